"""Attention, as an operator or written out around a softmax, as one op.

q, k and v are taken from where they came: heads that were repeated for grouped queries are not, a scale is folded in,
and where heads are slices of rows [B, S, H*D] the op reads those rows and writes rows, so that the transposes on both
sides disappear.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx_ir as ir

from trimaran.export.onnx_graph import (
    MOST_VIEWS,
    RESHAPES,
    Inserter,
    attribute,
    dims,
    dtype_of,
    is_same,
    is_view,
    only_user,
    readable,
    replace_value,
    same,
    same_dims,
    source,
    uncast,
)
from trimaran.export.report import Fault
from trimaran.export.rules.heads import PLAIN, ROWS, Operand, as_heads, as_rows, followed, lifted, put_back, unrepeated
from trimaran.export.rules.masks import Mask, MaskReader, Term, alike, bias_input, key_inputs
from trimaran.export.rules.scores import Scores, read_scores, weighted_values
from trimaran.export.schemas import DOMAIN
from trimaran.export.shapes import STANDARD
from trimaran.kernels.attention import MAX_HEAD_DIM, attention


@dataclass(frozen=True)
class Attention:
    """out is Transpose([B, H, Sq, D], order), or [B*H, Sq, D] where flat."""

    q: Operand
    k: Operand
    v: Operand
    scale: float
    mask: Mask
    out: ir.Value
    order: tuple[int, ...] = PLAIN
    softcap: float = 0.0
    flat: bool = False


def from_softmax(node: ir.Node, opset: int) -> Attention | str | None:
    """softmax(q k^T * scale + mask) v, scales, masks, casts and a cap on the way."""
    shape = dims(node.outputs[0])
    axis = attribute(node, "axis", -1 if opset >= 13 else 1)
    turned = opset >= 13 and shape is not None and axis in (-2, len(shape) - 2)  # softmax(k q^T), over the keys
    masks: list[ir.Value] = []
    product = weighted_values(node, turned, None if turned else masks)
    if product is None and turned:
        return f"a softmax over axis {axis} of {len(shape or ())}, not over the last"
    if product is None or isinstance(product, str):
        return "the softmax is not multiplied with values" if product is None and shape and len(shape) > 2 else product
    scores = read_scores(node.inputs[0])
    if isinstance(scores, Scores) and scores.gate is not None:
        scores = "the scores are multiplied by a mask, which does not hide them"
    if not isinstance(scores, Scores):
        return Fault.of(scores or "the scores are not a product of queries and keys", node.inputs[0])
    if node.domain not in STANDARD or shape is None or len(shape) not in (3, 4):
        return f"its scores have shape {readable(shape)}, expected [B, H, Sq, Sk] or [B*H, Sq, Sk]"
    if turned and not (scores.terms or scores.seen):
        scores = scores.turned()
    elif axis not in (-1, len(shape) - 1):
        return f"a softmax over axis {axis} of {len(shape)}, not over the last"
    found = Attention(scores.q, scores.k, product.v, scores.scale, Mask(), product.out, product.order, scores.softcap)
    added = {source(uncast(term.value)) for term in scores.terms}
    if any(source(uncast(guard)) not in added for guard in product.guards):
        return "its weights are zero where something else than its mask says so"
    whole = split(found, node, scores)
    if isinstance(whole, str):
        return whole
    found, shape = whole
    wide, tall = dims(node.inputs[0]) or (), scores.shape or ()
    wide = wide if not turned else (*wide[:-2], *wide[:-3:-1])
    if any(isinstance(a, int) and isinstance(b, int) and a != b for a, b in zip(wide, tall, strict=False)):
        return f"the scores {readable(tall)} become {readable(wide)} by what is added to them"
    reader = MaskReader(shape)
    for term in scores.terms:
        problem = reader.added(term, dtype_of(found.q.value))
        if problem is not None:
            return problem
    for term, fill in (*scores.seen, *((Term(mask), -np.inf) for mask in masks)):
        reader.mask.fills.add(fill)
        problem = reader.seen(term)
        if problem is not None:
            return problem
    return replace(found, mask=reader.mask)


def split(found: Attention, softmax: ir.Node, scores: Scores) -> tuple[Attention, tuple[Any, ...]] | str:
    """With operands of four dimensions, and the scores' shape in four: where the product is one of [B*H, S, D], what
    was flattened is taken from before that, or all is one batch of B*H heads."""
    shape: Any = scores.shape or dims(softmax.outputs[0])
    views = [term.views for term in scores.terms] + [term.views for term, _ in scores.seen]
    four = next(
        (dims(view.outputs[0]) for each in views for view in each if len(dims(view.outputs[0]) or ()) == 4), None
    )
    full = shape if len(shape) == 4 else four
    ranks = [len(dims(operand.value) or ()) for operand in (found.q, found.k, found.v)]
    if ranks == [4, 4, 4]:
        return found, full or shape
    if ranks != [3, 3, 3]:
        return f"q, k and v have {ranks} dimensions"
    if full is None:
        plain = {
            name: replace(getattr(found, name), order=(0, *(axis + 1 for axis in getattr(found, name).order)))
            for name in "qkv"
        }
        return replace(found, **plain, flat=True), (1, *shape)
    whole: dict[str, Any] = {name: lifted_operand(getattr(found, name), full) for name in "qkv"}
    turned = (0, 1, *(axis + 1 for axis in found.order[1:]))
    rows = (full[2], (dims(found.out) or (None,) * 3)[found.order.index(2)])
    apart = parted(found.out, (*full[:2], *(rows[axis - 1] for axis in found.order[1:])))
    if None in whole.values() or apart is None:
        return "heads are merged with the batch, and what is done to them is not undone"
    return replace(found, **whole, out=apart, order=turned), full


def parted(value: ir.Value, shape: tuple[Any, ...]) -> ir.Value | None:
    """What views alone make of a value, in that shape."""
    for _ in range(MOST_VIEWS):
        view = only_user(value, "Transpose", *RESHAPES)
        if view is None or not is_view(view):
            return None
        value = view.outputs[0]
        found = dims(value) or (None,)
        # the product of weights and v has the batch of v, whatever is known of what masked the weights
        if same_dims(found[1:], shape[1:]) and found[0] is not None and alike(found[0], shape[0]):
            return value
    return None


def lifted_operand(operand: Operand, full: tuple[Any, ...]) -> Operand | None:
    after = dims(operand.value) or ()
    found = lifted(operand.value, (*full[:2], *after[1:]))
    if found is None:
        return None
    order = (0, 1, *(axis + 1 for axis in operand.order[1:]))
    inner, factor = followed(found.value, tuple(found.order[axis] for axis in order))
    return inner if factor == 1.0 else None


def checked(match: Attention) -> Attention | str:
    """With the fewest heads of k and v; a str where the op does not take these operands."""
    for name in "qkv":
        operand = getattr(match, name)
        if dtype_of(operand.value) not in attention.types["T"] or dtype_of(operand.value) != dtype_of(match.q.value):
            reason = f"{name} is {dtype_of(operand.value)}, supported are {', '.join(attention.types['T'])}, all alike"
            return Fault.of(reason, operand.value)
        shape = dims(operand.value)
        if shape is None or len(shape) != (3 if match.flat else 4):
            return Fault.of(f"{name} has shape {readable(shape)}, expected [B, H, S, D]", operand.value)
    narrow = unrepeated(match.k), unrepeated(match.v)
    if not match.flat and same((narrow[0].shape or (None,) * 2)[1], (narrow[1].shape or (0, 0))[1]):
        match = replace(match, k=narrow[0], v=narrow[1])
    q, k, v = (shape_of(match, getattr(match, name)) for name in "qkv")
    if not isinstance(q[3], int) or (
        not match.flat and not (isinstance(q[1], int) and isinstance(k[1], int) and k[1] > 0)
    ):
        return f"the heads of q {readable(q)} and k {readable(k)} are not known"
    if q[3] > MAX_HEAD_DIM:
        return f"the head dimension is {q[3]}, supported are up to {MAX_HEAD_DIM}"
    grouped = same(q[1], k[1]) or (isinstance(q[1], int) and isinstance(k[1], int) and q[1] % k[1] == 0)
    if not grouped or not (same(q[0], k[0]) and same(q[3], k[3]) and same_dims(k, v)):
        found = f"q {readable(q)}, k {readable(k)} and v {readable(v)}"
        return f"{found} are not provably [B, H, Sq, D], [B, Hkv, Sk, D] and the same"
    return match


def shape_of(match: Attention, operand: Operand) -> tuple[Any, ...]:
    shape = dims(operand.value) or ()
    full = (1, *shape) if match.flat else shape
    return tuple(full[axis] for axis in operand.order)


def rewrite_attention(node: ir.Node, match: Attention, cache: dict[Any, Any], opset: int) -> None:
    anchor = match.out.producer()
    assert anchor is not None
    add = Inserter(anchor)
    shape, kv_heads = shape_of(match, match.q), shape_of(match, match.k)[1]
    dtype = match.q.value.dtype
    assert dtype is not None
    lengths, keys = key_inputs(add, match.mask, cache, opset)
    bias = bias_input(add, match.mask, dtype, cache)
    operands = [match.q, match.k, match.v]
    in_rows = not match.flat and all(operand.order == ROWS for operand in operands)
    attrs = attributes(match)
    if in_rows:
        attrs |= {"num_heads": shape[1], "kv_num_heads": kv_heads}
        given: list[ir.Value | None] = [as_rows(add, operand) for operand in operands]
        packed = packed_source(given)
        given = [packed, None, None] if packed is not None else given
    else:
        wide = [replace(o, value=add.widened(o.value, 4)) if match.flat else o for o in operands]
        given = [as_heads(add, operand) for operand in wide]
    new = add.node(
        attention.name, [*given, bias, lengths, keys], attrs, domain=DOMAIN, version=attention.version, name=anchor.name
    ).outputs[0]  # fmt: skip
    new.dtype = dtype
    for old, made in placed(add, new, match, shape, in_rows):
        replace_value(old, made)


def placed(add: Inserter, new: ir.Value, match: Attention, shape: tuple[Any, ...], in_rows: bool) -> Any:
    """(old, new) values: the op's output in the place of what it replaces."""
    if in_rows:
        return put_back(add, new, match.out, match.order, shape)
    if match.flat:
        return [(match.out, add("Reshape", new, flat_target(add, match)))]
    return [(match.out, new if match.order == PLAIN else add.transpose(new, match.order))]


