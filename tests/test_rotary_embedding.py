"""rotary_embedding: the kernel against fp64, interpreted on the CPU and compiled on a GPU."""

from functools import partial

import pytest
import torch
from oracle import assert_close, run_kernel, widened

from trimaran.kernels.contract import Device, Tensor
from trimaran.kernels.interpreter import interpret
from trimaran.kernels.plans import make_plan
from trimaran.kernels.rotary_embedding import rotary_embedding, rotary_embedding_reference
from trimaran.kernels.sizes import contiguous_strides

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
run = partial(run_kernel, "rotary_embedding")
NAMES = [port.name for port in rotary_embedding.inputs]


def draw(device, dtype, *shape):
    generator = torch.Generator().manual_seed(sum(shape) + len(shape))
    return torch.randn(*shape, generator=generator).to(device, dtype)


def angles(device, dtype, rows, width, *, full=True, interleaved=False, batch=None):
    """cos and sin [.., rows, width] or, not full, half as wide."""
    place = torch.arange(rows * (batch or 1)).view(*((batch,) if batch else ()), rows, 1).double()
    angle = place * 10000.0 ** (-torch.arange(width // 2).double() / max(1, width // 2))
    if full:
        angle = angle.repeat_interleave(2, -1) if interleaved else torch.cat([angle, angle], -1)
    return angle.cos().to(device, dtype), angle.sin().to(device, dtype)


def check(q, cos, sin, k=None, positions=None, **attrs):
    inputs = (q, cos, sin, k, positions)
    given = vars(rotary_embedding.attributes(attrs))
    got = run(*inputs, return_k_out=k is not None, **attrs)
    exact = rotary_embedding_reference(*map(widened, inputs), **given)
    peer = rotary_embedding_reference(*inputs, **given)
    for mine, right, same_dtype in zip(got, exact, peer, strict=True):
        assert (mine is None) == (right is None)
        if mine is not None:
            assert_close(mine, right, same_dtype)
    return got


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("rotary_dim", [0, 8, 20])
def test_styles(device, dtype, interleaved, full, rotary_dim):
    q, k = draw(device, dtype, 2, 4, 37, 24), draw(device, dtype, 2, 2, 37, 24)
    cos, sin = angles(device, dtype, 37, rotary_dim or 24, full=full, interleaved=interleaved, batch=1)
    check(q, cos, sin, k, interleaved=interleaved, rotary_dim=rotary_dim)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (4, 1)])
def test_layouts(device, interleaved, heads):
    count, kv = heads
    cos, sin = angles(device, torch.float16, 9, 16, interleaved=interleaved)
    attrs = {"interleaved": interleaved, "num_heads": count, "kv_num_heads": kv}
    q, k = draw(device, torch.float16, 3, 9, count * 16), draw(device, torch.float16, 3, 9, kv * 16)
    rows = check(q, cos, sin, k, **attrs)
    four = check(
        q.unflatten(-1, (count, 16)).transpose(1, 2),
        cos,
        sin,
        k.unflatten(-1, (kv, 16)).transpose(1, 2),
        interleaved=interleaved,
    )
    v = draw(device, torch.float16, 3, 9, kv * 16) + float("inf")
    packed, none = check(torch.cat([q, k, torch.nan_to_num(v)], -1), cos, sin, packed=True, **attrs)
    assert none is None
    for mine, same in zip(rows, four, strict=True):
        assert torch.equal(mine, same.transpose(1, 2).flatten(2))
    assert torch.equal(packed, torch.cat([*rows, torch.nan_to_num(v)], -1))


@pytest.mark.parametrize("device", DEVICES)
def test_v_of_a_packed_input_is_copied_whatever_it_holds(device):
    cos, sin = angles(device, torch.float32, 5, 8)
    packed = draw(device, torch.float32, 1, 5, 3 * 8)
    packed[..., 16] = float("inf")
    packed[..., 20] = float("nan")
    got, _ = run(packed, cos, sin, num_heads=1, packed=True)
    assert torch.equal(got[..., 16:].nan_to_num(7.0), packed[..., 16:].nan_to_num(7.0))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("batch", [1, 3])
def test_positions(device, interleaved, full, batch):
    q, k = draw(device, torch.float16, 3, 2, 6, 16), draw(device, torch.float16, 3, 2, 6, 16)
    cos, sin = angles(device, torch.float16, 50, 16, full=full, interleaved=interleaved)
    positions = torch.tensor([[0, 49, 3, 7, 7, 2], [5, 6, 7, 8, 9, 10], [1, 1, 1, 40, 41, 42]])[:batch].to(device)
    check(q, cos, sin, k, positions, interleaved=interleaved)


@pytest.mark.parametrize("device", DEVICES)
def test_a_position_outside_the_table_is_nan(device):
    q = draw(device, torch.float32, 1, 2, 4, 8)
    cos, sin = angles(device, torch.float32, 10, 8)
    got, _ = run(q, cos, sin, None, torch.tensor([[0, 10, -1, 9]], device=device))
    assert got.isnan().all(-1).all(1).tolist() == [[False, True, True, False]]
    assert not got[:, :, [0, 3]].isnan().any()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_cos_in_fp32_for_halves(device, dtype):
    q = draw(device, dtype, 2, 4, 100, 64)
    cos, sin = angles(device, torch.float32, 100, 64, batch=2)
    check(q, cos, sin, q * 2)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_many_elements_have_pytorchs_own_error(device, dtype):
    q = draw(device, dtype, 2, 8, 128, 64)
    check(q, *angles(device, dtype, 128, 64), q + 1)


