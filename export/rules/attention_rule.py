"""Attention, whatever it is written as: one rule."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

from trimaran.export.onnx_graph import Inserter
from trimaran.export.rules import attention as written_out
from trimaran.export.rules.attention import Attention, checked, from_softmax
from trimaran.export.rules.attention_operator import Prepared, from_operator
from trimaran.export.rules.group_query import from_group
from trimaran.export.rules.onnxruntime_attention import from_multi_head, from_packed

ATTENTION_ANCHORS = ("Softmax", "Attention", "MultiHeadAttention", "GroupQueryAttention", "PackedAttention",
                     "DecoderMaskedMultiHeadAttention", "DecoderMaskedSelfAttention")  # fmt: skip


def check_attention(node: ir.Node, opset: int) -> Attention | Prepared | str | None:
    if node.op_type == "Softmax":
        found = from_softmax(node, opset)
        return checked(found) if isinstance(found, Attention) else found
    if node.domain != "com.microsoft":
        return from_operator(node)
    if node.op_type == "MultiHeadAttention":
        return from_multi_head(node)
    if node.op_type == "Attention":
        return from_packed(node)
    if node.op_type == "GroupQueryAttention":
        return from_group(node, opset)
    return f"onnxruntime's {node.op_type} keeps its cache in place, which no op here does"


def rewrite(node: ir.Node, match: Attention | Prepared, cache: dict[Any, Any], opset: int) -> None:
    if isinstance(match, Prepared):
        match = match.make(Inserter(node))
    assert isinstance(match, Attention)
    written_out.rewrite_attention(node, match, cache, opset)
