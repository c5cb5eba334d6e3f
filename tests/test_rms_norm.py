"""rms_norm: the kernel against fp64 and the models' own modules, interpreted on the CPU and compiled on a GPU."""

from functools import partial

import pytest
import torch
from oracle import assert_close, run_kernel, widened
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm
from transformers.models.t5.modeling_t5 import T5LayerNorm

from trimaran.kernels.compiler import compile_launch
from trimaran.kernels.contract import Device, Tensor
from trimaran.kernels.interpreter import interpret
from trimaran.kernels.norms import MAX_COLUMNS
from trimaran.kernels.plans import make_plan
from trimaran.kernels.rms_norm import rms_norm, rms_norm_reference
from trimaran.kernels.sizes import contiguous_strides

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
CASTS = ["torch", "llama", "gemma"]
run = partial(run_kernel, "rms_norm")


def tensors(device, dtype, shape, *, weight=True, residual=False, magnitude=1.0):
    generator = torch.Generator().manual_seed(sum(shape))

    def make(*size, scale=1.0, shift=0.0):
        return (torch.randn(*size, generator=generator) * scale + shift).to(device, dtype)

    return (
        make(*shape, scale=magnitude, shift=0.3 * magnitude),
        make(shape[-1]) if weight else None,
        make(*shape, scale=magnitude) if residual else None,
    )


def check(inputs, eps=1e-6, cast="torch", return_sum=False):
    got, summed = run(*inputs, eps=eps, cast=cast, return_sum=return_sum)
    peer, peer_sum = rms_norm_reference(*inputs, eps=eps, cast=cast)
    total = inputs[0] if peer_sum is None else peer_sum  # the norm is of the sum as the model rounds it
    exact, _ = rms_norm_reference(widened(total), widened(inputs[1]), None, eps=eps, cast=cast)
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
@pytest.mark.parametrize("cast", CASTS)
@pytest.mark.parametrize("columns", [32768, 40001, 65536])
def test_long_rows_with_a_residual(device, cast, columns):
    check(tensors(device, torch.float16, (2, columns), residual=True), cast=cast, return_sum=True)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("columns", [1, 3, 16, 60, 64, 200, 500, 768, pytest.param(2000, marks=pytest.mark.slow)])
def test_many_rows_share_a_program(device, columns):
    rows = 1027  # not a multiple of any tile
    check(tensors(device, torch.float16, (rows, columns), residual=True), return_sum=True)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cast", CASTS)
@pytest.mark.parametrize("return_sum", [False, True])
def test_residual(device, dtype, cast, return_sum):
    check(tensors(device, dtype, (2, 3, 100), residual=True), cast=cast, return_sum=return_sum)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("cast", CASTS)
