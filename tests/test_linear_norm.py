"""linear_norm: the kernels against fp64, interpreted on the CPU and compiled on a GPU."""

from functools import partial

import pytest
import torch
from oracle import EXACT_PLACES, LINEAR_PLACES, assert_close, run_kernel, widened

from trimaran.kernels import linear_configs
from trimaran.kernels import linear_norm as module
from trimaran.kernels.contract import Device, Tensor
from trimaran.kernels.interpreter import interpret
from trimaran.kernels.linear_norm import linear_norm, linear_norm_reference
from trimaran.kernels.plans import PlanCache, make_plan
from trimaran.kernels.sizes import contiguous_strides
from trimaran.torch_path.ops import TORCH_OPS

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
run = partial(run_kernel, "linear_norm")
NAMES = [port.name for port in linear_norm.inputs]
TILE = {"SPLIT": 3, "BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_K": 32, "num_warps": 4, "num_stages": 2}
JOINED_ROWS = {"joined": module.JOINED_ROWS, "one after the other": 0}


@pytest.fixture(autouse=True)
def kernels_alone(request, monkeypatch):
    """The kernels are tested also where the vendor's are faster."""
    if "declined" not in request.node.name:
        monkeypatch.setattr(module, "left_to_vendor", lambda *_: None)


@pytest.fixture(params=JOINED_ROWS)
def table(request, monkeypatch):
    monkeypatch.setattr(module, "JOINED_ROWS", JOINED_ROWS[request.param])
    monkeypatch.setattr(linear_configs, "CONFIGS", [({}, TILE)])
    monkeypatch.setattr(TORCH_OPS["linear_norm"], "plans", PlanCache(linear_norm))
    return request.param


def tensors(device, dtype, shape, columns, *, bias=True, residual=True, weight=True, norm_bias=True, transpose=False):
    generator = torch.Generator().manual_seed(sum(shape) + columns)

    def make(*size, scale=1.0, shift=0.0):
        return (torch.randn(*size, generator=generator) * scale + shift).to(device, dtype)

    depth = shape[-1]
    return [
        make(*shape),
        make(*((depth, columns) if transpose else (columns, depth)), scale=depth**-0.5),
        make(columns) if bias else None,
        make(*shape[:-1], columns, shift=0.5) if residual else None,
        make(columns, shift=1.0) if weight else None,
        make(columns) if norm_bias else None,
    ]


def check(inputs, norm="layer", return_sum=True, **attrs):
    given = vars(linear_norm.attributes({"eps": 1e-5, "norm": norm, **attrs}))
    y, total = run(*inputs, eps=1e-5, norm=norm, return_sum=return_sum, **attrs)
    exact, exact_sum = linear_norm_reference(*map(widened, inputs), **given)
    peer, peer_sum = linear_norm_reference(*inputs, **given)
    assert_close(y, exact, peer)
    assert (total is not None) == return_sum
    if return_sum:
        assert_close(total, exact_sum, peer_sum)
    return y, total


@pytest.mark.parametrize(("device", "dtype"), LINEAR_PLACES, ids=str)
@pytest.mark.parametrize("shape", [(1, 64), (2, 5, 72), (40, 200)])
@pytest.mark.parametrize("columns", [1, 48, 130])
def test_shapes(device, dtype, shape, columns, table):
    check(tensors(device, dtype, shape, columns))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("cast", ["torch", "llama", "gemma"])
@pytest.mark.parametrize("residual", [False, True])
def test_rms(device, cast, residual, table):
    inputs = tensors(device, torch.float16, (9, 64), 96, residual=residual, norm_bias=False)
    check(inputs, "rms", cast=cast)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize("residual", [False, True])
def test_under_autocast(device, dtype, norm, residual, table):
    """The layer in half precision, everything after it in fp32."""
    inputs = tensors(device, torch.float32, (9, 64), 96, residual=residual, norm_bias=norm == "layer")
    inputs[:3] = (tensor.to(dtype) for tensor in inputs[:3])
    y, total = check(inputs, norm)
    assert y.dtype == total.dtype == torch.float32


@pytest.mark.parametrize(("device", "dtype"), EXACT_PLACES, ids=str)
@pytest.mark.parametrize("absent", ["bias", "residual", "weight", "norm_bias"])
@pytest.mark.parametrize("return_sum", [False, True])
def test_without(device, dtype, absent, return_sum, table):
    check(tensors(device, dtype, (9, 64), 96, **{absent: False}), return_sum=return_sum)


@pytest.mark.parametrize("device", DEVICES)
def test_transposed_weight(device, table):
    check(tensors(device, torch.float16, (9, 64), 96, transpose=True), transpose_weight=True)


