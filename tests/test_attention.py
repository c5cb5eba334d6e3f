"""attention: the kernel against fp64 in every layout and with every mask, interpreted on the CPU and compiled on a
GPU."""

from functools import partial

import pytest
import torch
from oracle import assert_close, run_kernel, widened
from torch.nn.functional import scaled_dot_product_attention

from trimaran.kernels.attention import attention, attention_reference
from trimaran.kernels.interpreter import interpret

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
INF = float("inf")
run = partial(run_kernel, "attention")


def draw(device, dtype, *shape, scale=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return (torch.randn(*shape, generator=generator) * scale).to(device, dtype)


def operands(device, dtype, batch=2, heads=3, kv_heads=None, queries=37, keys=70, head_dim=32):
    kv_heads = kv_heads or heads
    q = draw(device, dtype, batch, heads, queries, head_dim)
    k, v = (draw(device, dtype, batch, kv_heads, keys, head_dim, seed=s) for s in (1, 2))
    return q, k, v


def check(q, k=None, v=None, bias=None, key_lengths=None, key_mask=None, **given):
    given.setdefault("scale", 0.2)
    attrs = vars(attention.attributes(given))
    inputs = (q, k, v, bias, key_lengths, key_mask)
    got = run(*inputs, **attrs)
    (exact,) = attention_reference(*map(widened, inputs), **attrs)
    (peer,) = attention_reference(*inputs, **attrs)
    assert got.is_contiguous()
    assert_close(got, exact, peer)
    return got


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [16, 32, 40, 64, 80, 128, 256])
def test_head_dimensions(device, dtype, head_dim):
    check(*operands(device, dtype, batch=1, heads=2, queries=20, keys=33, head_dim=head_dim), scale=head_dim**-0.5)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (1, 70), (17, 64), (64, 64), (100, 3), (65, 129)])
def test_lengths(device, queries, keys):
    check(*operands(device, torch.float32, queries=queries, keys=keys))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_many_elements_have_pytorchs_own_error(device, dtype):
    q, k, v = operands(device, dtype, batch=2, heads=4, queries=200, keys=200, head_dim=64)
    got = run(q, k, v, scale=0.125)
    exact = scaled_dot_product_attention(*map(widened, (q, k, v)), scale=0.125)
    assert_close(got, exact, scaled_dot_product_attention(q, k, v, scale=0.125))


def rows(*tensors):
    """[B, H, S, D] -> [B, S, H*D]"""
    return tuple(t.transpose(1, 2).flatten(2) for t in tensors)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_layouts_give_the_same_bits(device, dtype, kv_heads):
    q, k, v = operands(device, dtype, heads=4, kv_heads=kv_heads, queries=70)
    heads = check(q, k, v)
    q3, k3, v3 = rows(q, k, v)
    counts = {"num_heads": 4, "kv_num_heads": kv_heads}
    three = check(q3, k3, v3, **counts)
    packed = check(torch.cat([q3, k3, v3], -1), **counts)
    assert torch.equal(rows(heads)[0], three)
    assert torch.equal(packed, three)


