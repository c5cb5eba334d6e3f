"""Attention: the standard `Attention` operator, and the form that torch's exporter writes below opset 23.

Anchored on `Attention` and on `Softmax` and read outwards from there: the mask added to the scores, scales before or
after the product, the transposition of k, IsNaN / Where around the softmax, the product with v. Where q, k and v come
from `[B, S, H*D] -> Reshape [B, S, H, D] -> Transpose`, and the output goes back the same way, the rewritten node reads
and writes rows and those nodes disappear.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from trimaran.export.onnx_graph import (
    Inserter,
    attribute,
    dims,
    dtype_of,
    made_by,
    operand,
    permutation,
    readable,
    replace_value,
    same,
    same_dims,
    scalar,
)
from trimaran.export.rules.masks import Mask, key_inputs, read_condition
from trimaran.export.schemas import DOMAIN
from trimaran.kernels.attention import MAX_HEAD_DIM, attention

ATTENTION_ANCHORS = ("Attention", "Softmax")
MASKED = {"float32": -3.4e38, "float16": -65504.0, "bfloat16": -3.38e38}  # added to a score, hides the key completely


@dataclass(frozen=True)
class Attention:
    q: ir.Value  # [B, H, Sq, D]
    k: ir.Value  # [B, Hkv, Sk, D]
    v: ir.Value
    scale: float
    mask: Mask
    out: ir.Value  # [B, H, Sq, D]


def check_attention(node: ir.Node) -> Attention | str:
    found = read_operator(node) if node.op_type == "Attention" else read_softmax(node)
    return found if isinstance(found, str) else (problem_with(found) or found)


def problem_with(match: Attention) -> str | None:
    """The reason why the op does not take these operands, None where it does."""
    shapes = {name: dims(value) for name, value in (("q", match.q), ("k", match.k), ("v", match.v))}
    for name, shape in shapes.items():
        dtype = dtype_of(getattr(match, name))
        if dtype not in attention.types["T"] or dtype != dtype_of(match.q):
            return f"{name} is {dtype}, supported are {', '.join(attention.types['T'])}, all alike"
        if shape is None or len(shape) != 4:
            return f"{name} has shape {readable(shape)}, expected [B, H, S, D]"
    q, k, v = (shape for shape in shapes.values() if shape is not None)
    if not (isinstance(q[3], int) and isinstance(q[1], int) and isinstance(k[1], int) and k[1] > 0):
        return f"the heads of q {readable(q)} and k {readable(k)} are not known"
    if q[3] > MAX_HEAD_DIM:
        return f"the head dimension is {q[3]}, supported are up to {MAX_HEAD_DIM}"
    if q[1] % k[1] or not (same(q[0], k[0]) and same(q[3], k[3]) and same_dims(k, v)):
        found = f"q {readable(q)}, k {readable(k)} and v {readable(v)}"
        return f"{found} are not provably [B, H, Sq, D], [B, Hkv, Sk, D] and the same"
    return None


def read_operator(node: ir.Node) -> Attention | str:
    """The standard operator, since opset 23."""
    q, k, v, mask, *cache = (operand(node, index) for index in range(7))
    if q is None or k is None or v is None or any(value is not None for value in cache):
        return "attention with a cache of past keys is not supported yet"
    if any(output.uses() or output.is_graph_output() for output in node.outputs[1:]):
        return "its present keys, present values or scores are used"
    if attribute(node, "softcap", 0.0) != 0.0:
        return "soft capping is not supported yet"
    shapes = [dims(value) for value in (q, k, v)]
    if any(shape is None or len(shape) != 4 for shape in shapes):
        return f"q has shape {readable(shapes[0])}, only [B, H, S, D] is supported yet"
    shape, key_shape = shapes[0] or (), shapes[1] or ()
    if not isinstance(shape[3], int):
        return "the head dimension is not known"
    meaning: Mask | str = Mask()
    if mask is not None:
        condition = dtype_of(mask) == "bool"
        meaning = (condition and read_condition(mask, shape[0], shape[2], key_shape[2])) or read_bias(
            mask, shape, key_shape[2]
        )
    if isinstance(meaning, str):
        return meaning
    if attribute(node, "is_causal", 0):
        if not same(shape[2], key_shape[2]):
            return "is_causal with different numbers of queries and keys counts both from 0, the op from the end"
        meaning.causal = True
    scale = float(attribute(node, "scale", shape[3] ** -0.5))
    return Attention(q, k, v, scale, meaning, node.outputs[0])


def read_softmax(node: ir.Node) -> Attention | str:
    """MatMul(Softmax(MatMul(q, k transposed) * scale + mask), v), scales anywhere before the mask."""
    scores, probabilities = node.inputs[0], safe_softmax(node)
    rank = len(dims(node.outputs[0]) or ())
    if attribute(node, "axis", -1) not in (-1, rank - 1) or scores is None:
        return f"a softmax over axis {attribute(node, 'axis', -1)} of {rank}, not over the last"
    product = sole_user(probabilities, "MatMul")
    if product is None or product.inputs[0] is not probabilities or product.inputs[1] is None:
        return "the softmax is not multiplied with values"
    added = None
    if (addition := made_by(scores, "Add")) is not None:
        first, second = addition.inputs
        scores, added = (first, second) if scaled_product(first) is not None else (second, first)
    product_of = scaled_product(scores)
    if product_of is None:
        return "the scores are not a product of queries and keys"
    left, right, scale = product_of
    keys = untransposed(right, node)
    if keys is None:
        return f"the keys are not provably a transposed [B, H, Sk, D], their shape is {readable(dims(right))}"
    shape, key_shape = dims(left), dims(keys)
    if shape is None or key_shape is None or len(shape) != 4 or len(key_shape) != 4:
        return f"q has shape {readable(shape)}, expected [B, H, S, D]"
    meaning = Mask() if added is None else read_added(added, shape, key_shape[2])
    if isinstance(meaning, str):
        return meaning
    return Attention(left, keys, product.inputs[1], scale, meaning, product.outputs[0])


def safe_softmax(node: ir.Node) -> ir.Value:
    """The softmax, or `Where(IsNaN(softmax), 0, softmax)` around it, which is zero in rows without any key."""
    plain = node.outputs[0]
    for use in plain.uses():
        where = use.node
        if where.op_type == "Where" and where.inputs[2] is plain and scalar(where.inputs[1]) == 0.0:
            test = made_by(where.inputs[0], "IsNaN")
            if test is not None and test.inputs[0] is plain and len(plain.uses()) == 2:
                return where.outputs[0]
    return plain


def sole_user(value: ir.Value, op_type: str) -> ir.Node | None:
    users = [use.node for use in value.uses()]
    return users[0] if len(users) == 1 and users[0].op_type == op_type and not value.is_graph_output() else None


def unscaled(value: ir.Value | None) -> tuple[ir.Value | None, float]:
    """(x, factor) where the value is x times constants, however they were multiplied."""
    factor = 1.0
    while value is not None:
        if (node := made_by(value, "Mul")) is not None and (number := scalar(node.inputs[1])) is not None:
            value, factor = node.inputs[0], factor * number
        elif node is not None and (number := scalar(node.inputs[0])) is not None:
            value, factor = node.inputs[1], factor * number
        elif (node := made_by(value, "Div")) is not None and (number := scalar(node.inputs[1])):
            value, factor = node.inputs[0], factor / number
        else:
            break
    return value, factor


def scaled_product(value: ir.Value | None) -> tuple[ir.Value, ir.Value, float] | None:
    """(q, k transposed, scale) where the value is their product."""
    inner, scale = unscaled(value)
    node = made_by(inner, "MatMul")
    if node is None:
        return None
    (left, left_scale), (right, right_scale) = (unscaled(side) for side in node.inputs)
    return (left, right, scale * left_scale * right_scale) if left is not None and right is not None else None


def untransposed(value: ir.Value, before: ir.Node) -> ir.Value | None:
    """k [B, H, Sk, D], of which the value [B, H, D, Sk] is the transposition; None where that is not provable."""
    perm = permutation(made_by(value, "Transpose"))
    if perm == [0, 1, 3, 2]:
        return value.producer().inputs[0]  # type: ignore[union-attr]
    if perm == [0, 2, 3, 1]:
        rows = value.producer().inputs[0]  # type: ignore[union-attr]
        shape = dims(rows)
        if rows is None or shape is None:
            return None
        order = [0, 2, 1, 3]
        return Inserter(before)("Transpose", rows, perm=order, dtype=rows.dtype, shape=[shape[axis] for axis in order])
    return untransposed_by_reshapes(value)


def untransposed_by_reshapes(value: ir.Value) -> ir.Value | None:
    """Through [B, H, Sk, D] -> [B*H, Sk, D] -> Transpose [B*H, D, Sk] -> [B, H, D, Sk], as torch's exporter writes
    it."""
    outer = made_by(value, "Reshape")
    flat = made_by(outer.inputs[0], "Transpose") if outer is not None else None
    inner = made_by(flat.inputs[0], "Reshape") if flat is not None else None
    if outer is None or flat is None or inner is None or permutation(flat) != [0, 2, 1]:
        return None
    keys, merged, split = dims(inner.inputs[0]), dims(inner.outputs[0]), dims(value)
    if keys is None or merged is None or len(keys) != 4 or len(merged) != 3:
        return None
    right = same_dims(merged[1:], keys[2:]) and same_dims(split, (keys[0], keys[1], keys[3], keys[2]))
    return inner.inputs[0] if right else None


def read_added(added: ir.Value, shape: tuple[Any, ...], keys: Any) -> Mask | str:
    """What is added to the scores: `Where(condition, 0, -inf or the lowest number)`, or else a bias."""
    node = made_by(added, "Where")
    if node is not None and node.inputs[0] is not None and scalar(node.inputs[1]) == 0.0:
        hidden = scalar(node.inputs[2])
        if hidden is not None and hidden <= MASKED.get(dtype_of(added), -np.inf):
            meaning = read_condition(node.inputs[0], shape[0], shape[2], keys)
            if meaning is not None:
                meaning.masked_row = "zero" if hidden == -np.inf else "mean"
                return meaning
    return read_bias(added, shape, keys)


def read_bias(added: ir.Value, shape: tuple[Any, ...], keys: Any) -> Mask | str:
    bias = dims(added)
    broadcast = (
        bias is not None and len(bias) == 4 and all(b == 1 or same(b, q) for b, q in zip(bias, shape[:3], strict=False))
    )
    if not broadcast or not same((bias or (None,))[-1], keys):
        return f"the mask's shape {readable(bias)} is not provably [1|B, 1|H, 1|Sq, Sk]"
    if dtype_of(added) not in (*attention.types["T"], "bool"):
        return f"the mask is {dtype_of(added)}, supported are bool, {', '.join(attention.types['T'])}"
    return Mask(bias=added)


def rewrite_attention(node: ir.Node, match: Attention, cache: dict[Any, Any], opset: int) -> None:
    lengths, keys = key_inputs(match.mask, cache, opset)
    anchor = match.out.producer()
    assert anchor is not None
    bias = match.mask.bias
    if bias is not None and bias.dtype == ir.DataType.BOOL:
        bias = additive(Inserter(anchor), bias, match.q)
    attrs: dict[str, Any] = {"scale": match.scale}
    if match.mask.causal:
        attrs["causal"] = 1
    if match.mask.masked_row != "zero":
        attrs["masked_row"] = match.mask.masked_row
    rows = [row_source(value) for value in (match.q, match.k, match.v)]
    merged = merge_of(match.out)
    shape, key_shape = dims(match.q) or (), dims(match.k) or ()
    operands: list[ir.Value | None] = [match.q, match.k, match.v]
    replaced = match.out
    if all(source is not None for source in rows) and merged is not None:
        operands, replaced = rows, merged
        attrs |= {"num_heads": shape[1], "kv_num_heads": key_shape[1]}
    new = Inserter(anchor).node(
        attention.name,
        [*operands, bias, lengths, keys],
        attrs,
        domain=DOMAIN,
        version=attention.version,
        name=anchor.name,
    )
    replace_value(replaced, new.outputs[0])


def additive(add: Inserter, condition: ir.Value, like: ir.Value) -> ir.Value:
    """0 where the condition holds, -inf where not, in the dtype of `like`."""
    assert like.dtype is not None
    zero, hidden = (add.constant(np.array(number, like.dtype.numpy())) for number in (0.0, -np.inf))
    return add("Where", condition, zero, hidden, dtype=like.dtype, shape=condition.shape)


def row_source(value: ir.Value) -> ir.Value | None:
    """x [B, S, H*D] where the value is `Transpose(Reshape(x, [B, S, H, D]), [0, 2, 1, 3])`, else None."""
    transpose = made_by(value, "Transpose")
    split = made_by(transpose.inputs[0], "Reshape") if transpose is not None else None
    if split is None or permutation(transpose) != [0, 2, 1, 3]:
        return None
    rows, shape = dims(split.inputs[0]), dims(split.outputs[0])
    if rows is None or shape is None or len(rows) != 3 or not all(isinstance(n, int) for n in (*shape[2:], rows[2])):
        return None
    return split.inputs[0] if same_dims(rows[:2], shape[:2]) and rows[2] == shape[2] * shape[3] else None


def merge_of(out: ir.Value) -> ir.Value | None:
    """The rows [B, Sq, H*D] that out [B, H, Sq, D] becomes by a Transpose and a Reshape, where it is used for nothing
    else."""
    transpose = sole_user(out, "Transpose")
    if transpose is None or permutation(transpose) != [0, 2, 1, 3]:
        return None
    merge = sole_user(transpose.outputs[0], "Reshape")
    shape = dims(out)
    if merge is None or shape is None or not isinstance(shape[1], int) or not isinstance(shape[3], int):
        return None
    right = same_dims(dims(merge.outputs[0]), (shape[0], shape[2], shape[1] * shape[3]))
    return merge.outputs[0] if right else None
