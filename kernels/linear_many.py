"""Many rows times one weight, several, or a gated pair, on Hopper (compute capability 9.0), written in Gluon.

What `linear_kernel` and `gated_linear_kernel` compute, in half precision. A program is a crew: one warp fetches x, one
the weights of each product, through tensor descriptors into rings in shared memory; two consumers, four warps each,
multiply. Either both share a tile, half of its rows each, or (PINGPONG) each has tiles of its own, so that one finishes
a tile, with bias, activation, residual and its way to memory, while the other feeds the tensor cores.

A consumer sums two products side by side: BLOCK_N columns of a weight, and the REST_N columns after them (192 together
spread some shapes over a GPU better than 256), or the same columns of gate and up. Programs are persistent: they take
tile after tile of one weight, then of the next. Where weights are constant (EARLY) the rings are filled with them while
the last kernel still runs.
"""

from __future__ import annotations

from collections.abc import Mapping

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
from trimaran.kernels.contract import Descriptor, Tensor
from trimaran.kernels.dependent import await_rest, begin
from trimaran.kernels.matmul import grouped, matrix_rows
from trimaran.kernels.sizes import product

fetch = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared  # its name to Triton 3.8

CONSUMERS = gl.constexpr(2)

# A fetching warp waits until a slot of the rings is `empty`, a consumer until it is `full`. A barrier has a phase each
# time it completes, and is waited for by the phase's parity; the n-th use of a ring of STAGES slots is the
# (n // STAGES)-th phase of slot n % STAGES. Parity tells a phase only from its neighbours, so consumers with tiles of
# their own take `turns`: one waits for its first block when the other has seen its last.


@gluon.jit
def turns_of_all(rows, columns, PARTS: gl.constexpr, BLOCK_M: gl.constexpr, TILE_N: gl.constexpr):
    """How many tiles this program has, and how many stand side by side. columns: of each weight."""
    tiles_n = 0
    for part in gl.static_range(PARTS):
        tiles_n += gl.cdiv(columns[part], TILE_N)
    return gl.cdiv(gl.cdiv(rows, BLOCK_M) * tiles_n - gl.program_id(0), gl.num_programs(0)), tiles_n


@gluon.jit
def tile_of(
    turn, tiles_n, rows, columns, PARTS: gl.constexpr, GROUP: gl.constexpr, BLOCK_M: gl.constexpr, TILE_N: gl.constexpr
):
    """This program's tile number `turn`: its first row; its weight, and the column of it where the tile begins; and the
    column of the output where the weight's own begin, and how many these are."""
    tile = gl.program_id(0) + turn * gl.num_programs(0)
    tile_m, tile_n = grouped(tile, gl.cdiv(rows, BLOCK_M), tiles_n, GROUP)
    weight, start, own = 0, 0, columns[0]
    for part in gl.static_range(1, PARTS):
        tiles = gl.cdiv(own, TILE_N)
        if (weight == part - 1) & (tile_n >= tiles):
            weight = part
            tile_n -= tiles
            start += own
            own = columns[part]
    return tile_m * BLOCK_M, weight, tile_n * TILE_N, start, own