@pytest.mark.parametrize("device", DEVICES)
def test_q_alone_and_k_not_asked_for(device):
    q = draw(device, torch.float32, 2, 4, 5, 8)
    cos, sin = angles(device, torch.float32, 5, 8)
    alone, _ = check(q, cos, sin)
    got, none = run(q, cos, sin, q * 2)
    assert none is None
    assert torch.equal(got, alone)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", [(0, 2, 5, 8), (2, 0, 5, 8), (2, 2, 0, 8), (1, 1, 1, 2)])
def test_empty_and_small(device, shape):
    q = draw(device, torch.float32, *shape)
    got, _ = check(q, *angles(device, torch.float32, shape[2], shape[3]))
    assert got.shape == shape


@pytest.mark.parametrize("device", DEVICES)
def test_strided_inputs(device):
    packed = draw(device, torch.float32, 2, 7, 3 * 4 * 16)
    q, k, _ = (t.unflatten(-1, (4, 16)).transpose(1, 2) for t in packed.chunk(3, -1))
    cos, sin = (t[:, ::2] for t in angles(device, torch.float32, 14, 16, batch=2))
    check(q, cos, sin, k[:, ::2])
    positions = torch.arange(28, device=device).view(2, 14)[:, ::2]
    table = angles(device, torch.float32, 30, 16)
    check(q, *table, k, positions)


def declined(**change):
    def tensor(*shape, dtype="float16", strides=None):
        return Tensor(dtype, shape, strides or contiguous_strides(shape))

    given = {"q": tensor(2, 4, 8, 16), "cos": tensor(8, 16), "sin": tensor(8, 16), "k": tensor(2, 4, 8, 16)}
    given |= {name: tensor(*shape, strides=strides) for name, (shape, strides) in change.items()}
    inputs = [given.get(name) for name in NAMES]
    capability = 90 if change else 75
    attrs = rotary_embedding.attributes({})
    return make_plan(rotary_embedding, inputs, attrs, Device("cuda", 0, capability, 132), (True, True)).declined


def test_what_is_declined():
    assert declined(q=((2, 4, 8, 16), (512, 128, 1, 8))) == "the rows of q are not contiguous"
    assert declined(k=((2, 4, 8, 16), (512, 128, 1, 8))) == "the rows of k are not contiguous"
    assert declined(cos=((8, 16), (1, 8))) == "the rows of cos are not contiguous"
    assert declined(sin=((8, 16), (1, 8))) == "the rows of sin are not contiguous"
    assert declined() == "rotary_embedding needs a GPU of compute capability 8.0, this one has 7.5"


Q, T, P = torch.ones(2, 4, 5, 8), torch.ones(5, 8), torch.zeros(2, 5, dtype=torch.int64)


@pytest.mark.parametrize(
    ("inputs", "attrs", "error", "message"),
    [
        ({"q": Q[0]}, {}, ValueError, r"q has shape \[4, 5, 8\], expected 4 dimensions"),
        ({"q": Q[0]}, {"num_heads": 3}, ValueError, "q has rows of 8, expected a multiple of 3 heads"),
        ({}, {"num_heads": 2}, ValueError, r"q has shape \[2, 4, 5, 8\], expected 3 dimensions"),
        ({"q": Q[0], "k": Q[0]}, {"num_heads": 2, "packed": True}, ValueError, "packed is set, expected num_heads"),
        ({}, {"packed": True}, ValueError, "packed is set, expected num_heads > 0"),
        ({}, {"num_heads": -1}, ValueError, "num_heads and kv_num_heads are -1"),
        ({"k": torch.ones(2, 4, 6, 8)}, {}, ValueError, r"k has shape \[2, 4, 6, 8\]"),
        ({}, {"rotary_dim": 10}, ValueError, "rotary_dim is 10, expected an even number up to D = 8"),
        ({}, {"rotary_dim": 5}, ValueError, "rotary_dim is 5, expected an even number"),
        ({}, {"rotary_dim": -2}, ValueError, "rotary_dim is -2, expected an even number"),
        ({"cos": T[:, :6], "sin": T[:, :6]}, {}, ValueError, r"cos has shape \[5, 6\], expected R = 8 or half of it"),
        ({"cos": T[0], "sin": T[0]}, {}, ValueError, r"cos has shape \[8\], expected \[B\|1, S, R\] or \[S, R\]"),
        ({"cos": Q[0], "sin": Q[0], "positions": P}, {}, ValueError, r"cos has shape .*, expected \[max, R\]"),
        ({"sin": T[:, :4]}, {}, ValueError, r"sin has shape \[5, 4\], expected the shape of cos"),
        ({"cos": T[:4], "sin": T[:4]}, {}, ValueError, r"cos has shape \[4, 8\], expected \[B\|1, S, R\]"),
        ({"positions": P[:, :4]}, {}, ValueError, r"positions has shape \[2, 4\], expected \[B\|1, S\]"),
        ({"positions": P.int()}, {}, TypeError, "positions is int32, expected int64"),
        ({"sin": T.half()}, {}, TypeError, "sin is float16, expected float32 as cos is"),
    ],
)
@pytest.mark.parametrize("interpreted", [False, True])
def test_wrong_inputs_are_refused(inputs, attrs, error, message, interpreted):
    given = {"q": Q, "cos": T, "sin": T} | inputs
    with interpret(interpreted), pytest.raises(error, match=f"rotary_embedding: {message}"):
        torch.ops.trimaran.rotary_embedding(*(given.get(name) for name in NAMES), **attrs)
