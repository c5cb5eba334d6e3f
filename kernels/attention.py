"""Scaled dot-product attention: one pass over the keys, nothing quadratic in memory.

    out = softmax(q k^T * scale + bias, over the keys that are not masked) v

Layouts, by `num_heads`:
    0: q [B, H, Sq, D], k and v [B, Hkv, Sk, D], out [B, H, Sq, D]
    H: q [B, Sq, H*D], k and v [B, Sk, Hkv*D], out [B, Sq, H*D], Hkv = kv_num_heads (0: H)
    H, k and v absent: q is packed [B, S, (H + 2 Hkv)*D], that is q, k and v side by side
Hkv divides H: query head h reads key head h // (H / Hkv). D is at most 256. fp32, fp16 or bf16, accumulated in fp32.

A key is masked by any of: `key_lengths` [B] int32 (keys from there on), `key_mask` [B, Sk] bool (where False), `causal`
(query i sees keys up to i + Sk - Sq), a `bias` of -inf. K and V of keys masked by length or key_mask may hold NaN.
`bias` [1|B, 1|H, 1|Sq, Sk] is added to the scaled scores. A query without any key gives zero (`masked_row="zero"`, what
torch does with bool masks) or the mean of v over all keys (`"mean"`, what adding finfo.min to every score comes to).
Source: Dao, "FlashAttention-2", 2023; torch.nn.functional.scaled_dot_product_attention.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import triton
import triton.language as tl

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
from trimaran.kernels.sizes import cdiv, differ, known, power_of_2

MAX_HEAD_DIM = 256
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def attention_kernel(
    q_ptr,  # [B, H, queries, HEAD_DIM], any strides but the last, which is 1; so are k, v and out
    k_ptr,  # [B, H // group, keys, HEAD_DIM]
    v_ptr,  # [B, H // group, keys, HEAD_DIM]
    bias_ptr,  # [B, H, queries, keys] or None; stride 0 where it is broadcast
    key_lengths_ptr,  # [B] int32 or None
    key_mask_ptr,  # [B, keys] bool or None
    out_ptr,  # [B, H, queries, HEAD_DIM]
    stride_qb,
    stride_qh,
    stride_qm,
    stride_kb,
    stride_kh,
    stride_kn,
    stride_vb,
    stride_vh,
    stride_vn,
    stride_biasb,
    stride_biash,
    stride_biasm,
    stride_biasn,
    stride_lengths,
    stride_maskb,
    stride_maskn,
    stride_ob,
    stride_oh,
    stride_om,
    heads,  # H
    group,  # query heads that share a key head
    queries,  # Sq
    keys,  # Sk
    scale,
    CAUSAL: tl.constexpr,
    MEAN: tl.constexpr,  # masked_row == "mean"
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,  # power of two, at least HEAD_DIM
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    # One program per block of BLOCK_M queries of one head: grid = (cdiv(queries, BLOCK_M) * heads * B,), the blocks of
    # a head next to each other, so that they find its keys in the cache.
    blocks = tl.cdiv(queries, BLOCK_M)
    block = tl.program_id(0) % blocks
    head = (tl.program_id(0) // blocks % heads).to(tl.int64)
    batch = (tl.program_id(0) // blocks // heads).to(tl.int64)
    q_ptr += batch * stride_qb + head * stride_qh
    k_ptr += batch * stride_kb + head // group * stride_kh
    v_ptr += batch * stride_vb + head // group * stride_vh
    out_ptr += batch * stride_ob + head * stride_oh
    if bias_ptr is not None:
        bias_ptr += batch * stride_biasb + head * stride_biash
    if key_mask_ptr is not None:
        key_mask_ptr += batch * stride_maskb

    m = block * BLOCK_M + tl.arange(0, BLOCK_M)  # query positions
    d = tl.arange(0, BLOCK_D)
    in_head = d < HEAD_DIM
    row = m.to(tl.int64)[:, None]
    q_mask = (m < queries)[:, None] & in_head[None, :]
    q = tl.load(q_ptr + row * stride_qm + d[None, :], mask=q_mask, other=0.0)

    length = keys
    if key_lengths_ptr is not None:
        length = tl.minimum(tl.maximum(tl.load(key_lengths_ptr + batch * stride_lengths), 0), keys)
    end = length
    if CAUSAL:  # keys that no query of this block sees are not visited
        end = tl.minimum(length, (block + 1) * BLOCK_M + keys - queries)

    # Online softmax: `top` is the largest score so far, `total` the sum of exp(score - top), `acc` the weighted sum of
    # v.
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for start in range(0, end, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)  # key positions
        column = n.to(tl.int64)
        valid = n < length
        k = tl.load(k_ptr + column[None, :] * stride_kn + d[:, None], mask=valid[None, :] & in_head[:, None], other=0.0)
        if key_mask_ptr is not None:
            valid = valid & tl.load(key_mask_ptr + column * stride_maskn, mask=valid, other=0).to(tl.int1)
        scores = tl.dot(q, k, input_precision="ieee") * scale
        if bias_ptr is not None:
            bias_at = bias_ptr + row * stride_biasm + column[None, :] * stride_biasn
            scores += tl.load(bias_at, mask=(m < queries)[:, None] & valid[None, :], other=0.0).to(tl.float32)
        scores = tl.where(valid[None, :], scores, float("-inf"))
        if CAUSAL:
            scores = tl.where(n[None, :] <= m[:, None] + (keys - queries), scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, axis=1))
        finite = tl.where(higher == float("-inf"), 0.0, higher)  # -inf - -inf would be NaN
        p = tl.exp2((scores - finite[:, None]) * LOG2_E)
        shrink = tl.exp2((top - finite) * LOG2_E)
        total = total * shrink + tl.sum(p, axis=1)
        v = tl.load(v_ptr + column[:, None] * stride_vn + d[None, :], mask=valid[:, None] & in_head[None, :], other=0.0)
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
        top = higher

    masked = total == 0.0
    out = acc / tl.where(masked, 1.0, total)[:, None]
    if MEAN:
        if tl.max(masked.to(tl.int32), axis=0) > 0:
            mean = tl.zeros([BLOCK_D], tl.float32)
            for start in range(0, keys, BLOCK_N):
                n = start + tl.arange(0, BLOCK_N)
                v_at = v_ptr + n.to(tl.int64)[:, None] * stride_vn + d[None, :]
                v = tl.load(v_at, mask=(n < keys)[:, None] & in_head[None, :], other=0.0)
                mean += tl.sum(v.to(tl.float32), axis=0)
            mean = mean / tl.maximum(keys, 1)
            out = tl.where(masked[:, None], mean[None, :], out)
    tl.store(out_ptr + row * stride_om + d[None, :], out.to(out_ptr.dtype.element_ty), mask=q_mask)


# Blocks that fit the 99 KiB of shared memory of the smallest supported GPUs (sm_86, sm_120).
CONFIGS: list[Row] = [
    ({"dtype": "float32", "head_dim": 64}, {"BLOCK_M": 32, "BLOCK_N": 32, "num_warps": 4, "num_stages": 2}),
    ({"dtype": "float32", "head_dim": 128}, {"BLOCK_M": 32, "BLOCK_N": 32, "num_warps": 4, "num_stages": 1}),
    ({"dtype": "float32"}, {"BLOCK_M": 16, "BLOCK_N": 16, "num_warps": 4, "num_stages": 1}),
    ({"queries": 16, "head_dim": 128}, {"BLOCK_M": 16, "BLOCK_N": 64, "num_warps": 4, "num_stages": 2}),
    ({"head_dim": 64}, {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 4, "num_stages": 3}),
    ({"head_dim": 128}, {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 4, "num_stages": 2}),
    ({}, {"BLOCK_M": 64, "BLOCK_N": 32, "num_warps": 4, "num_stages": 2}),
]


def heads_of(inputs: Any, attrs: Any) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v as views [B, heads, S, D], whatever the layout. ValueError where they are not of one layout."""
    q, k, v = inputs.q, inputs.k, inputs.v
    heads, kv_heads = attrs.num_heads, attrs.kv_num_heads or attrs.num_heads
    if min(heads, kv_heads) < 0 or (kv_heads and heads % kv_heads):
        raise ValueError(f"attention: kv_num_heads is {kv_heads}, expected a divisor of num_heads = {heads}")
    if (k is None) != (v is None) or (k is None and not heads):
        raise ValueError("attention: k and v are expected together, and may be absent only where num_heads > 0")
    layout = "3 dimensions [B, S, H*D] for num_heads > 0" if heads else "4 dimensions [B, H, S, D] for num_heads = 0"
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor is not None and tensor.rank != (3 if heads else 4):
            raise ValueError(f"attention: {name} has shape {readable(tensor.shape)}, expected {layout}")
    if not heads:
        return q, k, v
    packed = heads + 2 * kv_heads
    parts = [(q, packed if k is None else heads, 0, heads)]
    if k is None:
        parts += [(q, packed, heads, kv_heads), (q, packed, heads + kv_heads, kv_heads)]
    else:
        parts += [(k, kv_heads, 0, kv_heads), (v, kv_heads, 0, kv_heads)]
    views = []
    for name, (tensor, count, first, taken) in zip("qkv", parts, strict=True):
        if differ(tensor.shape[2] % count, 0):
            raise ValueError(
                f"attention: {name} has rows of {readable(tensor.shape)[2]}, expected a multiple of {count} heads"
            )
        views.append(head_view(tensor, tensor.shape[2] // count, first, taken))
    return views[0], views[1], views[2]


def head_view(tensor: Tensor, head_dim: Any, first: int, count: int) -> Tensor:
    """Heads `first` to `first + count` of [B, S, all heads * head_dim], as a view [B, count, S, head_dim]."""
    batch, length, _ = tensor.shape
    if not tensor.strides:  # shape inference
        return replace(tensor, shape=(batch, count, length, head_dim))
    stride_batch, stride_length, step = tensor.strides
    strides = (stride_batch, head_dim * step, stride_length, step)
    return replace(tensor, shape=(batch, count, length, head_dim), strides=strides, offset=first * head_dim * step)


def infer(inputs: Any, attrs: Any) -> tuple[Tensor]:
    q, k, v = heads_of(inputs, attrs)
    batch, heads, queries, head_dim = q.shape
    keys = k.shape[2]
    expect_shape("attention", "k", k, (batch, k.shape[1], keys, head_dim), "[B, Hkv, Sk, D] with q's B and D")
    expect_shape("attention", "v", v, (batch, k.shape[1], keys, head_dim), "[B, Hkv, Sk, D] with k's Hkv and Sk")
    if known(heads) and known(k.shape[1]) and (k.shape[1] == 0 or heads % k.shape[1] != 0):
        raise ValueError(
            f"attention: k has {readable(k.shape)[1]} heads, expected a divisor of q's {readable(q.shape)[1]}"
        )
    expect_shape("attention", "key_lengths", inputs.key_lengths, (batch,), "[B]")
    expect_shape("attention", "key_mask", inputs.key_mask, (batch, keys), "[B, Sk]")
    if inputs.bias is not None:
        if inputs.bias.rank != 4:
            raise ValueError(f"attention: bias has shape {readable(inputs.bias.shape)}, expected [1|B, 1|H, 1|Sq, Sk]")
        free = [
            1 if not differ(size, 1) and known(size) else full
            for size, full in zip(inputs.bias.shape, q.shape, strict=True)
        ]
        expect_shape("attention", "bias", inputs.bias, (*free[:3], keys), "[1|B, 1|H, 1|Sq, Sk]")
    shape = (batch, queries, heads * head_dim) if attrs.num_heads else q.shape
    return (Tensor(q.dtype, shape),)


def plan(inputs: Any, outputs: Any, attrs: Any, device: Device) -> list[Launch]:
    q, k, v = heads_of(inputs, attrs)
    out = head_view(outputs.out, q.shape[3], 0, attrs.num_heads) if attrs.num_heads else outputs.out
    bias, lengths, mask = inputs.bias, inputs.key_lengths, inputs.key_mask
    batch, heads, queries, head_dim = q.shape
    if device.type == "cuda" and device.capability < 80:
        raise Decline(f"attention needs a GPU of compute capability 8.0, this one has {device.capability / 10}")
    if head_dim > MAX_HEAD_DIM:
        raise Decline(f"head dimension of more than {MAX_HEAD_DIM}")
    head_dim = int(head_dim)
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.strides[3] != 1 and head_dim > 1:
            raise Decline(f"the rows of {name} are not contiguous")
    config = dict(lookup(CONFIGS, dtype=q.dtype, head_dim=head_dim, queries=queries))
    block_m, block_n = config.pop("BLOCK_M"), config.pop("BLOCK_N")
    strides = {
        **named_strides("q", q, "bhm"),
        **named_strides("k", k, "bhn"),
        **named_strides("v", v, "bhn"),
        **named_strides("o", out, "bhm"),
        **named_strides("bias", bias, "bhmn"),
        **named_strides("mask", mask, "bn"),
        "stride_lengths": lengths.strides[0] if lengths is not None else 0,
    }
    return [
        Launch(
            attention_kernel,
            grid=(cdiv(queries, block_m) * heads * batch if head_dim else 0,),
            args={
                "q_ptr": q,
                "k_ptr": k,
                "v_ptr": v,
                "bias_ptr": bias,
                "key_lengths_ptr": lengths,
                "key_mask_ptr": mask,
                "out_ptr": out,
                **strides,
                "heads": heads,
                "group": heads // k.shape[1],
                "queries": queries,
                "keys": k.shape[2],
                "scale": attrs.scale,
            },
            constexprs={
                "CAUSAL": attrs.causal,
                "MEAN": attrs.masked_row == "mean",
                "HEAD_DIM": head_dim,
                "BLOCK_D": power_of_2(head_dim, least=16),
                "BLOCK_M": block_m,
                "BLOCK_N": block_n,
            },
            options=config,
        )
    ]


def named_strides(name: str, tensor: Tensor | None, axes: str) -> dict[str, Any]:
    """Kernel arguments `stride_<name><axis>` for the leading axes; 0 where the tensor is absent or broadcast."""
    if tensor is None:
        return {f"stride_{name}{axis}": 0 for axis in axes}
    sizes = zip(axes, tensor.shape, tensor.strides, strict=False)
    return {f"stride_{name}{axis}": 0 if size == 1 else Divisible(stride) for axis, size, stride in sizes}


def attention_reference(q: Any, k: Any, v: Any, bias: Any, key_lengths: Any, key_mask: Any, **attrs: Any) -> tuple[Any]:
    import torch

    heads, kv_heads = attrs["num_heads"], attrs["kv_num_heads"] or attrs["num_heads"]
    if heads and k is None:
        head_dim = q.shape[-1] // (heads + 2 * kv_heads)
        q, k, v = q.split([heads * head_dim, kv_heads * head_dim, kv_heads * head_dim], dim=-1)
    if heads:
        q = q.unflatten(-1, (heads, -1)).transpose(1, 2)
        k, v = (t.unflatten(-1, (kv_heads, -1)).transpose(1, 2) for t in (k, v))
    group = q.shape[1] // k.shape[1]
    k, v = (t.repeat_interleave(group, dim=1) if group > 1 else t for t in (k, v))
    queries, keys = q.shape[2], k.shape[2]
    position = torch.arange(keys, device=q.device)
    visible = torch.ones(q.shape[0], 1, 1, keys, dtype=torch.bool, device=q.device)
    if key_lengths is not None:
        visible = visible & (position < key_lengths[:, None, None, None])
    if key_mask is not None:
        visible = visible & key_mask[:, None, None, :]
    weights_of = v.masked_fill(~visible.transpose(2, 3), 0.0)  # NaN in padding must not reach the output
    if attrs["causal"]:
        visible = visible & (position <= torch.arange(queries, device=q.device)[:, None] + (keys - queries))
    scores = q @ k.transpose(-1, -2) * attrs["scale"]
    if bias is not None:
        scores = scores + bias
    scores = scores.masked_fill(~visible, float("-inf"))
    masked = (scores == float("-inf")).all(-1, keepdim=True)
    out = torch.softmax(scores.masked_fill(masked, 0.0), dim=-1) @ weights_of
    empty = v.mean(2, keepdim=True) if attrs["masked_row"] == "mean" and keys else torch.zeros_like(out)
    out = torch.where(masked, empty, out)
    return ((out.transpose(1, 2).flatten(2) if heads else out).contiguous(),)


def body(g: Any, inputs: Any, attrs: Any) -> tuple[Any]:
    q, k, v, group = body_heads(g, inputs, attrs)
    dtype = g.types["T"]
    if group != 1:
        k, v = (repeat_heads(g, q, x) for x in (k, v))
    visible = None  # [B, 1, 1, Sk]
    if inputs.key_lengths is not None:
        keys = g.Gather(g.Shape(k), g.constant(2, "int64"), axis=0)
        position = g.Range(g.constant(0, "int64"), keys, g.constant(1, "int64"))
        visible = g.Less(position, g.unsqueeze(g.cast(inputs.key_lengths, "int64"), [1, 2, 3]))
    if inputs.key_mask is not None:
        mask = g.unsqueeze(inputs.key_mask, [1, 2])
        visible = mask if visible is None else g.And(visible, mask)
    zero, minus_infinity = g.constant(0.0, dtype), g.constant(float("-inf"), dtype)
    values = v if visible is None else g.Where(g.Transpose(visible, perm=[0, 1, 3, 2]), v, zero)
    scores = g.Mul(g.MatMul(q, g.Transpose(k, perm=[0, 1, 3, 2])), g.constant(attrs.scale, dtype))
    if inputs.bias is not None:
        scores = g.Add(scores, inputs.bias)
    if visible is not None:
        scores = g.Where(visible, scores, minus_infinity)
    if attrs.causal:
        scores = g.Where(body_causal(g, q, k), scores, minus_infinity)
    if visible is None and inputs.bias is None and not attrs.causal:
        out = g.MatMul(g.softmax(scores), values)
    else:  # softmax of a row of -inf is NaN
        masked = g.Equal(g.cast(g.reduce_max(scores, axis=-1), "float32"), g.constant(float("-inf"), "float32"))
        out = g.MatMul(g.softmax(g.Where(masked, zero, scores)), values)
        out = g.Where(masked, g.reduce_mean(v, axis=2) if attrs.masked_row == "mean" else zero, out)
    if attrs.num_heads:
        out = g.Reshape(g.Transpose(out, perm=[0, 2, 1, 3]), g.constant([0, 0, -1], "int64"))
    return (out,)


def body_heads(g: Any, inputs: Any, attrs: Any) -> tuple[Any, Any, Any, int | None]:
    """q, k and v as [B, heads, S, D] in the function body, and how many query heads share a key head (None: not
    known)."""
    heads, kv_heads = attrs.num_heads, attrs.kv_num_heads or attrs.num_heads
    if not heads:
        q_heads, k_heads = (x.shape[1] if x.shape is not None else None for x in (inputs.q, inputs.k))
        group = q_heads // k_heads if isinstance(q_heads, int) and isinstance(k_heads, int) else None
        return inputs.q, inputs.k, inputs.v, group

    def split(x: Any, count: int) -> Any:
        return g.Transpose(g.Reshape(x, g.constant([0, 0, count, -1], "int64")), perm=[0, 2, 1, 3])

    if inputs.k is not None:
        return split(inputs.q, heads), split(inputs.k, kv_heads), split(inputs.v, kv_heads), heads // kv_heads
    packed = split(inputs.q, heads + 2 * kv_heads)
    bounds = [0, heads, heads + kv_heads, heads + 2 * kv_heads]
    q, k, v = (
        g.Slice(packed, *(g.constant([number], "int64") for number in (first, last, 1)))
        for first, last in itertools.pairwise(bounds)
    )
    return q, k, v, heads // kv_heads


def repeat_heads(g: Any, q: Any, x: Any) -> Any:
    """x [B, Hkv, S, D], each head repeated until there are as many as q has."""

    def size(of: Any, axis: int) -> Any:
        return g.Slice(g.Shape(of), g.constant([axis], "int64"), g.constant([axis + 1], "int64"))

    group = g.Div(size(q, 1), size(x, 1))
    wide = g.Concat(size(x, 0), size(x, 1), group, size(x, 2), size(x, 3), axis=0)
    flat = g.Concat(size(x, 0), size(q, 1), size(x, 2), size(x, 3), axis=0)
    return g.Reshape(g.Expand(g.unsqueeze(x, [2]), wide), flat)


def body_causal(g: Any, q: Any, k: Any) -> Any:
    """[Sq, Sk] bool: key position at most query position + Sk - Sq."""
    zero, one = g.constant(0, "int64"), g.constant(1, "int64")
    queries, keys = (g.Gather(g.Shape(x), g.constant(2, "int64"), axis=0) for x in (q, k))
    last_seen = g.Add(g.Range(zero, queries, one), g.Sub(keys, queries))
    return g.Not(g.Less(g.unsqueeze(last_seen, [1]), g.Range(zero, keys, one)))


attention = Op(
    name="attention",
    version=1,
    inputs=(
        Input("q"),
        Input("k", optional=True),
        Input("v", optional=True),
        Input("bias", optional=True),
        Input("key_lengths", "int32", optional=True),
        Input("key_mask", "bool", optional=True),
    ),
    outputs=(Output("out"),),
    attrs=(
        Attr("scale", "float"),
        Attr("causal", "bool", False),
        Attr("num_heads", "int", 0),
        Attr("kv_num_heads", "int", 0),
        Attr("masked_row", "string", "zero", choices=("zero", "mean")),
    ),
    types={"T": ("float32", "float16", "bfloat16")},
    infer=infer,
    plan=plan,
    reference=attention_reference,
    body=body,
)
