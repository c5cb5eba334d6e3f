"""Scaled dot-product attention over many keys on Hopper (compute capability 9.0), written in Gluon.

What `attention_kernel` computes, for half precision, without bias, key mask, soft cap and window. Stock Triton waits
for the tensor cores before it starts a block's softmax; here the two run side by side:
- A program is a crew. Three warps only fetch, one each for q, k and v: blocks pass through tensor descriptors into
  shared memory, for k and v into rings. Two or three consumers, four warps each, own 64 queries apiece.
- A consumer issues the product q k^T of the next block together with p v of the last one, and takes the softmax of the
  next block while p v is still running. It also runs beside the products of the others, which take turns to issue.
- Programs are persistent: a tile's first blocks are fetched while the consumers finish the tile before.
Values beyond `key_lengths` may be NaN: in the one block that has some, consumers overwrite them with zeros, all of them
with the same.
Source: Shah et al., "FlashAttention-3: Fast and Accurate Attention with Asynchrony and Low-precision", 2024.
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

from trimaran.kernels.configs import Row, lookup
from trimaran.kernels.contract import Descriptor, Device, Launch, Tensor
from trimaran.kernels.dependent import await_inputs, dependent
from trimaran.kernels.heads import named_strides
from trimaran.kernels.sizes import cdiv, minimum, power_of_2

fetch = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared  # its name to Triton 3.8

MAX_HEAD_DIM = 128
LOG2_E = gl.constexpr(1.4426950408889634)
ROWS = gl.constexpr(64)  # queries of one consumer: the rows of a warpgroup's matrix product

# Where two parts of the crew hand something over, `full` and `empty` are barriers: the fetching warp waits until a slot
# is empty, a consumer until it is full. A barrier has a phase each time it completes, and is waited for by the phase's
# parity; the n-th use of a ring of STAGES slots is the (n // STAGES)-th phase of slot n % STAGES.


@gluon.jit
def tile_of(
    turn,
    key_lengths_ptr,
    stride_lengths,
    heads,
    queries,
    keys,
    tiles,
    CAUSAL: gl.constexpr,
    BLOCK_M: gl.constexpr,
):
    """The tile of this program's turn: batch, head, first query, keys of the batch, and one past the last key that any
    of its queries sees (0: nothing to do). Programs go there and back, so that heavy tiles meet light ones; the blocks
    of a head stand next to each other, the last one, which sees most under causality, first."""
    programs = gl.num_programs(0)
    program = gl.program_id(0)
    tile = turn * programs + gl.where(turn % 2 == 0, program, programs - 1 - program)
    inside = tile < tiles
    blocks = (queries + BLOCK_M - 1) // BLOCK_M
    first = (blocks - 1 - tile % blocks) * BLOCK_M
    head = tile // blocks % heads
    batch = gl.where(inside, tile // blocks // heads, 0)
    length = keys
    if key_lengths_ptr is not None:
        length = gl.minimum(gl.maximum(gl.load(key_lengths_ptr + batch * stride_lengths), 0), keys)
    end = length
    if CAUSAL:
        end = gl.maximum(gl.minimum(end, first + BLOCK_M + keys - queries), 0)
    return inside, batch, head, first, length, end


@gluon.jit
def fetch_queries(given, CAUSAL: gl.constexpr, CONSUMERS: gl.constexpr):
    rows, slots, full, empty, walk = given
    tiles = walk[5]
    fetched = 0
    for turn in range((tiles + gl.num_programs(0) - 1) // gl.num_programs(0)):
        inside, batch, head, first, _length, end = tile_of(turn, *walk, CAUSAL, ROWS * CONSUMERS)
        if inside & (end > 0):
            mbarrier.wait(empty, fetched & 1 ^ 1)
            mbarrier.expect(full, rows.block_type.nbytes * CONSUMERS)
            for consumer in gl.static_range(CONSUMERS):
                fetch(rows, [batch, head, first + consumer * ROWS, 0], full, slots.index(consumer))
            fetched += 1


@gluon.jit
def fetch_keys(given, CAUSAL: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, CONSUMERS: gl.constexpr):
    """The blocks of k, or of v, that the consumers want, last ones first."""
    rows, group, ring, full, empty, walk = given
    tiles = walk[5]
    fetched = 0
    for turn in range((tiles + gl.num_programs(0) - 1) // gl.num_programs(0)):
        inside, batch, head, _first, _length, end = tile_of(turn, *walk, CAUSAL, ROWS * CONSUMERS)
        if inside & (end > 0):
            count = (end + BLOCK_N - 1) // BLOCK_N
            for step in range(count):
                slot = fetched % STAGES
                mbarrier.wait(empty.index(slot), fetched // STAGES & 1 ^ 1)
                mbarrier.expect(full.index(slot), rows.block_type.nbytes)
                fetch(rows, [batch, head // group, (count - 1 - step) * BLOCK_N, 0], full.index(slot), ring.index(slot))
                fetched += 1


@gluon.jit
def consume(
    given, CAUSAL: gl.constexpr, HEAD_DIM: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
    CONSUMERS: gl.constexpr, TURNS: gl.constexpr, CONSUMER: gl.constexpr,
):  # fmt: skip
    """The tiles' queries of one consumer, ROWS at a time."""
    out_ptr, stride_ob, stride_oh, stride_om, scale, q_slots, rings, barriers, walk = given
    k_ring, v_ring = rings
    q_full, q_empty, k_full, k_empty, v_full, v_empty, turns = barriers
    queries, keys, tiles = walk[3], walk[4], walk[5]
    BLOCK_D: gl.constexpr = k_ring.shape[4]
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_D, 16])
    STORE: gl.constexpr = gl.BlockedLayout([1, 8], [256 // BLOCK_D, BLOCK_D // 8], [4, 1], [1, 0])
    dtype: gl.constexpr = k_ring.dtype
    scale = scale * LOG2_E
    shift = keys - queries  # the key position that query 0 stands at
    seen = 0  # blocks of keys
    served = 0  # tiles that have any
    for turn in range((tiles + gl.num_programs(0) - 1) // gl.num_programs(0)):
        inside, batch, head, first, length, end = tile_of(turn, *walk, CAUSAL, ROWS * CONSUMERS)
        if inside:
            acc = gl.zeros([ROWS, BLOCK_D], gl.float32, OUT)
            total = gl.zeros([ROWS], gl.float32, gl.SliceLayout(1, SCORES))
            top = gl.full([ROWS], float("-inf"), gl.float32, gl.SliceLayout(1, SCORES))
            first += CONSUMER * ROWS
            if end > 0:
                m = first + gl.arange(0, ROWS, gl.SliceLayout(1, SCORES))
                q = matrix(q_slots.index(CONSUMER))
                count = (end + BLOCK_N - 1) // BLOCK_N
                full = length  # one past the last key that each of these queries sees
                if CAUSAL:
                    full = gl.maximum(gl.minimum(full, first + 1 + shift), 0)
                edges = count - full // BLOCK_N  # blocks with a key to mask; the first is always taken for one
                at = (count - 1) * BLOCK_N
                mbarrier.wait(q_full, served & 1)
                scores = score(q, k_ring, k_full, seen, turns, BLOCK_N, STAGES, TURNS, CONSUMER)
                give_turn(turns, TURNS, CONSUMER, CONSUMERS)
                scores = warpgroup_mma_wait(0, deps=(scores,))
                mbarrier.arrive(k_empty.index(seen % STAGES))
                if walk[0] is not None:
                    if at + BLOCK_N > length:
                        mbarrier.wait(v_full.index(seen % STAGES), seen // STAGES & 1)
                        clean(matrix(v_ring.index(seen % STAGES)), length - at)
                weights, total, top, _ = soften(scores, total, top, at, length, m, shift, scale, True, CAUSAL)
                p = pack(weights, dtype)
                for step in range(1, edges):
                    acc, p, total, top = advance(
                        acc, p, total, top, q, rings, barriers, seen + step, at - step * BLOCK_N, length, m, shift,
                        scale, True, CAUSAL, STAGES, CONSUMERS, TURNS, CONSUMER,
                    )  # fmt: skip
                for step in range(gl.maximum(edges, 1), count):
                    acc, p, total, top = advance(
                        acc, p, total, top, q, rings, barriers, seen + step, at - step * BLOCK_N, length, m, shift,
                        scale, False, CAUSAL, STAGES, CONSUMERS, TURNS, CONSUMER,
                    )  # fmt: skip
                mbarrier.arrive(q_empty)
                seen += count
                served += 1
                slot = (seen - 1) % STAGES
                mbarrier.wait(v_full.index(slot), (seen - 1) // STAGES & 1)
                acc = warpgroup_mma(unpack(p, dtype, OUT), matrix(v_ring.index(slot)), acc)
                mbarrier.arrive(v_empty.index(slot))
            total = gl.where(total == 0.0, 1.0, total)
            out = (acc / rows_of(total, OUT)).to(dtype)
            row = first + gl.arange(0, ROWS, gl.SliceLayout(1, STORE))
            d = gl.arange(0, BLOCK_D, gl.SliceLayout(0, STORE))
            out_at = out_ptr + batch.to(gl.int64) * stride_ob + head.to(gl.int64) * stride_oh
            out_at = out_at + row.to(gl.int64)[:, None] * stride_om + d[None, :]
            gl.store(out_at, gl.convert_layout(out, STORE), mask=(row < queries)[:, None] & (d < HEAD_DIM)[None, :])


@gluon.jit
def advance(
    acc, p, total, top, q, rings, barriers, number, at, length, m, shift, scale, EDGE: gl.constexpr,
    CAUSAL: gl.constexpr, STAGES: gl.constexpr, CONSUMERS: gl.constexpr, TURNS: gl.constexpr, CONSUMER: gl.constexpr,
):  # fmt: skip
    """Add p v of the last block to acc, and meanwhile take the softmax of the next, which becomes p.

    number: of the block among all that this consumer sees; at: its first key.
    """
    k_ring, v_ring = rings
    _, _, k_full, k_empty, v_full, v_empty, turns = barriers
    BLOCK_N: gl.constexpr = k_ring.shape[3]
    OUT: gl.constexpr = acc.type.layout
    before = (number - 1) % STAGES
    p = unpack(p, k_ring.dtype, OUT)
    scores = score(q, k_ring, k_full, number, turns, BLOCK_N, STAGES, TURNS, CONSUMER)
    mbarrier.wait(v_full.index(before), (number - 1) // STAGES & 1)
    acc = warpgroup_mma(p, matrix(v_ring.index(before)), acc, is_async=True)
    give_turn(turns, TURNS, CONSUMER, CONSUMERS)
    scores = warpgroup_mma_wait(1, deps=(scores,))
    mbarrier.arrive(k_empty.index(number % STAGES))
    weights, total, top, shrink = soften(scores, total, top, at, length, m, shift, scale, EDGE, CAUSAL)
    acc = warpgroup_mma_wait(0, deps=(acc,))
    mbarrier.arrive(v_empty.index(before))
    return acc * rows_of(shrink, OUT), pack(weights, k_ring.dtype), total, top


@gluon.jit
def score(
    q, k_ring, k_full, number, turns, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, TURNS: gl.constexpr,
    CONSUMER: gl.constexpr,
):  # fmt: skip
    """Issue q k^T of one block, once it is here and it is this consumer's turn."""
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    if TURNS:  # the first consumer goes first: its barrier counts as completed once before it ever is
        mbarrier.wait(turns.index(CONSUMER), number & 1 ^ (CONSUMER == 0))
    mbarrier.wait(k_full.index(number % STAGES), number // STAGES & 1)
    nothing = gl.zeros([ROWS, BLOCK_N], gl.float32, SCORES)
    k = matrix(k_ring.index(number % STAGES))
    return warpgroup_mma(q, k.permute((1, 0)), nothing, use_acc=False, is_async=True)


@gluon.jit
def matrix(block):
    """A block [1, 1, rows, columns] of a ring as [rows, columns]."""
    return block.reshape([block.shape[2], block.shape[3]])


@gluon.jit
def clean(block, rows):
    """Zeros from row `rows` on."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [256 // block.shape[1], block.shape[1] // 8], [4, 1], [1, 0])
    row = gl.arange(0, block.shape[0], gl.SliceLayout(1, LAYOUT))
    values = block.load(LAYOUT)
    block.store(gl.where((row < rows)[:, None], values, gl.zeros_like(values)))
    fence_async_shared()


@gluon.jit
def give_turn(turns, TURNS: gl.constexpr, CONSUMER: gl.constexpr, CONSUMERS: gl.constexpr):
    if TURNS:
        mbarrier.arrive(turns.index((CONSUMER + 1) % CONSUMERS))


@gluon.jit
def soften(scores, total, top, at, length, m, shift, scale, EDGE: gl.constexpr, CAUSAL: gl.constexpr):
    """One step of the online softmax: the block's weights, and the factor by which all earlier ones shrink."""
    if EDGE:
        SCORES: gl.constexpr = scores.type.layout
        n = at + gl.arange(0, scores.shape[1], gl.SliceLayout(0, SCORES))
        scores = gl.where((n < length)[None, :], scores, float("-inf"))
        if CAUSAL:
            scores = gl.where(n[None, :] <= m[:, None] + shift, scores, float("-inf"))
    higher = gl.maximum(top, gl.max(scores, axis=1) * scale)
    finite = higher
    if EDGE:  # -inf - -inf would be NaN
        finite = gl.where(higher == float("-inf"), 0.0, higher)
    weights = gl.exp2(scores * scale - finite[:, None])
    shrink = gl.exp2(top - finite)
    return weights, total * shrink + gl.sum(weights, axis=1), higher, shrink


@gluon.jit
def rows_of(vector, LAYOUT: gl.constexpr):
    """[ROWS] as a column beside LAYOUT."""
    return gl.expand_dims(gl.convert_layout(vector, gl.SliceLayout(1, LAYOUT)), 1)


@gluon.jit
def pack(weights, dtype: gl.constexpr):
    """[ROWS, BLOCK_N] fp32 as [ROWS, BLOCK_N // 2] pairs in half precision: single halves that a loop hands on would
    take a register each."""
    even, odd = gl.split(gl.reshape(weights, [weights.shape[0], weights.shape[1] // 2, 2]))
    half: gl.constexpr = "f16" if dtype == gl.float16 else "bf16"
    asm: gl.constexpr = "cvt.rn." + half + "x2.f32 $0, $2, $1;"
    return gl.inline_asm_elementwise(asm, "=r,r,r", [even, odd], gl.int32, True, 1)


@gluon.jit
def unpack(pairs, dtype: gl.constexpr, OUT: gl.constexpr):
    """What `pack` packed, as the left operand of a product whose result has the layout OUT."""
    asm: gl.constexpr = "mov.b32 {$0, $1}, $2;"
    if dtype == gl.float16:
        even, odd = gl.inline_asm_elementwise(asm, "=h,=h,r", [pairs], (gl.float16, gl.float16), True, 1)
    else:
        even, odd = gl.inline_asm_elementwise(asm, "=h,=h,r", [pairs], (gl.bfloat16, gl.bfloat16), True, 1)
    weights = gl.reshape(gl.join(even, odd), [pairs.shape[0], pairs.shape[1] * 2])
    return gl.convert_layout(weights, gl.DotOperandLayout(0, OUT, 2))


@gluon.jit
def attention_hopper_kernel(
    q_desc,  # [B, H, queries, HEAD_DIM], in blocks of ROWS
    k_desc,  # [B, H // group, keys, HEAD_DIM], in blocks of BLOCK_N
    v_desc,  # [B, H // group, keys, HEAD_DIM], in blocks of BLOCK_N
    key_lengths_ptr,  # [B] int32 or None
    out_ptr,  # [B, H, queries, HEAD_DIM]
    stride_lengths,
    stride_ob,
    stride_oh,
    stride_om,
    heads,  # H
    group,  # query heads that share a key head
    queries,  # Sq
    keys,  # Sk
    scale,  # positive
    tiles,  # cdiv(queries, ROWS * CONSUMERS) * heads * B
    CAUSAL: gl.constexpr,
    PDL: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    BLOCK_D: gl.constexpr,  # power of two, at least HEAD_DIM and 64
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,  # blocks of k, and of v, in shared memory
    CONSUMERS: gl.constexpr,  # 2 or 3
    TURNS: gl.constexpr,  # consumers take turns to issue their products
):
    # Persistent: grid = (min(tiles, multiprocessors),), a program takes one tile after the other.
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    q_slots = gl.allocate_shared_memory(q_desc.dtype, [CONSUMERS, 1, 1, ROWS, BLOCK_D], q_desc.layout)
    k_ring = gl.allocate_shared_memory(q_desc.dtype, [STAGES, 1, 1, BLOCK_N, BLOCK_D], k_desc.layout)
    v_ring = gl.allocate_shared_memory(q_desc.dtype, [STAGES, 1, 1, BLOCK_N, BLOCK_D], v_desc.layout)
    q_full = gl.allocate_shared_memory(gl.int64, [1], BARRIER)
    q_empty = gl.allocate_shared_memory(gl.int64, [1], BARRIER)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    turns = gl.allocate_shared_memory(gl.int64, [CONSUMERS, 1], BARRIER)
    mbarrier.init(q_full, count=1)
    mbarrier.init(q_empty, count=CONSUMERS)
    for slot in gl.static_range(STAGES):
        mbarrier.init(k_full.index(slot), count=1)
        mbarrier.init(k_empty.index(slot), count=CONSUMERS)
        mbarrier.init(v_full.index(slot), count=1)
        mbarrier.init(v_empty.index(slot), count=CONSUMERS)
    for consumer in gl.static_range(CONSUMERS):
        mbarrier.init(turns.index(consumer), count=1)
    fence_async_shared()
    if PDL:
        await_inputs()

    # What is known at compile time stays outside these tuples: an assignment would make a tensor of it.
    walk = (key_lengths_ptr, stride_lengths, heads, queries, keys, tiles)
    barriers = (q_full, q_empty, k_full, k_empty, v_full, v_empty, turns)
    query = (q_desc, q_slots, q_full, q_empty, walk)
    key = (k_desc, group, k_ring, k_full, k_empty, walk)
    value = (v_desc, group, v_ring, v_full, v_empty, walk)
    out = (out_ptr, stride_ob, stride_oh, stride_om, scale, q_slots, (k_ring, v_ring), barriers, walk)
    if CONSUMERS == 2:
        gl.warp_specialize(
            [
                (consume, (out, CAUSAL, HEAD_DIM, BLOCK_N, STAGES, CONSUMERS, TURNS, 0)),
                (consume, (out, CAUSAL, HEAD_DIM, BLOCK_N, STAGES, CONSUMERS, TURNS, 1)),
                (fetch_queries, (query, CAUSAL, CONSUMERS)),
                (fetch_keys, (key, CAUSAL, BLOCK_N, STAGES, CONSUMERS)),
                (fetch_keys, (value, CAUSAL, BLOCK_N, STAGES, CONSUMERS)),
            ],
            [4, 1, 1, 1],  # warps of all but the first, which has the kernel's own four
            [240, 24, 24, 24],  # and their registers a thread
        )
    else:
        gl.warp_specialize(
            [
                (consume, (out, CAUSAL, HEAD_DIM, BLOCK_N, STAGES, CONSUMERS, TURNS, 0)),
                (consume, (out, CAUSAL, HEAD_DIM, BLOCK_N, STAGES, CONSUMERS, TURNS, 1)),
                (consume, (out, CAUSAL, HEAD_DIM, BLOCK_N, STAGES, CONSUMERS, TURNS, 2)),
                (fetch_queries, (query, CAUSAL, CONSUMERS)),
                (fetch_keys, (key, CAUSAL, BLOCK_N, STAGES, CONSUMERS)),
                (fetch_keys, (value, CAUSAL, BLOCK_N, STAGES, CONSUMERS)),
            ],
            [4, 4, 1, 1, 1],
            [160, 160, 24, 24, 24],
        )


# Measured on an H200 (Triton 3.6). causal and lengths (there are some) are 0 or 1.
CONFIGS: list[Row] = [
    (
        {"causal": 0, "keys": 1024, "lengths": 0, "head_dim": 64},
        {"BLOCK_N": 128, "STAGES": 4, "CONSUMERS": 2, "TURNS": 1},
    ),
    ({"causal": 0, "keys": 1024, "lengths": 0}, {"BLOCK_N": 128, "STAGES": 2, "CONSUMERS": 2, "TURNS": 1}),
    ({"causal": 0, "keys": 768}, {"BLOCK_N": 64, "STAGES": 3, "CONSUMERS": 2, "TURNS": 1}),
    ({"causal": 0, "keys": 1024, "head_dim": 64}, {"BLOCK_N": 128, "STAGES": 4, "CONSUMERS": 2, "TURNS": 1}),
    ({"head_dim": 64, "causal": 0}, {"BLOCK_N": 128, "STAGES": 2, "CONSUMERS": 3, "TURNS": 1}),
    ({"head_dim": 64}, {"BLOCK_N": 128, "STAGES": 4, "CONSUMERS": 2, "TURNS": 1}),
    ({"causal": 0}, {"BLOCK_N": 128, "STAGES": 2, "CONSUMERS": 2, "TURNS": 1}),
    ({}, {"BLOCK_N": 128, "STAGES": 2, "CONSUMERS": 2, "TURNS": 0}),
]


def hopper_launch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    key_lengths: Tensor | None,
    causal: bool,
    scale: float,
    device: Device,
) -> Launch:
    """The launch for q and out [B, H, Sq, D], k and v [B, Hkv, Sk, D], views whose rows tensor descriptors can read;
    key_lengths [B] int32."""
    batch, heads, queries, head_dim = q.shape
    facts = {"causal": int(causal), "lengths": int(key_lengths is not None)}
    config = lookup(CONFIGS, head_dim=head_dim, keys=k.shape[2], **facts)
    tiles = cdiv(queries, 64 * config["CONSUMERS"]) * heads * batch
    block_d = power_of_2(head_dim, least=64)
    return Launch(
        attention_hopper_kernel,
        grid=(minimum(tiles, device.sm_count),),
        args={
            "q_desc": blocks(q, 64, block_d),
            "k_desc": blocks(k, config["BLOCK_N"], block_d),
            "v_desc": blocks(v, config["BLOCK_N"], block_d),
            "key_lengths_ptr": key_lengths,
            "out_ptr": out,
            **named_strides("o", out, "bhm"),
            "stride_lengths": key_lengths.strides[0] if key_lengths is not None else 0,
            "heads": heads,
            "group": heads // k.shape[1],
            "queries": queries,
            "keys": k.shape[2],
            "scale": scale,
            "tiles": tiles,
        },
        constexprs={
            "CAUSAL": causal,
            "HEAD_DIM": int(head_dim),
            "BLOCK_D": block_d,
            "PDL": dependent(device),
            **config,
        },
        options={"num_warps": 4, "num_stages": 1, "launch_pdl": dependent(device)},
    )


def blocks(tensor: Tensor, rows: int, columns: int) -> Descriptor:
    """[B, H, S, D] in blocks of so many rows of a head. Along an axis of one element no step is ever taken."""
    strides = tuple(16 if size == 1 else stride for size, stride in zip(tensor.shape, tensor.strides, strict=True))
    return Descriptor(tensor, tensor.shape, (*strides[:3], 1), (1, 1, rows, columns))