@pytest.mark.parametrize(
    ("device", "dtype"),
    [
        ("cpu", torch.float16),
        pytest.param("cpu", torch.bfloat16, marks=pytest.mark.slow),  # a minute in the interpreter
        *LINEAR_PLACES[3:],
    ],
    ids=str,
)
def test_many_elements_have_pytorchs_own_error(device, dtype, table):
    check(tensors(device, dtype, (280, 96), 384), return_sum=False)


@pytest.mark.parametrize("device", DEVICES)
def test_the_norm_is_of_the_sum_that_is_returned(device, table):
    inputs = tensors(device, torch.bfloat16, (9, 64), 96)
    y, total = run(*inputs, eps=1e-5, norm="layer", return_sum=True)
    exact = torch.nn.functional.layer_norm(total.double(), (96,), inputs[4].double(), inputs[5].double(), 1e-5)
    peer = torch.nn.functional.layer_norm(total, (96,), inputs[4], inputs[5], 1e-5)
    assert_close(y, exact, peer)


@pytest.mark.parametrize(("device", "dtype"), EXACT_PLACES, ids=str)
@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8), (7,)])
def test_empty_and_odd_ranks(device, dtype, shape, table):
    y, total = check(tensors(device, dtype, shape, 12))
    assert y.shape == total.shape == (*shape[:-1], 12)


@pytest.mark.parametrize(("device", "dtype"), EXACT_PLACES, ids=str)
def test_a_spaced_residual(device, dtype, table):
    x, weight, bias, residual, *rest = tensors(device, dtype, (6, 64), 48)
    wide = torch.zeros(6, 100, device=device, dtype=dtype)
    wide[:, 5:53] = residual
    check([x, weight, bias, wide[:, 5:53], *rest])


def test_other_dtypes_do_not_mix():
    inputs = [t.half() for t in tensors("cpu", torch.float32, (9, 64), 96)]
    inputs[3:] = (t.bfloat16() for t in inputs[3:])
    with pytest.raises(TypeError, match="residual and norm are bfloat16, expected float16 as x is, or float32"):
        torch.ops.trimaran.linear_norm(*inputs, eps=1e-5, norm="layer")


def planned(shape, columns, dtype="float16", **facts):
    def matrix(*size):
        return Tensor(dtype, size, contiguous_strides(size), **facts)

    inputs = [matrix(*shape), matrix(columns, shape[-1]), None, matrix(*shape[:-1], columns), None, None]
    attrs = linear_norm.attributes({"eps": 1e-5, "norm": "layer"})
    return make_plan(linear_norm, inputs, attrs, Device("cuda", 0, 90, 132, 227 * 1024), (True, False))


def test_few_rows_are_summed_where_they_are_normalized():
    names = [launch.kernel.fn.__name__ for launch in planned((16, 3072), 768).launches]
    assert names == ["linear_few_kernel", "sum_norm_kernel"]
    names = [launch.kernel.fn.__name__ for launch in planned((4096, 3072), 768).launches]
    assert names[-1] == "layer_norm_kernel"
    assert len(planned((16, 3072), 768).scratch) == 1
    assert len(planned((4096, 3072), 768).scratch) == 1, "the sum, which is not asked for"


def test_what_is_declined():
    assert planned((16, 3072), 768, "float32").declined == "linear_norm in fp32 is slower than the vendor's"
    assert planned((16, 3072), 768).declined is None
    assert planned((16384, 768), 768).declined is None


X, W, V = torch.ones(3, 8), torch.ones(4, 8), torch.ones(5)


@pytest.mark.parametrize(
    ("inputs", "attrs", "message"),
    [
        ({"x": torch.tensor(1.0)}, {}, r"x is a scalar, expected \[.., K\]"),
        ({"weight": torch.ones(4, 9)}, {}, r"weight has shape \[4, 9\], expected \[N, K\] with K = 8"),
        ({"bias": V}, {}, r"bias has shape \[5\], expected \[N\] as weight has = \[4\]"),
        ({"norm_weight": V}, {}, r"norm_weight has shape \[5\]"),
        ({"norm_bias": V}, {}, r"norm_bias has shape \[5\]"),
        ({"residual": torch.ones(3, 5)}, {}, r"residual has shape \[3, 5\], expected the shape of y"),
        ({"norm_bias": torch.ones(4)}, {"norm": "rms"}, "norm_bias is given, expected none for norm='rms'"),
        ({}, {"cast": "llama"}, "cast is 'llama', expected 'torch' for norm='layer'"),
        ({}, {"norm": "batch"}, "norm is 'batch', expected one of layer, rms"),
    ],
)
@pytest.mark.parametrize("interpreted", [False, True])
def test_wrong_inputs_are_refused(inputs, attrs, message, interpreted):
    given = {"x": X, "weight": W} | inputs
    with interpret(interpreted), pytest.raises(ValueError, match=f"linear_norm: {message}"):
        torch.ops.trimaran.linear_norm(*(given.get(name) for name in NAMES), **({"eps": 1e-5, "norm": "layer"} | attrs))
