"""linear's kernels for any GPU: a tile of the product and what follows it, and the sum of a depth that was split.

Those of Hopper alone stand in `linear_few` and `linear_many`; what any of them computes, and its arguments, are these.
"""

from __future__ import annotations

import triton
import triton.language as tl

from trimaran.kernels.activations import activated
from trimaran.kernels.dependent import await_inputs, await_rest, begin
from trimaran.kernels.matmul import grouped, load_weight, load_x


@triton.jit
def weight_of_tile(
    tile_n,  # counted over the tiles of all weights, one after the other
    weight_ptr,
    weight_1_ptr,
    weight_2_ptr,
    stride_weight,
    stride_weight_1,
    stride_weight_2,
    columns,
    columns_1,
    columns_2,
    BLOCK_N: tl.constexpr,
):
    """The weight that a tile belongs to: its number, pointer, stride and columns, the tile's number in it, and the
    column of the output where its own begin."""
    tiles = tl.cdiv(columns, BLOCK_N)
    stride_weight = stride_weight.to(tl.int64)
    part, start = 0, 0
    if weight_2_ptr is not None:
        before = tiles + tl.cdiv(columns_1, BLOCK_N)
        if tile_n >= before:
            weight_ptr, stride_weight = weight_2_ptr, stride_weight_2.to(tl.int64)
            tile_n -= before
            part, start = 2, columns + columns_1
            columns = columns_2
    if weight_1_ptr is not None:
        if (tile_n >= tiles) & (part == 0):
            weight_ptr, stride_weight = weight_1_ptr, stride_weight_1.to(tl.int64)
            tile_n -= tiles
            part, start = 1, columns
            columns = columns_1
    return part, weight_ptr, stride_weight, columns, tile_n, start


@triton.jit
def tiles_of_all(columns, columns_1, columns_2, BLOCK_N: tl.constexpr):
    """How many tiles stand side by side."""
    return tl.cdiv(columns, BLOCK_N) + tl.cdiv(columns_1, BLOCK_N) + tl.cdiv(columns_2, BLOCK_N)


@triton.jit
def load_bias(part, bias_ptr, bias_1_ptr, bias_2_ptr, column, columns):
    """The bias of one of the weights at `column`, in fp32; 0 where it has none."""
    bias = column.to(tl.float32) * 0.0
    inside = column < columns
    if bias_ptr is not None:
        if part == 0:
            bias = tl.load(bias_ptr + column, mask=inside, other=0.0).to(tl.float32)
    if bias_1_ptr is not None:
        if part == 1:
            bias = tl.load(bias_1_ptr + column, mask=inside, other=0.0).to(tl.float32)
    if bias_2_ptr is not None:
        if part == 2:
            bias = tl.load(bias_2_ptr + column, mask=inside, other=0.0).to(tl.float32)
    return bias


