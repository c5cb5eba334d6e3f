"""Conditions on positions: how far a key may stand from a query, read from the arithmetic that a mask is made by.

`torch_path/lines.py` has the arithmetic itself.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from trimaran.export.onnx_graph import constant, dims, is_parameter, made_by, operand, permutation, same, scalar, source
from trimaran.export.shapes import attr, given, numbers, slice_arguments
from trimaran.torch_path.lines import KEY, QUERY, Bounds, Line, less, near, plain, triangle

MOVES = ("Neg", "Cast", "Expand", "Unsqueeze", "Squeeze", "Reshape", "Transpose", "Slice")
COMPARE = {"LessOrEqual": (0, 1, 0), "Less": (0, 1, 1), "GreaterOrEqual": (1, 0, 0), "Greater": (1, 0, 1)}
OPPOSITE = {"LessOrEqual": "Greater", "Less": "GreaterOrEqual", "GreaterOrEqual": "Less", "Greater": "LessOrEqual"}


def bounds_of(condition: ir.Value, hidden: bool = False) -> Bounds | None:
    """What a bool tensor, or its opposite where it says what is hidden, says about key minus query; `Bounds()` where
    it always holds, None where it says more."""
    known = _triangle(condition, hidden) or _table(condition, hidden)
    node = made_by(condition, *COMPARE)
    if known is not None or node is None:
        return known
    smaller, larger, slack = COMPARE[OPPOSITE[node.op_type] if hidden else node.op_type]
    limit = line_of(node.inputs[larger])
    inner = made_by(node.inputs[smaller], "Abs")
    if inner is not None and limit is not None and not limit.steps:
        return near(line_of(inner.inputs[0]), limit.offset, slack)
    return less(line_of(node.inputs[smaller]), limit, slack)


def _triangle(condition: ir.Value, hidden: bool) -> Bounds | None:
    """Trilu of ones, lower: k <= q + diagonal, upper: k >= q + diagonal"""
    cast = made_by(condition, "Cast")
    node = made_by(cast.inputs[0] if cast is not None else condition, "Trilu")
    if node is None or fill_of(node.inputs[0]) not in (True, 1):
        return None
    diagonal = 0 if operand(node, 1) is None else scalar(node.inputs[1])
    return None if diagonal is None else triangle(bool(attr(node, "upper", 1)), int(diagonal), hidden)


def _table(condition: ir.Value, hidden: bool) -> Bounds | None:
    """A part of a constant triangle, [.., rows from a, columns from b]: key b + j is seen by query a + i."""
    start = {KEY: 0, QUERY: 0}
    value: ir.Value | None = source(condition)
    while (node := made_by(value, "Slice", "Cast")) is not None:
        if node.op_type == "Slice":
            rank, bounds = len(dims(node.inputs[0]) or ()), slice_arguments(node)
            if bounds is None or any(step != 1 for _, _, step in bounds.values()):
                return None
            for axis, (first, _, _) in bounds.items():
                if first is None or (isinstance(first, int) and first < 0):
                    return None
                if rank - axis in start:
                    start[rank - axis] = plain(start[rank - axis] + first)
                elif first != 0:
                    return None
        value = source(node.inputs[0])
    table = constant(value) if is_parameter(value) else None
    if (
        table is None
        or table.ndim < 2
        or table.dtype.kind not in "biu"
        or table.size != table.shape[-1] * table.shape[-2]
    ):
        return None
    seen = table.reshape(table.shape[-2:]) != 0
    ones = np.ones_like(seen)
    for upper, part in ((False, np.tril(ones)), (True, np.triu(ones))):
        if seen.shape[0] > 1 and np.array_equal(seen, part):
            return triangle(upper, plain(start[QUERY] - start[KEY]), hidden)
    return None


def line_of(value: ir.Value | None, depth: int = 24) -> Line | None:
    """The line that an integer tensor is, None where it is none."""
    shape, known = dims(value), numbers(value)
    if value is None or shape is None or not depth:
        return None
    if known is not None and len(known) == 1:
        return None if known[0] is None else Line({}, known[0])
    if (table := constant(value)) is not None:
        return _constant_line(table)
    node = made_by(value, "Range", "Add", "Sub", "CumSum", "ConstantOfShape", *MOVES)
    if node is None:
        return None
    op = node.op_type
    if op == "Range":
        first, step = numbers(node.inputs[0]), numbers(node.inputs[2])
        return None if step != [1] or not first or first[0] is None else Line({KEY: 1}, first[0])
    if op in ("Add", "Sub"):
        left, right = (line_of(part, depth - 1) for part in node.inputs)
        return None if left is None or right is None else left.plus(right, 1 if op == "Add" else -1)
    if op == "ConstantOfShape" or (op == "Expand" and fill_of(value) is not None):
        fill = fill_of(value)
        return Line({}, int(fill)) if fill is not None and fill == int(fill) else None
    if op == "CumSum":
        axis = scalar(node.inputs[1])
        ones = fill_of(node.inputs[0]) == 1 and axis is not None and not attr(node, "reverse", 0)
        return (
            Line({len(shape) - int(axis) % len(shape): 1}, 1 - attr(node, "exclusive", 0))
            if ones and axis is not None
            else None
        )
    line = line_of(node.inputs[0], depth - 1)
    return None if line is None else _moved(node, line)


def _moved(node: ir.Node, line: Line) -> Line | None:
    before, after = dims(node.inputs[0]) or (), dims(node.outputs[0]) or ()
    if node.op_type == "Neg":
        return Line({}).plus(line, -1)
    if node.op_type == "Cast":
        dtype = node.outputs[0].dtype
        return line if dtype is not None and dtype != ir.DataType.BOOL else None
    if node.op_type == "Expand":
        return line
    if node.op_type == "Transpose":
        order = permutation(node) or []
        rank = len(order)
        return Line({rank - order.index(rank - axis): step for axis, step in line.steps.items()}, line.offset)
    if node.op_type == "Slice":
        bounds = slice_arguments(node)
        if bounds is None or any(step != 1 or not _not_negative(first) for first, _, step in bounds.values()):
            return None
        moved = sum(line.steps.get(len(before) - axis, 0) * first for axis, (first, _, _) in bounds.items())
        return Line(line.steps, plain(line.offset + moved))
    if node.op_type == "Unsqueeze":
        axes = {axis % len(after) for axis in given(node, "axes", 1) or ()}
        kept = [axis for axis in range(len(after)) if axis not in axes]
        place = {len(before) - i: len(after) - axis for i, axis in enumerate(kept)}
        return Line({place[axis]: step for axis, step in line.steps.items()}, line.offset)
    long = [[axis for axis, size in enumerate(reversed(s), 1) if size != 1] for s in (before, after)]
    sizes = [[s[len(s) - axis] for axis in axes] for s, axes in zip((before, after), long, strict=True)]
    if len(sizes[0]) != len(sizes[1]) or not all(map(same, *sizes)) or not {*line.steps} <= {*long[0]}:
        return None
    return Line({long[1][long[0].index(axis)]: step for axis, step in line.steps.items()}, line.offset)


def _not_negative(number: Any) -> bool:
    return number is not None and (not isinstance(number, int) or number >= 0)


def _constant_line(table: Any) -> Line | None:
    """0, 1, 2, ... along one axis"""
    long = [axis for axis, size in enumerate(reversed(table.shape), 1) if size > 1]
    if table.dtype.kind not in "iu" or len(long) > 1 or not table.size:
        return None
    flat = table.reshape(-1).astype(np.int64)
    return Line(dict.fromkeys(long, 1), int(flat[0])) if (np.diff(flat) == 1).all() else None


def fill_of(value: ir.Value | None, depth: int = 8) -> Any:
    """The number or bool that every element of a tensor has, None where that is not known."""
    array = constant(value)
    if array is not None:
        return (
            array.reshape(-1)[0].item()
            if array.size and array.dtype.kind in "biuf" and (array == array.flat[0]).all()
            else None
        )
    node = (
        made_by(value, "ConstantOfShape", "Expand", "Reshape", "Unsqueeze", "Cast", "CastLike", "Trilu")
        if depth
        else None
    )
    if node is None:
        return None
    if node.op_type == "ConstantOfShape":
        tensor = attr(node, "value", None)
        return 0.0 if tensor is None else tensor.numpy().reshape(-1)[0].item()
    if node.op_type == "Trilu":
        return None
    inner = fill_of(node.inputs[0], depth - 1)
    if inner is None or node.op_type != "Cast":
        return inner
    return bool(inner) if node.outputs[0].dtype == ir.DataType.BOOL else inner
