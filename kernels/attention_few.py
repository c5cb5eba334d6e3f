"""Scaled dot-product attention to few keys on Hopper (compute capability 9.0), written in Gluon.

What `attention_kernel` computes, for half precision, without bias, soft cap and window. Where all keys of a head fit
into one block, what counts is latency: a program asks for its queries, all keys and all values at once, by copies into
shared memory which take no registers, and then needs two products and no loop. Rows that are masked are never asked
for, so NaN in padding does not arrive.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from trimaran.kernels.contract import Device, Launch, Tensor
from trimaran.kernels.dependent import await_inputs, dependent
from trimaran.kernels.heads import named_strides
from trimaran.kernels.linear_few import copy
from trimaran.kernels.sizes import cdiv, power_of_2

MAX_KEYS = 256
MAX_HEAD_DIM = 128
ROWS = 64  # queries of a program
LOG2_E = gl.constexpr(1.4426950408889634)


@gluon.jit
def copy_head(ptr, stride, row, inside, block, HEAD_DIM: gl.constexpr):
    """Ask for rows of a head, [rows, HEAD_DIM], where they are inside; the rest of the block becomes zero."""
    d = gl.arange(0, block.shape[1], gl.SliceLayout(0, copy_layout(block.shape[1])))
    at = ptr + row.to(gl.int64)[:, None] * stride + d[None, :]
    copy(block, at, mask=inside[:, None] & (d < HEAD_DIM)[None, :])
    async_copy.commit_group()


@gluon.constexpr_function
def copy_layout(width):
    """Sixteen bytes a thread, rows of `width` elements of two bytes side by side."""
    return gl.BlockedLayout([1, 8], [256 // width, width // 8], [4, 1], [1, 0])


@gluon.jit
def seen_keys(n, key_mask_ptr, stride_maskn, length):
    seen = n < length
    if key_mask_ptr is not None:
        seen = seen & (gl.load(key_mask_ptr + n * stride_maskn, mask=seen, other=0) != 0)
    return seen


@gluon.jit
def attention_few_kernel(
    q_ptr,  # [B, H, queries, HEAD_DIM]; rows and all else of q, k and v start on multiples of 16 bytes
    k_ptr,  # [B, H // group, keys, HEAD_DIM]
    v_ptr,  # [B, H // group, keys, HEAD_DIM]
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
    scale,  # positive
    CAUSAL: gl.constexpr,
    MEAN: gl.constexpr,  # masked_row == "mean"; not with CAUSAL
    PDL: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    BLOCK_D: gl.constexpr,  # power of two, at least HEAD_DIM
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,  # power of two, at least keys
):
    # One program per block of BLOCK_M queries of one head: grid = (cdiv(queries, BLOCK_M) * heads * B,).
    dtype: gl.constexpr = q_ptr.dtype.element_ty
    COPY: gl.constexpr = copy_layout(BLOCK_D)
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_D, 16])
    KV: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_N, BLOCK_D], dtype)
    q_block = gl.allocate_shared_memory(
        dtype, [BLOCK_M, BLOCK_D], gl.NVMMASharedLayout.get_default_for([BLOCK_M, BLOCK_D], dtype)
    )
    k_block = gl.allocate_shared_memory(dtype, [BLOCK_N, BLOCK_D], KV)
    v_block = gl.allocate_shared_memory(dtype, [BLOCK_N, BLOCK_D], KV)
    blocks = gl.cdiv(queries, BLOCK_M)
    first = gl.program_id(0) % blocks * BLOCK_M
    head = (gl.program_id(0) // blocks % heads).to(gl.int64)
    batch = (gl.program_id(0) // blocks // heads).to(gl.int64)
    k_ptr += batch * stride_kb + head // group * stride_kh
    v_ptr += batch * stride_vb + head // group * stride_vh
    if key_mask_ptr is not None:
        key_mask_ptr += batch * stride_maskb
    if PDL:
        await_inputs()

    row = gl.arange(0, BLOCK_N, gl.SliceLayout(1, COPY))
    q_row = first + gl.arange(0, BLOCK_M, gl.SliceLayout(1, COPY))
    copy_head(q_ptr + batch * stride_qb + head * stride_qh, stride_qm, q_row, q_row < queries, q_block, HEAD_DIM)
    length = keys
    if key_lengths_ptr is not None:
        length = gl.minimum(gl.maximum(gl.load(key_lengths_ptr + batch * stride_lengths), 0), keys)
    copy_head(k_ptr, stride_kn, row, row < length, k_block, HEAD_DIM)
    copy_head(v_ptr, stride_vn, row, seen_keys(row, key_mask_ptr, stride_maskn, length), v_block, HEAD_DIM)
    n = gl.arange(0, BLOCK_N, gl.SliceLayout(0, SCORES))
    m = first + gl.arange(0, BLOCK_M, gl.SliceLayout(1, SCORES))
    seen = seen_keys(n, key_mask_ptr, stride_maskn, length)

    async_copy.wait_group(1)
    fence_async_shared()
    scores = gl.zeros([BLOCK_M, BLOCK_N], gl.float32, SCORES)
    scores = warpgroup_mma(q_block, k_block.permute((1, 0)), scores, use_acc=False, is_async=True)
    scores = warpgroup_mma_wait(0, deps=(scores,))
    scores = gl.where(seen[None, :], scores, float("-inf"))
    if CAUSAL:
        scores = gl.where(n[None, :] <= m[:, None] + (keys - queries), scores, float("-inf"))
    top = gl.max(scores, axis=1)
    top = gl.where(top == float("-inf"), 0.0, top)  # -inf - -inf would be NaN
    scale = scale * LOG2_E
    weights = gl.exp2(scores * scale - (top * scale)[:, None])
    if MEAN:
        if gl.sum(seen.to(gl.int32), axis=0) == 0:
            copy_head(v_ptr, stride_vn, row, row < keys, v_block, HEAD_DIM)
            weights = gl.zeros([BLOCK_M, BLOCK_N], gl.float32, SCORES) + gl.where(n < keys, 1.0, 0.0)[None, :]
    total = gl.sum(weights, axis=1)
    total = gl.where(total == 0.0, 1.0, total)

    async_copy.wait_group(0)
    fence_async_shared()
    weights = gl.convert_layout(weights.to(dtype), gl.DotOperandLayout(0, OUT, 2))
    out = warpgroup_mma(weights, v_block, gl.zeros([BLOCK_M, BLOCK_D], gl.float32, OUT), use_acc=False, is_async=True)
    out = warpgroup_mma_wait(0, deps=(out,))
    out = out / gl.expand_dims(gl.convert_layout(total, gl.SliceLayout(1, OUT)), 1)
    d = gl.arange(0, BLOCK_D, gl.SliceLayout(0, COPY))
    at = out_ptr + batch * stride_ob + head * stride_oh + q_row.to(gl.int64)[:, None] * stride_om + d[None, :]
    gl.store(at, gl.convert_layout(out.to(dtype), COPY), mask=(q_row < queries)[:, None] & (d < HEAD_DIM)[None, :])


def few_launch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    key_lengths: Tensor | None,
    key_mask: Tensor | None,
    causal: bool,
    mean: bool,
    scale: float,
    device: Device,
) -> Launch:
    """The launch for q and out [B, H, Sq, D], k and v [B, Hkv, Sk, D], views whose rows start on whole vectors;
    key_lengths [B] int32, key_mask [B, Sk]."""
    batch, heads, queries, head_dim = q.shape
    return Launch(
        attention_few_kernel,
        grid=(cdiv(queries, ROWS) * heads * batch,),
        args={
            "q_ptr": q,
            "k_ptr": k,
            "v_ptr": v,
            "key_lengths_ptr": key_lengths,
            "key_mask_ptr": key_mask,
            "out_ptr": out,
            **named_strides("q", q, "bhm"),
            **named_strides("k", k, "bhn"),
            **named_strides("v", v, "bhn"),
            **named_strides("o", out, "bhm"),
            **named_strides("mask", key_mask, "bn"),
            "stride_lengths": key_lengths.strides[0] if key_lengths is not None else 0,
            "heads": heads,
            "group": heads // k.shape[1],
            "queries": queries,
            "keys": k.shape[2],
            "scale": scale,
        },
        constexprs={
            "CAUSAL": causal,
            "MEAN": mean,
            "PDL": dependent(device),
            "HEAD_DIM": int(head_dim),
            "BLOCK_D": power_of_2(head_dim, least=32),
            "BLOCK_M": ROWS,
            "BLOCK_N": power_of_2(k.shape[2], least=16),
        },
        options={"num_warps": 4, "num_stages": 1, "launch_pdl": dependent(device)},
    )
