"""linear: the kernels against fp64, interpreted on the CPU and compiled on a GPU."""

from functools import partial

import pytest
import torch
from oracle import EXACT_PLACES, LINEAR_PLACES, assert_close, run_kernel, widened

from trimaran.kernels import linear as module
from trimaran.kernels import linear_configs
from trimaran.kernels.activations import ACTIVATIONS
from trimaran.kernels.compiler import compile_launch
from trimaran.kernels.contract import INTERPRETER, Device, Tensor
from trimaran.kernels.interpreter import interpret
from trimaran.kernels.linear import linear, linear_reference
from trimaran.kernels.plans import PlanCache, make_plan
from trimaran.kernels.sizes import contiguous_strides
from trimaran.torch_path.ops import TORCH_OPS

HOPPER = Device("cuda", 0, 90, 132, 227 * 1024)
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
run = partial(run_kernel, "linear")
NAMES = [port.name for port in linear.inputs]


@pytest.fixture(autouse=True)
def kernels_alone(request, monkeypatch):
    """The kernels are tested also where the vendor's are faster."""
    if "declined" not in request.node.name:
        monkeypatch.setattr(module, "left_to_vendor", lambda *_: None)


def draw(device, dtype, *shape, scale=1.0):
    generator = torch.Generator().manual_seed(sum(shape) + len(shape))
    return (torch.randn(*shape, generator=generator) * scale).to(device, dtype)


def tensors(device, dtype, shape, columns, *, bias=True, residual=False, transpose=False):
    """Inputs for x of `shape` and weights of so many columns; biases for all of them, or where `bias` lists them."""
    depth = shape[-1]
    columns = columns if isinstance(columns, tuple) else (columns,)
    biases = bias if isinstance(bias, tuple) else (bias,) * len(columns)
    found = {"x": draw(device, dtype, *shape)}
    for part, width, biased in zip(linear_configs.PARTS, columns, biases, strict=False):
        size = (depth, width) if transpose else (width, depth)
        found[f"weight{part}"] = draw(device, dtype, *size, scale=max(depth, 1) ** -0.5)
        found[f"bias{part}"] = draw(device, dtype, width) if biased else None
    if residual:
        found["residual"] = draw(device, dtype, *shape[:-1], sum(columns), scale=2.0)
    return [found.get(name) for name in NAMES]


def check(inputs, **attrs):
    inputs = [*inputs, *[None] * (len(NAMES) - len(inputs))]
    given = vars(linear.attributes(attrs))
    got = run(*inputs, **attrs)
    (exact,) = linear_reference(*map(widened, inputs), **given)
    (peer,) = linear_reference(*inputs, **given)
    assert_close(got, exact, peer)
    return got


@pytest.fixture
def tile(monkeypatch):
    """Plans take this row of the tables, whatever the sizes."""

    def choose(**config):
        monkeypatch.setattr(linear_configs, "HOPPER", [({}, config)])
        if "STAGES" not in config:  # a row of Hopper's alone
            monkeypatch.setattr(linear_configs, "CONFIGS", [({}, config)])
        monkeypatch.setattr(TORCH_OPS["linear"], "plans", PlanCache(linear))

    return choose


SMALL = {"BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_K": 32, "num_warps": 4, "num_stages": 2}
FEW = {"BLOCK_M": 16, "BLOCK_N": 64, "BLOCK_K": 64}
MANY = {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64, "STAGES": 3}
ON_HOPPER = {
    "few rows, the depth at once": {**FEW, "STAGES": 4},
    "few rows, in a ring": {**FEW, "STAGES": 2},
    "few rows, eight warps": {**FEW, "BLOCK_M": 128, "BLOCK_N": 128, "STAGES": 3, "num_warps": 8},
    "few rows, in parts": {**FEW, "STAGES": 1, "SPLIT": 3},
    "many rows, by turns": {**MANY, "REST_N": 64, "PINGPONG": 1},
    "many rows, together": {**MANY, "REST_N": 64, "PINGPONG": 0},
    "many rows, one product": {**MANY, "REST_N": 0, "PINGPONG": 1},
}


@pytest.mark.parametrize(("device", "dtype"), LINEAR_PLACES, ids=str)
@pytest.mark.parametrize("rows", [1, 5, 16, 100, 300])
def test_any_number_of_rows(device, dtype, rows):
    check(tensors(device, dtype, (rows, 72), 40, residual=True), activation="gelu")


