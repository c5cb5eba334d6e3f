"""The types of values where onnx's own inference gave up: after operators that it does not know."""

from __future__ import annotations

import functools
from typing import Any

import onnx_ir as ir
from onnx.defs import OpSchema

from trimaran.export.structure import schema_of

_TYPE = {
    "tensor(float)": ir.DataType.FLOAT,
    "tensor(bool)": ir.DataType.BOOL,
    "tensor(int32)": ir.DataType.INT32,
    "tensor(int64)": ir.DataType.INT64,
}
# onnxruntime's own, of which onnx has no schema: the input whose type their first output has
_LIKE = {
    ("com.microsoft", name): index
    for index, names in (
        (0, "FusedMatMul MultiHeadAttention Attention GroupQueryAttention SkipLayerNormalization RotaryEmbedding Gelu "
            "BiasGelu FastGelu QuickGelu SkipSimplifiedLayerNormalization BiasSplitGelu FusedGemm BiasAdd"),
    )
    for name in names.split()
} | {("", "SimplifiedLayerNormalization"): 1}  # fmt: skip


def output_dtype(node: ir.Node, index: int, opset: int) -> ir.DataType | None:
    """The type that the operator's schema gives an output, None where it gives none."""
    if node.op_type == "Cast" and node.domain in ("", "ai.onnx"):
        return ir.DataType(node.attributes["to"].value) if "to" in node.attributes else None
    if node.op_type == "DequantizeLinear":
        given = node.attributes.get("output_dtype")
        return ir.DataType(given.value) if given is not None and given.value else _input_dtype(node, 1)
    domain = "" if node.domain == "ai.onnx" else node.domain
    if (domain, node.op_type) in _LIKE:
        return _input_dtype(node, _LIKE[domain, node.op_type]) if index in (0, 3) else None
    schema = schema_of(node.op_type, opset, domain)
    if schema is None or not schema.outputs:
        return None
    like = _types(schema)[min(index, len(schema.outputs) - 1)]
    if isinstance(like, ir.DataType):
        return like
    return next((found for place in like if (found := _input_dtype(node, place)) is not None), None)


def _types(schema: OpSchema) -> list[Any]:
    return _read(schema.name, schema.domain, schema.since_version)


@functools.cache
def _read(name: str, domain: str, version: int) -> list[Any]:
    """For each output its type, or the inputs that are of the same."""
    schema = schema_of(name, version, domain)
    assert schema is not None
    return [
        _TYPE.get(out.type_str) or [i for i, port in enumerate(schema.inputs) if port.type_str == out.type_str]
        for out in schema.outputs
    ]


def _input_dtype(node: ir.Node, index: int) -> ir.DataType | None:
    value = node.inputs[index] if index < len(node.inputs) else None
    return None if value is None else value.dtype
