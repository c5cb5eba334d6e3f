"""Layer norms over the last dimension, whole or written out, with the addition before them where that is a residual
connection.

Written out it is (x - mean) / sqrt(var + eps) * weight + bias. The anchor is the root; what is under it says whether it
is a variance, and of what: x.var(unbiased=False), mean((x - mean)^2), or mean(x^2) - mean^2.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, replace
from typing import Any

from torch.fx import Graph, Node

from trimaran.kernels.layer_norm import layer_norm
from trimaran.torch_path.graph import argument, aten, called, dtype_of, literal, value
from trimaran.torch_path.ops import TORCH_OPS
from trimaran.torch_path.rules.residual import only_user, rewrite_norm
from trimaran.torch_path.rules.statistics import CASTS, mean_of, square_of, uncast, vector_of

_STD = (aten.std.dim, aten.std.correction)
_VAR = (aten.var.dim, aten.var.correction)
_VAR_MEAN = (aten.var_mean.dim, aten.var_mean.correction)
LAYER_NORM_ANCHORS = (aten.layer_norm.default, aten.rsqrt.default, aten.sqrt.default, *_STD)


@dataclass(frozen=True)
class LayerNorm:
    end: Node  # what is replaced
    x: Node
    weight: Node | None
    bias: Node | None
    eps: float


def check_layer_norm(node: Node) -> LayerNorm | str | None:
    match = _whole(node) if node.target is aten.layer_norm.default else _written_out(node)
    if not isinstance(match, LayerNorm):
        return match
    tensors = (("x", match.x), ("weight", match.weight), ("bias", match.bias))
    dtypes = {name: dtype_of(tensor) for name, tensor in tensors if tensor is not None}
    for name, dtype in dtypes.items():
        if dtype not in layer_norm.types["T"]:
            return f"{name} is {dtype}, supported are {', '.join(layer_norm.types['T'])}"
        if dtype != dtypes["x"]:
            return f"{name} is {dtype} and x is {dtypes['x']}"
    if dtype_of(match.end) != dtypes["x"]:
        return f"its result is {dtype_of(match.end)} and x is {dtypes['x']}"
    return match


def _whole(node: Node) -> LayerNorm | str:
    x, shape = node.args[:2]
    eps = argument(node, 4, "eps", 1e-5)
    if len(shape) != 1:  # type: ignore[arg-type]
        return f"it normalizes the last {len(shape)} dimensions, only the last one is supported"  # type: ignore[arg-type]
    if not isinstance(eps, float):
        return "eps is computed at run time"
    return LayerNorm(node, x, argument(node, 2, "weight"), argument(node, 3, "bias"), eps)  # type: ignore[arg-type]


def _written_out(root: Node) -> LayerNorm | str | None:
    """None where this is no root of a variance."""
    if called(root, *_STD):
        return _deviation(root)
    under: Any = root.args[0]
    variance, eps = under, None
    if called(under, aten.add.Tensor) and not under.kwargs:
        variance, eps = next(((a, b) for a, b in (under.args, under.args[::-1]) if literal(b) is not None), under.args)
    x = _variance_of(variance)
    if x is None:
        return None
    normalized = next((user for user in root.users if _normalizes(user, root, x)), None)
    if normalized is None:
        return "what is divided by the deviation is not x - mean"
    if _is_unbiased(variance):
        return "its variance is divided by N - 1, a layer norm's by N"
    if variance is under:
        return "it adds no eps to the variance"
    if literal(eps) is None:
        return "eps is computed at run time"
    return _affine(LayerNorm(normalized, uncast(x), None, None, float(literal(eps))))  # type: ignore[arg-type]


def _deviation(std: Node) -> str | None:
    """x.std() is never a layer norm's, whose eps is under the root; said where it looks like one."""
    root: Any = next((user for user in std.users if called(user, aten.add.Tensor)), std)
    x: Any = std.args[0]
    if not any(_normalizes(user, root, x) for user in root.users):
        return None
    return "it adds eps to the deviation (or none), a layer norm to the variance"


def _variance_of(node: Any) -> Node | None:
    """x of its variance over the last dimension, which is kept"""
    if called(node, *_VAR) or (_is_item(node, 0) and called(node.args[0], *_VAR_MEAN)):
        call = node if called(node, *_VAR) else node.args[0]
        keeps = argument(call, 3, "keepdim", False) is True
        return call.args[0] if keeps and _last_only(call.args[0], argument(call, 1, "dim")) else None
    if called(node, aten.sub.Tensor) and not node.kwargs:
        x, mean = square_of(mean_of(node.args[0])), square_of(node.args[1])
        return x if x is not None and mean_of(mean) is x else None
    centered = square_of(mean_of(node))
    return _centered(centered)


def _is_item(node: Any, place: int) -> bool:
    return isinstance(node, Node) and node.target is operator.getitem and bool(node.args[1] == place)


def _last_only(x: Node, axes: Any) -> bool:
    return axes is not None and [axis % value(x).dim() for axis in axes] == [value(x).dim() - 1]


def _centered(node: Any) -> Node | None:
    """x of x - mean(x)"""
    if not called(node, aten.sub.Tensor) or node.kwargs:
        return None
    x, mean = node.args
    both: Any = mean.args[0] if _is_item(mean, 1) and called(mean.args[0], *_VAR_MEAN) else None
    return x if x is mean_of(mean) or (both is not None and both.args[0] is x) else None


def _is_unbiased(variance: Node) -> bool:
    """Whether a variance that torch computes is divided by N - 1, as it is unless it is told otherwise."""
    call: Any = variance.args[0] if _is_item(variance, 0) else variance
    if called(call, aten.var.dim, aten.var_mean.dim):
        return argument(call, 2, "unbiased", True) is not False
    return called(call, *_VAR, *_VAR_MEAN) and call.kwargs.get("correction", 1) not in (0, 0.0)


def _normalizes(user: Node, root: Node, x: Node) -> bool:
    """(x - mean) * rsqrt(..), in either order, or (x - mean) / sqrt(..)"""
    if called(root, aten.rsqrt.default):
        return called(user, aten.mul.Tensor) and root in user.args and any(_centered(side) is x for side in user.args)
    return called(user, aten.div.Tensor) and user.args[1] is root and _centered(user.args[0]) is x


def _affine(match: LayerNorm) -> LayerNorm:
    """The norm with the weight and bias that follow it, as far as a result in x's dtype comes out."""
    found, end, weight, bias = match, match.end, None, None
    while (user := only_user(end, aten.mul.Tensor, aten.add.Tensor, *CASTS)) is not None:
        if not called(user, *CASTS):
            other = vector_of(next((side for side in user.args if side is not end), None), match.x)
            if other is None or user.kwargs or bias is not None:
                break
            if called(user, aten.add.Tensor):
                bias = other
            elif weight is None:
                weight = other
            else:
                break
        end = user
        if dtype_of(end) == dtype_of(match.x):
            found = replace(found, end=end, weight=weight, bias=bias)
    return found


def rewrite_layer_norm(graph: Graph, node: Node, match: LayerNorm) -> None:
    target = TORCH_OPS["layer_norm"].overload
    rewrite_norm(graph, match.end, target, match.x, (match.weight, match.bias), {"eps": match.eps})
