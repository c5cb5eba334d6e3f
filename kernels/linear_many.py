"""Many rows times one weight, several, or a gated pair, on Hopper (compute capability 9.0), written in Gluon.

What `linear_kernel` and `gated_linear_kernel` compute, in half precision. A program is a crew: one warp fetches x, one
the weights of each product, through tensor descriptors into rings in shared memory; two consumers, four warps each,
multiply. Either both share a tile, half of its rows each, or (PINGPONG) each has tiles of its own, so that one finishes
a tile, with bias, activation, residual and its way to memory, while the other feeds the tensor cores.

A consumer sums two products side by side: BLOCK_N columns of a weight, and the REST_N columns after them (192 together
spread some shapes over a GPU better than 256), or the same columns of gate and up. Programs are persistent: they take
tile after tile of one weight, then of the next.
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

# A fetching warp waits until a slot of the rings is `empty`, a consumer until it is `full`. A barrier has a phase each
# time it completes, and is waited for by the phase's parity; the n-th use of a ring of STAGES slots is the
# (n // STAGES)-th phase of slot n % STAGES. Parity tells a phase only from its neighbours, so consumers with tiles of
# their own take `turns`: one waits for its first block when the other has seen its last.


@gluon.jit
def first_tile(before):
    """This program's first tile of a weight, where the weights before have so many."""
    programs = gl.num_programs(0)
    return (gl.program_id(0) + programs - before % programs) % programs