def masks(device, batch=2, queries=37, keys=70):
    return {
        "lengths": {"key_lengths": torch.tensor([keys, keys // 3], dtype=torch.int32, device=device)},
        "no length": {"key_lengths": torch.tensor([0, keys], dtype=torch.int32, device=device)},
        "lengths out of range": {"key_lengths": torch.tensor([-5, 10**6], dtype=torch.int32, device=device)},
        "left padding": {"key_mask": torch.arange(keys, device=device) >= torch.tensor([[40], [0]], device=device)},
        "holes": {"key_mask": (torch.arange(batch * keys, device=device) % 3 != 0).view(batch, keys)},
        "nothing left": {"key_mask": torch.arange(batch, device=device)[:, None].expand(batch, keys) == 1},
        "causal": {"causal": True},
        "bias": {"bias": draw(device, torch.float32, batch, 3, queries, keys)},
        "bias broadcast": {"bias": draw(device, torch.float32, 1, 3, 1, keys)},
        "bias over heads": {"bias": draw(device, torch.float32, batch, 1, queries, keys)},
        "bias of -inf": {
            "bias": torch.where(torch.arange(keys, device=device) < 5, 0.0, -INF).expand(1, 1, queries, keys)
        },
        "bias of -inf alone": {"bias": torch.full((batch, 1, 1, keys), -INF, device=device)},
        "bias of the lowest number": {
            "bias": torch.full((batch, 1, 1, keys), torch.finfo(torch.float16).min, device=device)
        },
    }


def combined(device, *names):
    return {key: value for name in names for key, value in masks(device)[name].items()}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("masked_row", ["zero", "mean"])
@pytest.mark.parametrize(
    "names",
    [
        *[(name,) for name in masks("cpu")],
        ("lengths", "holes"),
        ("left padding", "causal"),
        ("lengths", "left padding", "causal", "bias"),
        ("no length", "bias broadcast"),
    ],
    ids=" and ".join,
)
def test_masks(device, dtype, masked_row, names):
    given = combined(device, *names)
    if "bias" in given:
        given["bias"] = given["bias"].to(dtype)
    check(*operands(device, dtype), **given, masked_row=masked_row)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("masked_row", ["zero", "mean"])
def test_rows_without_keys(device, masked_row):
    q, k, v = operands(device, torch.float32)
    out = check(q, k, v, **masks(device)["nothing left"], masked_row=masked_row)
    expected = v[0].mean(1, keepdim=True).expand_as(out[0]) if masked_row == "mean" else torch.zeros_like(out[0])
    torch.testing.assert_close(out[0], expected)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("queries", "keys"), [(5, 40), (40, 5), (33, 33), (1, 64)])
def test_causal_counts_from_the_end(device, queries, keys):
    q, k, v = operands(device, torch.float32, queries=queries, keys=keys)
    out = check(q, k, v, causal=True)
    seen = torch.arange(keys, device=device) <= torch.arange(queries, device=device)[:, None] + keys - queries
    exact = scaled_dot_product_attention(*map(widened, (q, k, v)), attn_mask=seen, scale=0.2)
    assert_close(out, exact, scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=0.2))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("head_dim", [40, 64, 80, 128])
@pytest.mark.parametrize(
    "names", [("bias",), ("bias broadcast",), ("bias", "lengths"), ("bias", "holes", "causal")], ids=str
)
def test_biases_that_fit_tensor_descriptors(device, head_dim, names):
    given = {k: v for name in names for k, v in masks(device, queries=200, keys=208)[name].items()}
    given["bias"] = given["bias"].half()
    check(*operands(device, torch.float16, queries=200, keys=208, head_dim=head_dim), **given)


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [40, 64, 128, 200])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_long_sequences(dtype, head_dim, causal):
    """Each row of the tables for many keys, and edges that no block size divides."""
    q, k, v = operands("cuda", dtype, batch=1, heads=2, queries=1500, keys=9001, head_dim=head_dim)
    check(q, k, v, scale=head_dim**-0.5, causal=causal)
    lengths = torch.tensor([4321], dtype=torch.int32, device="cuda")
    check(q, k[:, :, :8000], v[:, :, :8000], scale=head_dim**-0.5, causal=causal, key_lengths=lengths)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("scale", [-0.3, 0.0])
def test_scales_that_are_not_positive(device, scale):
    check(*operands(device, torch.float32), scale=scale)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("window", [(0, 0), (5, -1), (-1, 3), (20, 20), (64, 0), (200, 200), (3, 100)], ids=str)
@pytest.mark.parametrize(("queries", "keys"), [(150, 150), (40, 200), (100, 30)])
def test_windows(device, window, queries, keys):
    left, right = window
    q, k, v = operands(device, torch.float16, heads=2, queries=queries, keys=keys)
    out = check(q, k, v, window_left=left, window_right=right)
    distance = torch.arange(keys, device=device) - (torch.arange(queries, device=device)[:, None] + keys - queries)
    seen = (distance <= right) | (right < 0)
    seen = seen & ((distance >= -left) | (left < 0))
    exact = scaled_dot_product_attention(*map(widened, (q, k, v)), attn_mask=seen, scale=0.2)
    assert_close(out, exact, scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=0.2))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("masked_row", ["zero", "mean"])
def test_a_causal_window_over_padding(device, masked_row):
    given = {**masks(device, keys=150)["left padding"], "causal": True, "window_left": 30, "masked_row": masked_row}
    check(*operands(device, torch.float32, queries=150, keys=150), **given)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("names", [(), ("causal",), ("bias", "lengths")], ids=str)
def test_soft_cap(device, dtype, names):
    given = combined(device, *names)
    if "bias" in given:
        given["bias"] = given["bias"].to(dtype)
    q, k, v = operands(device, dtype)
    check(q * 5, k * 5, v, **given, softcap=20.0)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("length", [60, 64, 128, 150])
def test_holes_at_the_edges_of_blocks(device, length):
    mask = torch.arange(200, device=device).expand(2, 200) < length
    lengths = mask.sum(1, dtype=torch.int32)
    inputs = operands(device, torch.float16, queries=70, keys=200)
    both = check(*inputs, key_mask=mask, key_lengths=lengths)
    assert torch.equal(both, check(*inputs, key_lengths=lengths))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("masking", ["lengths", "mask", "both"])
