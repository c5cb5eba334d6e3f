"""LayerNormalization over the last dimension, with the Add before it where that is a residual connection."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from trimaran.export.onnx_graph import (
    Inserter,
    attribute,
    dims,
    dtype_of,
    made_by,
    operand,
    readable,
    replace_value,
    same_dims,
)
from trimaran.export.schemas import DOMAIN
from trimaran.kernels.layer_norm import layer_norm

LAYER_NORM_ANCHORS = ("LayerNormalization",)


@dataclass(frozen=True)
class LayerNorm:
    x: ir.Value
    weight: ir.Value
    bias: ir.Value | None
    eps: float
    addition: ir.Node | None  # the residual's; x is then its result


def check_layer_norm(node: ir.Node) -> LayerNorm | str:
    x, weight, bias = (operand(node, index) for index in range(3))
    if x is None or weight is None:
        return "x or the scale is absent"
    axis, shape = attribute(node, "axis", -1), dims(x)
    if shape is None:
        return "the rank of x is not known"
    if axis not in (-1, len(shape) - 1):
        return f"it normalizes from axis {axis} of {len(shape)}, only the last one is supported"
    if attribute(node, "stash_type", 1) != 1:
        return f"its statistics are kept in type {attribute(node, 'stash_type', 1)}, only float (1) is supported"
    if any(output.uses() or output.is_graph_output() for output in node.outputs[1:]):
        return "its mean or inverse standard deviation is used"
    for name, value in (("x", x), ("the scale", weight), ("the bias", bias)):
        if value is not None and (dtype_of(value) not in layer_norm.types["T"] or dtype_of(value) != dtype_of(x)):
            return f"{name} is {dtype_of(value)}, supported are {', '.join(layer_norm.types['T'])}, all alike"
        if value is not None and value is not x and not same_dims(dims(value), shape[-1:]):
            return f"{name} has shape {readable(dims(value))}, expected [N] = {readable(shape[-1:])}"
    return LayerNorm(x, weight, bias, float(attribute(node, "epsilon", 1e-5)), residual_addition(x))


def residual_addition(x: ir.Value) -> ir.Node | None:
    """The Add of two tensors of x's own shape that makes x, None where there is none."""
    node = made_by(x, "Add")
    shapes = [dims(value) for value in node.inputs] if node is not None else []
    return node if shapes and all(same_dims(shape, dims(x)) for shape in shapes) else None


def rewrite_layer_norm(node: ir.Node, match: LayerNorm) -> None:
    x, residual = match.x, None
    summed = False
    if match.addition is not None:
        x, residual = match.addition.inputs  # type: ignore[assignment]
        summed = len(match.x.uses()) > 1 or match.x.is_graph_output()
    new = Inserter(node).node(
        layer_norm.name,
        [x, match.weight, match.bias, residual],
        {"eps": match.eps},
        domain=DOMAIN,
        num_outputs=2 if summed else 1,
        version=layer_norm.version,
        name=node.name,
    )
    replace_value(node.outputs[0], new.outputs[0])
    assert node.graph is not None
    node.graph.remove(node, safe=True)
    if summed:
        replace_value(match.x, new.outputs[1])
