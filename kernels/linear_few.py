"""Few rows times one weight, several, or a gated pair, on Hopper (compute capability 9.0), written in Gluon.

What `linear_kernel` and `gated_linear_kernel` compute, in half precision. With few rows all that counts is how soon the
weights are here, and how little happens after the input is. So a program asks for all of its weights, or as much as its
ring holds, before it waits for the last kernel: copies into shared memory, which take no registers. A tile is turned,
columns of the weight times rows of x: the hardware's product has at least 64 rows, and 8 columns or more.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from trimaran.kernels.activations import activated
from trimaran.kernels.dependent import await_rest, begin
from trimaran.kernels.linear_tiles import load_bias, tiles_of_all, weight_of_tile
from trimaran.kernels.matmul import grouped

# its name to Triton 3.8
copy = async_copy.async_load if hasattr(async_copy, "async_load") else async_copy.async_copy_global_to_shared


@gluon.jit
def copy_rows(ptr, stride, rows, first, k, last, slot, ROWS: gl.constexpr):
    """Ask for [ROWS, BLOCK_K] of rows that step by stride, from row `first` and column k on; zero from `last` on, and
    beyond the rows (to read the last one instead, again and again, makes one slice of the L2 the bottleneck)."""
    BLOCK_K: gl.constexpr = slot.shape[1]
    COPY: gl.constexpr = gl.BlockedLayout([1, 8], [256 // BLOCK_K, BLOCK_K // 8], [gl.num_warps(), 1], [1, 0])
    row = first + gl.arange(0, ROWS, gl.SliceLayout(1, COPY))
    column = k + gl.arange(0, BLOCK_K, gl.SliceLayout(0, COPY))
    at = ptr + row.to(gl.int64)[:, None] * stride + column[None, :]
    copy(slot, at, mask=(row < rows)[:, None] & (column < last)[None, :])


@gluon.jit
def copy_weight(ptr, stride, columns, first, k, last, slot, TRANSPOSE: gl.constexpr, BLOCK_N: gl.constexpr):
    """The same of a weight: BLOCK_N of its columns from `first` on."""
    if TRANSPOSE:
        BLOCK_K: gl.constexpr = slot.shape[0]
        COPY: gl.constexpr = gl.BlockedLayout([1, 8], [256 // BLOCK_N, BLOCK_N // 8], [gl.num_warps(), 1], [1, 0])
        row = k + gl.arange(0, BLOCK_K, gl.SliceLayout(1, COPY))
        column = first + gl.arange(0, BLOCK_N, gl.SliceLayout(0, COPY))
        at = ptr + row.to(gl.int64)[:, None] * stride + column[None, :]
        copy(slot, at, mask=(row < last)[:, None] & (column < columns)[None, :])
    else:
        copy_rows(ptr, stride, columns, first, k, last, slot, BLOCK_N)


@gluon.jit
def as_left(block, TRANSPOSE: gl.constexpr):
    """A block of a weight as the left operand, [BLOCK_N, BLOCK_K]."""
    if TRANSPOSE:
        return block.permute((1, 0))
    else:
        return block


@gluon.jit
def few_rows(
    x_ptr, stride_x, rows, row, weight_ptr, stride_weight, up_ptr, stride_up, columns, column, first, last,
    TRANSPOSE: gl.constexpr, PDL: gl.constexpr, EARLY: gl.constexpr, WHOLE: gl.constexpr, STAGES: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr,
):  # fmt: skip
    """[BLOCK_N, BLOCK_M] of the weight times x, summed over the depth from first to last; and that of `up`."""
    dtype: gl.constexpr = x_ptr.dtype.element_ty
    GATED: gl.constexpr = up_ptr is not None
    SHAPE: gl.constexpr = [BLOCK_K, BLOCK_N] if TRANSPOSE else [BLOCK_N, BLOCK_K]
    WEIGHT: gl.constexpr = gl.NVMMASharedLayout.get_default_for(SHAPE, dtype)
    X: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_M, BLOCK_K], dtype)
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, BLOCK_M, 16])
    ring = gl.allocate_shared_memory(dtype, [STAGES, SHAPE[0], SHAPE[1]], WEIGHT)
    up_ring = ring
    if GATED:
        up_ring = gl.allocate_shared_memory(dtype, [STAGES, SHAPE[0], SHAPE[1]], WEIGHT)
    x_ring = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_M, BLOCK_K], X)
    begin(PDL, EARLY)
    for stage in gl.static_range(STAGES):
        k = first + stage * BLOCK_K
        copy_weight(weight_ptr, stride_weight, columns, column, k, last, ring.index(stage), TRANSPOSE, BLOCK_N)
        if GATED:
            copy_weight(up_ptr, stride_up, columns, column, k, last, up_ring.index(stage), TRANSPOSE, BLOCK_N)
    await_rest(PDL, EARLY)
    for stage in gl.static_range(STAGES):
        copy_rows(x_ptr, stride_x, rows, row, first + stage * BLOCK_K, last, x_ring.index(stage), BLOCK_M)
        async_copy.commit_group()
    acc = gl.zeros([BLOCK_N, BLOCK_M], gl.float32, ACC)
    up = gl.zeros([BLOCK_N, BLOCK_M], gl.float32, ACC)
    if WHOLE:
        for stage in gl.static_range(STAGES):
            async_copy.wait_group(STAGES - 1 - stage)
            x = x_ring.index(stage).permute((1, 0))
            acc = warpgroup_mma(as_left(ring.index(stage), TRANSPOSE), x, acc, is_async=True)
            if GATED:
                up = warpgroup_mma(as_left(up_ring.index(stage), TRANSPOSE), x, up, is_async=True)
        if GATED:
            acc, up = warpgroup_mma_wait(0, deps=(acc, up))
        else:
            acc = warpgroup_mma_wait(0, deps=(acc,))
    else:
        for step in range(gl.cdiv(last - first, BLOCK_K)):
            slot = step % STAGES
            async_copy.wait_group(STAGES - 1)
            x = x_ring.index(slot).permute((1, 0))
            acc = warpgroup_mma(as_left(ring.index(slot), TRANSPOSE), x, acc, is_async=True)
            if GATED:
                up = warpgroup_mma(as_left(up_ring.index(slot), TRANSPOSE), x, up, is_async=True)
                acc, up = warpgroup_mma_wait(0, deps=(acc, up))
            else:
                acc = warpgroup_mma_wait(0, deps=(acc,))
            k = first + (step + STAGES) * BLOCK_K
            copy_weight(weight_ptr, stride_weight, columns, column, k, last, ring.index(slot), TRANSPOSE, BLOCK_N)
            if GATED:
                copy_weight(up_ptr, stride_up, columns, column, k, last, up_ring.index(slot), TRANSPOSE, BLOCK_N)
            copy_rows(x_ptr, stride_x, rows, row, k, last, x_ring.index(slot), BLOCK_M)
            async_copy.commit_group()
        # Beyond the depth zeros are copied: they too have to be here before what follows gets the ring's memory.
        async_copy.wait_group(0)
    return acc, up


@gluon.jit
def linear_few_kernel(
    x_ptr,  # all as linear_kernel's, and every row starts on a multiple of 16 elements
    weight_ptr,
    weight_1_ptr,
    weight_2_ptr,
    bias_ptr,
    bias_1_ptr,
    bias_2_ptr,
    residual_ptr,
    out_ptr,
    stride_x,
    stride_weight,
    stride_weight_1,
    stride_weight_2,
    stride_residual,
    rows,
    columns,
    columns_1,
    columns_2,
    width,
    depth,
    ACTIVATION: gl.constexpr,
    TRANSPOSE: gl.constexpr,
    SPLIT: gl.constexpr,
    PDL: gl.constexpr,
    EARLY: gl.constexpr,
    WHOLE: gl.constexpr,  # a part of the depth fits the ring
    GROUP: gl.constexpr,
    STAGES: gl.constexpr,  # blocks in the ring
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr,
):
    # The grid is linear_kernel's: (cdiv(rows, BLOCK_M) * tiles of all weights, SPLIT).
    tiles_n = tiles_of_all(columns, columns_1, columns_2, BLOCK_N)
    tile_m, tile_n = grouped(gl.program_id(0), gl.cdiv(rows, BLOCK_M), tiles_n, GROUP)
    part, weight_ptr, stride_weight, columns, tile_n, start = weight_of_tile(
        tile_n, weight_ptr, weight_1_ptr, weight_2_ptr, stride_weight, stride_weight_1, stride_weight_2, columns,
        columns_1, columns_2, BLOCK_N,
    )  # fmt: skip
    row, column = tile_m * BLOCK_M, tile_n * BLOCK_N
    share = gl.cdiv(gl.cdiv(depth, BLOCK_K), SPLIT) * BLOCK_K
    first = gl.program_id(1) * share
    last = gl.minimum(first + share, depth)
    acc, _up = few_rows(
        x_ptr, stride_x, rows, row, weight_ptr, stride_weight, None, 0, columns, column, first, last, TRANSPOSE, PDL,
        EARLY, WHOLE, STAGES, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    STORE: gl.constexpr = gl.BlockedLayout([1, 4], [512 // BLOCK_N // 4, BLOCK_N // 4], [gl.num_warps(), 1], [1, 0])
    m = row + gl.arange(0, BLOCK_M, gl.SliceLayout(1, STORE))
    n = column + gl.arange(0, BLOCK_N, gl.SliceLayout(0, STORE))
    inside = (m < rows)[:, None] & (n < columns)[None, :]
    at = m.to(gl.int64)[:, None] * width + (start + n)[None, :]
    out = gl.convert_layout(gl.permute(acc, (1, 0)), STORE)
    if SPLIT > 1:
        gl.store(out_ptr + gl.program_id(1).to(gl.int64) * rows * width + at, out, mask=inside)
    else:
        out += load_bias(part, bias_ptr, bias_1_ptr, bias_2_ptr, n, columns)[None, :]
        out = activated(out, ACTIVATION, False)
        if residual_ptr is not None:
            residual_at = residual_ptr + m.to(gl.int64)[:, None] * stride_residual + (start + n)[None, :]
            out += gl.load(residual_at, mask=inside, other=0.0).to(gl.float32)
        gl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=inside)


@gluon.jit
def gated_linear_few_kernel(
    x_ptr,  # all as gated_linear_kernel's, and every row starts on a multiple of 16 elements
    gate_ptr,
    up_ptr,
    gate_bias_ptr,
    up_bias_ptr,
    out_ptr,
    stride_x,
    stride_gate,
    stride_up,
    rows,
    columns,
    depth,
    ACTIVATION: gl.constexpr,
    TRANSPOSE: gl.constexpr,
    PDL: gl.constexpr,
    EARLY: gl.constexpr,
    WHOLE: gl.constexpr,
    GROUP: gl.constexpr,
    STAGES: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr,
):
    # The grid is gated_linear_kernel's: one program per tile of out.
    tile_m, tile_n = grouped(gl.program_id(0), gl.cdiv(rows, BLOCK_M), gl.cdiv(columns, BLOCK_N), GROUP)
    row, column = tile_m * BLOCK_M, tile_n * BLOCK_N
    gate, up = few_rows(
        x_ptr, stride_x, rows, row, gate_ptr, stride_gate, up_ptr, stride_up, columns, column, 0, depth, TRANSPOSE, PDL,
        EARLY, WHOLE, STAGES, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    TURNED: gl.constexpr = gate.type.layout
    turned_n = column + gl.arange(0, BLOCK_N, gl.SliceLayout(1, TURNED))
    if gate_bias_ptr is not None:
        gate += gl.load(gate_bias_ptr + turned_n, mask=turned_n < columns, other=0.0).to(gl.float32)[:, None]
    if up_bias_ptr is not None:
        up += gl.load(up_bias_ptr + turned_n, mask=turned_n < columns, other=0.0).to(gl.float32)[:, None]
    STORE: gl.constexpr = gl.BlockedLayout([1, 4], [512 // BLOCK_N // 4, BLOCK_N // 4], [gl.num_warps(), 1], [1, 0])
    out = (activated(gate, ACTIVATION, False) * up).to(out_ptr.dtype.element_ty)
    m = row + gl.arange(0, BLOCK_M, gl.SliceLayout(1, STORE))
    n = column + gl.arange(0, BLOCK_N, gl.SliceLayout(0, STORE))
    at = out_ptr + m.to(gl.int64)[:, None] * columns + n[None, :]
    gl.store(at, gl.convert_layout(gl.permute(out, (1, 0)), STORE), mask=(m < rows)[:, None] & (n < columns)[None, :])
