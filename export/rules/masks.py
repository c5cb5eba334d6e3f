"""Reading an attention mask back: which part hides keys, which part is causal or a window, and what is neither.

As `torch_path/rules/masks.py` does in FX. The conjunction of conditions is walked; terms that always hold are
dropped; a term that does not vary with the query is a key mask. What is left over stays what it is: an additive bias.
A float mask is what it was made of: `Where(mask, x, finfo.min)`, or `Cast(bool) * finfo.min`, is the mask and the
bias x.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import onnx_ir as ir

from trimaran.export.algebra import Expansion
from trimaran.export.onnx_graph import (
    Inserter,
    dims,
    dtype_of,
    made_by,
    readable,
    same,
    same_dims,
    scalar,
    sides,
    source,
)
from trimaran.export.report import Fault
from trimaran.export.rules.positions import bounds_of, fill_of
from trimaran.export.shapes import broadcast_all, note, typed
from trimaran.torch_path.lines import Bounds, plain

LOWEST = {"float32": -3.4e38, "float16": -65504.0, "bfloat16": -3.38e38}  # added to a score, hides the key completely
HIDES = -1e4  # instead of a score: so much lower than others has a weight of zero


@dataclass(frozen=True)
class Term:
    """A tensor that a mask is made of. views: nodes whose form it is yet to take, one after the other. hidden: it says
    what is hidden instead of what is seen. factor: of a float one."""

    value: ir.Value
    views: tuple[ir.Node, ...] = ()
    factor: float = 1.0
    hidden: bool = False

    @property
    def shape(self) -> tuple[Any, ...] | None:
        if self.views and not same_dims(dims(self.value), dims(self.views[0].inputs[0])):
            return None  # it is broadcast first
        shape = dims(self.views[-1].outputs[0] if self.views else self.value)
        return None if shape is None or len(shape) > 4 else (1,) * (4 - len(shape)) + shape

    def of(self, value: ir.Value) -> Term:
        return replace(self, value=value)


@dataclass
class Mask:
    """What masks and biases of one attention say together."""

    keys: list[Term] = field(default_factory=list)  # bool, [B, 1, 1, Sk]: the keys that are seen
    others: list[Term] = field(default_factory=list)  # bool, any shape: what neither keys nor a window can say
    biases: list[Term] = field(default_factory=list)  # to be added
    left: int = -1  # the window, -1 where it is open
    right: int = -1
    fills: set[float] = field(default_factory=set)  # what hidden scores became
    lengths: ir.Value | None = None  # [B] int32, where a file has them

    @property
    def masked_row(self) -> str:
        return "mean" if any(fill != -np.inf for fill in self.fills) else "zero"


class MaskReader:
    """Reads the masks of one attention with scores [B, H, Sq, Sk]."""

    def __init__(self, shape: tuple[Any, ...]) -> None:
        self.batch, self.heads, self.queries, self.length = shape
        self.mask = Mask()

    def seen(self, term: Term) -> str | None:
        """Add a bool condition under which keys are seen. A str is the reason why that cannot be."""
        for part in conjunction(term):
            fill = fill_of(part.value)
            bounds = None if part.views else bounds_of(part.value, part.hidden)
            if fill is not None and bool(fill) is not part.hidden:
                continue
            if bounds is not None and self.window(bounds):
                continue
            shape = part.shape
            if shape is None or not self.fits(shape):
                return Fault.of(f"the mask's shape {readable(shape)} is not provably [1|B, 1|H, 1|Sq, Sk]", part.value)
            per_key = same(shape[0], self.batch) and shape[1:3] == (1, 1)
            (self.mask.keys if per_key else self.mask.others).append(part)
        return None

    def added(self, term: Term, dtype: str) -> str | None:
        """Add a float tensor that is added to the scores. A str is the reason why that cannot be."""
        fill = fill_of(term.value)
        if fill is not None and fill > HIDES:
            return None  # every score alike
        if dtype_of(term.value) == "bool":
            return Fault.of("the mask is bool and added", term.value)
        term = unwrapped(term)
        low = LOWEST.get(dtype, -np.inf) / term.factor if term.factor > 0 else -np.inf
        split = (masked_value(term.value, low) or switched(term.value, low)) if term.factor > 0 else None
        if split is not None:
            condition, kept, fill, hides = split
            self.mask.fills.add(fill)
            seen = self.seen(replace(term.of(condition), hidden=hides))
            return seen or (None if kept is None else self.added(term.of(kept), dtype))
        if dtype_of(term.value) != dtype:
            return Fault.of(f"the mask is {dtype_of(term.value)} and q is {dtype}", term.value)
        shape = term.shape
        if shape is None or not self.fits(shape):
            full = readable(dims(term.value))
            return Fault.of(f"the mask's shape {full} is not provably [1|B, 1|H, 1|Sq, Sk]", term.value)
        if term.factor > 0 and not term.views and self.upper_triangle(term.value, low):
            return None
        self.mask.biases.append(term)
        return None

    def upper_triangle(self, value: ir.Value, low: float) -> bool:
        """Trilu(full(-inf), d), upper: seen is what it left at zero, up to key = query + d - 1"""
        node = made_by(value, "Trilu")
        fill = fill_of(node.inputs[0]) if node is not None and node.attributes.get("upper") is None else None
        diagonal = scalar(node.inputs[1]) if node is not None and len(node.inputs) > 1 else 0
        if fill is None or fill > low or diagonal is None or not self.window(Bounds(high=int(diagonal) - 1)):
            return False
        self.mask.fills.add(fill)
        return True

    def fits(self, shape: tuple[Any, ...]) -> bool:
        """Whether it may be [1|B, 1|H, 1|Sq, Sk]: of sizes that nobody knows the op itself says whether they do."""
        *front, keys = zip(shape, (self.batch, self.heads, self.queries, self.length), strict=True)
        row = same(*keys) or (keys[0] != 1 and alike(*keys))
        return row and all(size == 1 or alike(size, whole) for size, whole in front)

    def window(self, bounds: Bounds) -> bool:
        """Take the bounds in, counted from where each query stands among the keys; False where they are not known."""
        offset = plain(self.length - self.queries)
        right = None if bounds.high is None else plain(bounds.high - offset)
        left = None if bounds.low is None else plain(offset - bounds.low)
        if any(n is not None and (not isinstance(n, int) or n < 0) for n in (left, right)):
            return False
        if right == 0 and self.queries == 1:  # the one query is the last position
            right = None
        self.mask.right = tighter(self.mask.right, right)
        self.mask.left = tighter(self.mask.left, left)
        return True


def alike(size: Any, other: Any) -> bool:
    """Equal sizes, or such of which that is not known."""
    return same(size, other) or not isinstance(plain(size - other), int)


def tighter(one: int, other: int | None) -> int:
    return one if other is None else other if one < 0 else min(one, other)


def conjunction(term: Term) -> list[Term]:
    """The conditions that must all hold, broadcasts looked through."""
    value = source(term.value)
    assert value is not None
    if (node := made_by(value, "Not")) is not None and node.inputs[0] is not None:
        return conjunction(replace(term.of(node.inputs[0]), hidden=not term.hidden))
    if (node := made_by(value, "Or" if term.hidden else "And")) is not None and not term.views:
        return [part for side in node.inputs if side is not None for part in conjunction(term.of(side))]
    if (node := broadcast_of(value)) is not None and not term.views and node.inputs[0] is not None:
        return conjunction(term.of(node.inputs[0]))
    node = made_by(value, "Cast")
    if node is not None and node.inputs[0] is not None and is_switch(node.inputs[0]):
        return conjunction(term.of(node.inputs[0]))
    both = made_by(value, "Mul")
    if both is not None and not term.hidden and not term.views and all(map(is_switch, both.inputs)):
        return [part for side in both.inputs if side is not None for part in conjunction(term.of(side))]
    for one, other in sides(made_by(value, "Equal")):
        fill = fill_of(other)
        if dtype_of(one) == "bool" and fill is not None:
            return conjunction(replace(term.of(one), hidden=term.hidden is bool(fill)))
    return [term.of(value)]


def broadcast_of(value: ir.Value | None) -> ir.Node | None:
    """A node that does what broadcasting would do."""
    node = made_by(value, "Expand", "Unsqueeze", "Reshape")
    if node is None or node.op_type == "Expand":
        return node
    before, after = dims(node.inputs[0]), dims(node.outputs[0])
    if before is None or after is None or len(after) <= len(before):
        return None
    more = len(after) - len(before)
    return node if all(n == 1 for n in after[:more]) and all(map(same, before, after[more:])) else None


def unwrapped(term: Term) -> Term:
    """A float term without the views that broadcasting would take."""
    while not term.views and (node := broadcast_of(term.value)) is not None and node.inputs[0] is not None:
        term = term.of(node.inputs[0])
    while (node := made_by(term.value, "Cast")) is not None and node.inputs[0] is not None:
        exact = {"float32": ("float16", "bfloat16")}
        if dtype_of(node.inputs[0]) not in exact.get(dtype_of(term.value), ()):
            break
        return term
    return term


def masked_value(value: ir.Value | None, low: float) -> tuple[ir.Value, ir.Value, float, bool] | None:
    """(condition, value, what it is elsewhere, whether the condition hides) of a tensor that a mask was written into,
    None where there is none, or one that does not hide."""
    node = made_by(value, "Where")
    if node is None or any(part is None for part in node.inputs):
        return None
    condition, one, other = node.inputs
    for kept, fill, hides in ((one, other, False), (other, one, True)):
        number = fill_of(fill)
        if number is not None and number <= low:
            return condition, kept, float(number), hides  # type: ignore[return-value]
    return None


def switched(value: ir.Value, low: float) -> tuple[ir.Value, None, float, bool] | None:
    """The same of a + b * Cast(bool), which is a or a + b."""
    found = two_values(value)
    if found is None:
        return None
    condition, off, on = found
    if off == 0.0 and on <= low:
        return condition, None, on, True
    return (condition, None, off, False) if on == 0.0 and off <= low else None


def two_values(value: ir.Value | None) -> tuple[ir.Value, float, float] | None:
    """(condition, what the value is where that is False, and where it is True); the condition is bool, or 0 and 1."""
    expanded = Expansion().of(value, 4) or {}
    rest = [monomial for monomial in expanded if monomial]
    if len(rest) != 1 or len(rest[0]) != 1 or rest[0][0][1] != 1 or not isinstance(rest[0][0][0], ir.Value):
        return None
    condition = rest[0][0][0]
    if not is_switch(condition):
        return None
    off = expanded.get((), 0.0)
    on = off + expanded[rest[0]]
    return condition, off, 0.0 if abs(on) < 1e-6 * abs(off) else on


def is_switch(value: ir.Value | None) -> bool:
    """Whether it is bool, or 0 and 1 made of such, whatever its shape became."""
    if value is None or dtype_of(value) == "bool":
        return value is not None
    node = made_by(value, "Cast", "Expand", "Unsqueeze", "Reshape", "Squeeze", "Slice", "Transpose")
    return node is not None and is_switch(node.inputs[0])


def same_condition(one: Term, other: Term) -> bool:
    """Whether two say the same, by the same values."""
    parts = [{(source(part.value), part.hidden) for part in conjunction(term)} for term in (one, other)]
    return parts[0] == parts[1]


# ---- what goes into the op


def materialized(add: Inserter, term: Term) -> ir.Value:
    """The term as a tensor, its views taken; a bool one says what is seen."""
    value = term.value
    if is_switch(value) and dtype_of(value) != "bool":
        value = add.cast(value, ir.DataType.BOOL)
    if term.hidden:
        value = add("Not", value, dtype=ir.DataType.BOOL, shape=dims(value))
    for view in term.views:
        like = add.node(view.op_type, [value, *view.inputs[1:]], view.attributes).outputs[0]
        typed(like, value.dtype)
        note(like, dims(view.outputs[0]))
        value = like
    if term.factor != 1.0:
        assert value.dtype is not None
        factor = add.constant(np.array(term.factor, value.dtype.numpy()))
        value = add("Mul", value, factor, dtype=value.dtype, shape=dims(value))
    return value


def key_inputs(add: Inserter, mask: Mask, cache: dict[Any, Any], opset: int) -> tuple[ir.Value | None, ir.Value | None]:
    """(key_lengths [B] int32, key_mask [B, Sk] bool), once for all layers of a graph.

    A key mask need not be a prefix; the length is one past its last True, which bounds the keys that are visited.
    """
    if not mask.keys:
        return mask.lengths, None
    key = (id(add.graph), *((term.value, term.hidden) for term in mask.keys))
    if key not in cache:
        both: ir.Value | None = None
        for term in mask.keys:
            row = squeezed(add, materialized(add, term), opset)
            both = row if both is None else add("And", both, row, dtype=ir.DataType.BOOL, shape=dims(both))
        assert both is not None
        cache[key] = (lengths_of(add, both, opset), both)
    return cache[key]  # type: ignore[no-any-return]


def lengths_of(add: Inserter, seen: ir.Value, opset: int) -> ir.Value:
    """One past the last True of each row [B, Sk], as [B] int32"""
    shape = dims(seen) or ()
    ones = add("Cast", seen, to=ir.DataType.INT32.value, dtype=ir.DataType.INT32, shape=shape)
    one = ir.tensor(np.array([1], np.int32))
    every = add(
        "ConstantOfShape",
        add("Shape", seen, dtype=ir.DataType.INT64, shape=[2]),
        value=one,
        dtype=ir.DataType.INT32,
        shape=shape,
    )
    positions = add("CumSum", every, add.constant(np.array(1, np.int64)), dtype=ir.DataType.INT32, shape=shape)
    last = add("Mul", positions, ones, dtype=ir.DataType.INT32, shape=shape)
    axes: dict[str, Any] = {"keepdims": 0, "dtype": ir.DataType.INT32, "shape": shape[:1]}
    if opset >= 18:
        return add("ReduceMax", last, add.constant(np.array([1], np.int64)), **axes)
    return add("ReduceMax", last, axes=[1], **axes)


def squeezed(add: Inserter, row: ir.Value, opset: int) -> ir.Value:
    """[B, 1, 1, Sk], leading axes of size 1 perhaps missing, as [B, Sk]"""
    shape = dims(row) or ()
    node = made_by(row, "Unsqueeze")
    if node is not None and len(dims(node.inputs[0]) or ()) == 2 and dims(node.inputs[0]) == (shape[0], shape[-1]):
        return node.inputs[0]  # type: ignore[return-value]
    if len(shape) == 2:
        return row
    return (
        add.reshape(row, [0, -1], [shape[0], shape[-1]])
        if len(shape) == 4
        else add.reshape(row, [1, -1], [1, shape[-1]])
    )


def bias_input(add: Inserter, mask: Mask, dtype: ir.DataType, cache: dict[Any, Any]) -> ir.Value | None:
    """What is added to the scores, [1|B, 1|H, 1|Sq, Sk]: biases, and -inf for what only a mask of its own can say."""
    key = (id(add.graph), "bias", dtype, *((t.value, t.hidden, t.factor) for t in (*mask.biases, *mask.others)))
    if key in cache:
        return cache[key]  # type: ignore[no-any-return]
    total: ir.Value | None = None
    for term in mask.biases:
        bias = materialized(add, term)
        total = bias if total is None else add("Add", total, bias, dtype=dtype, shape=joined(total, bias))
    zero, hidden = (
        (add.constant(np.array(number, dtype.numpy())) for number in (0.0, -np.inf)) if mask.others else (None, None)
    )
    for term in mask.others:
        seen = materialized(add, term)
        kept = zero if total is None else total
        total = add("Where", seen, kept, hidden, dtype=dtype, shape=joined(seen, kept))
    if total is not None and len(dims(total) or ()) < 4:
        total = add.widened(total, 4)
    cache[key] = total
    return total


def joined(a: ir.Value, b: ir.Value | None) -> tuple[Any, ...] | None:
    return broadcast_all([dims(a), dims(b)])
