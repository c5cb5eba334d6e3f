"""aten.layer_norm over the last dimension, with the addition before it where that is a residual connection."""

from __future__ import annotations

from dataclasses import dataclass

from torch.fx import Graph, Node

from trimaran.kernels.layer_norm import layer_norm
from trimaran.torch_path.graph import argument, aten, dtype_of
from trimaran.torch_path.ops import TORCH_OPS
from trimaran.torch_path.rules.residual import rewrite_norm

LAYER_NORM_ANCHORS = (aten.layer_norm.default,)


@dataclass(frozen=True)
class LayerNorm:
    x: Node
    weight: Node | None
    bias: Node | None
    eps: float


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
    return LayerNorm(x, weight, bias, eps)


def rewrite_layer_norm(graph: Graph, node: Node, match: LayerNorm) -> None:
    target = TORCH_OPS["layer_norm"].overload
    rewrite_norm(graph, node, target, match.x, (match.weight, match.bias), {"eps": match.eps})
