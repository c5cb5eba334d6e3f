"""Attention as the standard operator, since opset 23, and what all attention operators have in common."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import onnx_ir as ir

from trimaran.export.onnx_graph import (
    Inserter,
    attribute,
    dims,
    dtype_of,
    operand,
    readable,
    replace_value,
    same,
    used,
)
from trimaran.export.report import Fault
from trimaran.export.rules.attention import Attention
from trimaran.export.rules.heads import ROWS, Operand, as_heads, followed
from trimaran.export.rules.masks import Mask, MaskReader, Term, tighter
from trimaran.kernels.attention import MAX_HEAD_DIM, attention
from trimaran.torch_path.lines import plain


@dataclass(frozen=True)
class Prepared:
    """An operator whose operands are made by a few nodes of its own first: `make(add)` gives the match."""

    make: Any


def from_operator(node: ir.Node) -> Attention | Prepared | str:
    q, k, v, mask, past_k, past_v, lengths = (operand(node, index) for index in range(7))
    if q is None or k is None or v is None:
        return "q, k or v is absent"
    if len(node.outputs) > 3 and used(node.outputs[3]):
        return "its scores are used"
    heads = attribute(node, "q_num_heads", 0), attribute(node, "kv_num_heads", 0)
    ranks = {len(dims(value) or ()) for value in (q, k, v)}
    if ranks not in ({3}, {4}) or (ranks == {3} and not all(heads)):
        return f"q has shape {readable(dims(q))}, expected [B, H, S, D], or [B, S, H*D] and numbers of heads"
    rows = ranks == {3}
    sizes = [
        split_shape(value, count, rows) for value, count in zip((q, k, v), (heads[0], heads[1], heads[1]), strict=True)
    ]
    if any(size is None for size in sizes):
        return f"the heads of q {readable(dims(q))} and k {readable(dims(k))} are not known"
    shape, key_shape, value_shape = sizes
    assert shape is not None
    assert key_shape is not None
    if not isinstance(shape[3], int):
        return "the head dimension is not known"
    if key_shape != value_shape:
        return f"v has heads of {readable(value_shape)}, k of {readable(key_shape)}"
    past = dims(past_k)
    if (past_k is None) != (past_v is None) or (
        past_k is not None and (past is None or past != dims(past_v) or len(past) != 4)
    ):
        return "the shapes of past keys and values are not known, or differ"
    total = key_shape[2] if past is None else plain(past[2] + key_shape[2])
    reader = MaskReader((shape[0], shape[1], shape[2], total))
    if (problem := operator_mask(reader, mask, q)) is not None:
        return problem
    if attribute(node, "is_causal", 0):
        if not same(shape[2], key_shape[2]):
            return "is_causal with different numbers of queries and keys counts both from 0, the op from the end"
        if lengths is not None:
            return "is_causal with lengths counts from each length"
        reader.mask.right = 0
    left, right = (attribute(node, f"{side}_window_size", -1) for side in ("left", "right"))
    if (left, right) != (-1, -1):
        if lengths is not None or not same(shape[2], key_shape[2]):
            return "its window, with lengths or different numbers of queries and keys, is not counted from the end"
        reader.mask.left = tighter(reader.mask.left, left if left >= 0 else None)
        reader.mask.right = tighter(reader.mask.right, right if right >= 0 else None)
    scale = attribute(node, "scale", None)
    scale = shape[3] ** -0.5 if scale is None else float(scale)
    make = partial(
        operator_operands, node, (q, k, v), heads if rows else None, (past_k, past_v), lengths, scale, reader.mask
    )
    trial = checked_shapes(sizes, total, q, k, v)
    return trial or Prepared(make)


def split_shape(value: ir.Value, heads: int, rows: bool) -> tuple[Any, ...] | None:
    """[B, H, S, D] of an operand."""
    shape = dims(value) or ()
    if not rows:
        return shape if isinstance(shape[1], int) else None
    width = shape[2]
    return (shape[0], heads, shape[1], width // heads) if isinstance(width, int) and width % heads == 0 else None


def checked_shapes(sizes: Any, total: Any, *values: ir.Value) -> str | None:
    """What `checked` will say of the operands once they are made."""
    (q, k, _), dtypes = sizes, {dtype_of(value) for value in values}
    kinds = attention.types["T"]
    if len(dtypes) != 1 or not dtypes <= {*kinds}:
        return f"q is {', '.join(sorted(dtypes))}, supported are {', '.join(kinds)}, all alike"
    if q[3] > MAX_HEAD_DIM:
        return f"the head dimension is {q[3]}, supported are up to {MAX_HEAD_DIM}"
    if not k[1] or q[1] % k[1] or not same(q[0], k[0]) or q[3] != k[3]:
        return f"q {readable(q)} and k {readable(k)} are not provably [B, H, Sq, D] and [B, Hkv, Sk, D]"
    return None


def operator_mask(reader: MaskReader, mask: ir.Value | None, q: ir.Value) -> str | None:
    """The operator's mask: bool or added, of two to four dimensions."""
    if mask is None:
        return None
    if not same((dims(mask) or (None,))[-1], reader.length):
        return Fault.of(f"the mask's shape {readable(dims(mask))} does not end in the number of keys", mask)
    if dtype_of(mask) == "bool":
        return reader.seen(Term(mask))
    problem = reader.added(Term(mask), dtype_of(q))
    if problem is None and any(fill != -np.inf for fill in reader.mask.fills) and reader.mask.fills:
        reader.mask.fills = {max(reader.mask.fills)}
    return problem


