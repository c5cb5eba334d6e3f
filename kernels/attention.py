"""Scaled dot-product attention: one pass over the keys, nothing quadratic in memory.

    out = softmax(q k^T * scale + bias, over the keys that are not masked) v

Layouts, by `num_heads`:
    0: q [B, H, Sq, D], k and v [B, Hkv, Sk, D], out [B, H, Sq, D]
    H: q [B, Sq, H*D], k and v [B, Sk, Hkv*D], out [B, Sq, H*D], Hkv = kv_num_heads (0: H)
    H, k and v absent: q is packed [B, S, (H + 2 Hkv)*D], that is q, k and v side by side
Hkv divides H: query head h reads key head h // (H / Hkv). D is at most 256. fp32, fp16 or bf16, accumulated in fp32.

With a `softcap` c > 0 the scaled scores become c * tanh(scores / c) before the bias. A key is masked by any of:
`key_lengths` [B] int32 (keys from there on), `key_mask` [B, Sk] bool (where False), a sliding window (query i stands at
key i + Sk - Sq and sees `window_left` keys before and `window_right` after that one; -1: all), `causal`, which is a
`window_right` of 0, a `bias` of -inf. K and V of keys masked by length or key_mask may hold NaN.
`bias` [1|B, 1|H, 1|Sq, Sk] is added to the scaled scores. A query without any key gives zero (`masked_row="zero"`, what
torch does with bool masks) or the mean of v over all keys (`"mean"`, what adding finfo.min to every score comes to).
Source: Dao, "FlashAttention-2", 2023; torch.nn.functional.scaled_dot_product_attention.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from trimaran.kernels import attention_few, attention_hopper
from trimaran.kernels.attention_body import attention_body
from trimaran.kernels.attention_few import few_launch
from trimaran.kernels.attention_hopper import hopper_launch
from trimaran.kernels.configs import Row, lookup
from trimaran.kernels.contract import (
    ALIGNMENT,
    ITEMSIZE,
    Attr,
    Decline,
    Device,
    Input,
    Launch,
    Op,
    Output,
    Tensor,
    expect_shape,
    readable,
)
from trimaran.kernels.dependent import await_inputs, dependent
from trimaran.kernels.heads import head_view, heads_of, named_strides
from trimaran.kernels.sizes import cdiv, differ, known, power_of_2

MAX_HEAD_DIM = 256
FEW, MEDIUM, LONG = 128, 384, 1024  # keys
LOG2_E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-1e38)  # a bias below it hides a key; times log2(e) it could become -inf, which means more


@triton.jit
def attend(
    acc,  # [BLOCK_M, BLOCK_D] fp32: the sum of p * v so far, p = exp2(score - top)
    total,  # [BLOCK_M]: the sum of p so far
    top,  # [BLOCK_M]: the largest score so far; scores are times log2(e), but where EXACT
    q,  # [BLOCK_M, BLOCK_D]
    k_ptr,  # [keys, HEAD_DIM], or its descriptor
    v_ptr,
    bias_ptr,  # [queries, keys] or None
    bias_blocks,  # its descriptor, or None
    key_mask_ptr,  # [keys] bool or None
    stride_kn,
    stride_vn,
    stride_biasm,
    stride_biasn,
    stride_maskn,
    start,  # keys start .. end are visited
    end,
    length,  # keys from there on are masked
    m,  # [BLOCK_M]: query positions
    queries,
    shift,  # the key position that query 0 stands at
    scale,  # times log2(e), but where EXACT or for a soft cap
    cap,  # the soft cap, times log2(e) but where EXACT
    left,  # a query sees that many keys before its own position
    right,  # and that many after it
    EDGE: tl.constexpr,  # some of these keys may be masked; else all are visible to every query of the block
    DESCRIPTORS: tl.constexpr,
    FOLD: tl.constexpr,
    EXACT: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One pass of the online softmax over some keys."""
    d = tl.arange(0, BLOCK_D)
    in_head = d < HEAD_DIM
    for at in range(start, end, BLOCK_N):
        n = at + tl.arange(0, BLOCK_N)  # key positions
        column = n.to(tl.int64)
        valid = n < length
        if EDGE:
            if key_mask_ptr is not None:
                valid = valid & tl.load(key_mask_ptr + column * stride_maskn, mask=valid, other=0).to(tl.int1)
        if DESCRIPTORS:
            k = k_ptr.load([at, 0]).T
        else:
            k_at = k_ptr + column[None, :] * stride_kn + d[:, None]
            if EDGE:
                k = tl.load(k_at, mask=valid[None, :] & in_head[:, None], other=0.0)
            elif HEAD_DIM == BLOCK_D:
                k = tl.load(k_at)
            else:
                k = tl.load(k_at, mask=in_head[:, None], other=0.0)
        scores = tl.dot(q, k, input_precision="ieee")
        if not FOLD:
            scores = scores * scale
        if SOFT_CAP:
            scores = (1.0 - 2.0 / (tl.exp2(scores * (2.0 * LOG2_E)) + 1.0)) * cap  # cap * tanh(scores)
        if bias_ptr is not None:
            bias_at = bias_ptr + m.to(tl.int64)[:, None] * stride_biasm + column[None, :] * stride_biasn
            if EDGE:
                bias = tl.load(bias_at, mask=(m < queries)[:, None] & valid[None, :], other=0.0)
            elif bias_blocks is not None:
                bias = bias_blocks.load([tl.min(m, axis=0), at])
            else:
                bias = tl.load(bias_at, mask=(m < queries)[:, None], other=0.0)
            bias = bias.to(tl.float32)
            if not EXACT:
                bias = tl.where(bias < LOWEST, bias, bias * LOG2_E)  # finfo.min must stay finite
            scores += bias
        if EDGE:
            scores = tl.where(valid[None, :], scores, float("-inf"))
            if RIGHT:
                scores = tl.where(n[None, :] <= m[:, None] + (shift + right), scores, float("-inf"))
            if LEFT:
                scores = tl.where(n[None, :] >= m[:, None] + (shift - left), scores, float("-inf"))
        highest = tl.max(scores, axis=1)
        if FOLD:
            highest = highest * scale
        higher = tl.maximum(top, highest)
        finite = higher
        if EDGE or bias_ptr is not None:  # -inf - -inf would be NaN
            finite = tl.where(higher == float("-inf"), 0.0, higher)
        if FOLD:  # one fused multiply-add an element
            p = tl.exp2(scores * scale - finite[:, None])
            shrink = tl.exp2(top - finite)
        elif EXACT:  # the difference is exact where it matters, near the maximum; its logarithm's base comes after
            p = tl.exp2((scores - finite[:, None]) * LOG2_E)
            shrink = tl.exp2((top - finite) * LOG2_E)
        else:
            p = tl.exp2(scores - finite[:, None])
            shrink = tl.exp2(top - finite)
        total = total * shrink + tl.sum(p, axis=1)
        acc = acc * shrink[:, None]
        if DESCRIPTORS:
            v = v_ptr.load([at, 0])
        else:
            v_at = v_ptr + column[:, None] * stride_vn + d[None, :]
            if EDGE:  # what is masked may be NaN
                v = tl.load(v_at, mask=valid[:, None] & in_head[None, :], other=0.0)
            elif HEAD_DIM == BLOCK_D:
                v = tl.load(v_at)
            else:
                v = tl.load(v_at, mask=in_head[None, :], other=0.0)
        acc = tl.dot(p.to(v.dtype), v, acc, input_precision="ieee")
        top = higher
    return acc, total, top


