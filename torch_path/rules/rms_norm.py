"""x / sqrt(mean(x^2) + eps), times a weight: written out, as every model does, or as torch's rms_norm.

The anchor is the rsqrt. From it the mean of squares is read back to x, and the products forward to the last one that
belongs to the norm; casts on the way say which of the op's cast orders it is.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import Graph, Node

from trimaran.kernels.rms_norm import rms_norm
from trimaran.torch_path.graph import argument, aten, called, dtype_of, literal, value
from trimaran.torch_path.ops import TORCH_OPS
from trimaran.torch_path.rules.residual import only_user, rewrite_norm
from trimaran.torch_path.rules.statistics import CASTS, mean_of, square_of, vector_of

RMS_NORM_ANCHORS = (aten.rsqrt.default, aten.sqrt.default, aten.rms_norm.default)


@dataclass(frozen=True)
class RmsNorm:
    end: Node  # what is replaced
    x: Node
    weight: Node | None
    eps: float
    cast: str = "torch"


def check_rms_norm(node: Node) -> RmsNorm | str | None:
    match = _whole(node) if node.target is aten.rms_norm.default else _written_out(node)
    if not isinstance(match, RmsNorm):
        return match
    for name, tensor in (("x", match.x), ("weight", match.weight)):
        if tensor is not None and dtype_of(tensor) not in rms_norm.types["T"]:
            return f"{name} is {dtype_of(tensor)}, supported are {', '.join(rms_norm.types['T'])}"
    if dtype_of(match.end) != dtype_of(match.x):
        return f"its result is {dtype_of(match.end)} and x is {dtype_of(match.x)}"
    if match.weight is not None and match.cast == "llama" and dtype_of(match.weight) != dtype_of(match.x):
        return f"weight is {dtype_of(match.weight)} and x is {dtype_of(match.x)}"
    return match


def _whole(node: Node) -> RmsNorm | str:
    x, shape, weight, eps = node.args[0], node.args[1], argument(node, 2, "weight"), argument(node, 3, "eps")
    if len(shape) != 1:  # type: ignore[arg-type]
        return f"it normalizes the last {len(shape)} dimensions, only the last one is supported"  # type: ignore[arg-type]
    eps = torch.finfo(value(x).dtype).eps if eps is None else eps
    return RmsNorm(node, x, weight, eps) if isinstance(eps, float) else "eps is computed at run time"  # type: ignore[arg-type]


def _written_out(root: Node) -> RmsNorm | str | None:
    """None where this is no root of a mean of squares."""
    squares = _mean_of_squares(root.args[0])
    if squares is None:
        return None
    wide, eps = squares
    if eps is None:
        return "eps is computed at run time"
    if dtype_of(wide) == "float64":
        return "x is float64, or its squares are"
    x = wide.args[0] if called(wide, *CASTS) else wide
    normalized = next((user for user in root.users if _normalizes(user, root, {wide, x})), None)
    if normalized is None:
        return "what is multiplied with the root is not what was squared"
    assert isinstance(x, Node)
    return _weighted(RmsNorm(normalized, x, None, eps))


def _mean_of_squares(node: Any) -> tuple[Node, float | None] | None:
    """(x, eps) of mean(x^2, -1, keepdim) + eps"""
    if not called(node, aten.add.Tensor):
        return None
    for mean, eps in (node.args, node.args[::-1]):
        x = square_of(mean_of(mean))
        if x is not None:
            return x, literal(eps)
    return None


def _normalizes(user: Node, root: Node, xs: set[Any]) -> bool:
    """x * rsqrt(..), rsqrt(..) * x or x / sqrt(..)"""
    if called(root, aten.sqrt.default):
        return called(user, aten.div.Tensor) and user.args[0] in xs and user.args[1] is root
    return called(user, aten.mul.Tensor) and any(side in xs for side in user.args) and root in user.args


def _weighted(match: RmsNorm) -> RmsNorm:
    """The norm with what follows it: a cast to x's dtype, a product with a weight, and such a cast again."""
    found, end = match, only_user(match.end)
    inner = found.end
    rounded = False
    if called(end, *CASTS) and dtype_of(end) == dtype_of(match.x):
        found, inner, rounded = replace(found, end=end), end, True  # type: ignore[arg-type, assignment]
        end = only_user(inner)
    if not called(end, aten.mul.Tensor) or len(end.args) != 2:  # type: ignore[union-attr]
        return found
    one, other = end.args  # type: ignore[union-attr]
    weight, gemma = _weight(other if one is inner else one, match.x)
    if weight is None:
        return found
    after = only_user(end)
    if not rounded and dtype_of(end) != dtype_of(match.x):
        if not called(after, *CASTS) or dtype_of(after) != dtype_of(match.x):
            return found
        end = after
    cast = "gemma" if gemma else "llama" if rounded else "torch"
    if gemma and rounded:
        return found
    return replace(found, end=end, weight=weight, cast=cast)  # type: ignore[arg-type]


def _weight(node: Any, x: Node) -> tuple[Node | None, bool]:
    """(w [N], whether 1 is added to it) of a factor w or 1 + w, casts looked through."""
    one = False
    while called(node, *CASTS, aten.add.Tensor):
        if called(node, aten.add.Tensor):
            literals = [side for side in node.args if literal(side) is not None]
            if one or len(literals) != 1 or literal(literals[0]) != 1.0 or node.kwargs:
                return None, False
            one, node = True, next(side for side in node.args if side is not literals[0])
        else:
            node = node.args[0]
    weight = vector_of(node, x)
    return (weight, one) if weight is not None else (None, False)


def rewrite_rms_norm(graph: Graph, node: Node, match: RmsNorm) -> None:
    target = TORCH_OPS["rms_norm"].overload
    rewrite_norm(graph, match.end, target, match.x, (match.weight,), {"eps": match.eps, "cast": match.cast})
