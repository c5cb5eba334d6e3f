"""layer_norm: the kernel against fp64, interpreted on the CPU and compiled on a GPU."""

from functools import partial

import pytest
import torch
from oracle import assert_close, run_kernel, widened

from trimaran.kernels.compiler import compile_launch
from trimaran.kernels.contract import Device, Tensor
from trimaran.kernels.interpreter import interpret
from trimaran.kernels.layer_norm import layer_norm, layer_norm_reference
from trimaran.kernels.norms import MAX_COLUMNS, MAX_ROWS
from trimaran.kernels.plans import make_plan
from trimaran.kernels.sizes import contiguous_strides

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
run = partial(run_kernel, "layer_norm")


def tensors(device, dtype, shape, *, weight=True, bias=True, residual=False, magnitude=1.0):
    generator = torch.Generator().manual_seed(sum(shape))

    def make(*size, scale=1.0, shift=0.0):
        return (torch.randn(*size, generator=generator) * scale + shift).to(device, dtype)

    columns = shape[-1]
    return (
        make(*shape, scale=magnitude, shift=0.3 * magnitude),
        make(columns) if weight else None,
        make(columns) if bias else None,
        make(*shape, scale=magnitude) if residual else None,
    )


def check(inputs, eps=1e-5, return_sum=False):
    got, summed = run(*inputs, eps=eps, return_sum=return_sum)
    peer, peer_sum = layer_norm_reference(*inputs, eps=eps)
    total = inputs[0] if peer_sum is None else peer_sum  # the norm is of the sum as the model rounds it
    exact, _ = layer_norm_reference(*map(widened, (total, *inputs[1:3])), None, eps=eps)
    assert_close(got, exact, peer)
    assert (summed is not None) == return_sum
    if return_sum:
        assert torch.equal(summed, peer_sum)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("columns", [1, 3, 16, 100, 384, 1000, 5000, 32768, 40001, 65536])
def test_rows_of_any_length(device, dtype, columns):
    check(tensors(device, dtype, (5 if columns < 10000 else 2, columns)))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("columns", [32768, 40001, 65536])
def test_long_rows_with_a_residual(device, columns):
    check(tensors(device, torch.float16, (2, columns), residual=True), return_sum=True)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("columns", [1, 3, 16, 60, 64, 200, 500, 768, pytest.param(2000, marks=pytest.mark.slow)])
def test_many_rows_share_a_program(device, columns):
    rows = 1027  # not a multiple of any tile
    check(tensors(device, torch.float16, (rows, columns), residual=True), return_sum=True)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("return_sum", [False, True])
def test_residual(device, dtype, return_sum):
    check(tensors(device, dtype, (2, 3, 100), residual=True), return_sum=return_sum)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("weight", "bias"), [(False, False), (True, False), (False, True)])
def test_without_weight_or_bias(device, weight, bias):
    check(tensors(device, torch.float32, (4, 48), weight=weight, bias=bias))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_many_elements_have_pytorchs_own_error(device, dtype):
    check(tensors(device, dtype, (300, 384), residual=True))


@pytest.mark.parametrize("device", DEVICES)
def test_large_values_far_from_zero(device):
    check(tensors(device, torch.float32, (64, 256), magnitude=1e4))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("eps", [1e-12, 1e-5, 1.0])
def test_eps_is_the_models_own(device, eps):
    x, *rest = tensors(device, torch.float32, (3, 32))
    check((x * 1e-4, *rest), eps=eps)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", [(0, 8), (3, 0), (2, 0, 8), (7,), (1, 1, 1, 5)])
def test_empty_and_odd_ranks(device, shape):
    inputs = tensors(device, torch.float32, shape)
    got, _ = run(*inputs, eps=1e-5)
    assert got.shape == shape
    assert torch.equal(got, torch.nn.functional.layer_norm(*inputs[:1], shape[-1:], *inputs[1:3])) or got.numel()


@pytest.mark.parametrize("device", DEVICES)
def test_rows_anywhere_in_memory(device):
    x, weight, bias, residual = tensors(device, torch.float32, (2, 3, 64), residual=True)
    wide = torch.zeros(2, 3, 100, device=device)
    wide[..., 7:71] = x  # evenly spaced, and not aligned to 16 bytes
    check((wide[..., 7:71], weight, bias, residual))
    check((x[:, 1:2].expand(2, 3, 64)[:, :1], weight, bias, None))


