"""Conditions on positions: how far a key may stand from a query, read from the arithmetic that a mask is made by.

`torch_path/lines.py` has the arithmetic itself.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from trimaran.torch_path.graph import argument, aten, called, is_tensor, literal, same, value
from trimaran.torch_path.lines import KEY, Bounds, Line, less, near, triangle

_OPPOSITE = {"le": "gt", "lt": "ge", "ge": "lt", "gt": "le"}
_COMPARE = {"le": (0, 1, 0), "lt": (0, 1, 1), "ge": (1, 0, 0), "gt": (1, 0, 1)}  # args[i] + slack <= args[j]


def bounds_of(condition: Node, hidden: bool = False) -> Bounds | None:
    """What a bool tensor, or its opposite where it says what is hidden, says about key minus query; `Bounds()` where
    it always holds, None where it says more."""
    known = _triangle(condition, hidden)
    if known is not None:
        return known
    name = getattr(condition.target, "_opname", "")
    if name not in _COMPARE or not is_tensor(condition):
        return None
    name = _OPPOSITE[name] if hidden else name
    smaller, larger, slack = _COMPARE[name]
    sides: Any = condition.args
    low, high = sides[smaller], sides[larger]
    if any(is_tensor(side) and value(side).dtype.is_floating_point for side in (low, high)):
        return None
    limit = line_of(high)
    if called(low, aten.abs.default) and limit is not None and not limit.steps:
        return near(line_of(low.args[0]), limit.offset, slack)
    return less(line_of(low), limit, slack)


def _triangle(node: Node, hidden: bool) -> Bounds | None:
    """tril(ones): k <= q + diagonal; triu(ones): k >= q + diagonal"""
    if not called(node, aten.tril.default, aten.triu.default) or constant_of(node.args[0]) not in (True, 1):
        return None
    diagonal = argument(node, 1, "diagonal", 0)
    return triangle(called(node, aten.triu.default), diagonal, hidden)


def line_of(node: Any) -> Line | None:
    """The line that an integer tensor or number is, None where it is none."""
    if isinstance(node, (int, torch.SymInt)) or (isinstance(node, Node) and isinstance(value(node), torch.SymInt)):
        return Line({}, value(node))
    if not is_tensor(node) or value(node).dtype not in (torch.int64, torch.int32):  # smaller ones wrap around
        return None
    args = node.args
    if called(node, aten.arange.default):
        return Line({KEY: 1})
    if called(node, aten.arange.start):
        return Line({KEY: 1}, value(args[0]))
    if called(node, aten.add.Tensor, aten.sub.Tensor) and not node.kwargs:
        left, right = line_of(args[0]), line_of(args[1])
        sign = 1 if called(node, aten.add.Tensor) else -1
        return None if left is None or right is None else left.plus(right, sign)
    if called(node, aten.neg.default):
        inner = line_of(args[0])
        return None if inner is None else Line({}).plus(inner, -1)
    if called(node, aten.to.dtype, aten.to.device, aten.expand.default):
        return line_of(args[0])
    if called(node, aten.repeat.default):
        line, times = line_of(args[0]), tuple(args[1])
        along = line is not None and all(times[-axis] == 1 for axis in line.steps)
        return line if along else None
    if called(node, aten.unsqueeze.default, aten.view.default, aten.reshape.default):
        return _moved(node, line_of(args[0]))
    if called(node, aten.slice.Tensor):
        return _sliced(node, line_of(args[0]))
    if called(node, aten.index.Tensor):
        return _looked_up(node)
    number = constant_of(node)
    return Line({}, number) if isinstance(number, int) else None


def _moved(node: Node, line: Line | None) -> Line | None:
    """Axes of size 1 put in between."""
    if line is None:
        return None
    before, after = value(node.args[0]).shape, value(node).shape
    if called(node, aten.unsqueeze.default):
        at: Any = node.args[1]
        place = len(after) - (at % len(after))
        return Line({axis + (axis >= place): step for axis, step in line.steps.items()}, line.offset)
    long = [[axis for axis, size in enumerate(reversed(s), 1) if not same(size, 1)] for s in (before, after)]
    sizes = [[s[len(s) - axis] for axis in axes] for s, axes in zip((before, after), long, strict=True)]
    if len(sizes[0]) != len(sizes[1]) or not all(map(same, *sizes)) or not {*line.steps} <= {*long[0]}:
        return None
    return Line({long[1][long[0].index(axis)]: step for axis, step in line.steps.items()}, line.offset)


def _sliced(node: Node, line: Line | None) -> Line | None:
    start, step = argument(node, 2, "start") or 0, argument(node, 4, "step", 1)
    if line is None or step != 1 or not isinstance(start, int) or start < 0:
        return None
    axis = value(node).dim() - argument(node, 1, "dim", 0) % value(node).dim()
    return Line(line.steps, line.offset + start * line.steps.get(axis, 0))


def _looked_up(node: Node) -> Line | None:
    """positions[batch, i]: a line read along another line."""
    places: Any = node.args[1]
    table, place = line_of(node.args[0]), line_of(places[-1])
    if table is None or place is None or len(places) != value(node.args[0]).dim() or not {*table.steps} <= {KEY}:
        return None
    step = table.steps.get(KEY, 0)
    steps = {axis: step * by for axis, by in place.steps.items() if step}
    return Line(steps, table.offset + step * place.offset)


def constant_of(node: Any) -> Any:
    """The number or bool that every element of a tensor has, None where that is not known."""
    if not is_tensor(node):
        return value(node) if isinstance(value(node), (bool, int, float)) else None
    args = node.args
    if called(node, aten.ones.default, aten.new_ones.default, aten.ones_like.default):
        return _typed(node, 1)
    if called(node, aten.zeros.default, aten.new_zeros.default, aten.zeros_like.default):
        return _typed(node, 0)
    if called(node, aten.full.default, aten.new_full.default, aten.full_like.default):
        return _typed(node, argument(node, 2 if called(node, aten.new_full.default) else 1, "fill_value"))
    if called(node, aten.expand.default, aten.view.default, aten.unsqueeze.default, aten.index.Tensor, aten.to.dtype):
        inner = constant_of(args[0])
        return None if inner is None else _typed(node, inner)
    if called(node, aten.cumsum.default):
        return 0 if constant_of(args[0]) in (0, False) else None
    if called(node, aten.eq.Tensor, aten.ne.Scalar, aten.ne.Tensor, aten.eq.Scalar):
        left, right = constant_of(args[0]), constant_of(args[1])
        equal = called(node, aten.eq.Tensor, aten.eq.Scalar)
        return None if left is None or right is None else (left == right) is equal
    if called(node, aten.diff.default):
        return _difference(node)
    return literal(node) if value(node).dim() == 0 else None


def _typed(node: Node, number: Any) -> Any:
    if not isinstance(number, (bool, int, float)):
        return None
    dtype = value(node).dtype
    return bool(number) if dtype == torch.bool else float(number) if dtype.is_floating_point else int(number)


def _difference(node: Node) -> int | None:
    """diff(x, prepend=first - step) of a line is its step, everywhere"""
    line, before = line_of(node.args[0]), argument(node, 3, "prepend")
    if line is None or argument(node, 1, "n", 1) != 1 or before is None or {*line.steps} != {KEY}:
        return None
    axis: Any = argument(node, 2, "dim", -1)
    first, step = line_of(before), line.steps[KEY]
    last = (axis + 1) % value(node).dim() == 0 and same(value(before).shape[-1], 1)
    known = first is not None and same(first.offset, line.offset - step)
    return step if last and known else None