def operator_operands(
    node: ir.Node, values: Any, heads: Any, past: Any, lengths: ir.Value | None, scale: float, mask: Mask, add: Inserter
) -> Attention:
    found = []
    for index, value in enumerate(values):
        made: Operand | None = Operand(value)
        if heads is not None:
            count = heads[0] if index == 0 else heads[1]
            shape = dims(value) or ()
            made = Operand(add.reshape(value, [0, 0, count, -1], [*shape[:2], count, shape[2] // count]), ROWS)
        else:
            made, factor = followed(value, made.order)  # type: ignore[union-attr]
            made = made if factor == 1.0 and made is not None else Operand(value)
        found.append(made)
    q, k, v = found
    if past[0] is not None:
        k, v = (grown(add, before, now, output(node, i)) for before, now, i in ((past[0], k, 1), (past[1], v, 2)))
    else:
        for i, now in ((1, k), (2, v)):
            if len(node.outputs) > i and used(node.outputs[i]):
                replace_value(node.outputs[i], add("Identity", as_heads(add, now), dtype=now.value.dtype))
    if lengths is not None:
        mask.lengths = add.cast(lengths, ir.DataType.INT32)
    order = (0, 1, 2, 3)
    out = node.outputs[0]
    if heads is not None:
        shape = dims(found[0].value) or ()
        return rows_out(add, node, Attention(q, k, v, scale, mask, out, order, soft_cap(node)), shape)
    return Attention(q, k, v, scale, mask, out, order, soft_cap(node))


def output(node: ir.Node, index: int) -> ir.Value | None:
    return node.outputs[index] if index < len(node.outputs) else None


def soft_cap(node: ir.Node) -> float:
    return float(attribute(node, "softcap", 0.0))


def grown(add: Inserter, past: ir.Value, now: Operand, present: ir.Value | None) -> Operand:
    """The past keys with the new ones behind them, which is also the present."""
    heads = as_heads(add, now)
    before, after = dims(past) or (), dims(heads) or ()
    shape = [*after[:2], plain(before[2] + after[2]), after[3]]
    both = add("Concat", past, heads, axis=2, dtype=heads.dtype, shape=shape)
    if present is not None and used(present):
        replace_value(present, both)
    return Operand(both)


def rows_out(add: Inserter, node: ir.Node, match: Attention, shape: Any) -> Attention:
    """An operator whose output is rows: let it be a Transpose and a Reshape of heads, which the rewriting takes in."""
    batch, length, heads, width = shape
    inner = add("Identity", match.q.value, dtype=match.q.value.dtype, shape=[batch, heads, length, width])
    turned = add.transpose(inner, ROWS)
    rows = add.reshape(turned, [0, 0, -1], [batch, length, heads * width])
    replace_value(match.out, rows)
    return replace(match, out=inner)
