"""gated_linear: the kernel against fp64, interpreted on the CPU and compiled on a GPU."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from oracle import EXACT_PLACES, LINEAR_PLACES, assert_close, run_kernel, widened

from trimaran.kernels import gated_linear as module
from trimaran.kernels.activations import ACTIVATIONS
from trimaran.kernels.compiler import compile_launch
from trimaran.kernels.contract import Device, Tensor
from trimaran.kernels.gated_linear import gated_linear, gated_linear_reference
from trimaran.kernels.interpreter import interpret
from trimaran.kernels.plans import PlanCache, make_plan
from trimaran.kernels.sizes import contiguous_strides
from trimaran.torch_path.ops import TORCH_OPS

HOPPER = Device("cuda", 0, 90, 132, 227 * 1024)
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
run = partial(run_kernel, "gated_linear")
NAMES = [port.name for port in gated_linear.inputs]


@pytest.fixture(autouse=True)
def kernels_alone(request, monkeypatch):
    """The kernels are tested also where the vendor's are faster."""
    if "declined" not in request.node.name:
        monkeypatch.setattr(module, "left_to_vendor", lambda *_: None)


def tensors(device, dtype, shape, columns, *, chunked=False, bias=True, transpose=False):
    generator = torch.Generator().manual_seed(sum(shape) + columns)

    def make(*size, scale=1.0):
        return (torch.randn(*size, generator=generator) * scale).to(device, dtype)

    depth, width = shape[-1], columns * 2 if chunked else columns
    size = (depth, width) if transpose else (width, depth)
    scale = max(depth, 1) ** -0.5
    x, gate, gate_bias = make(*shape), make(*size, scale=scale), make(width)
    up, up_bias = (None, None) if chunked else (make(*size, scale=scale), make(width))
    return [x, gate, up, gate_bias if bias else None, up_bias if bias else None]


def check(inputs, activation="silu", **attrs):
    given = vars(gated_linear.attributes({"activation": activation, **attrs}))
    got = run(*inputs, activation=activation, **attrs)
    (exact,) = gated_linear_reference(*map(widened, inputs), **given)
    (peer,) = gated_linear_reference(*inputs, **given)
    assert_close(got, exact, peer)
    return got


@pytest.mark.parametrize(("device", "dtype"), LINEAR_PLACES, ids=str)
@pytest.mark.parametrize("shape", [(3, 64), (2, 5, 72), (100, 33), (300, 128)])
@pytest.mark.parametrize("chunked", [False, True])
def test_shapes(device, dtype, shape, chunked):
    check(tensors(device, dtype, shape, 40, chunked=chunked))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("gate", ["first", "second"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("columns", [24, 65])
def test_chunked_forms(device, transpose, gate, bias, columns):
    inputs = tensors(device, torch.float16, (7, 48), columns, chunked=True, bias=bias, transpose=transpose)
    check(inputs, "gelu", transpose_weight=transpose, gate=gate)


@pytest.mark.parametrize(("device", "dtype"), EXACT_PLACES, ids=str)
@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("present", [(True, False), (False, True)])
def test_one_bias(device, dtype, transpose, present):
    x, gate, up, *biases = tensors(device, dtype, (7, 48), 24, transpose=transpose)
    kept = [bias if here else None for bias, here in zip(biases, present, strict=True)]
    check([x, gate, up, *kept], transpose_weight=transpose)


@pytest.mark.parametrize(("device", "dtype"), EXACT_PLACES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(device, dtype, activation):
    check(tensors(device, dtype, (20, 64), 48), activation)


@pytest.mark.parametrize(("device", "dtype"), LINEAR_PLACES, ids=str)
def test_many_elements_have_pytorchs_own_error(device, dtype):
    check(tensors(device, dtype, (320, 256), 384, bias=False))


@pytest.mark.parametrize(("device", "dtype"), EXACT_PLACES, ids=str)
@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8), (7,)])
def test_empty_and_odd_ranks(device, dtype, shape):
    assert check(tensors(device, dtype, shape, 12)).shape == (*shape[:-1], 12)


ON_HOPPER = {
    "few rows, the depth at once": {"BLOCK_M": 16, "BLOCK_N": 64, "BLOCK_K": 64, "STAGES": 4},
    "few rows, in a ring": {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 64, "STAGES": 2},
    "many rows, together": {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64, "STAGES": 3, "PINGPONG": 0},
    "many rows, by turns": {"BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_K": 64, "STAGES": 3, "PINGPONG": 1},
}


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ON_HOPPER)
@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("depth", [16, 208])
def test_on_hopper(monkeypatch, kind, transpose, chunked, depth):
    """The kernels that only Hopper has, which the interpreter cannot run."""
    monkeypatch.setattr(module, "HOPPER", [({}, ON_HOPPER[kind])])
    monkeypatch.setattr(TORCH_OPS["gated_linear"], "plans", PlanCache(gated_linear))
    for rows, columns in ((21, 80), (150, 272), (4000, 1040)):
        inputs = tensors("cuda", torch.float16, (rows, depth), columns, chunked=chunked, transpose=transpose)
        check(inputs, transpose_weight=transpose)


