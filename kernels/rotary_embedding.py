"""Rotary position embedding of q and k: pairs of elements of a head turn by an angle that grows with the position.

    out[i] = x[i] * cos[i] - x[j] * sin[i]      for each pair (i, j) of the first `rotary_dim` elements of a head
    out[j] = x[j] * cos[j] + x[i] * sin[j]      the others are copied

Pairs are (i, i + rotary_dim / 2), as Llama has them, or (2i, 2i + 1) where `interleaved`, as GPT-J. rotary_dim 0: all
of the head. Layouts, as attention's, by `num_heads`:
    0: q [B, H, S, D], k [B, Hkv, S, D]
    H: q [B, S, H*D], k [B, S, Hkv*D], Hkv = kv_num_heads (0: H)
    H, packed: q is [B, S, (H + 2 Hkv)*D], that is q, k and v side by side; v is copied
q_out and k_out have the shapes of q and k. fp32, fp16 or bf16, computed in fp32; cos and sin may have another dtype.

cos and sin [B|1, S, R] or [S, R] hold a row for each position of the sequence; with `positions` [B|1, S] int64 they are
tables [max, R] and positions, read on the device, say which row: a row outside the table gives NaN. R is rotary_dim, or
half of it where both elements of a pair share a value.
Source: Su et al., "RoFormer", 2021; the modeling files of transformers; ONNX RotaryEmbedding.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from trimaran.kernels import bodies
from trimaran.kernels.configs import Row, lookup
from trimaran.kernels.contract import (
    Attr,
    Decline,
    Device,
    Divisible,
    Input,
    Launch,
    Op,
    Output,
    Tensor,
    expect_shape,
    readable,
)
from trimaran.kernels.dependent import await_inputs, dependent
from trimaran.kernels.heads import head_view, named_strides
from trimaran.kernels.sizes import cdiv, differ, known, power_of_2

FLOATS = ("float32", "float16", "bfloat16")


@triton.jit
def load_pairs(
    ptr,
    mask,
    other: tl.constexpr,
    FULL: tl.constexpr,
    PAIRS: tl.constexpr,
    HALF: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):
    """Both elements of each pair, [BLOCK_S, HALF] in fp32, from rows at ptr [BLOCK_S, 1], mask [BLOCK_S, 1]. Rows hold
    PAIRS values of one kind and then as many of the other, or one after the other; one kind alone unless FULL."""
    i = tl.arange(0, HALF)[None, :]
    if not FULL:
        first = tl.load(ptr + i, mask=mask & (i < PAIRS), other=other).to(tl.float32)
        second = first
    elif INTERLEAVED:
        both = tl.arange(0, 2 * HALF)[None, :]
        x = tl.load(ptr + both, mask=mask & (both < 2 * PAIRS), other=other).to(tl.float32)
        first, second = tl.split(tl.reshape(x, [x.shape[0], HALF, 2]))
    else:
        first = tl.load(ptr + i, mask=mask & (i < PAIRS), other=other).to(tl.float32)
        second = tl.load(ptr + PAIRS + i, mask=mask & (i < PAIRS), other=other).to(tl.float32)
    return first, second


@triton.jit
def rotary_embedding_kernel(
    q_ptr,  # [B, q_heads, length, HEAD_DIM], any strides but the last, which is 1; so is k
    k_ptr,  # [B, heads of k, length, HEAD_DIM] or None
    cos_ptr,  # [B, length, R] without positions, else [table, R]; rows contiguous, as sin's
    sin_ptr,
    positions_ptr,  # [B, length] int64 or None
    q_out_ptr,  # as q
    k_out_ptr,  # as k
    stride_qb,
    stride_qh,
    stride_qs,
    stride_kb,
    stride_kh,
    stride_ks,
    stride_cosb,  # 0 where all batches share it; so are the next
    stride_coss,
    stride_sinb,
    stride_sins,
    stride_positionsb,
    stride_positionss,
    stride_qob,
    stride_qoh,
    stride_qos,
    stride_kob,
    stride_koh,
    stride_kos,
    length,  # S
    table,  # rows of cos and sin
    q_heads,
    turned,  # heads from there on are copied; all of k's turn
    INTERLEAVED: tl.constexpr,
    FULL: tl.constexpr,  # cos and sin hold a value for each element, not for each pair
    PDL: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAIRS: tl.constexpr,  # rotary_dim / 2
    HALF: tl.constexpr,  # power of two, at least PAIRS
    REST: tl.constexpr,  # power of two, at least HEAD_DIM - rotary_dim, or 0
    BLOCK_S: tl.constexpr,
):
    # One program per BLOCK_S positions of one head of q or k: grid = (cdiv(length, BLOCK_S) * B, heads of both).
    blocks = tl.cdiv(length, BLOCK_S)
    batch = (tl.program_id(0) // blocks).to(tl.int64)
    s = tl.program_id(0) % blocks * BLOCK_S + tl.arange(0, BLOCK_S)
    place = s.to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    x_ptr = q_ptr + batch * stride_qb + head * stride_qh
    out_ptr = q_out_ptr + batch * stride_qob + head * stride_qoh
    stride_x, stride_out = stride_qs.to(tl.int64), stride_qos.to(tl.int64)
    turns = head < turned
    if k_ptr is not None:
        if head >= q_heads:
            x_ptr = k_ptr + batch * stride_kb + (head - q_heads) * stride_kh
            out_ptr = k_out_ptr + batch * stride_kob + (head - q_heads) * stride_koh
            stride_x, stride_out = stride_ks.to(tl.int64), stride_kos.to(tl.int64)
            turns = True
    if PDL:
        await_inputs()

    inside = (s < length)[:, None]
    if positions_ptr is not None:
        at = positions_ptr + batch * stride_positionsb + place * stride_positionss
        position = tl.load(at, mask=s < length, other=0)
        listed = inside & ((position >= 0) & (position < table))[:, None]
    else:
        position = place
        listed = inside
    cos_ptr += batch * stride_cosb + position[:, None] * stride_coss
    sin_ptr += batch * stride_sinb + position[:, None] * stride_sins
    nan: tl.constexpr = float("nan")
    cos, cos_2 = load_pairs(cos_ptr, listed, nan, FULL, PAIRS, HALF, INTERLEAVED)
    sin, sin_2 = load_pairs(sin_ptr, listed, nan, FULL, PAIRS, HALF, INTERLEAVED)
    x_ptr += place[:, None] * stride_x
    out_ptr += place[:, None] * stride_out
    x, x_2 = load_pairs(x_ptr, inside, 0.0, True, PAIRS, HALF, INTERLEAVED)
    dtype: tl.constexpr = q_out_ptr.dtype.element_ty
    out = tl.where(turns, x * cos - x_2 * sin, x).to(dtype)
    out_2 = tl.where(turns, x_2 * cos_2 + x * sin_2, x_2).to(dtype)
    i = tl.arange(0, HALF)[None, :]
    if INTERLEAVED:
        both = tl.arange(0, 2 * HALF)[None, :]
        joined = tl.reshape(tl.join(out, out_2), [BLOCK_S, 2 * HALF])
        tl.store(out_ptr + both, joined, mask=inside & (both < 2 * PAIRS))
    else:
        tl.store(out_ptr + i, out, mask=inside & (i < PAIRS))
        tl.store(out_ptr + PAIRS + i, out_2, mask=inside & (i < PAIRS))
    if REST > 0:
        rest = 2 * PAIRS + tl.arange(0, REST)[None, :]
        mask = inside & (rest < HEAD_DIM)
        tl.store(out_ptr + rest, tl.load(x_ptr + rest, mask=mask, other=0.0), mask=mask)


CONFIGS: list[Row] = [
    ({"length": 16}, {"BLOCK_S": 4, "num_warps": 1}),
    ({"pairs": 32}, {"BLOCK_S": 64, "num_warps": 4}),
    ({"pairs": 64}, {"BLOCK_S": 32, "num_warps": 4}),
    ({}, {"BLOCK_S": 16, "num_warps": 4}),
]


def heads_of(inputs: Any, attrs: Any) -> tuple[Tensor, Tensor | None, Any]:
    """q and k as views [B, heads, S, D], and how many heads of q turn. ValueError where they are of no layout."""
    q, k, heads = inputs.q, inputs.k, attrs.num_heads
    kv_heads = attrs.kv_num_heads or heads
    if min(heads, kv_heads) < 0:
        raise ValueError(f"rotary_embedding: num_heads and kv_num_heads are {heads}, {kv_heads}, expected none below 0")
    if attrs.packed and (k is not None or not heads):
        raise ValueError("rotary_embedding: packed is set, expected num_heads > 0 and no k")
    layout = "3 dimensions [B, S, H*D] for num_heads > 0" if heads else "4 dimensions [B, H, S, D] for num_heads = 0"
    for name, tensor in (("q", q), ("k", k)):
        if tensor is not None and tensor.rank != (3 if heads else 4):
            raise ValueError(f"rotary_embedding: {name} has shape {readable(tensor.shape)}, expected {layout}")
    if not heads:
        return q, k, q.shape[1]
    counts = (heads + 2 * kv_heads if attrs.packed else heads, kv_heads)
    views = []
    for name, tensor, count in zip("qk", (q, k), counts, strict=True):
        if tensor is not None and differ(tensor.shape[2] % count, 0):
            wanted = f"expected a multiple of {count} heads"
            raise ValueError(f"rotary_embedding: {name} has rows of {readable(tensor.shape)[2]}, {wanted}")
        views.append(None if tensor is None else head_view(tensor, tensor.shape[2] // count, 0, count))
    assert views[0] is not None
    return views[0], views[1], heads + kv_heads if attrs.packed else heads


def infer(inputs: Any, attrs: Any) -> tuple[Tensor, Tensor | None]:
    q, k, _ = heads_of(inputs, attrs)
    batch, _, length, head_dim = q.shape
    if k is not None:
        expect_shape(
            "rotary_embedding", "k", k, (batch, k.shape[1], length, head_dim), "[B, Hkv, S, D] with q's B, S, D"
        )
    rotary_dim = attrs.rotary_dim or head_dim
    if attrs.rotary_dim < 0 or (known(rotary_dim) and (rotary_dim % 2 or (known(head_dim) and rotary_dim > head_dim))):
        sizes = f"expected an even number up to D = {readable([head_dim])[0]}"
        raise ValueError(f"rotary_embedding: rotary_dim is {readable([rotary_dim])[0]}, {sizes}")
    cos, positions = inputs.cos, inputs.positions
    if cos.rank not in ((2,) if positions is not None else (2, 3)):
        wanted = "[max, R] with positions" if positions is not None else "[B|1, S, R] or [S, R] without positions"
        raise ValueError(f"rotary_embedding: cos has shape {readable(cos.shape)}, expected {wanted}")
    width = cos.shape[-1]
    if differ(width, rotary_dim) and differ(width * 2, rotary_dim):
        wanted = f"expected R = {readable([rotary_dim])[0]} or half of it"
        raise ValueError(f"rotary_embedding: cos has shape {readable(cos.shape)}, {wanted}")
    expect_shape("rotary_embedding", "sin", inputs.sin, cos.shape, "the shape of cos")
    if positions is not None:
        rows: tuple[Any, ...] = (shared_or(positions, batch), length)
        expect_shape("rotary_embedding", "positions", positions, rows, "[B|1, S]")
    else:
        rows = (length, width) if cos.rank == 2 else (shared_or(cos, batch), length, width)
        expect_shape("rotary_embedding", "cos", cos, rows, "[B|1, S, R] or [S, R]")
    return Tensor(q.dtype, inputs.q.shape), (None if k is None else Tensor(k.dtype, inputs.k.shape))


def shared_or(tensor: Tensor, batch: Any) -> Any:
    """1 where the tensor has one row for all batches, else `batch`."""
    return 1 if known(tensor.shape[0]) and tensor.shape[0] == 1 else batch


def plan(inputs: Any, outputs: Any, attrs: Any, device: Device) -> list[Launch]:
    q, k, turned = heads_of(inputs, attrs)
    q_out, k_out, _ = heads_of(_Outputs(outputs), attrs)
    k = None if k_out is None else k
    batch, q_heads, length, head_dim = q.shape
    if device.type == "cuda" and device.capability < 80:
        raise Decline(f"rotary_embedding needs a GPU of compute capability 8.0, this one has {device.capability / 10}")
    head_dim = int(head_dim)
    pairs = (attrs.rotary_dim or head_dim) // 2
    for name, tensor in (("q", q), ("k", k), ("cos", inputs.cos), ("sin", inputs.sin)):
        if tensor is not None and tensor.shape[-1] > 1 and tensor.strides[-1] != 1:
            raise Decline(f"the rows of {name} are not contiguous")
    options = dict(lookup(CONFIGS, length=length, pairs=pairs))
    block = options.pop("BLOCK_S")
    pdl = dependent(device)
    heads = q_heads if k is None else q_heads + k.shape[1]
    return [
        Launch(
            rotary_embedding_kernel,
            grid=(cdiv(length, block) * batch, heads if head_dim else 0),
            args={
                "q_ptr": q,
                "k_ptr": k,
                "cos_ptr": inputs.cos,
                "sin_ptr": inputs.sin,
                "positions_ptr": inputs.positions,
                "q_out_ptr": q_out,
                "k_out_ptr": k_out,
                **named_strides("q", q, "bhs"),
                **named_strides("k", k, "bhs"),
                **row_strides("cos", inputs.cos, 3),
                **row_strides("sin", inputs.sin, 3),
                **row_strides("positions", inputs.positions, 2),
                **named_strides("qo", q_out, "bhs"),
                **named_strides("ko", k_out, "bhs"),
                "length": length,
                "table": inputs.cos.shape[-2],
                "q_heads": q_heads,
                "turned": turned,
            },
            constexprs={
                "INTERLEAVED": attrs.interleaved,
                "FULL": bool(inputs.cos.shape[-1] == 2 * pairs),
                "PDL": pdl,
                "HEAD_DIM": head_dim,
                "PAIRS": pairs,
                "HALF": power_of_2(pairs),
                "REST": power_of_2(head_dim - 2 * pairs) if head_dim > 2 * pairs else 0,
                "BLOCK_S": block,
            },
            options={**options, "launch_pdl": pdl},
        )
    ]


class _Outputs:
    """q_out and k_out under the names of the inputs whose layout they have."""

    def __init__(self, outputs: Any) -> None:
        self.q, self.k = outputs.q_out, outputs.k_out


def row_strides(name: str, tensor: Tensor | None, rank: int) -> dict[str, Any]:
    """`stride_<name>b` and `stride_<name>s`; the first is 0 where there is no batch, or one for all."""
    if tensor is None:
        return {f"stride_{name}b": 0, f"stride_{name}s": 0}
    shared = tensor.rank < rank or tensor.shape[0] == 1
    along = tensor.strides[-2] if rank == 3 else tensor.strides[-1]
    return {f"stride_{name}b": Divisible(0 if shared else tensor.strides[0]), f"stride_{name}s": Divisible(along)}


def rotary_embedding_reference(
    q: Any,
    cos: Any,
    sin: Any,
    k: Any,
    positions: Any,
    *,
    interleaved: bool,
    rotary_dim: int,
    num_heads: int,
    kv_num_heads: int,
    packed: bool,
) -> tuple[Any, Any]:
    import torch

    kv_heads = kv_num_heads or num_heads
    if positions is not None:
        cos, sin = cos[positions], sin[positions]
    if cos.dim() == 2:
        cos, sin = cos[None], sin[None]
    head_dim = q.shape[-1] // (num_heads + 2 * kv_heads if packed else num_heads or 1)
    size = rotary_dim or head_dim
    if cos.shape[-1] < size:
        cos, sin = (t.repeat_interleave(2, -1) if interleaved else torch.cat([t, t], -1) for t in (cos, sin))
    cos, sin = (t.unsqueeze(2 if num_heads else 1) for t in (cos, sin))

    def turned(x: Any) -> Any:
        part, rest = x[..., :size], x[..., size:]
        if interleaved:
            crossed = torch.stack([-part[..., 1::2], part[..., ::2]], -1).flatten(-2)
        else:
            crossed = torch.cat([-part[..., size // 2 :], part[..., : size // 2]], -1)
        return torch.cat([(part * cos + crossed * sin).to(x.dtype), rest], -1)

    if not num_heads:
        return turned(q), (None if k is None else turned(k))
    q, k = (None if x is None else x.unflatten(-1, (-1, head_dim)) for x in (q, k))
    count = num_heads + kv_heads if packed else num_heads
    q_out = torch.cat([turned(q[:, :, :count]), q[:, :, count:]], 2).flatten(2)
    return q_out, (None if k is None else turned(k).flatten(2))


def body(g: Any, inputs: Any, attrs: Any) -> tuple[Any, Any]:
    """In fp32, as the kernel does it."""
    axis = -2 if attrs.num_heads else -3  # of the heads
    values = []
    for table in (inputs.cos, inputs.sin):
        wide = g.cast(table, "float32")
        values.append(
            g.unsqueeze(wide if inputs.positions is None else g.Gather(wide, inputs.positions, axis=0), [axis])
        )
    kv_heads = attrs.kv_num_heads or attrs.num_heads
    heads = attrs.num_heads + (2 * kv_heads if attrs.packed else 0)
    found: list[Any] = []
    for x, count in ((inputs.q, heads), (inputs.k, kv_heads)):
        if x is None:
            found.append(None)
        elif not attrs.num_heads:
            found.append(body_turned(g, x, values[0], values[1], attrs))
        else:
            x = g.Reshape(x, g.constant([0, 0, count, -1], "int64"))
            copied = None
            if attrs.packed:
                x, copied = body_cut(g, x, attrs.num_heads + kv_heads, axis=2)
            x = body_turned(g, x, values[0], values[1], attrs)
            x = x if copied is None else g.Concat(x, copied, axis=2)
            found.append(g.Reshape(x, g.constant([0, 0, -1], "int64")))
    return found[0], found[1]


def body_cut(g: Any, x: Any, at: int, axis: int) -> tuple[Any, Any]:
    """x up to `at`, and from there on."""
    bounds = (0, at, 2**31 - 1)
    first, second = (
        g.Slice(x, *(g.constant([number], "int64") for number in (bounds[i], bounds[i + 1], axis))) for i in (0, 1)
    )
    return first, second


def body_turned(g: Any, x: Any, cos: Any, sin: Any, attrs: Any) -> Any:
    """x [.., D], cos and sin [.., R], broadcast over the heads."""
    rest = None
    if attrs.rotary_dim:
        x, rest = body_cut(g, x, attrs.rotary_dim, axis=-1)
    split = bodies.pairs if attrs.interleaved else bodies.halves
    first, second = split(g, g.cast(x, "float32"))
    (cos, cos_2), (sin, sin_2) = (body_values(g, table, first, attrs.interleaved) for table in (cos, sin))
    out = g.Sub(g.Mul(first, cos), g.Mul(second, sin))
    out_2 = g.Add(g.Mul(second, cos_2), g.Mul(first, sin_2))
    if attrs.interleaved:
        joined = g.Concat(g.unsqueeze(out, [4]), g.unsqueeze(out_2, [4]), axis=4)
        joined = g.Reshape(joined, g.constant([0, 0, 0, -1], "int64"))
    else:
        joined = g.Concat(out, out_2, axis=-1)
    joined = g.cast(joined, g.types["T"])
    return joined if rest is None else g.Concat(joined, rest, axis=-1)


def body_values(g: Any, table: Any, x: Any, interleaved: bool) -> tuple[Any, Any]:
    """The values of cos or sin for both elements of the pairs x [.., rotary_dim / 2], whichever width the table has."""
    zero, one = g.constant(0, "int64"), g.constant(1, "int64")
    width, pairs = (g.Gather(bodies.last_size(g, of), zero, axis=0) for of in (table, x))
    index = g.Range(zero, pairs, one)
    if interleaved:
        step = g.Div(width, pairs)
        index = g.Mul(index, step)
        other = g.Add(index, g.Sub(step, one))
    else:
        other = g.Add(index, g.Sub(width, pairs))
    return g.Gather(table, index, axis=-1), g.Gather(table, other, axis=-1)


rotary_embedding = Op(
    name="rotary_embedding",
    version=1,
    inputs=(
        Input("q"),
        Input("cos", "C"),
        Input("sin", "C"),
        Input("k", optional=True),
        Input("positions", "int64", optional=True),
    ),
    outputs=(Output("q_out"), Output("k_out", optional=True)),
    attrs=(
        Attr("interleaved", "bool", False),
        Attr("rotary_dim", "int", 0),
        Attr("num_heads", "int", 0),
        Attr("kv_num_heads", "int", 0),
        Attr("packed", "bool", False),
    ),
    types={"T": FLOATS, "C": FLOATS},
    infer=infer,
    plan=plan,
    reference=rotary_embedding_reference,
    body=body,
)