@triton.jit
def first_hole(key_mask_ptr, stride_maskn, length, CHUNK: tl.constexpr):
    """The first key that key_mask [keys] hides, at most length."""
    hole = length
    for at in range(0, length, CHUNK):
        n = at + tl.arange(0, CHUNK)
        seen = tl.load(key_mask_ptr + n.to(tl.int64) * stride_maskn, mask=n < length, other=1).to(tl.int1)
        hole = tl.minimum(hole, tl.min(tl.where(seen, length, n), axis=0))
    return hole


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
    batches,  # B
    heads,  # H
    group,  # query heads that share a key head
    queries,  # Sq
    keys,  # Sk
    scale,
    cap,
    left,
    right,
    SOFT_CAP: tl.constexpr,  # cap is given
    LEFT: tl.constexpr,  # left is given
    RIGHT: tl.constexpr,  # right is given
    MEAN: tl.constexpr,  # masked_row == "mean"
    DESCRIPTORS: tl.constexpr,  # read blocks of k and v that nothing masks by tensor descriptors
    BIAS_DESCRIPTOR: tl.constexpr,  # and those of the bias
    FOLD: tl.constexpr,  # multiply by the scale, which is positive, after the maximum is taken
    EXACT: tl.constexpr,  # fp32: scores keep their own units, which costs a multiplication an element
    PDL: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,  # power of two, at least HEAD_DIM
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    # One program per block of BLOCK_M queries of one head: grid = (cdiv(queries, BLOCK_M) * heads * B,). The blocks of
    # a head stand next to each other, so that they find its keys in the cache; with a bias, which all batches may
    # share, the batches do. The last block, which sees most under causality, goes first.
    if PDL:
        await_inputs()
    blocks = tl.cdiv(queries, BLOCK_M)
    if bias_ptr is not None:
        batch = (tl.program_id(0) % batches).to(tl.int64)
        block = blocks - 1 - tl.program_id(0) // batches % blocks
        head = (tl.program_id(0) // batches // blocks).to(tl.int64)
        bias_ptr += batch * stride_biasb + head * stride_biash
    else:
        block = blocks - 1 - tl.program_id(0) % blocks
        head = (tl.program_id(0) // blocks % heads).to(tl.int64)
        batch = (tl.program_id(0) // blocks // heads).to(tl.int64)
    q_ptr += batch * stride_qb + head * stride_qh
    k_ptr += batch * stride_kb + head // group * stride_kh
    v_ptr += batch * stride_vb + head // group * stride_vh
    out_ptr += batch * stride_ob + head * stride_oh

    m = block * BLOCK_M + tl.arange(0, BLOCK_M)  # query positions
    d = tl.arange(0, BLOCK_D)
    in_head = d < HEAD_DIM
    row = m.to(tl.int64)[:, None]
    q_mask = (m < queries)[:, None] & in_head[None, :]
    q = tl.load(q_ptr + row * stride_qm + d[None, :], mask=q_mask, other=0.0)
    if not EXACT:
        cap = cap * LOG2_E
        if not SOFT_CAP:
            scale = scale * LOG2_E

    # Keys start .. end are visited. Of them, full_start .. full_end are seen by every query of the block: whole blocks
    # of keys that need no mask, between edges that do.
    shift = keys - queries
    length = keys
    if key_lengths_ptr is not None:
        length = tl.minimum(tl.maximum(tl.load(key_lengths_ptr + batch * stride_lengths), 0), keys)
    start, end = 0, length
    full_start, full_end = 0, length
    if key_mask_ptr is not None:
        key_mask_ptr += batch * stride_maskb
        full_end = first_hole(key_mask_ptr, stride_maskn, length, 1024)
    if RIGHT:
        end = tl.minimum(end, block * BLOCK_M + BLOCK_M + shift + right)
        full_end = tl.minimum(full_end, block * BLOCK_M + 1 + shift + right)
    if LEFT:
        start = tl.maximum(block * BLOCK_M + shift - left, 0) // BLOCK_N * BLOCK_N
        last = tl.minimum(block * BLOCK_M + BLOCK_M, queries) - 1
        full_start = tl.cdiv(tl.maximum(last + shift - left, 0), BLOCK_N) * BLOCK_N
    full_end = tl.maximum(full_end, full_start) // BLOCK_N * BLOCK_N

    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    if LEFT:
        acc, total, top = attend(
            acc, total, top, q, k_ptr, v_ptr, bias_ptr, None, key_mask_ptr, stride_kn, stride_vn, stride_biasm,
            stride_biasn, stride_maskn, start, tl.minimum(full_start, end), length, m, queries, shift, scale, cap,
            left, right, True, False, FOLD, EXACT, SOFT_CAP, LEFT, RIGHT, HEAD_DIM, BLOCK_D, BLOCK_N,
        )  # fmt: skip
    if DESCRIPTORS:
        k_blocks = tl.make_tensor_descriptor(k_ptr, [keys, HEAD_DIM], [stride_kn, 1], [BLOCK_N, BLOCK_D])
        v_blocks = tl.make_tensor_descriptor(v_ptr, [keys, HEAD_DIM], [stride_vn, 1], [BLOCK_N, BLOCK_D])
    else:
        k_blocks, v_blocks = k_ptr, v_ptr
    bias_blocks = None
    if BIAS_DESCRIPTOR:
        bias_blocks = tl.make_tensor_descriptor(bias_ptr, [queries, keys], [stride_biasm, 1], [BLOCK_M, BLOCK_N])
    acc, total, top = attend(
        acc, total, top, q, k_blocks, v_blocks, bias_ptr, bias_blocks, key_mask_ptr, stride_kn, stride_vn,
        stride_biasm, stride_biasn, stride_maskn, full_start, full_end, length, m, queries, shift, scale, cap, left,
        right, False, DESCRIPTORS, FOLD, EXACT, SOFT_CAP, LEFT, RIGHT, HEAD_DIM, BLOCK_D, BLOCK_N,
    )  # fmt: skip
    acc, total, top = attend(
        acc, total, top, q, k_ptr, v_ptr, bias_ptr, None, key_mask_ptr, stride_kn, stride_vn, stride_biasm,
        stride_biasn, stride_maskn, full_end, end, length, m, queries, shift, scale, cap, left, right,
        True, False, FOLD, EXACT, SOFT_CAP, LEFT, RIGHT, HEAD_DIM, BLOCK_D, BLOCK_N,
    )  # fmt: skip

    masked = total == 0.0
    out = acc / tl.where(masked, 1.0, total)[:, None]
    if MEAN:
        if tl.max(masked.to(tl.int32), axis=0) > 0:
            mean = tl.zeros([BLOCK_D], tl.float32)
            for at in range(0, keys, BLOCK_N):
                n = at + tl.arange(0, BLOCK_N)
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

# For compute capability 9.0 and half precision, measured on an H200 (Triton 3.6). bias, masked (by key) and causal are
# 0 or 1; descriptors pay where keys are many, or where a bias comes in tiles.
HOPPER: list[Row] = [
    (
        {"bias": 0, "queries": 16, "keys": 16, "head_dim": 64},
        {"BLOCK_M": 16, "BLOCK_N": 16, "num_warps": 4, "num_stages": 1},
    ),
    ({"queries": 16, "head_dim": 128}, {"BLOCK_M": 16, "BLOCK_N": 64, "num_warps": 4, "num_stages": 2}),
    ({"bias": 0, "head_dim": 64, "keys": 128}, {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 4, "num_stages": 2}),
    (
        {"bias": 0, "head_dim": 64, "causal": 0, "masked": 0, "keys": 8192},
        {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 8, "num_stages": 3},
    ),
    (
        {"bias": 0, "head_dim": 64, "causal": 0, "keys": 8192},
        {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 4, "num_stages": 3},
    ),
    ({"bias": 0, "head_dim": 64, "keys": 1024}, {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 4, "num_stages": 2}),
    (
        {"bias": 0, "head_dim": 64},
        {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 4, "num_stages": 3, "DESCRIPTORS": 1},
    ),
    (
        {"bias": 0, "head_dim": 128, "keys": 8192},
        {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 8, "num_stages": 3},
    ),
    (
        {"bias": 0, "head_dim": 128},
        {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 4, "num_stages": 3, "DESCRIPTORS": 1},
    ),
    (
        {"head_dim": 64},
        {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 4, "num_stages": 3, "DESCRIPTORS": 1, "BIAS_DESCRIPTOR": 1},
    ),
    (
        {"head_dim": 128},
        {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 8, "num_stages": 3, "DESCRIPTORS": 1, "BIAS_DESCRIPTOR": 1},
    ),
    ({}, {"BLOCK_M": 64, "BLOCK_N": 32, "num_warps": 4, "num_stages": 2}),
]


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
    if attrs.softcap < 0:
        raise ValueError(f"attention: softcap is {attrs.softcap}, expected 0 for none or a positive number")
    if attrs.causal and attrs.window_right > 0:
        raise ValueError(f"attention: window_right is {attrs.window_right}, expected -1 or 0 where causal")
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
    mean = attrs.masked_row == "mean"
    if suits_few(q, k, v, inputs, attrs, device):
        return [few_launch(q, k, v, out, lengths, mask, attrs.causal, mean, attrs.scale, device)]
    if suits_hopper(q, k, v, inputs, attrs, device):
        return [hopper_launch(q, k, v, out, lengths, attrs.causal, attrs.scale, device)]
    table = HOPPER if device.capability == 90 and q.dtype != "float32" else CONFIGS
    facts = {"bias": int(bias is not None), "masked": int(mask is not None), "causal": int(attrs.causal)}
    config = dict(lookup(table, dtype=q.dtype, head_dim=head_dim, queries=queries, keys=k.shape[2], **facts))
    descriptors = bool(config.pop("DESCRIPTORS", 0)) and all(map(descriptor_fits, (k, v)))
    bias_descriptor = bool(config.pop("BIAS_DESCRIPTOR", 0)) and bias is not None and bias_fits(bias, queries)
    block_m, block_n = config.pop("BLOCK_M"), config.pop("BLOCK_N")
    left, right = attrs.window_left, 0 if attrs.causal else attrs.window_right
    constants: dict[str, Any] = {}
    strides = {
        **named_strides("q", q, "bhm"),
        **named_strides("k", k, "bhn"),
        **named_strides("v", v, "bhn"),
        **named_strides("o", out, "bhm"),
        **named_strides("bias", bias, "bhm"),
        **named_strides("mask", mask, "b"),
        "stride_lengths": lengths.strides[0] if lengths is not None else 0,
    }
    for name, tensor in (("stride_biasn", bias), ("stride_maskn", mask)):  # known where they are 1, for wide loads
        step = tensor.strides[-1] if tensor is not None else 1
        (constants if step == 1 else strides)[name] = 1 if step == 1 else step
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
                "batches": batch,
                "heads": heads,
                "group": heads // k.shape[1],
                "queries": queries,
                "keys": k.shape[2],
                "scale": attrs.scale / attrs.softcap if attrs.softcap else attrs.scale,
                "cap": attrs.softcap,
                "left": left,
                "right": right,
            },
            constexprs={
                **constants,
                "SOFT_CAP": attrs.softcap > 0,
                "LEFT": left >= 0,
                "RIGHT": right >= 0,
                "DESCRIPTORS": descriptors,
                "BIAS_DESCRIPTOR": bias_descriptor,
                "FOLD": q.dtype != "float32" and attrs.scale > 0 and not attrs.softcap and bias is None,
                "EXACT": q.dtype == "float32",
                "PDL": dependent(device),
                "MEAN": mean,
                "HEAD_DIM": head_dim,
                "BLOCK_D": power_of_2(head_dim, least=16),
                "BLOCK_M": block_m,
                "BLOCK_N": block_n,
            },
            options={**config, "launch_pdl": dependent(device)},
        )
    ]


