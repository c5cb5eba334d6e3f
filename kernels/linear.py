"""A linear layer with what follows it: bias, activation and residual; or up to three layers of one input.

    out = activation(x W^T + bias) + residual

x: [.., K]; weight: [N, K], or [K, N] where `transpose_weight`; bias: [N]; residual, out: [.., N]. fp32, fp16 or bf16,
all alike. Accumulated, and all of the above computed, in fp32 (never TF32), and rounded once, at the end.

With weight_1 [N1, K], and weight_2 [N2, K], each with its bias or without, `out` is [.., N + N1 + N2]: the results side
by side, as if the weights were one. They stay where they are: a model's q, k and v layers need no merged copy.
`activation` and residual [.., N + N1 + N2] apply to all of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from trimaran.kernels.activations import ACTIVATIONS, activated, activation_body, activation_reference
from trimaran.kernels.configs import Row, lookup
from trimaran.kernels.contract import (
    Attr,
    Device,
    Divisible,
    Input,
    Launch,
    Op,
    Output,
    Scratch,
    Tensor,
    expect_shape,
)
from trimaran.kernels.dependent import await_inputs, dependent
from trimaran.kernels.matmul import (
    check_device,
    check_vectors,
    descriptors_fit,
    grouped,
    left_to_vendor,
    load_weight,
    load_x,
    matrix_rows,
    weight_rows,
    weight_sizes,
)
from trimaran.kernels.sizes import cdiv, minimum, product

SUM_BLOCK = 256  # columns that a program of sum_kernel takes
PARTS = ("", "_1", "_2")  # of the names of weights and biases


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
    CHAINS: tl.constexpr,
    PDL: tl.constexpr,  # launched while the last kernel may still run
    EARLY: tl.constexpr,  # weights and biases are constant, so they may be read before the last kernel ends
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # One program per tile of out and part of the depth: grid = (cdiv(rows, BLOCK_M) * tiles of all weights, SPLIT).
    # A tile is of one weight alone.
    tiles = tl.cdiv(columns, BLOCK_N)
    tiles_1 = 0 if weight_1_ptr is None else tl.cdiv(columns_1, BLOCK_N)
    tiles_2 = 0 if weight_2_ptr is None else tl.cdiv(columns_2, BLOCK_N)
    tile_m, tile_n = grouped(tl.program_id(0), tl.cdiv(rows, BLOCK_M), tiles + tiles_1 + tiles_2, GROUP)
    stride_weight = stride_weight.to(tl.int64)
    part, start = 0, 0  # which weight, and the column of out where its own begin
    if weight_2_ptr is not None:
        if tile_n >= tiles + tiles_1:
            weight_ptr, stride_weight = weight_2_ptr, stride_weight_2.to(tl.int64)
            tile_n -= tiles + tiles_1
            part, start = 2, columns + columns_1
            columns = columns_2
    if weight_1_ptr is not None:
        if (tile_n >= tiles) & (part == 0):
            weight_ptr, stride_weight = weight_1_ptr, stride_weight_1.to(tl.int64)
            tile_n -= tiles
            part, start = 1, columns
            columns = columns_1
    row = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    share = tl.cdiv(tl.cdiv(depth, BLOCK_K), SPLIT) * BLOCK_K
    first = tl.program_id(1) * share
    last = tl.minimum(first + share, depth)

    # What the end needs is asked for before the product, so that it is not waited for after it.
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    if PDL:
        gdc_launch_dependents()
        if not EARLY:
            gdc_wait()
    bias = tl.zeros([BLOCK_N], tl.float32)
    if bias_ptr is not None:
        if part == 0:
            bias = tl.load(bias_ptr + column, mask=column < columns, other=0.0).to(tl.float32)
    if bias_1_ptr is not None:
        if part == 1:
            bias = tl.load(bias_1_ptr + column, mask=column < columns, other=0.0).to(tl.float32)
    if bias_2_ptr is not None:
        if part == 2:
            bias = tl.load(bias_2_ptr + column, mask=column < columns, other=0.0).to(tl.float32)
    if CHAINS > 1:
        # The part of the depth is one block, summed in CHAINS chains at once: one after the other the products of so
        # few rows take longer than all loads.
        k = first + tl.arange(0, CHAINS)[:, None] * (BLOCK_K // CHAINS) + tl.arange(0, BLOCK_K // CHAINS)[None, :]
        deep = k.to(tl.int64)[:, :, None] * (stride_weight if TRANSPOSE else 1)
        wide = column.to(tl.int64)[None, None, :] * (1 if TRANSPOSE else stride_weight)
        present = (k < depth)[:, :, None] & (column < columns)[None, None, :]
        weight = tl.load(weight_ptr + deep + wide, mask=present, other=0.0, cache_modifier=".cg")
    if PDL and EARLY:
        gdc_wait()
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if residual_ptr is not None:
        residual_at = row.to(tl.int64)[:, None] * stride_residual + (start + column)[None, :]
        if CHAINS > 1:
            residual = tl.load(residual_ptr + residual_at, mask=inside, other=0.0)
    if CHAINS > 1:
        x_at = x_ptr + row.to(tl.int64)[None, :, None] * stride_x + k[:, None, :]
        x = tl.load(x_at, mask=(row < rows)[None, :, None] & (k < depth)[:, None, :], other=0.0)
        acc += tl.sum(tl.dot(x, weight, input_precision="ieee"), axis=0)
    else:
        for at in range(first, last, BLOCK_K):
            k = at + tl.arange(0, BLOCK_K)
            x = load_x(x_ptr, stride_x, rows, depth, row, k, EVEN)
            weight = load_weight(weight_ptr, stride_weight, columns, depth, column, k, TRANSPOSE, EVEN)
            acc = tl.dot(x, weight, acc, input_precision="ieee")

    at = row.to(tl.int64)[:, None] * width + (start + column)[None, :]
    if SPLIT > 1:
        tl.store(out_ptr + tl.program_id(1).to(tl.int64) * rows * width + at, acc, mask=inside)
    else:
        dtype: tl.constexpr = out_ptr.dtype.element_ty
        out = activated(acc + bias[None, :], ACTIVATION, dtype == tl.float32)
        if residual_ptr is not None:
            if CHAINS == 1:
                residual = tl.load(residual_ptr + residual_at, mask=inside, other=0.0)
            out += residual.to(tl.float32)
        tl.store(out_ptr + at, out.to(dtype), mask=inside)


@triton.jit
def store_tile(
    acc,  # [BLOCK_M, BLOCK_N], of out from row and column on
    row,
    column,
    bias_ptr,
    residual_ptr,
    out_blocks,
    stride_residual,
    rows,
    columns,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """What follows the product, and its way to memory."""
    n = column + tl.arange(0, BLOCK_N)
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + n, mask=n < columns, other=0.0).to(tl.float32)[None, :]
    acc = activated(acc, ACTIVATION, False)
    if residual_ptr is not None:
        m = row + tl.arange(0, BLOCK_M)
        residual_at = residual_ptr + m.to(tl.int64)[:, None] * stride_residual + n[None, :]
        acc += tl.load(residual_at, mask=(m < rows)[:, None] & (n < columns)[None, :], other=0.0).to(tl.float32)
    out_blocks.store([row, column], acc.to(out_blocks.dtype))


@triton.jit
def tiles_of_weight(
    x_blocks,  # the descriptor of x
    weight_ptr,  # as linear_kernel's
    bias_ptr,
    residual_ptr,  # from this weight's first column on; so is out
    out_ptr,
    stride_weight,
    stride_residual,
    rows,
    columns,
    width,
    depth,
    before,  # tiles of the weights before this one
    ACTIVATION: tl.constexpr,
    TRANSPOSE: tl.constexpr,
    SPECIALIZE: tl.constexpr,
    FLATTEN: tl.constexpr,
    HALVES: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """This program's tiles of one weight: each so many programs, counted over the tiles of all weights. How many tiles
    there are up to here."""
    if TRANSPOSE:
        weight_blocks = tl.make_tensor_descriptor(weight_ptr, [depth, columns], [stride_weight, 1], [BLOCK_K, BLOCK_N])
    else:
        weight_blocks = tl.make_tensor_descriptor(weight_ptr, [columns, depth], [stride_weight, 1], [BLOCK_N, BLOCK_K])
    out_blocks = tl.make_tensor_descriptor(out_ptr, [rows, columns], [width, 1], [BLOCK_M, BLOCK_N // (1 + HALVES)])
    tiles_m, tiles_n = tl.cdiv(rows, BLOCK_M), tl.cdiv(columns, BLOCK_N)
    programs = tl.num_programs(0)
    first = (tl.program_id(0) + programs - before % programs) % programs
    for tile in tl.range(first, tiles_m * tiles_n, programs, flatten=FLATTEN, warp_specialize=SPECIALIZE):
        tile_m, tile_n = grouped(tile, tiles_m, tiles_n, GROUP)
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for at in range(0, depth, BLOCK_K):
            x = x_blocks.load([tile_m * BLOCK_M, at])
            if TRANSPOSE:
                weight = weight_blocks.load([at, tile_n * BLOCK_N])
            else:
                weight = weight_blocks.load([tile_n * BLOCK_N, at]).T
            acc = tl.dot(x, weight, acc, input_precision="ieee")
        row, column = tile_m * BLOCK_M, tile_n * BLOCK_N
        if HALVES:  # one half after the other needs half the registers and shared memory
            width_2: tl.constexpr = BLOCK_N // 2
            left, right = tl.split(tl.permute(tl.reshape(acc, [BLOCK_M, 2, width_2]), [0, 2, 1]))
            store_tile(
                left, row, column, bias_ptr, residual_ptr, out_blocks, stride_residual, rows, columns, ACTIVATION,
                BLOCK_M, width_2,
            )  # fmt: skip
            store_tile(
                right, row, column + width_2, bias_ptr, residual_ptr, out_blocks, stride_residual, rows, columns,
                ACTIVATION, BLOCK_M, width_2,
            )  # fmt: skip
        else:
            store_tile(
                acc, row, column, bias_ptr, residual_ptr, out_blocks, stride_residual, rows, columns, ACTIVATION,
                BLOCK_M, BLOCK_N,
            )  # fmt: skip
    return before + tiles_m * tiles_n


@triton.jit
def linear_tma_kernel(
    x_ptr,  # all as linear_kernel's, and every row starts on a multiple of 16 bytes
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
    ACTIVATION: tl.constexpr,
    TRANSPOSE: tl.constexpr,
    PDL: tl.constexpr,
    SPECIALIZE: tl.constexpr,  # warps that load, apart from those that multiply
    FLATTEN: tl.constexpr,  # loads of a tile start while the last one is finished
    HALVES: tl.constexpr,  # a tile is finished and stored in two halves
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # Blocks move by tensor descriptors. As many programs as run at once, each with every so manieth tile: grid =
    # (at most the number of multiprocessors times programs on each,). Descriptors are written to memory that the last
    # kernel may still use, so even they wait.
    if PDL:
        await_inputs()
    x_blocks = tl.make_tensor_descriptor(x_ptr, [rows, depth], [stride_x, 1], [BLOCK_M, BLOCK_K])
    tiles = tiles_of_weight(
        x_blocks, weight_ptr, bias_ptr, residual_ptr, out_ptr, stride_weight, stride_residual, rows, columns, width,
        depth, 0, ACTIVATION, TRANSPOSE, SPECIALIZE, FLATTEN, HALVES, GROUP, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    if weight_1_ptr is not None:
        start = columns
        tiles = tiles_of_weight(
            x_blocks, weight_1_ptr, bias_1_ptr, None if residual_ptr is None else residual_ptr + start, out_ptr + start,
            stride_weight_1, stride_residual, rows, columns_1, width, depth, tiles, ACTIVATION, TRANSPOSE, SPECIALIZE,
            FLATTEN, HALVES, GROUP, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
    if weight_2_ptr is not None:
        start = columns + columns_1
        tiles_of_weight(
            x_blocks, weight_2_ptr, bias_2_ptr, None if residual_ptr is None else residual_ptr + start, out_ptr + start,
            stride_weight_2, stride_residual, rows, columns_2, width, depth, tiles, ACTIVATION, TRANSPOSE, SPECIALIZE,
            FLATTEN, HALVES, GROUP, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip


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
    EARLY: tl.constexpr,  # the bias is constant
    BLOCK: tl.constexpr,
):
    # The sums of the parts of the depth, added in their order, and what follows. One program per BLOCK columns of a
    # row: grid = (rows, cdiv(width, BLOCK)).
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    if PDL:
        gdc_launch_dependents()
        if not EARLY:
            gdc_wait()
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + column, mask=inside, other=0.0).to(tl.float32)
    if PDL and EARLY:
        gdc_wait()
    if residual_ptr is not None:
        residual = tl.load(residual_ptr + row * stride_residual + column, mask=inside, other=0.0).to(tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for part in tl.static_range(SPLIT):
        total += tl.load(parts_ptr + (part * rows.to(tl.int64) + row) * width + column, mask=inside, other=0.0)
    if bias_ptr is not None:
        total += bias
    total = activated(total, ACTIVATION, out_ptr.dtype.element_ty == tl.float32)
    if residual_ptr is not None:
        total += residual
    tl.store(out_ptr + row * width + column, total.to(out_ptr.dtype.element_ty), mask=inside)


# Tiles that fit the 99 KiB of shared memory of the smallest supported GPUs (sm_86, sm_120).
CONFIGS: list[Row] = [
    (
        {"dtype": "float32", "rows": 32},
        {"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": 64, "num_warps": 4, "num_stages": 3},
    ),
    ({"dtype": "float32"}, {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 32, "num_warps": 4, "num_stages": 3}),
    ({"rows": 16}, {"BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_K": 128, "num_warps": 4, "num_stages": 4}),
    ({"rows": 256}, {"BLOCK_M": 64, "BLOCK_N": 32, "BLOCK_K": 64, "num_warps": 4, "num_stages": 4}),
    ({}, {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 32, "num_warps": 4, "num_stages": 4}),
]

# For compute capability 9.0 and half precision, measured on an H200 (Triton 3.6). after: 0 where nothing follows the
# bias, 1 where a residual does, 2 where an activation does; parts: how many weights. SPLIT: parts that the depth is
# summed in, each by programs of its own; CHAINS: sums that a program with one block of the depth keeps at once; PER_SM:
# blocks move by descriptors, and programs stay; DECLINE: the vendor's library is at least as fast.
HOPPER: list[Row] = [
    (
        {"rows": 16, "depth": 256, "columns": 4096},
        {"BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_K": 256, "num_warps": 4, "num_stages": 1, "CHAINS": 4},
    ),
    (
        {"rows": 16, "depth": 768, "columns": 1024, "parts": 1},
        {"BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_K": 1024, "num_warps": 4, "num_stages": 1, "CHAINS": 4},
    ),
    (
        {"rows": 16, "depth": 768, "columns": 4096, "parts": 1},
        {"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": 1024, "num_warps": 4, "num_stages": 1, "CHAINS": 4},
    ),
    (
        {"rows": 16, "depth": 1024, "columns": 4096},
        {"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": 1024, "num_warps": 4, "num_stages": 1, "CHAINS": 4},
    ),
    (
        {"rows": 16, "depth": 3072, "columns": 2048, "parts": 1},
        {"BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_K": 1024, "num_warps": 4, "num_stages": 1, "SPLIT": 3, "CHAINS": 4},
    ),
    (
        {"rows": 16, "columns": 4096, "parts": 1},
        {"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": 256, "num_warps": 4, "num_stages": 3, "SPLIT": 6},
    ),
    (
        {"rows": 16},
        {"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": 128, "num_warps": 4, "num_stages": 4},
    ),
    (
        {"rows": 256, "depth": 1024, "columns": 1024, "parts": 1},
        {"BLOCK_M": 64, "BLOCK_N": 32, "BLOCK_K": 128, "num_warps": 4, "num_stages": 3, "SPLIT": 2},
    ),
    (
        {"rows": 256, "depth": 1024},
        {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 128, "num_warps": 4, "num_stages": 4},
    ),
    (
        {"rows": 256, "columns": 2048, "parts": 1},
        {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 128, "num_warps": 4, "num_stages": 4, "SPLIT": 4},
    ),
    (
        {"rows": 256},
        {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 64, "num_warps": 4, "num_stages": 5},
    ),
    (
        {"after": 0, "parts": 1},
        {
            "BLOCK_M": 128,
            "BLOCK_N": 256,
            "BLOCK_K": 64,
            "num_warps": 8,
            "num_stages": 3,
            "PER_SM": 1,
            "HALVES": 1,
            "DECLINE": 1,
        },
    ),
    (
        {"rows": 2048, "columns": 1024},
        {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 128, "num_warps": 4, "num_stages": 3},
    ),
    (
        {"rows": 2048},
        {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64, "num_warps": 8, "num_stages": 3, "PER_SM": 2, "HALVES": 1},
    ),
    (
        {"after": 1, "parts": 1, "depth": 1024},
        {"BLOCK_M": 128, "BLOCK_N": 256, "BLOCK_K": 64, "num_warps": 4, "num_stages": 3, "PER_SM": 1, "SPECIALIZE": 1},
    ),
    (
        {"after": 1, "parts": 1, "rows": 8192},
        {
            "BLOCK_M": 128,
            "BLOCK_N": 256,
            "BLOCK_K": 64,
            "num_warps": 4,
            "num_stages": 3,
            "PER_SM": 1,
            "SPECIALIZE": 1,
            "DECLINE": 1,
        },
    ),
    (
        {"after": 1, "parts": 1},
        {"BLOCK_M": 128, "BLOCK_N": 256, "BLOCK_K": 64, "num_warps": 4, "num_stages": 3, "PER_SM": 1, "SPECIALIZE": 1},
    ),
    (
        {"after": 1, "rows": 8192},
        {
            "BLOCK_M": 128,
            "BLOCK_N": 128,
            "BLOCK_K": 64,
            "num_warps": 4,
            "num_stages": 4,
            "PER_SM": 1,
            "HALVES": 1,
            "FLATTEN": 1,
        },
    ),
    (
        {"after": 1},
        {
            "BLOCK_M": 128,
            "BLOCK_N": 256,
            "BLOCK_K": 64,
            "num_warps": 8,
            "num_stages": 3,
            "PER_SM": 1,
            "HALVES": 1,
            "FLATTEN": 1,
        },
    ),
    (
        {"depth": 1024, "parts": 1},
        {"BLOCK_M": 128, "BLOCK_N": 256, "BLOCK_K": 64, "num_warps": 4, "num_stages": 3, "PER_SM": 1, "SPECIALIZE": 1},
    ),
    (
        {"depth": 1024},
        {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64, "num_warps": 8, "num_stages": 3, "PER_SM": 2, "HALVES": 1},
    ),
    (
        {},
        {
            "BLOCK_M": 128,
            "BLOCK_N": 256,
            "BLOCK_K": 64,
            "num_warps": 8,
            "num_stages": 4,
            "PER_SM": 1,
            "HALVES": 1,
            "GROUP": 16,
        },
    ),
]


def weights_of(inputs: Any) -> list[tuple[str, Tensor | None, Tensor | None]]:
    """(suffix of the name, weight, bias) of each part."""
    return [(part, getattr(inputs, f"weight{part}"), getattr(inputs, f"bias{part}")) for part in PARTS]


def infer(inputs: Any, attrs: Any) -> tuple[Tensor]:
    x = inputs.x
    if x.rank == 0:
        raise ValueError("linear: x is a scalar, expected [.., K]")
    if inputs.weight_2 is not None and inputs.weight_1 is None:
        raise ValueError("linear: weight_2 is given without weight_1, expected both or only weight_1")
    width: Any = 0
    for part, weight, bias in weights_of(inputs):
        if weight is None:
            if bias is not None:
                raise ValueError(f"linear: bias{part} is given without weight{part}")
            continue
        columns = weight_sizes("linear", f"weight{part}", weight, x.shape[-1], attrs.transpose_weight)
        expect_shape("linear", f"bias{part}", bias, (columns,), f"[N] as weight{part} has")
        width = columns + width
    shape = (*x.shape[:-1], width)
    expect_shape("linear", "residual", inputs.residual, shape, "the shape of out")
    return (Tensor(x.dtype, shape),)


def plan(inputs: Any, outputs: Any, attrs: Any, device: Device) -> list[Launch]:
    width = outputs.out.shape[-1]
    found = launches(inputs, outputs.out, width, attrs, device)
    left_to_vendor("linear", device, inputs.x.dtype, config_of(inputs, width, attrs, device))
    return found


def config_of(inputs: Any, width: Any, attrs: Any, device: Device) -> Mapping[str, int]:
    x = inputs.x
    table = HOPPER if device.capability == 90 and x.dtype != "float32" else CONFIGS
    return lookup(
        table,
        dtype=x.dtype,
        rows=product(x.shape[:-1]),
        columns=width,
        depth=x.shape[-1],
        parts=sum(weight is not None for _, weight, _ in weights_of(inputs)),
        after=2 if attrs.activation != "none" else int(inputs.residual is not None),
    )


def launches(inputs: Any, out: Tensor | Scratch, width: Any, attrs: Any, device: Device) -> list[Launch]:
    """The launches that write [rows, width] to `out`."""
    x = inputs.x
    rows, depth = product(x.shape[:-1]), x.shape[-1]
    check_device("linear", device, rows)
    check_vectors(inputs, "bias", "bias_1", "bias_2")
    config = dict(config_of(inputs, width, attrs, device))
    weights = [weight for _, weight, _ in weights_of(inputs) if weight is not None]
    if "PER_SM" in config and not descriptors_fit(x, weights, out, attrs.transpose_weight):
        config = dict(lookup(CONFIGS, dtype=x.dtype, rows=rows, columns=width, depth=depth))
    config.pop("DECLINE", 0)
    split = config.pop("SPLIT", 1) if inputs.weight_1 is None else 1
    if split > 1:
        return split_launches(inputs, out, attrs, config, split, device)
    return [tile_launch(inputs, out, inputs.residual, attrs, config, device)]


def split_launches(
    inputs: Any, out: Tensor | Scratch, attrs: Any, config: dict[str, int], split: int, device: Device
) -> list[Launch]:
    """Sums of parts of the depth, each by programs of their own, and a kernel that adds them in their order."""
    width = inputs.weight.shape[1 if attrs.transpose_weight else 0]
    rows = product(inputs.x.shape[:-1])
    parts = Scratch("float32", rows * width * split)
    pdl = dependent(device)
    return [
        tile_launch(inputs, parts, None, attrs, config, device, split),
        Launch(
            sum_kernel,
            grid=(rows, cdiv(width, SUM_BLOCK)),
            args={
                "parts_ptr": parts,
                "bias_ptr": inputs.bias,
                "residual_ptr": inputs.residual,
                "stride_residual": residual_rows(inputs.residual),
                "out_ptr": out,
                "rows": rows,
                "width": Divisible(width),
            },
            constexprs={
                "ACTIVATION": attrs.activation,
                "SPLIT": split,
                "PDL": pdl,
                "EARLY": pdl and constant(inputs.bias),
                "BLOCK": SUM_BLOCK,
            },
            options={"num_warps": 2, "launch_pdl": pdl},
        ),
    ]


def constant(tensor: Tensor | None) -> bool:
    return tensor is None or tensor.constant


def residual_rows(residual: Tensor | None) -> Divisible:
    return Divisible(0 if residual is None else matrix_rows("residual", residual))


def tile_launch(
    inputs: Any,
    out: Tensor | Scratch,
    residual: Tensor | None,
    attrs: Any,
    config: dict[str, int],
    device: Device,
    split: int = 1,
) -> Launch:
    """The launch of linear_kernel, or of linear_tma_kernel; where the depth is split it writes sums to scratch."""
    x, transpose = inputs.x, attrs.transpose_weight
    rows, depth = product(x.shape[:-1]), x.shape[-1]
    options = dict(config)
    blocks = {name: options.pop(name) for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K")}
    args: dict[str, Any] = {}
    tiles: Any = 0
    width: Any = 0
    for part, weight, bias in weights_of(inputs):
        columns = 0 if weight is None else weight.shape[1 if transpose else 0]
        args |= {
            f"weight{part}_ptr": weight,
            f"bias{part}_ptr": bias if split == 1 else None,
            f"stride_weight{part}": Divisible(weight_rows(f"weight{part}", weight)),
            f"columns{part}": Divisible(columns),
        }
        tiles, width = cdiv(rows, blocks["BLOCK_M"]) * cdiv(columns, blocks["BLOCK_N"]) + tiles, columns + width
    args |= {
        "x_ptr": x,
        "residual_ptr": residual,
        "out_ptr": out,
        "stride_x": Divisible(matrix_rows("x", x)),
        "stride_residual": residual_rows(residual),
        "rows": rows,
        "width": Divisible(width),
        "depth": Divisible(depth),
    }
    pdl = dependent(device)
    constexprs = {
        "ACTIVATION": attrs.activation if split == 1 else "none",
        "TRANSPOSE": transpose,
        "PDL": pdl,
        "GROUP": options.pop("GROUP", 8),
        **blocks,
    }
    if "PER_SM" in options:
        programs = minimum(tiles, device.sm_count * options.pop("PER_SM"))
        loops = {name: bool(options.pop(name, 0)) for name in ("SPECIALIZE", "FLATTEN", "HALVES")}
        return Launch(linear_tma_kernel, (programs,), args, constexprs | loops, {**options, "launch_pdl": pdl})
    parts = weights_of(inputs)
    one_block = bool(depth <= split * blocks["BLOCK_K"])
    constexprs |= {
        "EVEN": bool(depth % blocks["BLOCK_K"] == 0),
        "SPLIT": split,
        "CHAINS": options.pop("CHAINS", 1) if one_block else 1,
        "EARLY": pdl and all(constant(weight) and constant(bias) for _, weight, bias in parts),
    }
    options.pop("CHAINS", None)
    return Launch(linear_kernel, (tiles, split), args, constexprs, {**options, "launch_pdl": pdl})


def linear_reference(
    x: Any,
    weight: Any,
    bias: Any,
    residual: Any,
    weight_1: Any,
    bias_1: Any,
    weight_2: Any,
    bias_2: Any,
    *,
    activation: str,
    transpose_weight: bool,
) -> tuple[Any]:
    import torch

    outs = [
        torch.nn.functional.linear(x, w.t() if transpose_weight else w, b)
        for w, b in ((weight, bias), (weight_1, bias_1), (weight_2, bias_2))
        if w is not None
    ]
    out = activation_reference(outs[0] if len(outs) == 1 else torch.cat(outs, dim=-1), activation)
    return (out if residual is None else out + residual,)


def body(g: Any, inputs: Any, attrs: Any) -> tuple[Any]:
    outs = []
    for _, weight, bias in weights_of(inputs):
        if weight is not None:
            out = g.MatMul(inputs.x, weight if attrs.transpose_weight else g.Transpose(weight, perm=[1, 0]))
            outs.append(out if bias is None else g.Add(out, bias))
    out = outs[0] if len(outs) == 1 else g.Concat(*outs, axis=-1)
    out = activation_body(g, out, attrs.activation, g.types["T"])
    return (out if inputs.residual is None else g.Add(out, inputs.residual),)


linear = Op(
    name="linear",
    version=1,
    inputs=(
        Input("x"),
        Input("weight"),
        Input("bias", optional=True),
        Input("residual", optional=True),
        Input("weight_1", optional=True),
        Input("bias_1", optional=True),
        Input("weight_2", optional=True),
        Input("bias_2", optional=True),
    ),
    outputs=(Output("out"),),
    attrs=(
        Attr("activation", "string", "none", choices=ACTIVATIONS),
        Attr("transpose_weight", "bool", False),
    ),
    types={"T": ("float32", "float16", "bfloat16")},
    infer=infer,
    plan=plan,
    reference=linear_reference,
    body=body,
)