def test_nan_in_padding_stays_there(device, masking):
    q, k, v = operands(device, torch.float16)
    visible = torch.arange(70, device=device) < torch.tensor([[70], [20]], device=device)
    if masking == "mask":
        visible = visible & (torch.arange(70, device=device) != 3)
    clean = {
        "key_lengths": visible.sum(1, dtype=torch.int32) if masking != "mask" else None,
        "key_mask": visible if masking != "lengths" else None,
    }
    before = run(q, k, v, **clean, scale=0.2)
    for tensor in (k, v):
        tensor.masked_fill_(~visible[:, None, :, None], float("nan"))
    after = run(q, k, v, **clean, scale=0.2)
    assert not after.isnan().any()
    assert torch.equal(before, after)
    (reference,) = attention_reference(q, k, v, None, *clean.values(), **vars(attention.attributes({"scale": 0.2})))
    assert not reference.isnan().any()


@pytest.mark.parametrize("device", DEVICES)
def test_nan_in_a_query_stays_in_its_row(device):
    q, k, v = operands(device, torch.float32)
    q[0, 1, 5, 2] = float("nan")
    out = run(q, k, v, scale=0.2)
    assert out[0, 1, 5].isnan().all()
    out[0, 1, 5] = 0
    assert not out.isnan().any()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_scores(device, dtype):
    q, k, v = operands(device, dtype)
    check(q * 30, k * 30, v, scale=0.2)


@pytest.mark.parametrize("device", DEVICES)
def test_operands_anywhere_in_memory(device):
    q, k, v = operands(device, torch.float32, queries=70)
    bshd = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v)]
    assert torch.equal(check(*bshd), check(q, k, v))
    padded = torch.zeros(2, 3, 70, 37, device=device)
    padded[..., 5:] = k  # rows that start at odd addresses
    check(q, padded[..., 5:], v)
    check(q[:1].expand(2, -1, -1, -1), k, v[:, :1].expand(-1, 3, -1, -1))
    lengths = torch.tensor([9, 70, 30, 70], dtype=torch.int32, device=device)[::2]
    check(q, k, v, key_lengths=lengths, bias=draw(device, torch.float32, 2, 70, 3, 70).transpose(1, 2))