def flat_target(add: Inserter, match: Attention) -> ir.Value:
    """The sizes of [B*H, Sq, D], those of q but for its order."""
    sizes = add("Shape", match.q.value, dtype=ir.DataType.INT64, shape=[3])
    order = [axis - 1 for axis in match.q.order[1:]]
    if order == [0, 1, 2]:
        return sizes
    return add("Gather", sizes, add.constant(np.array(order, np.int64)), axis=0, dtype=ir.DataType.INT64, shape=[3])


def attributes(match: Attention) -> dict[str, Any]:
    """Those that are not what the op takes by itself."""
    mask = match.mask
    found: dict[str, Any] = {"scale": match.scale}
    if mask.right == 0:
        found["causal"] = 1
    elif mask.right > 0:
        found["window_right"] = mask.right
    if mask.left >= 0:
        found["window_left"] = mask.left
    if match.softcap:
        found["softcap"] = match.softcap
    if mask.masked_row != "zero":
        found["masked_row"] = mask.masked_row
    return found


def packed_source(rows: list[ir.Value | None]) -> ir.Value | None:
    """x [B, S, (H + 2 Hkv)*D] where q, k and v are, in this order, what a Split makes of its last dimension."""
    producers = [row.producer() if row is not None else None for row in rows]
    first = producers[0]
    if first is None or first.op_type != "Split" or first.domain not in STANDARD or len(first.outputs) != 3:
        return None
    shape = dims(first.inputs[0]) or ()
    last = attribute(first, "axis", 0) in (-1, len(shape) - 1)
    in_order = last and all(is_same(row, out) for row, out in zip(rows, first.outputs, strict=True))
    return first.inputs[0] if in_order else None