@pytest.mark.parametrize(("device", "dtype"), LINEAR_PLACES, ids=str)
@pytest.mark.parametrize(("depth", "columns"), [(1, 1), (3, 5), (64, 1), (1, 64), (129, 257), (768, 96), (1024, 33)])
@pytest.mark.parametrize("transpose", [False, True])
def test_any_depth_and_width(device, dtype, depth, columns, transpose):
    inputs = tensors(device, dtype, (3, 7, depth), columns, residual=True, transpose=transpose)
    check(inputs, transpose_weight=transpose)


@pytest.mark.parametrize(("device", "dtype"), LINEAR_PLACES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("bias", [False, True])
def test_activations(device, dtype, activation, bias):
    check(tensors(device, dtype, (5, 64), 48, bias=bias), activation=activation)


@pytest.mark.parametrize(("device", "dtype"), EXACT_PLACES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_far_from_zero(device, dtype, activation):
    x, weight, *_ = tensors(device, dtype, (5, 64), 48, bias=False)
    check([x * 50, weight], activation=activation)
    check([x * 1e-3, weight], activation=activation)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("columns", [(40, 24), (48, 16, 16), (5, 33, 1)])
@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("bias", [True, False, (True, False, True), (False, True, False)])
def test_weights_side_by_side(device, columns, transpose, bias):
    inputs = tensors(device, torch.float16, (2, 21, 64), columns, bias=bias, residual=True, transpose=transpose)
    check(inputs, activation="silu", transpose_weight=transpose)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("depth", "split"),
    [
        (200, 3),
        (64, 5),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in ((64, 2), (64, 3), (200, 2), (200, 5))),
    ],
)
def test_a_depth_in_parts(device, tile, split, depth):
    tile(**SMALL, SPLIT=split)
    inputs = tensors(device, torch.float16, (2, 13, depth), 300, residual=True)
    check(inputs, activation="gelu_tanh")
    check([inputs[0], inputs[1]])


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ON_HOPPER)
@pytest.mark.parametrize("depth", [0, 16, 208, 256])
@pytest.mark.parametrize("columns", [80, (64, 16, 272)])
@pytest.mark.parametrize("transpose", [False, True])
def test_on_hopper(tile, kind, depth, columns, transpose):
    """The kernels that only Hopper has, which the interpreter cannot run."""
    tile(**ON_HOPPER[kind])
    for rows in (1, 21, 150):
        inputs = tensors("cuda", torch.float16, (rows, depth), columns, residual=True, transpose=transpose)
        check(inputs, activation="gelu", transpose_weight=transpose)
        bare = tensors("cuda", torch.bfloat16, (rows, depth), columns, bias=False, transpose=transpose)
        check(bare, transpose_weight=transpose)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ON_HOPPER)
def test_tiles_take_turns_on_hopper(tile, kind):
    """More tiles than a GPU has multiprocessors, and more than once around the ring."""
    tile(**ON_HOPPER[kind])
    inputs = tensors("cuda", torch.float16, (4000, 448), (400, 1040), residual=True)
    check(inputs, activation="gelu")
    constant = [t if t is None or i in (0, 3) else torch.nn.Parameter(t) for i, t in enumerate(inputs)]
    with torch.no_grad():
        assert torch.equal(run(*constant, activation="gelu"), run(*inputs, activation="gelu"))


@pytest.mark.parametrize("kind", ["few rows, in a ring", "many rows, by turns"])
@pytest.mark.parametrize("transpose", [False, True])
def test_compiles_for_hopper(tile, kind, transpose):
    tile(**ON_HOPPER[kind])
    weight, bias = matrix(64, 64), matrix(64)
    inputs = [matrix(40, 64), weight, bias, None, weight, None, weight, bias]
    (launch,) = make_plan(linear, inputs, linear.attributes({"transpose_weight": transpose}), HOPPER, (True,)).launches
    assert launch.kernel.fn.__name__ == ("linear_few_kernel" if "few" in kind else "linear_many_kernel")
    assert compile_launch(launch, 90).shared <= HOPPER.shared_memory


@pytest.mark.parametrize(("device", "dtype"), LINEAR_PLACES, ids=str)
def test_many_elements_have_pytorchs_own_error(device, dtype):
    check(tensors(device, dtype, (320, 384), 384, residual=True), activation="gelu")


