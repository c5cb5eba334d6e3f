"""What linear, gated_linear and linear_norm share: how a tile of x times a weight is computed, and how operands lie.

x is [M, K]: any tensor whose rows step evenly, leading dimensions taken as one. A weight is [N, K], as torch's Linear
keeps it, or [K, N] where transposed (GPT-2's Conv1D); either has rows of contiguous elements that step by `stride`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import triton
import triton.language as tl

from trimaran.kernels.configs import Row
from trimaran.kernels.contract import ALIGNMENT, Decline, Device, Tensor, readable
from trimaran.kernels.norms import spaced_rows
from trimaran.kernels.sizes import differ

MAX_ROWS = 2**30  # row numbers are int32

# For any GPU: tiles that fit the 99 KiB of shared memory of the smallest (sm_86, sm_120). products: how many a program
# sums side by side.
CONFIGS: list[Row] = [
    ({"rows": 16}, {"BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_K": 128, "num_warps": 4, "num_stages": 4}),
    ({"rows": 256}, {"BLOCK_M": 64, "BLOCK_N": 32, "BLOCK_K": 64, "num_warps": 4, "num_stages": 3}),
    ({"products": 1}, {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 32, "num_warps": 4, "num_stages": 4}),
    ({}, {"BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_K": 32, "num_warps": 4, "num_stages": 3}),
]


@triton.jit
def grouped(tile, tiles_m, tiles_n, GROUP: tl.constexpr):
    """(row, column) of a tile. GROUP rows of tiles are gone through together, column by column, so that programs that
    run at once share what they read in the L2."""
    width = GROUP * tiles_n
    first = tile // width * GROUP
    height = tl.minimum(tiles_m - first, GROUP)
    return first + tile % width % height, tile % width // height


@triton.jit
def load_x(x_ptr, stride, rows, depth, row, k, EVEN: tl.constexpr):
    """[BLOCK_M, BLOCK_K] of x [rows, depth], zero beyond the depth unless EVEN; rows beyond the last repeat it."""
    pointers = x_ptr + tl.minimum(row, rows - 1).to(tl.int64)[:, None] * stride + k[None, :]
    if EVEN:
        return tl.load(pointers)
    else:
        return tl.load(pointers, mask=(k < depth)[None, :], other=0.0)


@triton.jit
def load_weight(weight_ptr, stride, columns, depth, column, k, TRANSPOSE: tl.constexpr, EVEN: tl.constexpr):
    """[BLOCK_K, BLOCK_N] of W^T, zero beyond the depth unless EVEN. W is [columns, depth], or [depth, columns] where
    TRANSPOSE; columns beyond the last are zero or repeat it."""
    if TRANSPOSE:
        pointers = weight_ptr + k.to(tl.int64)[:, None] * stride + column[None, :]
        return tl.load(pointers, mask=(k < depth)[:, None] & (column < columns)[None, :], other=0.0)
    else:
        pointers = weight_ptr + tl.minimum(column, columns - 1).to(tl.int64)[None, :] * stride + k[:, None]
        if EVEN:
            return tl.load(pointers)
        else:
            return tl.load(pointers, mask=(k < depth)[:, None], other=0.0)


def matrix_rows(name: str, tensor: Tensor) -> Any:
    """The step from one row of [.., K] to the next. Decline where rows do not step evenly or are not contiguous."""
    if tensor.shape[-1] > 1 and tensor.strides[-1] != 1:
        raise Decline(f"the last dimension of {name} is not contiguous")
    sizes, (strides,) = spaced_rows(tensor.shape, [tensor])
    if any(not isinstance(size, int) or size != 1 for size in sizes[:-1]):
        raise Decline(f"the rows of {name} do not step evenly")
    return strides[-1]


def weight_rows(name: str, weight: Tensor | None) -> Any:
    """The step from one row of a weight, as it is kept, to the next. Decline where a row is not contiguous."""
    if weight is None:
        return 0
    if weight.shape[1] > 1 and weight.strides[1] != 1:
        raise Decline(f"the rows of {name} are not contiguous")
    return weight.strides[0]


def weight_sizes(op: str, name: str, weight: Tensor, depth: Any, transpose: bool) -> Any:
    """N of a weight. ValueError where it is not a matrix of that depth."""
    layout = "[K, N]" if transpose else "[N, K]"
    k = 0 if transpose else 1
    if weight.rank != 2 or differ(weight.shape[k], depth):
        wanted = getattr(depth, "value", depth)
        raise ValueError(
            f"{op}: {name} has shape {readable(weight.shape)}, expected {layout} with K = {wanted} as x has"
        )
    return weight.shape[1 - k]


def check_vectors(inputs: Any, *names: str) -> None:
    """Decline vectors that are not contiguous."""
    for name in names:
        vector = getattr(inputs, name)
        if vector is not None and vector.shape[0] > 1 and vector.strides[0] != 1:
            raise Decline(f"{name} is not contiguous")


def check_device(op: str, device: Device, rows: Any) -> None:
    """Decline what no kernel of the op runs on."""
    if device.type == "cuda" and device.capability < 80:
        raise Decline(f"{op} needs a GPU of compute capability 8.0, this one has {device.capability / 10}")
    if rows > MAX_ROWS:
        raise Decline(f"more than {MAX_ROWS} rows")


def left_to_vendor(op: str, device: Device, dtype: str, config: Mapping[str, int] | None = None) -> None:
    """Decline what the vendor's library, and torch's kernels after it, do sooner: all of fp32, whose products tensor
    cores do not compute, and the rows of a table that say so, but where nobody else would compute them."""
    if device.type == "cuda" and dtype == "float32":
        raise Decline(f"{op} in fp32 is slower than the vendor's")
    if device.fallback and config and config.get("DECLINE"):
        raise Decline(f"{op} of these sizes is slower than the vendor's")


def whole_vectors(x: Tensor, weights: Sequence[Tensor]) -> bool:
    """Whether there is something to copy, and every row starts, and ends, on a whole vector: what is copied past the
    registers wants that."""
    steps = [x.shape[-1], matrix_rows("x", x)]
    for weight in weights:
        steps += [weight.shape[1], weight.strides[0], weight.offset]
    there = all(tensor.aligned and bool(size > 0) for tensor in (x, *weights) for size in tensor.shape[-2:])
    return there and all(bool(step % ALIGNMENT == 0) for step in steps)
