"""aten.layer_norm over the last dimension, with the addition before it where that is a residual connection."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch.fx import Graph, Node

from trimaran.kernels.layer_norm import layer_norm
from trimaran.torch_path.graph import (
    argument,
    aten,
    call,
    called,
    dtype_of,
    is_tensor,
    mutation_between,
    replace,
    same_shape,
    value,
)
from trimaran.torch_path.ops import TORCH_OPS

LAYER_NORM_ANCHORS = (aten.layer_norm.default,)


@dataclass(frozen=True)
class LayerNorm:
    x: Node
    weight: Node | None
    bias: Node | None
    eps: float
    addition: Node | None  # the residual's; x is then its result


def check_layer_norm(node: Node) -> LayerNorm | str:
    x, shape = node.args[:2]
    weight, bias = argument(node, 2, "weight"), argument(node, 3, "bias")
    eps = argument(node, 4, "eps", 1e-5)
    if len(shape) != 1:  # type: ignore[arg-type]
        return f"it normalizes the last {len(shape)} dimensions, only the last one is supported"  # type: ignore[arg-type]
    if not isinstance(eps, float):
        return "eps is computed at run time"
    dtypes = {name: dtype_of(t) for name, t in (("x", x), ("weight", weight), ("bias", bias)) if t is not None}
    for name, dtype in dtypes.items():
        if dtype not in layer_norm.types["T"]:
            return f"{name} is {dtype}, supported are {', '.join(layer_norm.types['T'])}"
        if dtype != dtypes["x"]:
            return f"{name} is {dtype} and x is {dtypes['x']}"
    assert isinstance(x, Node)
    return LayerNorm(x, weight, bias, eps, x if is_residual(x, node) else None)


def is_residual(x: Node, norm: Node) -> bool:
    """x = a + b of one shape and dtype, with nothing in between that could see a difference."""
    if not called(x, aten.add.Tensor) or x.kwargs.get("alpha", 1) != 1:
        return False
    if not all(is_tensor(side) and value(side).dtype == value(x).dtype for side in x.args):
        return False
    if not all(same_shape(value(side).shape, value(x).shape) for side in x.args):
        return False
    if any(user is not norm and user < norm for user in x.users):  # the sum comes out of the norm, which is later
        return False
    return mutation_between(x, norm) is None


def rewrite_layer_norm(graph: Graph, node: Node, match: LayerNorm) -> None:
    target = TORCH_OPS["layer_norm"].overload
    x: Any = match.x
    residual: Any = None
    summed = False
    if match.addition is not None:
        x, residual = match.addition.args
        summed = len(match.addition.users) > 1
    both = call(graph, target, x, match.weight, match.bias, residual, eps=match.eps, return_sum=summed)
    replace(node, getitem(graph, both, 0))
    if summed:
        replace(match.x, getitem(graph, both, 1))
    graph.erase_node(node)


def getitem(graph: Graph, node: Node, index: int) -> Node:
    import operator

    item = graph.call_function(operator.getitem, (node, index))
    item.meta["val"] = node.meta["val"][index]
    return item
