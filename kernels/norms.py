"""What layer_norm and rms_norm share: where rows lie, how many of them one program takes, and how they are read.

A program holds a tile of whole rows in registers, [ROWS, BLOCK]; rows of more than WHOLE_COLUMNS are read again, a
chunk of BLOCK columns at a time, once for each pass over them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import triton
import triton.language as tl

from trimaran.kernels.configs import Row, lookup
from trimaran.kernels.contract import Decline, Device, Divisible, Tensor, expect_shape
from trimaran.kernels.dependent import dependent
from trimaran.kernels.sizes import cdiv, power_of_2, product

MAX_COLUMNS = 65536
WHOLE_COLUMNS = 16384  # more do not fit in registers
EARLY_COLUMNS = 512  # for each warp: of so many there are registers for the weight while the row is reduced
MAX_ROWS = 2**30  # row numbers are int32
LEADING = 3  # dimensions before the last that may step independently


@triton.jit
def row_starts(row, size1, size2, stride0, stride1, stride2, DIMENSIONS: tl.constexpr):
    """Elements from the start of a tensor to each of `row`: int32 numbers of rows, counted over leading dimensions
    [.., size1, size2], of which the last DIMENSIONS are more than one element long."""
    if DIMENSIONS == 1:
        start = row.to(tl.int64) * stride2
    else:
        start = (row % size2).to(tl.int64) * stride2
        if DIMENSIONS == 2:
            start += (row // size2).to(tl.int64) * stride1
        else:
            start += (row // size2 % size1).to(tl.int64) * stride1 + (row // size2 // size1).to(tl.int64) * stride0
    return start


@triton.jit
def load_total(x_ptr, residual_ptr, mask):
    """A tile of x, plus that of the residual where there is one, in fp32 but rounded to the residual's dtype; 0
    outside."""
    x = tl.load(x_ptr, mask=mask, other=0.0)
    total = x.to(tl.float32)
    if residual_ptr is not None:
        residual = tl.load(residual_ptr, mask=mask, other=0.0)
        total = (total + residual.to(tl.float32)).to(residual.dtype).to(tl.float32)
    return total


# About 32 elements for each thread, which are four vectors of 16 bytes in half precision; tuned on an H200 in fp16.
# Where there are so few rows that they do not fill a GPU, one row for each program and more threads: what counts is how
# soon it ends.
CONFIGS: list[Row] = [
    ({"rows": 1024, "columns": 256}, {"ROWS": 1, "num_warps": 1}),
    ({"rows": 1024, "columns": 512}, {"ROWS": 1, "num_warps": 2}),
    ({"rows": 1024, "columns": 1024}, {"ROWS": 1, "num_warps": 4}),
    ({"rows": 1024, "columns": 4096}, {"ROWS": 1, "num_warps": 8}),
    ({"columns": 32}, {"ROWS": 128, "num_warps": 4}),
    ({"columns": 64}, {"ROWS": 64, "num_warps": 4}),
    ({"columns": 128}, {"ROWS": 32, "num_warps": 4}),
    ({"columns": 256}, {"ROWS": 16, "num_warps": 4}),
    ({"columns": 512}, {"ROWS": 4, "num_warps": 2}),
    ({"columns": 1024}, {"ROWS": 2, "num_warps": 2}),
    ({"columns": 2048}, {"ROWS": 1, "num_warps": 2}),
    ({"columns": 4096}, {"ROWS": 1, "num_warps": 4}),
    ({"columns": 8192}, {"ROWS": 1, "num_warps": 8}),
    ({"columns": WHOLE_COLUMNS, "dtype": "float32"}, {"ROWS": 1, "num_warps": 32}),
    ({"columns": WHOLE_COLUMNS}, {"ROWS": 1, "num_warps": 8}),
    ({}, {"ROWS": 1, "BLOCK": 8192, "num_warps": 16}),
]


def infer_norm(op: str, inputs: Any) -> tuple[Tensor, Tensor | None]:
    """Shapes of y and, where there is a residual, of the sum. ValueError naming the argument."""
    x: Tensor = inputs.x
    if x.rank == 0:
        raise ValueError(f"{op}: x is a scalar, expected [..., N]")
    for name in ("weight", "bias"):
        expect_shape(op, name, getattr(inputs, name, None), x.shape[-1:], "[N]")
    expect_shape(op, "residual", inputs.residual, x.shape, "the shape of x")
    y = Tensor(x.dtype, x.shape)
    return y, (y if inputs.residual is not None else None)


def norm_launch(op: str, inputs: Any, outputs: Any, eps: float, device: Device) -> dict[str, Any]:
    """The grid, args, constexprs and options that the norms have in common. Decline for rows that no kernel takes."""
    x, residual = inputs.x, inputs.residual
    columns, rows = x.shape[-1], product(x.shape[:-1])
    if device.type == "cuda" and device.capability < 80:
        raise Decline(f"{op} needs a GPU of compute capability 8.0, this one has {device.capability / 10}")
    if columns > MAX_COLUMNS:
        raise Decline(f"rows of more than {MAX_COLUMNS} elements")
    if rows > MAX_ROWS:
        raise Decline(f"more than {MAX_ROWS} rows")
    for name in ("x", "weight", "bias", "residual"):
        tensor = getattr(inputs, name, None)
        if tensor is not None and columns > 1 and tensor.strides[-1] != 1:
            raise Decline(f"the last dimension of {name} is not contiguous")
    sizes, strides = spaced_rows(x.shape, [x] if residual is None else [x, residual])
    block = power_of_2(columns)
    config = {"BLOCK": block, **lookup(CONFIGS, columns=block, rows=rows, dtype=x.dtype)}
    args = {"x_ptr": x, "residual_ptr": residual, "y_ptr": outputs.y, "sum_ptr": outputs.sum}
    for name, own in zip(("x", "residual"), [*strides, [0] * LEADING], strict=False):
        args |= {f"stride_{name}{axis}": Divisible(stride) for axis, stride in enumerate(own)}
    return {
        "grid": (cdiv(rows, config["ROWS"]) if columns > 0 else 0,),
        "args": {
            **args,
            "weight_ptr": inputs.weight,
            "size1": sizes[1],
            "size2": sizes[2],
            "rows": rows,
            "columns": Divisible(columns),
            "eps": eps,
        },
        "constexprs": {
            "DIMENSIONS": max(1, sum(not isinstance(size, int) or size != 1 for size in sizes)),
            "WHOLE": block <= WHOLE_COLUMNS,
            "EARLY": block <= EARLY_COLUMNS * config["num_warps"],
            "PDL": dependent(device),
            "ROWS": config.pop("ROWS"),
            "BLOCK": config.pop("BLOCK"),
        },
        "options": {**config, "launch_pdl": dependent(device)},
    }


def spaced_rows(shape: Sequence[Any], tensors: Sequence[Tensor]) -> tuple[list[Any], list[list[Any]]]:
    """LEADING sizes, outermost first, and for each tensor as many strides, that make up the dimensions before the last.

    Neighbours over which every tensor steps evenly are one dimension; missing outer ones have size 1 and stride 0.
    Decline where more are left.
    """
    sizes: list[Any] = []  # innermost first
    steps: list[list[Any]] = []
    empty = product(shape[:-1]) == 0
    for axis in reversed(range(len(shape) - 1)):
        size, here = shape[axis], [tensor.strides[axis] for tensor in tensors]
        if empty or size == 1:
            continue
        if sizes and all(step == inner * sizes[-1] for step, inner in zip(here, steps[-1], strict=True)):
            sizes[-1] = sizes[-1] * size
        else:
            sizes.append(size)
            steps.append(here)
    if len(sizes) > LEADING:
        raise Decline(f"rows that are spaced over more than {LEADING} dimensions")
    missing = LEADING - len(sizes)
    strides = [[0] * missing + [step[i] for step in reversed(steps)] for i in range(len(tensors))]
    return [1] * missing + sizes[::-1], strides