def suits_gluon(q: Tensor, inputs: Any, attrs: Any, device: Device) -> bool:
    """Whether this is what both Gluon kernels compute."""
    return (
        device.capability == 90
        and q.dtype != "float32"
        and inputs.bias is None
        and attrs.softcap == 0
        and attrs.scale > 0
        and attrs.window_left < 0
        and attrs.window_right < 0
    )


def suits_few(q: Tensor, k: Tensor, v: Tensor, inputs: Any, attrs: Any, device: Device) -> bool:
    """Whether `attention_few` computes this: all keys in one block; for more than FEW of them it pays where a
    multiprocessor has no second block."""
    batch, heads, queries, head_dim = q.shape
    keys = k.shape[2]
    return (
        suits_gluon(q, inputs, attrs, device)
        and not (attrs.causal and attrs.masked_row == "mean")
        and bool(head_dim <= attention_few.MAX_HEAD_DIM)
        and bool(keys > 0)
        and bool(keys <= attention_few.MAX_KEYS)
        and (bool(keys <= FEW) or bool(cdiv(queries, attention_few.ROWS) * heads * batch <= device.sm_count))
        and all(map(vectors_fit, (q, k, v)))
    )


def suits_hopper(q: Tensor, k: Tensor, v: Tensor, inputs: Any, attrs: Any, device: Device) -> bool:
    """Whether `attention_hopper` computes this, and keys are many enough for its longer start to pay."""
    return (
        suits_gluon(q, inputs, attrs, device)
        and inputs.key_mask is None
        and attrs.masked_row == "zero"
        and bool(q.shape[3] <= attention_hopper.MAX_HEAD_DIM)
        and bool(k.shape[2] > (LONG if attrs.causal else MEDIUM))
        and all(map(descriptor_fits, (q, k, v)))
    )