@gluon.jit
def fetch_x(
    given, PARTS: gl.constexpr, GATED: gl.constexpr, GROUP: gl.constexpr, STAGES: gl.constexpr, BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr, REST_N: gl.constexpr,
):  # fmt: skip
    """The warp that fetches x, for the tiles of all weights."""
    x_ptr, stride_x, weights, _biases, _out, sizes, rings, barriers = given
    rows, depth = sizes
    full, empty, _turns = barriers
    ring = rings[0]
    ROWS: gl.constexpr = ring.shape[1]
    BOXES: gl.constexpr = BLOCK_M // ROWS
    TILE_N: gl.constexpr = BLOCK_N if GATED else BLOCK_N + REST_N
    blocks = tma.make_tensor_descriptor(
        x_ptr, [rows, depth], [stride_x, 1], [ring.shape[1], ring.shape[2]], ring.layout
    )
    tiles_m = gl.cdiv(rows, BLOCK_M)
    before, fetched = 0, 0
    for part in gl.static_range(PARTS):
        tiles_n = gl.cdiv(weights[part][4], TILE_N)
        for tile in range(first_tile(before), tiles_m * tiles_n, gl.num_programs(0)):
            tile_m, _tile_n = grouped(tile, tiles_m, tiles_n, GROUP)
            for k in range(0, depth, ring.shape[2]):
                slot = fetched % STAGES
                mbarrier.wait(empty.index(slot), fetched // STAGES & 1 ^ 1)
                mbarrier.expect(full.index(slot), blocks.block_type.nbytes * BOXES)
                for box in gl.static_range(BOXES):
                    row = tile_m * BLOCK_M + box * ROWS
                    fetch(blocks, [row, k], full.index(slot), ring.index(slot * BOXES + box))
                fetched += 1
        before += tiles_m * tiles_n


@gluon.jit
def fetch_weights(
    given, PARTS: gl.constexpr, TRANSPOSE: gl.constexpr, GATED: gl.constexpr, GROUP: gl.constexpr, STAGES: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, REST_N: gl.constexpr, PRODUCT: gl.constexpr,
):  # fmt: skip
    """The warp that fetches the weights of the first or of the second product, where there is one."""
    _x_ptr, _stride_x, weights, _biases, _out, sizes, rings, barriers = given
    rows, depth = sizes
    full, empty, _turns = barriers
    ring = rings[1 + PRODUCT]
    BLOCK_K: gl.constexpr = rings[0].shape[2]
    TILE_N: gl.constexpr = BLOCK_N if GATED else BLOCK_N + REST_N
    SKIPPED: gl.constexpr = BLOCK_N if PRODUCT == 1 and not GATED else 0  # columns of a tile before this product's
    tiles_m = gl.cdiv(rows, BLOCK_M)
    before, fetched = 0, 0
    for part in gl.static_range(0 if PRODUCT == 1 and REST_N == 0 else PARTS):
        ptr, stride, columns = weights[part][2 * PRODUCT], weights[part][2 * PRODUCT + 1], weights[part][4]
        if TRANSPOSE:
            shape = [depth, columns]
        else:
            shape = [columns, depth]
        blocks = tma.make_tensor_descriptor(ptr, shape, [stride, 1], [ring.shape[1], ring.shape[2]], ring.layout)
        tiles_n = gl.cdiv(columns, TILE_N)
        for tile in range(first_tile(before), tiles_m * tiles_n, gl.num_programs(0)):
            _tile_m, tile_n = grouped(tile, tiles_m, tiles_n, GROUP)
            column = tile_n * TILE_N + SKIPPED
            for k in range(0, depth, BLOCK_K):
                slot = fetched % STAGES
                mbarrier.wait(empty.index(slot), fetched // STAGES & 1 ^ 1)
                mbarrier.expect(full.index(slot), blocks.block_type.nbytes)
                if TRANSPOSE:
                    fetch(blocks, [k, column], full.index(slot), ring.index(slot))
                else:
                    fetch(blocks, [column, k], full.index(slot), ring.index(slot))
                fetched += 1
        before += tiles_m * tiles_n


@gluon.jit
def multiply_all(
    given, PARTS: gl.constexpr, ACTIVATION: gl.constexpr, TRANSPOSE: gl.constexpr, GATED: gl.constexpr,
    PINGPONG: gl.constexpr, GROUP: gl.constexpr, STAGES: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
    REST_N: gl.constexpr, CONSUMER: gl.constexpr,
):  # fmt: skip
    """A consumer."""
    _x_ptr, _stride_x, weights, biases, out, sizes, rings, barriers = given
    before, turn, start = 0, 0, 0
    for part in gl.static_range(PARTS):
        columns = weights[part][4]
        before, turn = multiply_tiles(
            columns, biases[part], start, out, sizes, rings, barriers, before, turn, ACTIVATION, TRANSPOSE, GATED,
            PINGPONG, GROUP, STAGES, BLOCK_M, BLOCK_N, REST_N, CONSUMER,
        )  # fmt: skip
        start += columns


@gluon.jit
def multiply_tiles(
    columns, bias, start, out, sizes, rings, barriers, before, turn, ACTIVATION: gl.constexpr, TRANSPOSE: gl.constexpr,
    GATED: gl.constexpr, PINGPONG: gl.constexpr, GROUP: gl.constexpr, STAGES: gl.constexpr, BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr, REST_N: gl.constexpr, CONSUMER: gl.constexpr,
):  # fmt: skip
    """A consumer's share of the tiles of one weight; the tiles of all programs, and of this one, up to here."""
    rows, depth = sizes
    bias_ptr, rest_bias_ptr = bias
    ROWS: gl.constexpr = rings[0].shape[1]
    TILE_N: gl.constexpr = BLOCK_N if GATED else BLOCK_N + REST_N
    steps = gl.cdiv(depth, rings[0].shape[2])
    tiles_m, tiles_n = gl.cdiv(rows, BLOCK_M), gl.cdiv(columns, TILE_N)
    for tile in range(first_tile(before), tiles_m * tiles_n, gl.num_programs(0)):
        if not PINGPONG or turn % CONSUMERS == CONSUMER:
            acc, rest = multiply(rings, barriers, turn, steps, TRANSPOSE, PINGPONG, STAGES, BLOCK_N, REST_N, CONSUMER)
            tile_m, tile_n = grouped(tile, tiles_m, tiles_n, GROUP)
            row = tile_m * BLOCK_M + (0 if PINGPONG else CONSUMER * ROWS)
            column = tile_n * TILE_N
            acc = activated(with_bias(acc, bias_ptr, column, columns), ACTIVATION, False)
            if GATED:
                acc *= with_bias(rest, rest_bias_ptr, column, columns)
            write(acc, row, column, columns, start, rows, out)
            if REST_N > 0 and not GATED:
                rest = activated(with_bias(rest, rest_bias_ptr, column + BLOCK_N, columns), ACTIVATION, False)
                write(rest, row, column + BLOCK_N, columns, start, rows, out)
        turn += 1
    return before + tiles_m * tiles_n, turn


@gluon.jit
def multiply(
    rings, barriers, turn, steps, TRANSPOSE: gl.constexpr, PINGPONG: gl.constexpr, STAGES: gl.constexpr,
    BLOCK_N: gl.constexpr, REST_N: gl.constexpr, CONSUMER: gl.constexpr,
):  # fmt: skip
    """The two products of this program's tile number `turn`. A slot is given back a step later: by then nothing reads
    it, while the next products already run."""
    x_ring, ring, rest_ring = rings
    full, empty, turns = barriers
    ROWS: gl.constexpr = x_ring.shape[1]
    BOXES: gl.constexpr = x_ring.shape[0] // STAGES
    acc = gl.zeros([ROWS, BLOCK_N], gl.float32, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16]))
    rest = acc
    if REST_N > 0:
        rest = gl.zeros([ROWS, REST_N], gl.float32, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, REST_N, 16]))
    first = turn * steps
    if PINGPONG:  # the first consumer goes first: its barrier counts as completed once before it ever is
        mbarrier.wait(turns.index(CONSUMER), turn // CONSUMERS & 1 ^ (CONSUMER == 0))
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
    if PINGPONG:
        mbarrier.arrive(turns.index(1 - CONSUMER))
    if REST_N > 0:
        acc, rest = warpgroup_mma_wait(0, deps=(acc, rest))
    else:
        acc = warpgroup_mma_wait(0, deps=(acc,))
    mbarrier.arrive(empty.index((first + steps - 1) % STAGES))
    return acc, rest


@gluon.jit
def as_right(block, TRANSPOSE: gl.constexpr):
    """A block of a weight as the right operand, [BLOCK_K, BLOCK_N]."""
    if TRANSPOSE:
        return block
    else:
        return block.permute((1, 0))


@gluon.jit
def with_bias(acc, bias_ptr, column, columns):
    if bias_ptr is not None:
        n = column + gl.arange(0, acc.shape[1], gl.SliceLayout(0, acc.type.layout))
        acc += gl.load(bias_ptr + n, mask=n < columns, other=0.0).to(gl.float32)[None, :]
    return acc


@gluon.jit
def write(acc, row, column, columns, start, rows, out):
    """Add the residual, and write a tile at row and column of a weight whose columns begin at `start` in out."""
    residual_ptr, stride_residual, out_ptr, width = out
    BLOCK_N: gl.constexpr = acc.shape[1]
    STORE: gl.constexpr = gl.BlockedLayout([1, 8], [256 // BLOCK_N, BLOCK_N // 8], [4, 1], [1, 0])
    m = row + gl.arange(0, acc.shape[0], gl.SliceLayout(1, STORE))
    n = column + gl.arange(0, BLOCK_N, gl.SliceLayout(0, STORE))
    inside = (m < rows)[:, None] & (n < columns)[None, :]
    if residual_ptr is not None:
        residual_at = residual_ptr + m.to(gl.int64)[:, None] * stride_residual + (start + n)[None, :]
        residual = gl.load(residual_at, mask=inside, other=0.0)
        acc += gl.convert_layout(residual, acc.type.layout).to(gl.float32)
    at = out_ptr + m.to(gl.int64)[:, None] * width + (start + n)[None, :]
    gl.store(at, gl.convert_layout(acc.to(out_ptr.dtype.element_ty), STORE), mask=inside)


@gluon.jit
def crew(
    x_ptr, stride_x, weights, biases, out, rows, depth, PARTS: gl.constexpr, ACTIVATION: gl.constexpr,
    TRANSPOSE: gl.constexpr, GATED: gl.constexpr, PINGPONG: gl.constexpr, GROUP: gl.constexpr, STAGES: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, REST_N: gl.constexpr, BLOCK_K: gl.constexpr,
):  # fmt: skip
    """A program. weights: (pointer, stride, those of the second product, columns) of each; biases: of both products."""
    dtype: gl.constexpr = x_ptr.dtype.element_ty
    ROWS: gl.constexpr = BLOCK_M if PINGPONG else BLOCK_M // CONSUMERS
    X: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, BLOCK_K], dtype)
    SHAPE: gl.constexpr = [BLOCK_K, BLOCK_N] if TRANSPOSE else [BLOCK_N, BLOCK_K]
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
    turns = gl.allocate_shared_memory(gl.int64, [CONSUMERS, 1], BARRIER)
    for consumer in gl.static_range(CONSUMERS):
        mbarrier.init(turns.index(consumer), count=1)
    for slot in gl.static_range(STAGES):
        mbarrier.init(full.index(slot), count=3 if REST_N > 0 else 2)  # warps that fetch
        mbarrier.init(empty.index(slot), count=1 if PINGPONG else CONSUMERS)
    fence_async_shared()
    given = (x_ptr, stride_x, weights, biases, out, (rows, depth), (x_ring, ring, rest_ring), (full, empty, turns))
    # Descriptors are made by the warps that use them, each its own: made one after the other they take microseconds.
    gl.warp_specialize(
        [
            (
                multiply_all,
                (given, PARTS, ACTIVATION, TRANSPOSE, GATED, PINGPONG, GROUP, STAGES, BLOCK_M, BLOCK_N, REST_N, 0),
            ),
            (
                multiply_all,
                (given, PARTS, ACTIVATION, TRANSPOSE, GATED, PINGPONG, GROUP, STAGES, BLOCK_M, BLOCK_N, REST_N, 1),
            ),
            (fetch_x, (given, PARTS, GATED, GROUP, STAGES, BLOCK_M, BLOCK_N, REST_N)),
            (fetch_weights, (given, PARTS, TRANSPOSE, GATED, GROUP, STAGES, BLOCK_M, BLOCK_N, REST_N, 0)),
            (fetch_weights, (given, PARTS, TRANSPOSE, GATED, GROUP, STAGES, BLOCK_M, BLOCK_N, REST_N, 1)),
        ],
        [4, 1, 1, 1],  # warps of all but the first, which has the kernel's own four
        [240, 24, 24, 24],  # and their registers a thread
    )


@gluon.jit
def linear_many_kernel(
    x_ptr,  # all as linear_kernel's, and every row of x and the weights is of whole vectors
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
    REST_N: gl.constexpr,  # or 0
    BLOCK_K: gl.constexpr,
):
    # Persistent: grid = (min(tiles of all weights, multiprocessors),). Descriptors are written to memory that the last
    # kernel may still use, so even they wait.
    if PDL:
        await_inputs()
    PARTS: gl.constexpr = 1 if weight_1_ptr is None else 2 if weight_2_ptr is None else 3
    weights = (
        (weight_ptr, stride_weight, weight_ptr, stride_weight, columns),
        (weight_1_ptr, stride_weight_1, weight_1_ptr, stride_weight_1, columns_1),
        (weight_2_ptr, stride_weight_2, weight_2_ptr, stride_weight_2, columns_2),
    )
    biases = ((bias_ptr, bias_ptr), (bias_1_ptr, bias_1_ptr), (bias_2_ptr, bias_2_ptr))
    out = (residual_ptr, stride_residual, out_ptr, width)
    crew(
        x_ptr, stride_x, weights, biases, out, rows, depth, PARTS, ACTIVATION, TRANSPOSE, False, PINGPONG, GROUP,
        STAGES, BLOCK_M, BLOCK_N, REST_N, BLOCK_K,
    )  # fmt: skip


@gluon.jit
def gated_linear_many_kernel(
    x_ptr,  # all as gated_linear_kernel's, and every row of x and the weights is of whole vectors
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
    PINGPONG: gl.constexpr,
    GROUP: gl.constexpr,
    STAGES: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr,
):
    # As linear_many_kernel.
    if PDL:
        await_inputs()
    weights = ((gate_ptr, stride_gate, up_ptr, stride_up, columns),)
    biases = ((gate_bias_ptr, up_bias_ptr),)
    crew(
        x_ptr, stride_x, weights, biases, (None, 0, out_ptr, columns), rows, depth, 1, ACTIVATION, TRANSPOSE, True,
        PINGPONG, GROUP, STAGES, BLOCK_M, BLOCK_N, BLOCK_N, BLOCK_K,
    )  # fmt: skip
