"""Reading attention that a file writes out: softmax(scores) times v, back to q, k, scale, soft cap, masks and biases.

As `torch_path/rules/scores.py` does in FX. From the softmax the chain of operations is walked up to the product of
queries and keys; what is added or masked on the way is kept as terms. A cap is `c * tanh(x / c)`; it stands below every
term.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import numpy as np
import onnx_ir as ir

from trimaran.export.onnx_graph import (
    RESHAPES,
    dims,
    dtype_of,
    is_view,
    made_by,
    only_user,
    permutation,
    scalar,
    sides,
    source,
    standard,
    users,
    views_back,
)
from trimaran.export.rules.heads import Operand, followed, turned_heads
from trimaran.export.rules.masks import HIDES, Term, is_switch, masked_value, same_condition, two_values
from trimaran.export.rules.positions import fill_of
from trimaran.export.shapes import attr, given

PLAIN = (0, 1, 2, 3)
FLOATS = ("float32", "float16", "bfloat16")


@dataclass(frozen=True)
class Scores:
    """scale * q k^T, capped, with everything that was added (`terms`) and every mask that was filled in (`seen`). gate:
    a mask that they were multiplied by, which hides nothing before something low is added where it is 0."""

    q: Operand
    k: Operand
    scale: float = 1.0
    softcap: float = 0.0
    terms: tuple[Term, ...] = ()
    seen: tuple[tuple[Term, float], ...] = field(default=())
    gate: Term | None = None
    shape: tuple[Any, ...] | None = None  # before anything was added

    def turned(self) -> Scores:
        """Of keys by queries, as queries by keys."""
        return replace(self, q=self.k, k=self.q, shape=(*self.shape[:-2], *self.shape[:-3:-1]) if self.shape else None)


Found: TypeAlias = Scores | str | None


def read_scores(value: ir.Value | None, above: float = 1.0, views: tuple[ir.Node, ...] = (), depth: int = 0) -> Found:
    """The scores that a value is, times `above`; None where they come from no product of two tensors, a str where they
    do and something on the way is not understood."""
    value = source(value)
    node = value.producer() if value is not None else None
    if node is None or depth > 16:
        return None

    def below(inner: Any, factor: float = 1.0, through: tuple[ir.Node, ...] = views) -> Found:
        return read_scores(inner, above * factor, through, depth + 1)

    if standard(node, "MatMul", "Einsum") or node.op_type == "FusedMatMul":
        return _product(node, above, views)
    if is_view(node):
        return below(node.inputs[0], through=(node, *views))
    if not standard(node, *_STEPS):
        return None
    return _STEPS[node.op_type](node, above, views, below)


def _cast(node: ir.Node, above: float, views: tuple[ir.Node, ...], below: Callable[..., Found]) -> Found:
    floats = all(value is not None and dtype_of(value) in FLOATS for value in (node.inputs[0], node.outputs[0]))
    return below(node.inputs[0]) if floats else None


def _scaled(node: ir.Node, above: float, views: tuple[ir.Node, ...], below: Callable[..., Found]) -> Found:
    one, other = node.inputs
    by = scalar(other)
    if by is not None and (by or node.op_type == "Mul"):
        return below(one, by if node.op_type == "Mul" else 1.0 / by)
    by = scalar(one)
    if by is not None:
        return below(other, by) if node.op_type == "Mul" else None
    for kept, gate in sides(node) if node.op_type == "Mul" else ():
        inner = below(kept) if is_switch(gate) and dtype_of(gate) in FLOATS and not views else None
        if isinstance(inner, Scores) and inner.gate is None:
            return replace(inner, gate=Term(gate))
    return None


def _sum(node: ir.Node, above: float, views: tuple[ir.Node, ...], below: Callable[..., Found]) -> Found:
    sign = 1.0 if node.op_type == "Add" else -1.0
    one, other = node.inputs
    for kept, added, factor, through in ((one, other, sign, 1.0), (other, one, 1.0, sign)):
        inner = below(kept, through)
        if isinstance(inner, Scores) and inner.gate is not None:
            return filled(inner, added, factor * above)
        if isinstance(inner, Scores) and added is not None:
            return replace(inner, terms=(*inner.terms, Term(added, views, factor * above)))
        if isinstance(inner, str):
            return inner
    return None


def filled(scores: Scores, added: ir.Value | None, factor: float) -> Found:
    """mask * scores + low * (1 - mask), which is low where the mask hides"""
    found, gate = two_values(added), scores.gate
    assert gate is not None
    if found is None or 0.0 not in found[1:]:
        return "the scores are multiplied by a mask, and nothing low is added where it is 0"
    condition, off, on = found
    fill = (off or on) * factor
    if not fill <= HIDES:
        return f"masked scores become {fill:g}, which does not hide them"
    if not same_condition(gate, Term(condition, hidden=off == 0.0)):
        return "the scores are multiplied by one mask, and something low is added by another"
    return replace(scores, gate=None, seen=(*scores.seen, (gate, fill)))


def _capped(node: ir.Node, above: float, views: tuple[ir.Node, ...], below: Callable[..., Found]) -> Found:
    """cap * tanh(scores / cap), from what is inside the tanh, times cap"""
    inner = below(node.inputs[0], 1.0 / above) if above > 0 else None
    if not isinstance(inner, Scores):
        return inner
    if inner.terms or inner.seen or inner.softcap:
        return "something is added to the scores, or masked in them, before they are capped"
    return replace(inner, scale=inner.scale * above, softcap=above)


def _masked(node: ir.Node, above: float, views: tuple[ir.Node, ...], below: Callable[..., Found]) -> Found:
    split = masked_value(node.outputs[0], HIDES)
    if split is not None:
        condition, kept, fill, hides = split
        inner = below(kept)
        if not isinstance(inner, Scores):
            return inner
        if not fill * above <= HIDES:
            return f"masked scores become {fill * above:g}, which does not hide them"
        return replace(inner, seen=(*inner.seen, (Term(condition, views, hidden=hides), fill * above)))
    for one, other in (node.inputs[1:], node.inputs[:0:-1]):
        if isinstance(below(one), Scores):
            return f"masked scores become {fill_of(other)}, which does not hide them"
    return None


_STEPS: dict[str, Callable[..., Found]] = {
    "Cast": _cast,
    "Mul": _scaled,
    "Div": _scaled,
    "Add": _sum,
    "Sub": _sum,
    "Tanh": _capped,
    "Where": _masked,
}


def _product(node: ir.Node, above: float, views: tuple[ir.Node, ...]) -> Found:
    left, right = node.inputs[:2]
    if left is None or right is None:
        return None
    orders = operand_orders(node, "scores")
    shapes = dims(left), dims(right)
    if orders is None or None in shapes or not len(shapes[0] or ()) == len(shapes[1] or ()) == len(orders[0]):
        return None
    (q, q_scale), (k, k_scale) = (followed(value, order) for value, order in zip((left, right), orders, strict=False))
    if q is None or k is None or keeps_weights(k):
        return None
    alpha = float(attr(node, "alpha", 1.0)) if node.op_type == "FusedMatMul" else 1.0
    return Scores(q, k, above * alpha * q_scale * k_scale, shape=dims((views[-1] if views else node).outputs[0]))


def keeps_weights(k: Operand) -> bool:
    """A product with a weight is a linear layer, no scores."""
    return k.value.producer() is None and not k.value.is_graph_input()


def operand_orders(node: ir.Node, of: str) -> tuple[tuple[int, ...], ...] | None:
    """How the factors of a product, and its result, are transposed: the first and second as [B, H, S, D] (or without
    B), the result from [B, H, Sq, Sk] (scores) or [B, H, Sq, D] (values)."""
    if node.op_type == "Einsum":
        return _einsum(attr(node, "equation", ""), of)
    rank = len(dims(node.outputs[0]) or ())
    if rank not in (3, 4):
        return None
    plain = tuple(range(rank))
    swapped = (*plain[:-2], rank - 1, rank - 2)
    flips = (
        [bool(attr(node, name, 0)) for name in ("transA", "transB")] if node.op_type == "FusedMatMul" else [False] * 2
    )
    if any(attr(node, name, 0) for name in ("transBatchA", "transBatchB")):
        return None
    first = swapped if flips[0] else plain
    second = plain if flips[1] == (of == "scores") else swapped
    return first, second, plain


def _einsum(equation: str, of: str) -> tuple[tuple[int, ...], ...] | None:
    """`bqhd,bkhd->bhqk` and `bhqk,bkhd->bqhd`, in any order of letters."""
    left, _, out = equation.replace(" ", "").partition("->")
    first, _, second = left.partition(",")
    if not all(len({*part}) == len(part) == 4 for part in (first, second, out)):
        return None
    both = [x for x in first if x in second and x in out]
    summed = [x for x in first if x in second and x not in out]
    own, other = ([x for x in side if x not in rest and x in out] for side, rest in ((first, second), (second, first)))
    if (len(both), len(summed), len(own), len(other)) != (2, 1, 1, 1):
        return None
    batch, heads = sorted(both, key=out.index)
    if of == "scores":
        q, k = (batch, heads, own[0], summed[0]), (batch, heads, other[0], summed[0])
        result = (batch, heads, own[0], other[0])
        if out != "".join(result):
            return None
    else:
        q, k = (batch, heads, own[0], summed[0]), (batch, heads, summed[0], other[0])
        result = (batch, heads, own[0], other[0])
        if first != "".join(q):
            return None
    return (
        tuple(first.index(x) for x in q),
        tuple(second.index(x) for x in k),
        tuple(result.index(x) for x in out),
    )


@dataclass(frozen=True)
class Weighted:
    """The product of the softmax with v: `out` is Transpose([B, H, Sq, D], order)."""

    v: Operand
    out: ir.Value
    order: tuple[int, ...] = PLAIN
    guards: tuple[ir.Value, ...] = ()  # of what rows that are all -inf were made zero


def weighted_values(
    softmax: ir.Node, turned: bool = False, masks: list[ir.Value] | None = None
) -> Weighted | str | None:
    """None where no such product follows, a str where more than that does. turned: the softmax is [.., Sk, Sq]. masks:
    gets what the weights were multiplied by, before they were made to sum up to 1 again."""
    value = softmax.outputs[0]
    guards: list[ir.Value] = []
    while True:
        value = guarded(safe(value), guards)
        if masks is not None and (again := renormalized(value, masks)) is not None:
            value = again
        nodes = users(value)
        product = next((n for n in nodes if is_product(n, softmax) and source(n.inputs[turned]) is value), None)
        if product is not None:
            if len(nodes) > 1 or value.is_graph_output():
                return "its weights are used by something else too"
            found = _weighted_turned(product) if turned else _weighted(product)
            return replace(found, guards=tuple(guards)) if isinstance(found, Weighted) else found
        step = only_user(value, "Cast", "Transpose", *RESHAPES)
        if step is None or dtype_of(step.outputs[0]) not in FLOATS:
            return None
        if step.op_type != "Cast" and not is_view(step):
            if not swaps(step, value):
                return None
            turned = not turned
        value = step.outputs[0]


def is_product(node: ir.Node, softmax: ir.Node) -> bool:
    return (standard(node, "MatMul", "Einsum") or node.op_type == "FusedMatMul") and node.graph is softmax.graph


def swaps(node: ir.Node, value: ir.Value) -> bool:
    """Whether a Transpose swaps the queries and keys of the weights, whatever axes of size 1 there are."""
    shape = next((dims(v) for v in views_back(value) if len(dims(v) or ()) == 4), dims(value)) or ()
    order = permutation(node) or []
    if len(order) == len(shape) and len(shape) in (3, 4):
        return order == [*range(len(shape) - 2), len(shape) - 1, len(shape) - 2]
    found = turned_heads(node, (*shape[:2], shape[3], shape[2])) if len(shape) == 4 else None
    return found is not None and found.order == (0, 1, 3, 2)


def _weighted_turned(product: ir.Node) -> Weighted | None:
    """v^T w^T, which is (w v)^T"""
    rank = len(dims(product.outputs[0]) or ())
    if not standard(product, "MatMul") or rank not in (3, 4) or product.inputs[0] is None:
        return None
    order = (*range(rank - 2), rank - 1, rank - 2)
    v, factor = followed(product.inputs[0], order)
    return Weighted(v, product.outputs[0], order) if v is not None and factor == 1.0 else None


def _weighted(product: ir.Node) -> Weighted | str | None:
    orders = operand_orders(product, "values")
    if orders is None or orders[0] != tuple(range(len(orders[0]))):
        return None
    v, factor = followed(product.inputs[1], orders[1])
    alpha = float(attr(product, "alpha", 1.0)) if product.op_type == "FusedMatMul" else 1.0
    if v is None or factor * alpha != 1.0:
        plain = Operand(product.inputs[1], orders[1]) if product.inputs[1] is not None and alpha == 1.0 else None
        return None if plain is None else Weighted(plain, product.outputs[0], orders[2])
    return Weighted(v, product.outputs[0], orders[2])


def guarded(value: ir.Value, guards: list[ir.Value]) -> ir.Value:
    """The softmax, or `Where(ReduceMax(bias) == -inf, 0, softmax)` around it; the bias goes to the guards."""
    where = only_user(value, "Where")
    if where is None or source(where.inputs[2]) is not value or fill_of(where.inputs[1]) != 0.0:
        return value
    for largest, low in sides(made_by(where.inputs[0], "Equal")):
        node = made_by(largest, "ReduceMax")
        bias = node.inputs[0] if node is not None and attr(node, "keepdims", 1) else None
        if node is not None and bias is not None and given(node, "axes", 1) in ([-1], [3]) and fill_of(low) == -np.inf:
            guards.append(bias)
            return where.outputs[0]
    return value


def safe(value: ir.Value) -> ir.Value:
    """The softmax, or `Where(IsNaN(softmax), 0, softmax)` around it, which is zero in rows without any key."""
    for node in users(value):
        if standard(node, "Where") and source(node.inputs[2]) is value and fill_of(node.inputs[1]) == 0.0:
            test = made_by(node.inputs[0], "IsNaN")
            if test is not None and source(test.inputs[0]) is value and len(users(value)) == 2:
                return node.outputs[0]
    return value


def renormalized(value: ir.Value, masks: list[ir.Value]) -> ir.Value | None:
    """What a softmax becomes as `w * m / sum(w * m)`, zero where that sum is, which is the softmax over what m lets
    through; m goes to the masks."""
    product = only_user(value, "Mul")
    mask = next((m for w, m in sides(product) if source(w) is value and is_switch(m)), None)
    if product is None or mask is None:
        return None
    for total in (n for n in users(product.outputs[0]) if standard(n, "ReduceSum")):
        rank = len(dims(product.outputs[0]) or ())
        if given(total, "axes", 1) not in ([-1], [rank - 1]) or not attr(total, "keepdims", 1):
            continue
        for end in (n for n in users(product.outputs[0]) if standard(n, "Div")):
            found = zero_where_nothing(end, product.outputs[0], total.outputs[0])
            if found is not None and len(users(product.outputs[0])) == 2:
                masks.append(mask)
                return found
    return None


def zero_where_nothing(division: ir.Node, part: ir.Value, total: ir.Value) -> ir.Value | None:
    """`Where(total > 0, part / Where(total > 0, total, 1), 0)`"""
    below = made_by(division.inputs[1], "Where")
    last = only_user(division.outputs[0], "Where")
    if source(division.inputs[0]) is not source(part) or below is None or last is None:
        return None
    tests = [made_by(node.inputs[0], "Greater") for node in (below, last)]
    positive = all(
        t is not None and source(t.inputs[0]) is source(total) and fill_of(t.inputs[1]) == 0.0 for t in tests
    )
    one, zero = fill_of(below.inputs[2]) == 1.0, fill_of(last.inputs[2]) == 0.0
    kept = source(below.inputs[1]) is source(total) and source(last.inputs[1]) is source(division.outputs[0])
    return last.outputs[0] if positive and one and zero and kept else None