def kernel(*inputs, device=HOPPER):
    padded = [*inputs, *[None] * (len(NAMES) - len(inputs))]
    attrs = gated_linear.attributes({"activation": "silu"})
    return make_plan(gated_linear, padded, attrs, device, (True,)).launches[0]


def test_which_kernel():
    weight = matrix(512, 64)
    for x, weights, name in (
        (matrix(4, 64), (weight, weight), "gated_linear_few_kernel"),
        (matrix(4096, 64), (weight, weight), "gated_linear_many_kernel"),
        (matrix(4096, 60), (matrix(512, 60),), "gated_linear_kernel"),
        (matrix(4096, 64, aligned=False), (weight,), "gated_linear_kernel"),
    ):
        assert kernel(x, *weights).kernel.fn.__name__ == name
    assert kernel(matrix(4, 64), weight, device=Device("cuda", 0, 80, 108, 163 * 1024)).kernel.fn.__name__ == (
        "gated_linear_kernel"
    )


@pytest.mark.parametrize("rows", [4, 4096])
def test_compiles_for_hopper(rows):
    launch = kernel(matrix(rows, 64), matrix(512, 64))
    assert compile_launch(launch, 90).shared <= HOPPER.shared_memory


def reason(inputs, device=None):
    padded = [*inputs, *[None] * (len(NAMES) - len(inputs))]
    return make_plan(
        gated_linear, padded, gated_linear.attributes({"activation": "silu"}), device or HOPPER, (True,)
    ).declined


def matrix(*shape, strides=None, **facts):
    return Tensor("float16", shape, strides or contiguous_strides(shape), **facts)


def test_what_is_declined():
    x, weight = matrix(4, 32), matrix(16, 32)
    assert reason([x, weight, weight]) is None
    assert reason([matrix(4, 32, strides=(1, 4)), weight]) == "the last dimension of x is not contiguous"
    assert reason([x, matrix(16, 32, strides=(1, 16))]) == "the rows of gate_weight are not contiguous"
    assert reason([x, weight, matrix(16, 32, strides=(1, 16))]) == "the rows of up_weight are not contiguous"
    assert reason([x, weight, weight, None, matrix(16, strides=(2,))]) == "up_bias is not contiguous"
    fp32 = [replace(tensor, dtype="float32") for tensor in (x, weight, weight)]
    assert reason(fp32) == "gated_linear in fp32 is slower than the vendor's"
    assert reason([x, weight], Device("cuda", 0, 75, 40, 64 * 1024)).startswith("gated_linear needs a GPU of compute")


X, W = torch.ones(3, 8), torch.ones(4, 8)


@pytest.mark.parametrize(
    ("inputs", "attrs", "error", "message"),
    [
        ({"x": torch.tensor(1.0)}, {}, ValueError, r"x is a scalar, expected \[.., K\]"),
        ({"gate_weight": torch.ones(4, 9)}, {}, ValueError, r"gate_weight has shape \[4, 9\], expected \[N, K\]"),
        (
            {"up_weight": torch.ones(5, 8)},
            {},
            ValueError,
            r"up_weight has shape \[5, 8\], expected the shape of gate_w",
        ),
        ({"up_weight": torch.ones(4, 7)}, {}, ValueError, r"up_weight has shape \[4, 7\], expected \[N, K\]"),
        ({"gate_bias": torch.ones(8)}, {}, ValueError, r"gate_bias has shape \[8\], expected \[N\]"),
        ({"up_weight": W, "up_bias": torch.ones(8)}, {}, ValueError, r"up_bias has shape \[8\], expected \[N\]"),
        ({"up_bias": torch.ones(4)}, {}, ValueError, "up_bias is given without up_weight"),
        ({"gate_weight": torch.ones(5, 8)}, {}, ValueError, r"gate_weight has shape \[5, 8\], expected an even N"),
        ({}, {"gate": "third"}, ValueError, "gate is 'third', expected one of first, second"),
        ({"up_weight": W.half()}, {}, TypeError, "up_weight is float16, expected float32 as x is"),
    ],
)
@pytest.mark.parametrize("interpreted", [False, True])
def test_wrong_inputs_are_refused(inputs, attrs, error, message, interpreted):
    given = {"x": X, "gate_weight": W} | inputs
    with interpret(interpreted), pytest.raises(error, match=f"gated_linear: {message}"):
        torch.ops.trimaran.gated_linear(*(given.get(name) for name in NAMES), activation="silu", **attrs)
