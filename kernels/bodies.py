"""What several function bodies write alike, in standard ONNX ops through the builder `g`."""

from __future__ import annotations

from typing import Any


def last_size(g: Any, x: Any) -> Any:
    """The size of the last dimension, as [1] int64."""
    return g.Slice(g.Shape(x), g.constant([-1], "int64"), g.constant([2**31 - 1], "int64"))


def halves(g: Any, x: Any) -> tuple[Any, Any]:
    """The first and the second half of the last dimension."""
    width, axis = last_size(g, x), g.constant([-1], "int64")
    middle = g.Div(width, g.constant([2], "int64"))
    return g.Slice(x, g.constant([0], "int64"), middle, axis), g.Slice(x, middle, width, axis)


def pairs(g: Any, x: Any) -> tuple[Any, Any]:
    """The even and the odd elements of the last dimension."""
    axis, step, end = (g.constant([value], "int64") for value in (-1, 2, 2**31 - 1))
    first, second = (g.Slice(x, g.constant([start], "int64"), end, axis, step) for start in (0, 1))
    return first, second
