"""Attention as onnxruntime's MultiHeadAttention and Attention have it."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from trimaran.export.onnx_graph import Inserter, attribute, dims, dtype_of, operand, readable, same, used
from trimaran.export.report import Fault
from trimaran.export.rules.attention import Attention
from trimaran.export.rules.attention_operator import (
    Prepared,
    checked_shapes,
    operator_mask,
    operator_operands,
    rows_out,
    split_shape,
)
from trimaran.export.rules.heads import ROWS, Operand
from trimaran.export.rules.masks import Mask, MaskReader, Term
from trimaran.kernels.attention import MAX_HEAD_DIM
from trimaran.torch_path.lines import plain


def from_multi_head(node: ir.Node) -> Prepared | str:
    """query, key, value [B, S, H*D], or key and value [B, H, S, D]; a bias of all three; a mask of keys; a bias of the
    scores; past keys and values."""
    q, k, v, bias, keys, scores_bias, past_k, past_v = (operand(node, index) for index in range(8))
    heads = attribute(node, "num_heads", 0)
    if q is None or k is None or v is None or len(dims(q) or ()) != 3 or len(dims(k) or ()) != len(dims(v) or ()):
        return f"q has shape {readable(dims(q))}, only [B, S, H*D] with keys and values apart is supported"
    if any(operand(node, index) is not None for index in (8, 9)) or (len(node.outputs) > 3 and used(node.outputs[3])):
        return "its cache is written in place, or its scores are used"
    rows = len(dims(k) or ()) == 3
    shape, key_shape, value_shape = (
        split_shape(q, heads, True),
        split_shape(k, heads, rows),
        split_shape(v, heads, rows),
    )
    if shape is None or key_shape is None or key_shape != value_shape:
        found = f"q {readable(dims(q))}, k {readable(dims(k))} and v {readable(dims(v))}"
        return f"the heads of {found} are not known, or differ"
    past = dims(past_k)
    if past_k is not None and (past is None or past != dims(past_v) or not rows):
        return "the shapes of past keys and values are not known, or differ"
    if bias is not None and not rows:
        return "it has a bias of its own, and keys of four dimensions"
    total = key_shape[2] if past is None else plain(past[2] + key_shape[2])
    reader = MaskReader((shape[0], shape[1], shape[2], total))
    problem = operator_mask(reader, scores_bias, q) or checked_shapes((shape, key_shape, value_shape), total, q, k, v)
    if problem is not None:
        return problem
    kind = None if keys is None else padding_kind(keys, shape[0], total)
    if keys is not None and kind is None:
        return Fault.of(
            f"its key padding mask is {dtype_of(keys)}{readable(dims(keys))}, supported are [B] and [B, Sk]", keys
        )
    if attribute(node, "unidirectional", 0):
        if not same(shape[2], key_shape[2]):
            return "it is unidirectional, with different numbers of queries and keys"
        reader.mask.right = 0
    scale = float(attribute(node, "scale", 0.0)) or shape[3] ** -0.5
    low = float(attribute(node, "mask_filter_value", -10000.0))

    def make(add: Inserter) -> Attention:
        found = [value if bias is None else biased(add, value, bias, index) for index, value in enumerate((q, k, v))]
        masked(add, reader.mask, keys, kind, low, q)
        return operator_operands(node, found, (heads, heads), (past_k, past_v), None, scale, reader.mask, add)

    def make_apart(add: Inserter) -> Attention:
        masked(add, reader.mask, keys, kind, low, q)
        wide = add.reshape(q, [0, 0, heads, -1], [shape[0], shape[2], heads, shape[3]])
        match = Attention(Operand(wide, ROWS), Operand(k), Operand(v), scale, reader.mask, node.outputs[0])
        return rows_out(add, node, match, dims(wide) or ())

    return Prepared(make if rows else make_apart)


def padding_kind(keys: ir.Value, batch: Any, total: Any) -> str | None:
    shape = dims(keys) or ()
    if dtype_of(keys) != "int32":
        return None
    if len(shape) == 1 and same(shape[0], batch):
        return "lengths"
    return "mask" if len(shape) == 2 and same(shape[0], batch) and same(shape[1], total) else None


def masked(add: Inserter, mask: Mask, keys: ir.Value | None, kind: str | None, low: float, q: ir.Value) -> None:
    """Lengths go in as they are; a mask [B, Sk] of ones and zeros is added as onnxruntime does, `low` where it is 0."""
    if keys is None:
        return
    if kind == "lengths":
        mask.lengths = keys
        return
    shape = dims(keys) or ()
    assert q.dtype is not None
    zero = add.constant(np.array(0, np.int32))
    hidden = add("Equal", keys, zero, dtype=ir.DataType.BOOL, shape=shape)
    values = [add.constant(np.array(number, q.dtype.numpy())) for number in (low, 0.0)]
    bias = add("Where", hidden, *values, dtype=q.dtype, shape=shape)
    whole = [shape[0], 1, 1, shape[1]]
    sizes = add("Shape", bias, dtype=ir.DataType.INT64, shape=[2])
    ones = add.constant(np.array([1, 1], np.int64))
    first, last = (
        add("Gather", sizes, add.constant(np.array([i], np.int64)), axis=0, dtype=ir.DataType.INT64, shape=[1])
        for i in (0, 1)
    )
    target = add("Concat", first, ones, last, axis=0, dtype=ir.DataType.INT64, shape=[4])
    mask.biases.append(Term(add("Reshape", bias, target, dtype=q.dtype, shape=whole)))


def biased(add: Inserter, value: ir.Value, bias: ir.Value, index: int) -> ir.Value:
    """With its third of the bias."""
    width = (dims(value) or (0,))[-1]
    bounds = [add.constant(np.array([number], np.int64)) for number in (index * width, (index + 1) * width, 0)]
    part = add("Slice", bias, *bounds, dtype=bias.dtype, shape=[width])
    return add("Add", value, part, dtype=value.dtype, shape=dims(value))


def from_packed(node: ir.Node) -> Prepared | str:
    """x [B, S, K], a weight [K, 3*H*D] and a bias of q, k and v."""
    x, weight, bias, keys, past, scores_bias = (operand(node, index) for index in range(6))
    heads, shape, sizes = attribute(node, "num_heads", 0), dims(x), dims(weight)
    if (
        x is None
        or weight is None
        or shape is None
        or sizes is None
        or len(shape) != 3
        or not isinstance(sizes[1], int)
    ):
        return f"x has shape {readable(shape)} and the weight {readable(sizes)}, expected [B, S, K] and [K, 3*H*D]"
    if past is not None or operand(node, 6) is not None or any(used(out) for out in node.outputs[1:]):
        return "it keeps a cache of past keys"
    if (
        attribute(node, "qkv_hidden_sizes", None) is not None
        or attribute(node, "do_rotary", 0)
        or sizes[1] % (3 * heads)
    ):
        return "its q, k and v are of different widths, or it turns them itself"
    width = sizes[1] // (3 * heads)
    reader = MaskReader((shape[0], heads, shape[1], shape[1]))
    kind = None if keys is None else padding_kind(keys, shape[0], shape[1])
    problem = operator_mask(reader, scores_bias, x)
    if problem is not None or (keys is not None and kind is None):
        found = f"{dtype_of(keys)}{readable(dims(keys))}"
        return problem or Fault.of(f"its mask is {found}, supported are int32 [B] and [B, Sk]", keys)
    if width > MAX_HEAD_DIM:
        return f"the head dimension is {width}, supported are up to {MAX_HEAD_DIM}"
    if attribute(node, "unidirectional", 0):
        reader.mask.right = 0
    scale = float(attribute(node, "scale", 0.0)) or width**-0.5
    low = float(attribute(node, "mask_filter_value", -10000.0))

    def make(add: Inserter) -> Attention:
        rows = add("MatMul", x, weight, dtype=x.dtype, shape=[*shape[:2], sizes[1]])
        if bias is not None:
            rows = add("Add", rows, bias, dtype=x.dtype, shape=dims(rows))
        masked(add, reader.mask, keys, kind, low, x)
        third = heads * width
        bounds = [[add.constant(np.array([n], np.int64)) for n in (i * third, (i + 1) * third, 2)] for i in range(3)]
        parts = [add("Slice", rows, *b, dtype=x.dtype, shape=[*shape[:2], third]) for b in bounds]
        return operator_operands(node, parts, (heads, heads), (None, None), None, scale, reader.mask, add)

    return Prepared(make)