@pytest.mark.parametrize(("device", "dtype"), EXACT_PLACES, ids=str)
@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8), (7,), (1, 1, 1, 8)])
def test_empty_and_odd_ranks(device, dtype, shape):
    assert check(tensors(device, dtype, shape, 12)).shape == (*shape[:-1], 12)


@pytest.mark.parametrize(("device", "dtype"), EXACT_PLACES, ids=str)
def test_nothing_to_sum_and_no_columns(device, dtype):
    ones = partial(torch.ones, device=device, dtype=dtype)
    assert torch.equal(run(ones(3, 0), ones(4, 0), ones(4)), ones(3, 4))
    assert run(ones(3, 8), ones(0, 8)).shape == (3, 0)


@pytest.mark.parametrize(("device", "dtype"), EXACT_PLACES, ids=str)
def test_rows_anywhere_in_memory(device, dtype):
    x, weight, bias, residual, *_ = tensors(device, dtype, (2, 6, 64), 48, residual=True)
    wide = torch.zeros(2, 6, 100, device=device, dtype=dtype)
    wide[..., 7:71] = x  # evenly spaced, and not aligned to 16 bytes
    large = torch.zeros(48, 90, device=device, dtype=dtype)
    large[:, 3:67] = weight
    check([wide[..., 7:71], large[:, 3:67], bias, residual.repeat(1, 1, 2)[..., 48:]])
    check([x[:, 0], weight, bias, residual[:, 1]])  # of each sequence the first
    check([x[:, :1].expand(2, 6, 64)[:1], weight, bias, None])


def declined(inputs, device=None, **attrs):
    padded = [*inputs, *[None] * (len(NAMES) - len(inputs))]
    return make_plan(linear, padded, linear.attributes(attrs), device or HOPPER, (True,)).declined


def matrix(*shape, strides=None, dtype="float16", **facts):
    return Tensor(dtype, shape, strides or contiguous_strides(shape), **facts)


def test_what_is_declined():
    x, weight, bias = matrix(4, 32), matrix(16, 32), matrix(16)
    assert declined([x, weight, bias]) is None
    assert declined([matrix(4, 32, strides=(1, 4)), weight]) == "the last dimension of x is not contiguous"
    assert declined([matrix(2, 3, 32, strides=(999, 32, 1)), weight]) == "the rows of x do not step evenly"
    assert declined([x, matrix(16, 32, strides=(1, 16))]) == "the rows of weight are not contiguous"
    assert declined([x, weight, bias, matrix(4, 16, strides=(1, 4))]).startswith("the last dimension of residual")
    assert declined([x, weight, matrix(16, strides=(2,))]) == "bias is not contiguous"
    assert declined([matrix(2**30 + 1, 32), weight]) == f"more than {2**30} rows"
    old = Device("cuda", 0, 75, 40, 64 * 1024)
    assert declined([x, weight], old) == "linear needs a GPU of compute capability 8.0, this one has 7.5"


def test_what_the_vendor_does_sooner_is_declined():
    x, weight, bias = matrix(4096, 768), matrix(768, 768), matrix(768)
    slower = "linear of these sizes is slower than the vendor's"
    assert declined([x, weight, bias]) == slower
    assert declined([x, weight, bias], activation="gelu") is None
    assert declined([x, weight, bias, x]) is None
    assert declined([x, weight, bias, None, weight, bias]) is None, "torch has no product of several weights"
    assert declined([matrix(128, 768), weight, bias]) is None
    assert declined([matrix(4096, 3072), matrix(768, 3072), bias, x]) is None
    inputs = [matrix(4, 32, dtype="float32"), matrix(16, 32, dtype="float32")]
    assert declined(inputs) == "linear in fp32 is slower than the vendor's"
    alone = Device("cuda", 0, 90, 132, 232448, fallback=False)
    assert declined(inputs, alone) == "linear in fp32 is slower than the vendor's"
    assert declined([x, weight, bias], alone) is None, "a node of ONNX Runtime has no second way"
    assert declined(inputs, INTERPRETER) is None


X, W = torch.ones(3, 8), torch.ones(4, 8)