def vectors_fit(tensor: Tensor) -> bool:
    """Whether copies of 16 bytes can read these rows: everything starts on what a kernel knows of as a multiple."""
    steps = [0 if size == 1 else stride for size, stride in zip(tensor.shape[:3], tensor.strides[:3], strict=True)]
    return tensor.aligned and all(number % 16 == 0 for number in (tensor.offset, tensor.shape[3], *steps))


def descriptor_fits(tensor: Tensor) -> bool:
    """Whether the hardware's tensor descriptors can read these rows: everything starts on a multiple of 16 bytes."""
    steps = [stride for size, stride in zip(tensor.shape[:3], tensor.strides[:3], strict=True) if size != 1]
    numbers = (tensor.offset, tensor.shape[3], *steps)
    whole = all(number * ITEMSIZE[tensor.dtype] % ALIGNMENT == 0 for number in numbers)
    return tensor.aligned and whole and all(stride > 0 for stride in steps)


def bias_fits(bias: Tensor, queries: Any) -> bool:
    """Whether a tensor descriptor can read it: a row for each query, and everything on a multiple of 16 bytes."""
    strides = [0 if size == 1 else stride for size, stride in zip(bias.shape[:3], bias.strides[:3], strict=True)]
    starts = all(number * ITEMSIZE[bias.dtype] % ALIGNMENT == 0 for number in (bias.offset, *strides))
    return bias.aligned and starts and bias.strides[3] == 1 and bias.shape[2] == queries and queries > 1


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
    left, right = attrs["window_left"], 0 if attrs["causal"] else attrs["window_right"]
    stands = torch.arange(queries, device=q.device)[:, None] + (keys - queries)
    if right >= 0:
        visible = visible & (position <= stands + right)
    if left >= 0:
        visible = visible & (position >= stands - left)
    if q.dtype.itemsize < 4:  # products of 16 bits need not fit into them
        q, k = q.float(), k.float()
    scores = q @ k.transpose(-1, -2) * attrs["scale"]
    if attrs["softcap"] > 0:
        scores = torch.tanh(scores / attrs["softcap"]) * attrs["softcap"]
    if bias is not None:
        scores = scores + bias
    scores = scores.masked_fill(~visible, float("-inf"))
    masked = (scores == float("-inf")).all(-1, keepdim=True)
    out = torch.softmax(scores.masked_fill(masked, 0.0), dim=-1).to(v.dtype) @ weights_of
    empty = v.mean(2, keepdim=True) if attrs["masked_row"] == "mean" and keys else torch.zeros_like(out)
    out = torch.where(masked, empty, out)
    return ((out.transpose(1, 2).flatten(2) if heads else out).contiguous(),)


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
        Attr("window_left", "int", -1),
        Attr("window_right", "int", -1),
        Attr("softcap", "float", 0.0),
        Attr("masked_row", "string", "zero", choices=("zero", "mean")),
    ),
    types={"T": ("float32", "float16", "bfloat16")},
    infer=infer,
    plan=plan,
    reference=attention_reference,
    body=attention_body,
)