UNEVEN = {
    "every other of every other": lambda x: x[:, :2],  # of [2, 3, 4, 64]
    "transposed": lambda x: x[0].transpose(0, 1),
    "transposed, 4-D": lambda x: x.transpose(1, 2),
    "reversed dimensions": lambda x: x.permute(2, 1, 0, 3),
    "broadcast": lambda x: x[:, :1, :, :].expand(2, 3, 4, 64),
    "part of a row": lambda x: x[:, ::2, 1:, 3:40],
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("columns", [96, 768, 5000])
def test_addresses_that_are_not_aligned(device, dtype, columns):
    """Each tensor starts one element into its storage."""
    inputs = []
    for tensor in tensors(device, dtype, (3, columns), residual=True):
        storage = torch.empty(tensor.numel() + 1, dtype=dtype, device=device)
        inputs.append(storage[1:].view(tensor.shape).copy_(tensor))
        assert inputs[-1].data_ptr() % 16
    check(inputs, return_sum=True)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", UNEVEN)
@pytest.mark.parametrize("repeat", [1, 100])
def test_rows_that_do_not_step_evenly(device, case, repeat):
    x, weight, bias, residual = tensors(device, torch.float32, (2, 3, 4 * repeat, 64), residual=True)
    if case == "broadcast":
        x, residual = x[:, :, :4], residual[:, :, :4]
    view = UNEVEN[case]
    columns = view(x).shape[-1]
    rest = (weight[:columns], bias[:columns])
    check((view(x), *rest, view(residual)), return_sum=True)
    check((view(x), *rest, view(residual).contiguous()), return_sum=True)
    check((view(x).contiguous(), *rest, view(residual)), return_sum=True)


def reason_for_declining(inputs):
    plan = make_plan(
        layer_norm, inputs, layer_norm.attributes({"eps": 1e-5}), Device("cuda", 0, 90, 132), (True, False)
    )
    return plan.declined


def test_rows_that_are_declined():
    nothing = [None, None, None]
    x = Tensor("float16", (2, 3, 2, 3, 8), (1000, 2, 300, 40, 1))
    assert reason_for_declining([x, *nothing]) == "rows that are spaced over more than 3 dimensions"
    x = Tensor("float16", (2, 3, 8), (24, 1, 3))
    assert reason_for_declining([x, *nothing]) == "the last dimension of x is not contiguous"
    x, weight = Tensor("float16", (2, 8), (8, 1)), Tensor("float16", (8,), (2,))
    assert reason_for_declining([x, weight, None, None]) == "the last dimension of weight is not contiguous"
    x = Tensor("float16", (MAX_ROWS + 1, 8), (8, 1))
    assert reason_for_declining([x, *nothing]) == f"more than {MAX_ROWS} rows"


@pytest.mark.parametrize("device", DEVICES)
def test_nan_stays_in_its_row(device):
    x, *rest = tensors(device, torch.float32, (4, 20))
    x[1, 3] = float("nan")
    got, _ = run(x, *rest, eps=1e-5)
    assert got[1].isnan().all()
    assert not got[[0, 2, 3]].isnan().any()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_stays_in_its_row_of_a_tile(device, bad):
    x, *rest = tensors(device, torch.float32, (1030, 20))
    x[5, 3] = x[1029, 19] = bad
    got, _ = run(x, *rest, eps=1e-5)
    assert got.isnan().any(1).nonzero().flatten().tolist() == [5, 1029]
    assert got[[5, 1029]].isnan().all()


@pytest.mark.parametrize("device", DEVICES)
def test_same_input_same_bits(device):
    inputs = tensors(device, torch.float16, (16, 384))
    first, _ = run(*inputs, eps=1e-5)
    assert all(torch.equal(run(*inputs, eps=1e-5)[0], first) for _ in range(3))


@pytest.mark.gpu
def test_offsets_beyond_32_bits():
    x = torch.randn(2**22 + 3, 512, device="cuda", dtype=torch.float16)  # 2**31 elements and more
    got, _ = run(x, None, None, None, eps=1e-5)
    exact = torch.nn.functional.layer_norm(x[-3:].double(), (512,))
    assert_close(got[-3:], exact, torch.nn.functional.layer_norm(x[-3:], (512,)))


def test_rows_too_long_for_registers_are_declined():
    x = torch.randn(1, MAX_COLUMNS + 1)
    with pytest.raises(AssertionError, match="rows of more than 65536 elements"):
        run(x, eps=1e-5)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.tensor(1.0)}, ValueError, "x is a scalar"),
        ({"weight": torch.ones(5)}, ValueError, r"weight has shape \[5\], expected \[N\] = \[8\]"),
        ({"bias": torch.ones(2, 4)}, ValueError, r"bias has shape \[2, 4\]"),
        (
            {"residual": torch.ones(1, 8)},
            ValueError,
            r"residual has shape \[1, 8\], expected the shape of x = \[2, 8\]",
        ),
        ({"weight": torch.ones(8).half()}, TypeError, "weight is float16, expected float32 as x is"),
        ({"x": torch.ones(2, 8).double()}, TypeError, "x is float64, expected float32 or float16 or bfloat16"),
    ],
)
@pytest.mark.parametrize("interpreted", [False, True])
def test_bad_inputs_are_named(change, error, message, interpreted):
    inputs = {"x": torch.ones(2, 8), "weight": torch.ones(8), "bias": None, "residual": None, **change}
    with interpret(interpreted), pytest.raises(error, match=message):
        torch.ops.trimaran.layer_norm(*inputs.values(), eps=1e-5)


def test_the_sum_needs_a_residual():
    with interpret(), pytest.raises(ValueError, match="output sum is asked for"):
        torch.ops.trimaran.layer_norm(torch.ones(2, 8), eps=1e-5, return_sum=True)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("capability", [80, 86, 90, 120])
def test_every_tile_compiles(capability, dtype):
    device = Device("cuda", 0, capability, 100, 99 * 1024)
    for rows, columns in ((8, 768), (4096, 64), (4096, 768), (4096, 4096), (64, 65536)):
        x, weight = (Tensor(dtype, shape, contiguous_strides(shape)) for shape in ((rows, columns), (columns,)))
        attrs = layer_norm.attributes({"eps": 1e-5})
        (launch,) = make_plan(layer_norm, [x, weight, weight, x], attrs, device, (True, True)).launches
        binary = compile_launch(launch, capability)
        assert binary.cubin.startswith(b"\x7fELF")
        assert binary.shared <= 48 * 1024


def test_the_declaration_is_complete():
    assert [port.name for port in layer_norm.inputs] == ["x", "weight", "bias", "residual"]
    assert torch.ops.trimaran.layer_norm.default._schema.arguments[-1].name == "return_sum"