@triton.jit
def linear_kernel(
    x_ptr,  # [rows, depth]
    weight_ptr,  # [columns, depth], or [depth, columns] where TRANSPOSE
    weight_1_ptr,  # the same with columns_1, or None
    weight_2_ptr,  # the same with columns_2, or None
    bias_ptr,  # [columns] or None
    bias_1_ptr,
    bias_2_ptr,
    residual_ptr,  # [rows, width] or None
    out_ptr,  # [rows, width], contiguous; where SPLIT > 1 [SPLIT, rows, width] fp32, the sums of each part of the depth
    stride_x,
    stride_weight,
    stride_weight_1,
    stride_weight_2,
    stride_residual,
    rows,
    columns,
    columns_1,
    columns_2,
    width,  # all columns together
    depth,
    ACTIVATION: tl.constexpr,
    TRANSPOSE: tl.constexpr,
    EVEN: tl.constexpr,  # depth is a multiple of BLOCK_K
    SPLIT: tl.constexpr,
    PDL: tl.constexpr,  # launched while the last kernel may still run
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # One program per tile of out and part of the depth: grid = (cdiv(rows, BLOCK_M) * tiles of all weights, SPLIT).
    # A tile is of one weight alone.
    tiles_n = tiles_of_all(columns, columns_1, columns_2, BLOCK_N)
    tile_m, tile_n = grouped(tl.program_id(0), tl.cdiv(rows, BLOCK_M), tiles_n, GROUP)
    part, weight_ptr, stride_weight, columns, tile_n, start = weight_of_tile(
        tile_n, weight_ptr, weight_1_ptr, weight_2_ptr, stride_weight, stride_weight_1, stride_weight_2, columns,
        columns_1, columns_2, BLOCK_N,
    )  # fmt: skip
    row = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    share = tl.cdiv(tl.cdiv(depth, BLOCK_K), SPLIT) * BLOCK_K
    first = tl.program_id(1) * share
    if PDL:
        await_inputs()
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for at in range(first, tl.minimum(first + share, depth), BLOCK_K):
        k = at + tl.arange(0, BLOCK_K)
        x = load_x(x_ptr, stride_x, rows, depth, row, k, EVEN)
        weight = load_weight(weight_ptr, stride_weight, columns, depth, column, k, TRANSPOSE, EVEN)
        acc = tl.dot(x, weight, acc, input_precision="ieee")

    inside = (row < rows)[:, None] & (column < columns)[None, :]
    at = row.to(tl.int64)[:, None] * width + (start + column)[None, :]
    if SPLIT > 1:
        tl.store(out_ptr + tl.program_id(1).to(tl.int64) * rows * width + at, acc, mask=inside)
    else:
        dtype: tl.constexpr = out_ptr.dtype.element_ty
        acc += load_bias(part, bias_ptr, bias_1_ptr, bias_2_ptr, column, columns)[None, :]
        out = activated(acc, ACTIVATION, dtype == tl.float32)
        if residual_ptr is not None:
            residual_at = row.to(tl.int64)[:, None] * stride_residual + (start + column)[None, :]
            out += tl.load(residual_ptr + residual_at, mask=inside, other=0.0).to(tl.float32)
        tl.store(out_ptr + at, out.to(dtype), mask=inside)


@triton.jit
def sum_parts(
    parts_ptr,  # [SPLIT, rows, width] fp32
    bias_ptr,  # [width] or None
    row,
    column,  # [BLOCK] of the row
    rows,
    width,
    SPLIT: tl.constexpr,
    PDL: tl.constexpr,
    EARLY: tl.constexpr,  # the bias is constant
    BLOCK: tl.constexpr,
):
    """The sums of the parts of the depth, added in their order, and the bias. It waits for the parts (`await_rest`)."""
    inside = column < width
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + column, mask=inside, other=0.0).to(tl.float32)
    await_rest(PDL, EARLY)
    total = tl.zeros([BLOCK], tl.float32)
    for part in tl.static_range(SPLIT):
        total += tl.load(parts_ptr + (part * rows.to(tl.int64) + row) * width + column, mask=inside, other=0.0)
    if bias_ptr is not None:
        total += bias
    return total


@triton.jit
def sum_kernel(
    parts_ptr,  # [SPLIT, rows, width] fp32
    bias_ptr,  # [width] or None
    residual_ptr,  # [rows, width] or None
    out_ptr,  # [rows, width]
    stride_residual,
    rows,
    width,
    ACTIVATION: tl.constexpr,
    SPLIT: tl.constexpr,
    PDL: tl.constexpr,
    EARLY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # What follows the product, where the depth is split. One program per BLOCK columns of a row:
    # grid = (rows, cdiv(width, BLOCK)).
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    begin(PDL, EARLY)
    total = sum_parts(parts_ptr, bias_ptr, row, column, rows, width, SPLIT, PDL, EARLY, BLOCK)
    total = activated(total, ACTIVATION, out_ptr.dtype.element_ty == tl.float32)
    inside = column < width
    if residual_ptr is not None:
        total += tl.load(residual_ptr + row * stride_residual + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * width + column, total.to(out_ptr.dtype.element_ty), mask=inside)