@gluon.jit
def fetch_x(
    given, PARTS: gl.constexpr, PDL: gl.constexpr, EARLY: gl.constexpr, GROUP: gl.constexpr, STAGES: gl.constexpr,
    BLOCK_M: gl.constexpr, TILE_N: gl.constexpr,
):  # fmt: skip
    """The warp that fetches x."""
    x, _weights, columns, _biases, _out, sizes, rings, barriers = given
    rows, depth = sizes
    full, empty, _turns = barriers
    ring = rings[0]
    ROWS: gl.constexpr = ring.shape[1]
    BOXES: gl.constexpr = BLOCK_M // ROWS
    await_rest(PDL, EARLY)
    turns, tiles_n = turns_of_all(rows, columns, PARTS, BLOCK_M, TILE_N)
    fetched = 0
    for turn in range(turns):
        row, _weight, _column, _start, _own = tile_of(turn, tiles_n, rows, columns, PARTS, GROUP, BLOCK_M, TILE_N)
        for k in range(0, depth, ring.shape[2]):
            slot = fetched % STAGES
            mbarrier.wait(empty.index(slot), fetched // STAGES & 1 ^ 1)
            mbarrier.expect(full.index(slot), x.block_type.nbytes * BOXES)
            for box in gl.static_range(BOXES):
                fetch(x, [row + box * ROWS, k], full.index(slot), ring.index(slot * BOXES + box))
            fetched += 1


@gluon.jit
def fetch_weights(
    given, PARTS: gl.constexpr, TRANSPOSE: gl.constexpr, GROUP: gl.constexpr, STAGES: gl.constexpr,
    BLOCK_M: gl.constexpr, TILE_N: gl.constexpr, PRODUCT: gl.constexpr, SKIPPED: gl.constexpr,
):  # fmt: skip
    """The warp that fetches the weights of the first or of the second product, where there is one. SKIPPED: columns of
    a tile before this product's."""
    _x, weights, columns, _biases, _out, sizes, rings, barriers = given
    rows, depth = sizes
    full, empty, _turns = barriers
    if weights[0][PRODUCT] is not None:
        ring = rings[1 + PRODUCT]
        BLOCK_K: gl.constexpr = rings[0].shape[2]
        turns, tiles_n = turns_of_all(rows, columns, PARTS, BLOCK_M, TILE_N)
        fetched = 0
        for turn in range(turns):
            _row, weight, column, _start, _own = tile_of(turn, tiles_n, rows, columns, PARTS, GROUP, BLOCK_M, TILE_N)
            for k in range(0, depth, BLOCK_K):
                slot = fetched % STAGES
                mbarrier.wait(empty.index(slot), fetched // STAGES & 1 ^ 1)
                mbarrier.expect(full.index(slot), weights[0][PRODUCT].block_type.nbytes)
                for part in gl.static_range(PARTS):
                    if weight == part:
                        if TRANSPOSE:
                            at = [k, column + SKIPPED]
                        else:
                            at = [column + SKIPPED, k]
                        fetch(weights[part][PRODUCT], at, full.index(slot), ring.index(slot))
                fetched += 1


@gluon.jit
def multiply_all(
    given, PARTS: gl.constexpr, ACTIVATION: gl.constexpr, TRANSPOSE: gl.constexpr, GATED: gl.constexpr,
    PDL: gl.constexpr, EARLY: gl.constexpr, PINGPONG: gl.constexpr, GROUP: gl.constexpr, STAGES: gl.constexpr,
    BLOCK_M: gl.constexpr, TILE_N: gl.constexpr, BLOCK_N: gl.constexpr, REST_N: gl.constexpr, CONSUMER: gl.constexpr,
):  # fmt: skip
    """A consumer: all tiles, or every second of them."""
    _x, _weights, columns, biases, out, sizes, rings, barriers = given
    rows, depth = sizes
    await_rest(PDL, EARLY)
    steps = gl.cdiv(depth, rings[0].shape[2])
    turns, tiles_n = turns_of_all(rows, columns, PARTS, BLOCK_M, TILE_N)
    for turn in range(CONSUMER if PINGPONG else 0, turns, CONSUMERS if PINGPONG else 1):
        acc, rest = multiply(rings, barriers, turn, steps, TRANSPOSE, PINGPONG, STAGES, BLOCK_N, REST_N, CONSUMER)
        row, weight, column, start, own = tile_of(turn, tiles_n, rows, columns, PARTS, GROUP, BLOCK_M, TILE_N)
        row += 0 if PINGPONG else CONSUMER * rings[0].shape[1]
        acc = activated(with_bias(acc, biases, 0, weight, column, own, PARTS), ACTIVATION, False)
        if GATED:
            acc *= with_bias(rest, biases, 1, weight, column, own, PARTS)
        write(acc, row, column, own, start, rows, out)
        if REST_N > 0 and not GATED:
            rest = activated(with_bias(rest, biases, 0, weight, column + BLOCK_N, own, PARTS), ACTIVATION, False)
            write(rest, row, column + BLOCK_N, own, start, rows, out)


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
def with_bias(acc, biases, product: gl.constexpr, weight, column, own, PARTS: gl.constexpr):
    """Add the bias of one of the weights, where it has one, at a column of it; it has `own` of them."""
    n = column + gl.arange(0, acc.shape[1], gl.SliceLayout(0, acc.type.layout))
    bias = gl.zeros([acc.shape[1]], gl.float32, gl.SliceLayout(0, acc.type.layout))
    for part in gl.static_range(PARTS):
        if biases[part][product] is not None:
            if weight == part:
                bias = gl.load(biases[part][product] + n, mask=n < own, other=0.0).to(gl.float32)
    return acc + bias[None, :]


@gluon.jit
def write(acc, row, column, own, start, rows, out):
    """Add the residual, and write a tile at row and column of a weight, whose `own` columns begin at `start` in out."""
    residual_ptr, stride_residual, out_ptr, width = out
    BLOCK_N: gl.constexpr = acc.shape[1]
    STORE: gl.constexpr = gl.BlockedLayout([1, 8], [256 // BLOCK_N, BLOCK_N // 8], [4, 1], [1, 0])
    m = row + gl.arange(0, acc.shape[0], gl.SliceLayout(1, STORE))
    n = column + gl.arange(0, BLOCK_N, gl.SliceLayout(0, STORE))
    inside = (m < rows)[:, None] & (n < own)[None, :]
    if residual_ptr is not None:
        residual_at = residual_ptr + m.to(gl.int64)[:, None] * stride_residual + (start + n)[None, :]
        residual = gl.load(residual_at, mask=inside, other=0.0)
        acc += gl.convert_layout(residual, acc.type.layout).to(gl.float32)
    at = out_ptr + m.to(gl.int64)[:, None] * width + (start + n)[None, :]
    gl.store(at, gl.convert_layout(acc.to(out_ptr.dtype.element_ty), STORE), mask=inside)


@gluon.jit
def crew(
    x, weights, columns, biases, out, rows, depth, PARTS: gl.constexpr, ACTIVATION: gl.constexpr,
    TRANSPOSE: gl.constexpr, GATED: gl.constexpr, PDL: gl.constexpr, EARLY: gl.constexpr, PINGPONG: gl.constexpr,
    GROUP: gl.constexpr, STAGES: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, REST_N: gl.constexpr,
    BLOCK_K: gl.constexpr,
):  # fmt: skip
    """A program. weights: (descriptor, that of the second product) of each; columns: of each; biases: of both products
    of each."""
    begin(PDL, EARLY)
    ROWS: gl.constexpr = BLOCK_M if PINGPONG else BLOCK_M // CONSUMERS
    TILE_N: gl.constexpr = BLOCK_N if GATED else BLOCK_N + REST_N
    SKIPPED: gl.constexpr = 0 if GATED else BLOCK_N
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    first, second = weights[0]
    x_ring = gl.allocate_shared_memory(x.dtype, [STAGES * (BLOCK_M // ROWS), ROWS, BLOCK_K], x.layout)
    ring = gl.allocate_shared_memory(x.dtype, [STAGES, first.block_shape[0], first.block_shape[1]], first.layout)
    rest_ring = ring
    if REST_N > 0:
        SHAPE: gl.constexpr = [STAGES, second.block_shape[0], second.block_shape[1]]
        rest_ring = gl.allocate_shared_memory(x.dtype, SHAPE, second.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    turns = gl.allocate_shared_memory(gl.int64, [CONSUMERS, 1], BARRIER)
    for consumer in gl.static_range(CONSUMERS):
        mbarrier.init(turns.index(consumer), count=1)
    for slot in gl.static_range(STAGES):
        mbarrier.init(full.index(slot), count=3 if REST_N > 0 else 2)  # warps that fetch
        mbarrier.init(empty.index(slot), count=1 if PINGPONG else CONSUMERS)
    fence_async_shared()
    given = (x, weights, columns, biases, out, (rows, depth), (x_ring, ring, rest_ring), (full, empty, turns))
    gl.warp_specialize(
        [
            (
                multiply_all,
                (
                    given, PARTS, ACTIVATION, TRANSPOSE, GATED, PDL, EARLY, PINGPONG, GROUP, STAGES, BLOCK_M, TILE_N,
                    BLOCK_N, REST_N, 0,
                ),
            ),
            (
                multiply_all,
                (
                    given, PARTS, ACTIVATION, TRANSPOSE, GATED, PDL, EARLY, PINGPONG, GROUP, STAGES, BLOCK_M, TILE_N,
                    BLOCK_N, REST_N, 1,
                ),
            ),
            (fetch_x, (given, PARTS, PDL, EARLY, GROUP, STAGES, BLOCK_M, TILE_N)),
            (fetch_weights, (given, PARTS, TRANSPOSE, GROUP, STAGES, BLOCK_M, TILE_N, 0, 0)),
            (fetch_weights, (given, PARTS, TRANSPOSE, GROUP, STAGES, BLOCK_M, TILE_N, 1, SKIPPED)),
        ],
        [4, 1, 1, 1],  # warps of all but the first, which has the kernel's own four
        [240, 24, 24, 24],  # and their registers a thread
    )  # fmt: skip


@gluon.jit
def linear_many_kernel(
    x_desc,  # [rows, depth], in blocks of what a consumer multiplies
    weight_desc,  # a weight as it is kept, in blocks of BLOCK_K and BLOCK_N
    weight_1_desc,
    weight_2_desc,
    rest_desc,  # the same in blocks of BLOCK_K and REST_N, None where that is 0
    rest_1_desc,
    rest_2_desc,
    bias_ptr,  # and all else as linear_kernel's
    bias_1_ptr,
    bias_2_ptr,
    residual_ptr,
    out_ptr,
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
    EARLY: gl.constexpr,  # all weights are constant
    PINGPONG: gl.constexpr,
    GROUP: gl.constexpr,
    STAGES: gl.constexpr,  # blocks in the ring
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    REST_N: gl.constexpr,  # or 0
    BLOCK_K: gl.constexpr,
):
    # Persistent: grid = (min(tiles of all weights, multiprocessors),).
    PARTS: gl.constexpr = 1 if weight_1_desc is None else 2 if weight_2_desc is None else 3
    weights = ((weight_desc, rest_desc), (weight_1_desc, rest_1_desc), (weight_2_desc, rest_2_desc))
    biases = ((bias_ptr,), (bias_1_ptr,), (bias_2_ptr,))
    out = (residual_ptr, stride_residual, out_ptr, width)
    crew(
        x_desc, weights, (columns, columns_1, columns_2), biases, out, rows, depth, PARTS, ACTIVATION, TRANSPOSE, False,
        PDL, EARLY, PINGPONG, GROUP, STAGES, BLOCK_M, BLOCK_N, REST_N, BLOCK_K,
    )  # fmt: skip


@gluon.jit
def gated_linear_many_kernel(
    x_desc,  # as linear_many_kernel's
    gate_desc,
    up_desc,
    gate_bias_ptr,  # and all else as gated_linear_kernel's
    up_bias_ptr,
    out_ptr,
    rows,
    columns,
    depth,
    ACTIVATION: gl.constexpr,
    TRANSPOSE: gl.constexpr,
    PDL: gl.constexpr,
    EARLY: gl.constexpr,
    PINGPONG: gl.constexpr,
    GROUP: gl.constexpr,
    STAGES: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr,
):
    # As linear_many_kernel.
    weights, biases = ((gate_desc, up_desc),), ((gate_bias_ptr, up_bias_ptr),)
    crew(
        x_desc, weights, (columns,), biases, (None, 0, out_ptr, columns), rows, depth, 1, ACTIVATION, TRANSPOSE, True,
        PDL, EARLY, PINGPONG, GROUP, STAGES, BLOCK_M, BLOCK_N, BLOCK_N, BLOCK_K,
    )  # fmt: skip


def x_blocks(x: Tensor, config: Mapping[str, int]) -> Descriptor:
    """x as the kernels fetch it: by what one consumer multiplies."""
    rows = config["BLOCK_M"] if config["PINGPONG"] else config["BLOCK_M"] // int(CONSUMERS)
    shape = (product(x.shape[:-1]), x.shape[-1])
    return Descriptor(x, shape, (matrix_rows("x", x), 1), (rows, config["BLOCK_K"]))


def weight_blocks(weight: Tensor | None, columns: int, config: Mapping[str, int], transpose: bool) -> Descriptor | None:
    """A weight in blocks of so many columns; None where there is none, or none of them."""
    if weight is None or columns == 0:
        return None
    block = (config["BLOCK_K"], columns) if transpose else (columns, config["BLOCK_K"])
    return Descriptor(weight, weight.shape, (weight.strides[0], 1), block)
