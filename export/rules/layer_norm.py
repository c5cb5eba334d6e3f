"""Layer norms over the last dimension: the standard operator, onnxruntime's own with a residual, and written out."""

from __future__ import annotations

import onnx_ir as ir

from trimaran.export.onnx_graph import (
    attribute,
    dims,
    dtype_of,
    operand,
    readable,
    same_dims,
    used,
)
from trimaran.export.rules.residual import rewrite_norm
from trimaran.export.rules.written_norms import ROOTS, Norm, is_vector, read_root
from trimaran.kernels.layer_norm import layer_norm

LAYER_NORM_ANCHORS = ("LayerNormalization", "SkipLayerNormalization", *ROOTS)


def check_layer_norm(node: ir.Node) -> Norm | str | None:
    if node.op_type in ROOTS:
        found = read_root(node)
        if isinstance(found, Norm) and found.kind != "layer":
            return None
    else:
        found = read_skip(node) if node.op_type.startswith("Skip") else read_operator(node)
    return found if not isinstance(found, Norm) else problem_with(found) or found


def read_operator(node: ir.Node) -> Norm | str:
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
    if any(used(output) for output in node.outputs[1:]):
        return "its mean or inverse standard deviation is used"
    return Norm("layer", node.outputs[0], x, weight, bias, float(attribute(node, "epsilon", 1e-5)))


def read_skip(node: ir.Node) -> Norm | str:
    """com.microsoft's: x, skip, gamma, beta, a bias of x -> y, mean, deviation, sum"""
    x, skip, weight, bias, more = (operand(node, index) for index in range(5))
    if x is None or skip is None or not same_dims(dims(x), dims(skip)):
        return f"x {readable(dims(x))} and skip {readable(dims(skip))} are not provably of one shape"
    if any(used(output) for output in node.outputs[1:3]):
        return "its mean or inverse standard deviation is used"
    total = node.outputs[3] if len(node.outputs) > 3 else None
    eps = float(attribute(node, "epsilon", 1e-12))
    return Norm("layer", node.outputs[0], x, weight, bias, eps, total=total, residual=skip, shift=more)


def problem_with(match: Norm) -> str | None:
    shape = dims(match.x)
    for name, value in (("x", match.x), ("the scale", match.weight), ("the bias", match.bias)):
        if value is None:
            continue
        if dtype_of(value) not in layer_norm.types["T"] or dtype_of(value) != dtype_of(match.x):
            return f"{name} is {dtype_of(value)}, supported are {', '.join(layer_norm.types['T'])}, all alike"
        if name != "x" and not is_vector(value, match.x):
            return f"{name} has shape {readable(dims(value))}, expected [N] = {readable((shape or (None,))[-1:])}"
    return None


def rewrite_layer_norm(node: ir.Node, match: Norm) -> None:
    rewrite_norm(layer_norm, match, {"eps": match.eps})
