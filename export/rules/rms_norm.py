"""Root mean square norms over the last dimension: the standard operator, onnxruntime's own, and written out."""

from __future__ import annotations

from dataclasses import replace

import onnx_ir as ir

from trimaran.export.onnx_graph import attribute, dims, dtype_of, only_user, operand, readable, same_dims, used
from trimaran.export.rules.residual import rewrite_norm
from trimaran.export.rules.written_norms import ROOTS, Norm, is_vector, read_root
from trimaran.kernels.rms_norm import rms_norm

RMS_NORM_ANCHORS = (
    "RMSNormalization", "SimplifiedLayerNormalization", "SkipSimplifiedLayerNormalization", *ROOTS
)  # fmt: skip


def check_rms_norm(node: ir.Node) -> Norm | str | None:
    if node.op_type in ROOTS:
        found = read_root(node)
        if not isinstance(found, Norm) or found.kind != "rms":
            return None  # what is no norm at all is layer_norm's to report
    else:
        found = read_operator(node)
    return found if not isinstance(found, Norm) else problem_with(found) or found


def read_operator(node: ir.Node) -> Norm | str:
    skips = node.op_type == "SkipSimplifiedLayerNormalization"
    x, weight = operand(node, 0), operand(node, 2 if skips else 1)
    skip, more = (operand(node, 1), operand(node, 3)) if skips else (None, None)
    axis, shape = attribute(node, "axis", -1), dims(x)
    if x is None or shape is None:
        return "the rank of x is not known"
    if axis not in (-1, len(shape) - 1):
        return f"it normalizes from axis {axis} of {len(shape)}, only the last one is supported"
    if attribute(node, "stash_type", 1) != 1:
        return f"its statistics are kept in type {attribute(node, 'stash_type', 1)}, only float (1) is supported"
    if skips and not same_dims(shape, dims(skip)):
        return f"x {readable(shape)} and skip {readable(dims(skip))} are not provably of one shape"
    if any(used(output) for output in node.outputs[1:3]):
        return "its inverse root mean square is used"
    total = node.outputs[3] if len(node.outputs) > 3 else None
    eps = float(attribute(node, "epsilon", 1e-5))
    rounds = node.op_type == "RMSNormalization" and dtype_of(x) != "float32"
    found = Norm("rms", node.outputs[0], x, weight, None, eps, "llama" if rounds else "torch", total, skip, more)
    return narrowed(found) if dtype_of(found.end) != dtype_of(x) else found


def narrowed(match: Norm) -> Norm | str:
    """With the cast back of a norm whose weight is wider than x."""
    cast = only_user(match.end, "Cast")
    if cast is None or dtype_of(cast.outputs[0]) != dtype_of(match.x):
        return f"its result is {dtype_of(match.end)} and x is {dtype_of(match.x)}"
    return replace(match, end=cast.outputs[0], cast="torch")


def problem_with(match: Norm) -> str | None:
    for name, value in (("x", match.x), ("the scale", match.weight)):
        if value is not None and dtype_of(value) not in rms_norm.types["T"]:
            return f"{name} is {dtype_of(value)}, supported are {', '.join(rms_norm.types['T'])}"
    if match.weight is not None and not is_vector(match.weight, match.x):
        shape = dims(match.x) or (None,)
        return f"the scale has shape {readable(dims(match.weight))}, expected [N] = {readable(shape[-1:])}"
    if match.weight is not None and match.cast == "llama" and dtype_of(match.weight) != dtype_of(match.x):
        return f"the scale is {dtype_of(match.weight)} and x is {dtype_of(match.x)}"
    return None


def rewrite_rms_norm(node: ir.Node, match: Norm) -> None:
    rewrite_norm(rms_norm, match, {"eps": match.eps, "cast": match.cast})