@pytest.mark.parametrize("device", DEVICES)
def test_a_head_that_is_not_contiguous_is_declined(device):
    q, k, v = operands(device, torch.float32)
    with pytest.raises(AssertionError, match="the rows of k are not contiguous"):
        run(q, k.repeat(1, 1, 1, 2)[..., ::2], v, scale=0.2)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("batch", "queries", "keys"), [(0, 5, 5), (2, 0, 5), (2, 5, 0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_empty(device, dtype, batch, queries, keys):
    q, k, v = operands(device, dtype, batch=batch, queries=queries, keys=keys)
    assert torch.equal(run(q, k, v, scale=0.2), torch.zeros_like(q))
    bias = torch.zeros(1, q.shape[1], queries, keys, dtype=dtype, device=device)
    assert torch.equal(run(q, k, v, bias, scale=0.2), torch.zeros_like(q))


@pytest.mark.parametrize("device", DEVICES)
def test_strides_beyond_32_bits(device):
    step = 2**31 + 64
    storage = torch.empty_strided((2, 1, 20, 16), (step, 16, 16, 1), dtype=torch.float16, device=device)
    q, k, v = operands(device, torch.float16, heads=1, queries=20, keys=20, head_dim=16)
    storage.copy_(k)
    assert torch.equal(run(q, storage, v, scale=0.2), run(q, k, v, scale=0.2))


@pytest.mark.parametrize("device", DEVICES)
def test_same_input_same_bits(device):
    q, k, v = operands(device, torch.float16)
    first = run(q, k, v, scale=0.2, **masks(device)["holes"])
    assert all(torch.equal(run(q, k, v, scale=0.2, **masks(device)["holes"]), first) for _ in range(3))


@pytest.mark.gpu
def test_sixteen_thousand_tokens():
    q, k, v = operands("cuda", torch.float16, batch=1, heads=2, queries=16384, keys=16384, head_dim=64)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    got = run(q, k, v, scale=0.125)
    assert torch.cuda.max_memory_allocated() - before < 4 * q.nbytes, "nothing quadratic"
    sample = slice(0, None, 257)
    exact = scaled_dot_product_attention(q[:, :, sample].double(), k.double(), v.double(), scale=0.125)
    assert_close(got[:, :, sample], exact, scaled_dot_product_attention(q, k, v, scale=0.125)[:, :, sample])


def one(*shape, dtype=torch.float32):
    return torch.ones(*shape, dtype=dtype)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"q": one(2, 3, 4)}, ValueError, r"q has shape \[2, 3, 4\], expected 4 dimensions"),
        ({"k": None}, ValueError, "k and v are expected together"),
        (
            {"k": None, "v": None},
            ValueError,
            "k and v are expected together, and may be absent only where num_heads > 0",
        ),
        ({"k": one(2, 4, 7, 9)}, ValueError, r"k has shape \[2, 4, 7, 9\], expected \[B, Hkv, Sk, D\]"),
        ({"v": one(2, 4, 6, 8)}, ValueError, r"v has shape \[2, 4, 6, 8\], expected"),
        ({"k": one(2, 3, 7, 8), "v": one(2, 3, 7, 8)}, ValueError, "k has 3 heads, expected a divisor of q's 4"),
        ({"bias": one(5, 7)}, ValueError, r"bias has shape \[5, 7\], expected \[1\|B, 1\|H, 1\|Sq, Sk\]"),
        ({"bias": one(1, 2, 5, 7)}, ValueError, r"bias has shape \[1, 2, 5, 7\]"),
        ({"bias": one(1, 1, 5, 1)}, ValueError, r"bias has shape \[1, 1, 5, 1\]"),
        (
            {"key_lengths": one(3, dtype=torch.int32)},
            ValueError,
            r"key_lengths has shape \[3\], expected \[B\] = \[2\]",
        ),
        ({"key_lengths": one(2, dtype=torch.int64)}, TypeError, "key_lengths is int64, expected int32"),
        (
            {"key_mask": one(2, 5, dtype=torch.bool)},
            ValueError,
            r"key_mask has shape \[2, 5\], expected \[B, Sk\] = \[2, 7\]",
        ),
        ({"key_mask": one(2, 7)}, TypeError, "key_mask is float32, expected bool"),
        ({"k": one(2, 4, 7, 8, dtype=torch.float16)}, TypeError, "k is float16, expected float32 as q is"),
        ({"num_heads": 4}, ValueError, r"q has shape \[2, 4, 5, 8\], expected 3 dimensions"),
        ({"num_heads": 4, "kv_num_heads": 3}, ValueError, "kv_num_heads is 3, expected a divisor of num_heads = 4"),
        ({"softcap": -1.0}, ValueError, "softcap is -1.0, expected 0 for none or a positive number"),
        ({"causal": True, "window_right": 2}, ValueError, "window_right is 2, expected -1 or 0 where causal"),
        ({"masked_row": "nan"}, ValueError, "masked_row is 'nan', expected one of zero, mean"),
    ],
)
@pytest.mark.parametrize("interpreted", [False, True])
def test_bad_inputs_are_named(change, error, message, interpreted):
    call = {"q": one(2, 4, 5, 8), "k": one(2, 4, 7, 8), "v": one(2, 4, 7, 8), "scale": 0.2, **change}
    inputs = [call.pop(name, None) for name in ("q", "k", "v", "bias", "key_lengths", "key_mask")]
    with interpret(interpreted), pytest.raises(error, match=message):
        torch.ops.trimaran.attention(*inputs, **call)


def test_rows_that_the_heads_do_not_divide():
    with pytest.raises(ValueError, match="q has rows of 30, expected a multiple of 4 heads"):
        torch.ops.trimaran.attention(one(2, 5, 30), one(2, 5, 32), one(2, 5, 32), scale=0.2, num_heads=4)


def test_head_dimensions_over_the_limit_are_declined():
    q, k, v = operands("cpu", torch.float32, head_dim=300)
    with pytest.raises(AssertionError, match="head dimension of more than 256"):
        run(q, k, v, scale=0.2)


def test_on_a_cpu_without_interpretation_the_reference_answers():
    q, k, v = operands("cpu", torch.float32)
    (reference,) = attention_reference(q, k, v, None, None, None, **vars(attention.attributes({"scale": 0.2})))
    assert torch.equal(torch.ops.trimaran.attention(q, k, v, scale=0.2), reference)


@pytest.mark.parametrize("gqa", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_the_reference_agrees_with_pytorch(gqa, masked):
    """The oracle of all tests here, against an implementation that is not ours."""
    q, k, v = map(widened, operands("cpu", torch.float32, heads=4, kv_heads=2 if gqa else 4))
    mask = masks("cpu")["holes"]["key_mask"] if masked else None
    (ours,) = attention_reference(q, k, v, None, None, mask, **vars(attention.attributes({"scale": 0.2})))
    theirs = scaled_dot_product_attention(
        q, k, v, attn_mask=None if mask is None else mask[:, None, None], scale=0.2, enable_gqa=gqa
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