@pytest.mark.parametrize(
    ("inputs", "attrs", "error", "message"),
    [
        ({"x": torch.tensor(1.0)}, {}, ValueError, r"x is a scalar, expected \[.., K\]"),
        ({"weight": torch.ones(4, 9)}, {}, ValueError, r"weight has shape \[4, 9\], expected \[N, K\] with K = 8"),
        ({"weight": torch.ones(8)}, {}, ValueError, r"weight has shape \[8\], expected \[N, K\]"),
        ({}, {"transpose_weight": True}, ValueError, r"weight has shape \[4, 8\], expected \[K, N\] with K = 8"),
        ({"bias": torch.ones(8)}, {}, ValueError, r"bias has shape \[8\], expected \[N\] as weight has = \[4\]"),
        ({"residual": torch.ones(4)}, {}, ValueError, r"residual has shape \[4\], expected the shape of out"),
        ({"bias_1": torch.ones(4)}, {}, ValueError, "bias_1 is given without weight_1"),
        ({"weight_2": W}, {}, ValueError, "weight_2 is given without weight_1"),
        ({"weight_1": torch.ones(4, 7)}, {}, ValueError, r"weight_1 has shape \[4, 7\]"),
        ({"weight_1": W, "bias_1": torch.ones(3)}, {}, ValueError, r"bias_1 has shape \[3\]"),
        ({"weight": W.half()}, {}, TypeError, "weight is float16, expected float32 as x is"),
        ({}, {"activation": "mish"}, ValueError, "activation is 'mish', expected one of none, relu"),
    ],
)
@pytest.mark.parametrize("interpreted", [False, True])
def test_wrong_inputs_are_refused(inputs, attrs, error, message, interpreted):
    given = {"x": X, "weight": W} | inputs
    with interpret(interpreted), pytest.raises(error, match=f"linear: {message}"):
        torch.ops.trimaran.linear(*(given.get(name) for name in NAMES), **attrs)


@pytest.mark.parametrize(("device", "dtype"), EXACT_PLACES, ids=str)
def test_nan_stays_in_its_row(device, dtype):
    inputs = tensors(device, dtype, (20, 40), 24)
    inputs[0][3, 7] = float("nan")
    got = run(*inputs, activation="relu")
    assert got.isnan().any(1).nonzero().flatten().tolist() == [3]
    assert got[3].isnan().all()


@pytest.mark.parametrize("device", DEVICES)
def test_same_input_same_bits(device, tile):
    tile(**SMALL, SPLIT=4)
    inputs = tensors(device, torch.float16, (20, 512), 48)
    first = run(*inputs)
    assert all(torch.equal(run(*inputs), first) for _ in range(3))


def test_only_constant_weights_are_read_early():
    x, weight, constant = matrix(4, 64), matrix(16, 64), matrix(16, 64, constant=True)
    for weights, early in (
        ((constant,), True),
        ((weight,), False),
        ((constant, None, None, weight), False),
        ((constant, None, None, constant), True),
    ):
        inputs = [x, *weights, *[None] * (7 - len(weights))]
        launch = make_plan(linear, inputs, linear.attributes({}), HOPPER, (True,)).launches[0]
        assert launch.constexprs["EARLY"] == early
        assert launch.constexprs["PDL"]
        assert launch.options["launch_pdl"]


def test_what_is_no_whole_vector_has_the_kernel_of_any_gpu():
    def kernel(*inputs, device=HOPPER, **attrs):
        padded = [*inputs, *[None] * (len(NAMES) - len(inputs))]
        return make_plan(linear, padded, linear.attributes(attrs), device, (True,)).launches[0].kernel.fn.__name__

    x, weight = matrix(4, 64), matrix(40, 64)
    assert kernel(x, weight) == kernel(x, matrix(33, 64)) == "linear_few_kernel"
    assert kernel(x, weight, device=Device("cuda", 0, 80, 108, 163 * 1024)) == "linear_kernel"
    assert kernel(matrix(4, 60), matrix(40, 60)) == "linear_kernel"
    assert kernel(matrix(4, 64, strides=(72, 1)), weight) == "linear_kernel"
    assert kernel(x, matrix(40, 64, strides=(72, 1))) == "linear_kernel"
    assert kernel(matrix(4, 64, aligned=False), weight) == "linear_kernel"
    assert kernel(x, weight, None, None, matrix(40, 64, aligned=False)) == "linear_kernel"
    assert kernel(x, matrix(64, 33), transpose_weight=True) == "linear_kernel"