def test_without_weight(device, cast):
    check(tensors(device, torch.float16, (4, 48), weight=False), cast=cast)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("cast", ["torch", "gemma"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("weight_dtype", DTYPES, ids=str)
def test_a_weight_of_another_dtype(device, cast, dtype, weight_dtype):
    x, weight, _ = tensors(device, dtype, (1030, 100))
    check((x, weight.to(weight_dtype), None), cast=cast)


MODULES = {
    "llama": (LlamaRMSNorm, "llama"),
    "t5": (T5LayerNorm, "llama"),
    "gemma": (GemmaRMSNorm, "gemma"),
    "gemma3": (Gemma3RMSNorm, "gemma"),
    "olmo2": (Olmo2RMSNorm, "torch"),
    "torch": (torch.nn.RMSNorm, "torch"),
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("dtype", "model"),
    [  # in bfloat16 one on the CPU by default: each takes the interpreter ten seconds
        pytest.param(dtype, model, marks=pytest.mark.slow if dtype == torch.bfloat16 and model != "llama" else ())
        for dtype in DTYPES
        for model in MODULES
    ],
    ids=str,
)
def test_what_models_compute(device, dtype, model):
    """The model's own module in eager: equal but for the last bit here and there, and not so in another cast mode."""
    kind, cast = MODULES[model]
    module = kind(256, eps=1e-6).to(device, dtype)
    x, weight, _ = tensors(device, dtype, (400, 256))
    module.weight.data.copy_(weight)
    peer = module(x).detach()
    got, _ = run(x, weight, eps=1e-6, cast=cast)
    exact, _ = rms_norm_reference(*map(widened, (x, weight)), None, eps=1e-6, cast=cast)
    assert_close(got, exact, peer)
    if dtype != torch.float32:
        other = {"llama": "torch", "torch": "llama", "gemma": "llama"}[cast]
        wrong, _ = run(x, weight, eps=1e-6, cast=other)
        differs, differs_wrong = ((t != peer).float().mean().item() for t in (got, wrong))
        assert differs < 0.01, f"{differs:.1%} of the elements differ from the model's"
        assert differs_wrong > 0.1


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cast", CASTS)
def test_many_elements_have_pytorchs_own_error(device, dtype, cast):
    check(tensors(device, dtype, (300, 384), residual=True), cast=cast)


@pytest.mark.parametrize("device", DEVICES)
def test_squares_that_no_half_could_hold(device):
    check(tensors(device, torch.float16, (64, 256), magnitude=1e4), cast="llama")


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
    check(inputs)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("repeat", [1, 100])
def test_rows_anywhere_in_memory(device, repeat):
    x, weight, residual = tensors(device, torch.float32, (2, 3, 4 * repeat, 64), residual=True)
    wide = torch.zeros(2, 3, 4 * repeat, 100, device=device)
    wide[..., 7:71] = x  # evenly spaced, and not aligned to 16 bytes
    check((wide[..., 7:71], weight, residual))
    check((x.transpose(1, 2), weight, residual.transpose(1, 2)), return_sum=True)  # Qwen3's norms of q and k
    check((x.permute(2, 1, 0, 3), weight, residual.permute(2, 1, 0, 3).contiguous()), return_sum=True)
    check((x[:, :2], weight, residual[:, :1].expand(2, 2, 4 * repeat, 64)), return_sum=True)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rows", [4, 1030])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_stays_in_its_row(device, rows, bad):
    x, *rest = tensors(device, torch.float32, (rows, 20))
    x[1, 3] = x[rows - 1, 19] = bad
    got, _ = run(x, *rest, eps=1e-5)
    assert got.isnan().any(1).nonzero().flatten().tolist() == [1, rows - 1]


@pytest.mark.parametrize("device", DEVICES)
def test_same_input_same_bits(device):
    inputs = tensors(device, torch.float16, (16, 384))
    first, _ = run(*inputs, eps=1e-5)
    assert all(torch.equal(run(*inputs, eps=1e-5)[0], first) for _ in range(3))


@pytest.mark.gpu
def test_offsets_beyond_32_bits():
    x = torch.randn(2**22 + 3, 512, device="cuda", dtype=torch.float16)  # 2**31 elements and more
    got, _ = run(x, None, None, eps=1e-5)
    exact = torch.nn.functional.rms_norm(x[-3:].double(), (512,), eps=1e-5)
    assert_close(got[-3:], exact, torch.nn.functional.rms_norm(x[-3:], (512,), eps=1e-5))


def test_rows_too_long_are_declined():
    with pytest.raises(AssertionError, match="rows of more than 65536 elements"):
        run(torch.randn(1, MAX_COLUMNS + 1), eps=1e-5)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.tensor(1.0)}, ValueError, "rms_norm: x is a scalar"),
        ({"weight": torch.ones(5)}, ValueError, r"weight has shape \[5\], expected \[N\] = \[8\]"),
        (
            {"residual": torch.ones(1, 8)},
            ValueError,
            r"residual has shape \[1, 8\], expected the shape of x = \[2, 8\]",
        ),
        ({"residual": torch.ones(2, 8).half()}, TypeError, "residual is float16, expected float32 as x is"),
        ({"weight": torch.ones(8).half()}, TypeError, "weight is float16, expected float32 as x is, for cast='llama'"),
        ({"x": torch.ones(2, 8).double()}, TypeError, "x is float64, expected float32 or float16 or bfloat16"),
        ({"cast": "t5"}, ValueError, "cast is 't5', expected one of torch, llama, gemma"),
    ],
)
@pytest.mark.parametrize("interpreted", [False, True])
def test_bad_inputs_are_named(change, error, message, interpreted):
    given = {"x": torch.ones(2, 8), "weight": torch.ones(8), "residual": None, "cast": "llama", **change}
    cast = given.pop("cast")
    with interpret(interpreted), pytest.raises(error, match=message):
        torch.ops.trimaran.rms_norm(*given.values(), eps=1e-5, cast=cast)


def test_the_sum_needs_a_residual():
    with interpret(), pytest.raises(ValueError, match="output sum is asked for"):
        torch.ops.trimaran.rms_norm(torch.ones(2, 8), eps=1e-5, return_sum=True)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("capability", [80, 86, 90, 120])
def test_every_tile_compiles(capability, dtype):
    device = Device("cuda", 0, capability, 100, 99 * 1024)
    for cast, rows, columns in (
        ("llama", 8, 768),
        ("gemma", 4096, 64),
        ("torch", 4096, 768),
        ("llama", 4096, 4096),
        ("llama", 64, 65536),
    ):
        x, weight = (Tensor(dtype, shape, contiguous_strides(shape)) for shape in ((rows, columns), (columns,)))
        attrs = rms_norm.attributes({"eps": 1e-5, "cast": cast})
        (launch,) = make_plan(rms_norm, [x, weight, x], attrs, device, (True, True)).launches
        binary = compile_launch(launch, capability)
        assert binary.cubin.startswith(b"\x7fELF")
        assert binary.shared <= 48 * 1024
