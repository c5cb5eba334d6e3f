"""Where a key may stand, seen from a query, by the arithmetic that a mask is made by: what FX graphs and files share.

A `Line` is an integer tensor that grows by a constant along the query axis and the key axis of a mask [.., Sq, Sk]:
0, 1, 2.. plus an offset along one of them, or a sum or difference of such. Offsets may be symbolic (a cache's length),
sympy's in a file and torch's in a graph.
"""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Integral
from typing import Any

import sympy

KEY, QUERY = 1, 2  # axes, counted from the end


@dataclass(frozen=True)
class Line:
    """sum of steps[axis] * index along the axis, plus offset"""

    steps: dict[int, int]
    offset: Any = 0

    def plus(self, other: Line, sign: int = 1) -> Line:
        axes = {*self.steps, *other.steps}
        steps = {axis: self.steps.get(axis, 0) + sign * other.steps.get(axis, 0) for axis in axes}
        return Line({axis: step for axis, step in steps.items() if step}, plain(self.offset + sign * other.offset))


@dataclass(frozen=True)
class Bounds:
    """Keys from query + low to query + high are seen, both counted from 0; None: no bound on that side."""

    low: Any = None
    high: Any = None


def bound(line: Line) -> Bounds | None:
    """line <= 0"""
    if line.steps == {KEY: 1, QUERY: -1}:
        return Bounds(high=plain(-line.offset))
    if line.steps == {KEY: -1, QUERY: 1}:
        return Bounds(low=line.offset)
    grows = any(step > 0 for step in line.steps.values())
    return Bounds() if not grows and never_positive(line.offset) else None


def less(low: Line | None, limit: Line | None, slack: int) -> Bounds | None:
    """low + slack <= limit"""
    return None if low is None or limit is None else bound(low.plus(limit, -1).plus(Line({}, slack)))


def near(inside: Line | None, limit: Any, slack: int) -> Bounds | None:
    """|inside| + slack <= limit"""
    if inside is None:
        return None
    reach = Line({}, plain(limit - slack))
    one, other = bound(inside.plus(reach, -1)), bound(Line({}).plus(inside, -1).plus(reach, -1))
    if one is None or other is None:
        return None
    return Bounds(*(a if b is None else b for a, b in ((one.low, other.low), (one.high, other.high))))


def triangle(upper: bool, diagonal: Any, hidden: bool) -> Bounds:
    """Lower: k <= q + diagonal, upper: k >= q + diagonal; hidden: what is not in it."""
    if upper:
        return Bounds(high=plain(diagonal - 1)) if hidden else Bounds(low=diagonal)
    return Bounds(low=plain(diagonal + 1)) if hidden else Bounds(high=diagonal)


def never_positive(number: Any) -> bool:
    """Whether that is known."""
    expression = getattr(getattr(number, "node", None), "expr", number)  # a torch.SymInt's
    return expression <= 0 if isinstance(expression, int) else bool(getattr(expression, "is_nonpositive", False))


def plain(number: Any) -> Any:
    """One form for equal numbers: an int where it is one, of sympy's the expanded polynomial."""
    if isinstance(number, Integral):
        return int(number)
    if not isinstance(number, sympy.Basic):  # torch's are in one form already
        return number
    number = sympy.expand(number)
    return int(number) if number.is_Integer else number
