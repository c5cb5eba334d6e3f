"""Many rows times one weight, or several, on Hopper (compute capability 9.0), written in Gluon.

What `linear_kernel` computes, in half precision. A program is a crew of three: one warp only fetches, blocks of x and of
the weights, through tensor descriptors into a ring in shared memory; two consumers, four warps each, multiply. Either
both share a tile, ROWS of its rows each, or (PINGPONG) each has tiles of its own, so that one finishes a tile, with bias,
activation, residual and its way to memory, while the other keeps the tensor cores busy.

A tile is BLOCK_N + REST_N columns wide, two accumulators: 192 columns spread some shapes over a GPU better than 256.
Programs are persistent and take the tiles of one weight after those of another.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from trimaran.kernels.activations import activated
from trimaran.kernels.dependent import await_inputs
from trimaran.kernels.matmul import grouped

fetch = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared  # its name to Triton 3.8

CONSUMERS = gl.constexpr(2)


@gluon.jit
def first_tile(before):
    """This program's first tile of a weight, where the weights before have so many."""
    programs = gl.num_programs(0)
    return (gl.program_id(0) + programs - before % programs) % programs


@gluon.jit
def fetch_tiles(
    x_blocks, weight, sizes, rings, barriers, before, fetched, TRANSPOSE: gl.constexpr, GROUP: gl.constexpr,
    BLOCK_M: gl.constexpr, REST_N: gl.constexpr,
):  # fmt: skip
    """Fetch what the tiles of one weight need; the tiles, and the blocks, up to here."""
    weight_ptr, stride_weight, columns = weight
    rows, depth = sizes
    x_ring, ring, rest_ring = rings
    full, empty = barriers
    BLOCK_K: gl.constexpr = x_ring.shape[2]
    BOXES: gl.constexpr = BLOCK_M // x_ring.shape[1]
    STAGES: gl.constexpr = x_ring.shape[0] // BOXES
    BLOCK_N: gl.constexpr = ring.shape[2] if TRANSPOSE else ring.shape[1]
    if TRANSPOSE:
        blocks = tma.make_tensor_descriptor(
            weight_ptr, [depth, columns], [stride_weight, 1], [BLOCK_K, BLOCK_N], ring.layout
        )
    else:
        blocks = tma.make_tensor_descriptor(
            weight_ptr, [columns, depth], [stride_weight, 1], [BLOCK_N, BLOCK_K], ring.layout
        )
    nbytes: gl.constexpr = x_blocks.block_type.nbytes * BOXES + blocks.block_type.nbytes
    rest_nbytes: gl.constexpr = blocks.block_type.nbytes // BLOCK_N * REST_N
    if REST_N > 0:
        if TRANSPOSE:
            rest_blocks = tma.make_tensor_descriptor(
                weight_ptr, [depth, columns], [stride_weight, 1], [BLOCK_K, REST_N], rest_ring.layout
            )
        else:
            rest_blocks = tma.make_tensor_descriptor(
                weight_ptr, [columns, depth], [stride_weight, 1], [REST_N, BLOCK_K], rest_ring.layout
            )
    tiles_m, tiles_n = gl.cdiv(rows, BLOCK_M), gl.cdiv(columns, BLOCK_N + REST_N)
    for tile in range(first_tile(before), tiles_m * tiles_n, gl.num_programs(0)):
        tile_m, tile_n = grouped(tile, tiles_m, tiles_n, GROUP)
        row, column = tile_m * BLOCK_M, tile_n * (BLOCK_N + REST_N)
        for k in range(0, depth, BLOCK_K):
            slot = fetched % STAGES
            mbarrier.wait(empty.index(slot), fetched // STAGES & 1 ^ 1)
            mbarrier.expect(full.index(slot), nbytes + rest_nbytes)
            for box in gl.static_range(BOXES):
                fetch(x_blocks, [row + box * x_ring.shape[1], k], full.index(slot), x_ring.index(slot * BOXES + box))
            if TRANSPOSE:
                fetch(blocks, [k, column], full.index(slot), ring.index(slot))
            else:
                fetch(blocks, [column, k], full.index(slot), ring.index(slot))
            if REST_N > 0:
                if TRANSPOSE:
                    fetch(rest_blocks, [k, column + BLOCK_N], full.index(slot), rest_ring.index(slot))
                else:
                    fetch(rest_blocks, [column + BLOCK_N, k], full.index(slot), rest_ring.index(slot))
            fetched += 1
    return before + tiles_m * tiles_n, fetched


@gluon.jit
def fetch_all(
    given, PARTS: gl.constexpr, TRANSPOSE: gl.constexpr, ACTIVATION: gl.constexpr, PINGPONG: gl.constexpr,
    GROUP: gl.constexpr, BLOCK_M: gl.constexpr, REST_N: gl.constexpr,
):  # fmt: skip
    """The warp that only fetches."""
    x_ptr, stride_x, weights, _ends, _out, sizes, rings, barriers = given
    rows, depth = sizes
    x_ring = rings[0]
    x_blocks = tma.make_tensor_descriptor(
        x_ptr, [rows, depth], [stride_x, 1], [x_ring.shape[1], x_ring.shape[2]], x_ring.layout
    )
    before, fetched = 0, 0
    for part in gl.static_range(PARTS):
        before, fetched = fetch_tiles(
            x_blocks, weights[part], sizes, rings, barriers, before, fetched, TRANSPOSE, GROUP, BLOCK_M, REST_N
        )


@gluon.jit
def multiply_all(
    given, PARTS: gl.constexpr, TRANSPOSE: gl.constexpr, ACTIVATION: gl.constexpr, PINGPONG: gl.constexpr,
    GROUP: gl.constexpr, BLOCK_M: gl.constexpr, REST_N: gl.constexpr, CONSUMER: gl.constexpr,
):  # fmt: skip
    """A consumer."""
    _x_ptr, _stride_x, weights, ends, out, sizes, rings, barriers = given
    before, turn, start = 0, 0, 0
    for part in gl.static_range(PARTS):
        columns = weights[part][2]
        before, turn = multiply(
            columns, ends[part], start, out, sizes, rings, barriers, before, turn, TRANSPOSE, ACTIVATION, PINGPONG,
            GROUP, BLOCK_M, REST_N, CONSUMER,
        )  # fmt: skip
        start += columns


@gluon.jit
def multiply(
    columns, bias_ptr, start, out, sizes, rings, barriers, before, turn, TRANSPOSE: gl.constexpr,
    ACTIVATION: gl.constexpr, PINGPONG: gl.constexpr, GROUP: gl.constexpr, BLOCK_M: gl.constexpr,
    REST_N: gl.constexpr, CONSUMER: gl.constexpr,
):  # fmt: skip
    """A consumer's part of the tiles of one weight; the tiles of all programs, and of this one, up to here."""
    rows, depth = sizes
    x_ring, ring, rest_ring = rings
    full, empty = barriers
    ROWS: gl.constexpr = x_ring.shape[1]
    BOXES: gl.constexpr = BLOCK_M // ROWS
    STAGES: gl.constexpr = x_ring.shape[0] // BOXES
    BLOCK_N: gl.constexpr = ring.shape[2] if TRANSPOSE else ring.shape[1]
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    steps = gl.cdiv(depth, x_ring.shape[2])
    tiles_m, tiles_n = gl.cdiv(rows, BLOCK_M), gl.cdiv(columns, BLOCK_N + REST_N)
    for tile in range(first_tile(before), tiles_m * tiles_n, gl.num_programs(0)):
        if not PINGPONG or turn % CONSUMERS == CONSUMER:
            acc = gl.zeros([ROWS, BLOCK_N], gl.float32, ACC)
            if REST_N > 0:
                REST: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, REST_N, 16])
                rest = gl.zeros([ROWS, REST_N], gl.float32, REST)
            first = turn * steps
            for at in range(first, first + steps):
                slot = at % STAGES
                mbarrier.wait(full.index(slot), at // STAGES & 1)
                x = x_ring.index(slot * BOXES + (0 if PINGPONG else CONSUMER))
                acc = warpgroup_mma(x, as_right(ring.index(slot), TRANSPOSE), acc, is_async=True)
                if REST_N > 0:
                    rest = warpgroup_mma(x, as_right(rest_ring.index(slot), TRANSPOSE), rest, is_async=True)
                    acc, rest = warpgroup_mma_wait(2, deps=(acc, rest))
                else:
                    acc = warpgroup_mma_wait(1, deps=(acc,))
                mbarrier.arrive(empty.index((at + STAGES - 1) % STAGES), pred=at > first)
            if REST_N > 0:
                acc, rest = warpgroup_mma_wait(0, deps=(acc, rest))
            else:
                acc = warpgroup_mma_wait(0, deps=(acc,))
            mbarrier.arrive(empty.index((first + steps - 1) % STAGES))
            tile_m, tile_n = grouped(tile, tiles_m, tiles_n, GROUP)
            row = tile_m * BLOCK_M + (0 if PINGPONG else CONSUMER * ROWS)
            column = tile_n * (BLOCK_N + REST_N)
            finish(acc, row, column, columns, bias_ptr, start, rows, out, ACTIVATION)
            if REST_N > 0:
                finish(rest, row, column + BLOCK_N, columns, bias_ptr, start, rows, out, ACTIVATION)
        turn += 1
    return before + tiles_m * tiles_n, turn


@gluon.jit
def as_right(block, TRANSPOSE: gl.constexpr):
    """A block of a weight as the right operand, [BLOCK_K, BLOCK_N]."""
    if TRANSPOSE:
        return block
    else:
        return block.permute((1, 0))


@gluon.jit
def finish(acc, row, column, columns, bias_ptr, start, rows, out, ACTIVATION: gl.constexpr):
    """What follows the product, and its way to memory: a tile at row and column of a weight whose columns begin at
    `start` in out."""
    residual_ptr, stride_residual, out_ptr, width = out
    ACC: gl.constexpr = acc.type.layout
    ROWS: gl.constexpr = acc.shape[0]
    BLOCK_N: gl.constexpr = acc.shape[1]
    STORE: gl.constexpr = gl.BlockedLayout([1, 8], [256 // BLOCK_N, BLOCK_N // 8], [4, 1], [1, 0])
    dtype: gl.constexpr = out_ptr.dtype.element_ty
    m = row + gl.arange(0, ROWS, gl.SliceLayout(1, STORE))
    n = column + gl.arange(0, BLOCK_N, gl.SliceLayout(0, STORE))
    inside = (m < rows)[:, None] & (n < columns)[None, :]
    if residual_ptr is not None:
        residual_at = residual_ptr + m.to(gl.int64)[:, None] * stride_residual + (start + n)[None, :]
        residual = gl.load(residual_at, mask=inside, other=0.0)
    if bias_ptr is not None:
        bias_at = column + gl.arange(0, BLOCK_N, gl.SliceLayout(0, ACC))
        acc += gl.load(bias_ptr + bias_at, mask=bias_at < columns, other=0.0).to(gl.float32)[None, :]
    acc = activated(acc, ACTIVATION, False)
    if residual_ptr is not None:
        acc += gl.convert_layout(residual, ACC).to(gl.float32)
    at = out_ptr + m.to(gl.int64)[:, None] * width + (start + n)[None, :]
    gl.store(at, gl.convert_layout(acc.to(dtype), STORE), mask=inside)


@gluon.jit
def linear_hopper_kernel(
    x_ptr,  # all as linear_kernel's, and every row of x and the weights starts on a multiple of 16 bytes
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
    PDL: gl.constexpr,
    PINGPONG: gl.constexpr,
    GROUP: gl.constexpr,
    STAGES: gl.constexpr,  # blocks in the ring
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    REST_N: gl.constexpr,  # columns of a tile beyond BLOCK_N, or 0
    BLOCK_K: gl.constexpr,
):
    # Persistent: grid = (min(tiles, multiprocessors),). Descriptors are written to memory that the last kernel may
    # still use, so even they wait.
    if PDL:
        await_inputs()
    dtype: gl.constexpr = x_ptr.dtype.element_ty
    ROWS: gl.constexpr = BLOCK_M if PINGPONG else BLOCK_M // CONSUMERS
    SHAPE: gl.constexpr = [BLOCK_K, BLOCK_N] if TRANSPOSE else [BLOCK_N, BLOCK_K]
    X: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, BLOCK_K], dtype)
    WEIGHT: gl.constexpr = gl.NVMMASharedLayout.get_default_for(SHAPE, dtype)
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    x_ring = gl.allocate_shared_memory(dtype, [STAGES * (BLOCK_M // ROWS), ROWS, BLOCK_K], X)
    ring = gl.allocate_shared_memory(dtype, [STAGES, SHAPE[0], SHAPE[1]], WEIGHT)
    rest_ring = ring
    if REST_N > 0:
        REST_SHAPE: gl.constexpr = [BLOCK_K, REST_N] if TRANSPOSE else [REST_N, BLOCK_K]
        REST: gl.constexpr = gl.NVMMASharedLayout.get_default_for(REST_SHAPE, dtype)
        rest_ring = gl.allocate_shared_memory(dtype, [STAGES, REST_SHAPE[0], REST_SHAPE[1]], REST)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    for slot in gl.static_range(STAGES):
        mbarrier.init(full.index(slot), count=1)
        mbarrier.init(empty.index(slot), count=1 if PINGPONG else CONSUMERS)
    fence_async_shared()

    PARTS: gl.constexpr = 1 if weight_1_ptr is None else 2 if weight_2_ptr is None else 3
    weights = (
        (weight_ptr, stride_weight, columns),
        (weight_1_ptr, stride_weight_1, columns_1),
        (weight_2_ptr, stride_weight_2, columns_2),
    )
    ends = (bias_ptr, bias_1_ptr, bias_2_ptr)
    out = (residual_ptr, stride_residual, out_ptr, width)
    given = (x_ptr, stride_x, weights, ends, out, (rows, depth), (x_ring, ring, rest_ring), (full, empty))
    gl.warp_specialize(
        [
            (multiply_all, (given, PARTS, TRANSPOSE, ACTIVATION, PINGPONG, GROUP, BLOCK_M, REST_N, 0)),
            (multiply_all, (given, PARTS, TRANSPOSE, ACTIVATION, PINGPONG, GROUP, BLOCK_M, REST_N, 1)),
            (fetch_all, (given, PARTS, TRANSPOSE, ACTIVATION, PINGPONG, GROUP, BLOCK_M, REST_N)),
        ],
        [4, 1],  # warps of all but the first, which has the kernel's own four
        [240, 24],  # and their registers a thread
    )
