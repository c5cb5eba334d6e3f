"""Reading an attention mask back: which part hides keys, which part is causal or a window, and what is neither.

transformers builds one bool mask [B, 1, Sq, Sk] from conditions on positions: `True & (q >= 0) & padding[b, k]`, with
`k <= q` for a decoder and `k > q - w` for a window. Its conjunction is walked; terms that always hold are dropped; a
term that does not vary with the query is a key mask. What is left over stays what it is: an additive bias.

A float mask is what it was made of: `where(mask, x, finfo.min)` is the mask and the bias x.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.fx import Graph, Node

from trimaran.torch_path.graph import (
    RESHAPES,
    argument,
    aten,
    call,
    called,
    dtype_of,
    is_tensor,
    literal,
    same,
    same_shape,
    size,
    value,
)
from trimaran.torch_path.lines import KEY, Bounds, Line
from trimaran.torch_path.rules.positions import bounds_of, constant_of, line_of

HIDES = -1e4  # a score that is so much lower than others has a weight of zero
SCORES = 8.0  # what scores differ by
_AND = (aten.__and__.Tensor, aten.bitwise_and.Tensor, aten.logical_and.default, aten.mul.Tensor)
_OR = (aten.__or__.Tensor, aten.bitwise_or.Tensor, aten.logical_or.default)
_NOT = (aten.bitwise_not.default, aten.logical_not.default)
_VIEWS = (*RESHAPES, aten.unsqueeze.default, aten.expand.default, aten.contiguous.default, aten.unflatten.int)
_WHERE = (aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf, aten.where.Scalar)


@dataclass(frozen=True)
class Term:
    """A tensor that a mask is made of: a node, `views` of it yet to be taken (nodes to imitate, the last one first),
    a factor (-1 where it was subtracted), and for bool ones whether it says what is hidden instead of what is seen."""

    node: Node
    views: tuple[Node, ...] = ()
    factor: float = 1.0
    hidden: bool = False

    @property
    def shape(self) -> tuple[Any, ...]:
        shape = tuple(value(self.views[-1] if self.views else self.node).shape)
        return (1,) * (4 - len(shape)) + shape

    def of(self, node: Any) -> Term:
        """The same views of another node."""
        return replace(self, node=node)

    def under(self) -> Term:
        """The term that this node is a view of."""
        return Term(self.node.args[0], (self.node, *self.views), self.factor, self.hidden)  # type: ignore[arg-type]


@dataclass
class Mask:
    """What masks and biases of one attention say together."""

    keys: list[Term] = field(default_factory=list)  # bool, [B, 1, 1, Sk]: the keys that are seen
    others: list[Term] = field(default_factory=list)  # bool, any shape: what neither keys nor a window can say
    biases: list[Term] = field(default_factory=list)  # to be added
    left: int = -1  # the window, -1 where it is open
    right: int = -1
    finite: bool = False  # hidden scores were lowered, not taken away: a row without keys is a mean of all


class MaskReader:
    """Reads the masks of one attention with q [B, H, Sq, D] and k [B, _, Sk, D]."""

    def __init__(self, rows: Any, keys: Any, scores: torch.dtype, splits: bool = True) -> None:
        """rows: B, H, Sq. scores: their dtype. splits: whether finite numbers that hide the scores that they are added
        to become masks."""
        self.batch, self.heads, self.queries = rows
        self.length, self.splits = keys, splits
        self.forgetting = SCORES / torch.finfo(scores).eps  # nothing is left of a score to which so much is added
        self.mask = Mask()
        self.lowered: list[float] = []  # by how much each mask lowers the scores that it hides
        self.became: set[float] = set()  # what hidden scores become

    def seen(self, term: Term) -> str | None:
        """Add a bool condition under which keys are seen. A str is the reason why that cannot be."""
        for part in conjunction(term):
            known = always(part)
            bounds = None if known or part.views else bounds_of(part.node, part.hidden)
            if known or (bounds is not None and self.window(bounds)):
                continue
            shape = part.shape
            if not self.fits(shape):
                return f"the mask's shape {list(shape)} is not provably [1|B, 1|H, 1|Sq, Sk]"
            per_key = same(shape[1], 1) and same(shape[2], 1) and same(shape[3], self.length)
            (self.mask.keys if per_key else self.mask.others).append(part)
        return None

    def added(self, term: Term, dtype: str) -> str | None:
        """Add a float tensor, of the operands' dtype, to the scores. A str is the reason why that cannot be."""
        known = constant_of(term.node)
        if known is not None and known > HIDES:
            return None  # every score alike
        term = unwrapped(term)
        split = masked_value(term.node) if term.factor > 0 else None
        if split is not None and self.hides(split[2] * term.factor):
            condition, kept, fill, hides = split
            self.lower(fill * term.factor)
            seen = self.seen(replace(term.of(condition), hidden=hides, factor=1.0))
            return seen or self.added(term.of(kept), dtype)
        if called(term.node, aten.triu.default) and not term.views and self.upper_triangle(term):
            return None
        if dtype_of(term.node) != dtype:
            return f"the mask is {dtype_of(term.node)} and q is {dtype}"
        if not self.fits(term.shape):
            return f"the mask's shape {list(term.shape)} is not provably [1|B, 1|H, 1|Sq, Sk]"
        self.mask.biases.append(term)
        return None

    def hides(self, added: float) -> bool:
        """Whether a score to which this is added is hidden, and forgotten, so that a row without keys is a mean."""
        return (self.splits or added == float("-inf")) and -added > self.forgetting

    def upper_triangle(self, term: Term) -> bool:
        """triu(full(-inf), d): seen is what it left at zero, up to key = query + d - 1"""
        node = term.node
        fill = constant_of(node.args[0])
        if fill is None or not self.hides(fill * term.factor):
            return False
        if not self.window(Bounds(high=argument(node, 1, "diagonal", 0) - 1)):
            return False
        self.lower(fill * term.factor)
        return True

    def lower(self, by: float) -> None:
        """Scores that a mask hides are lowered by this number."""
        self.lowered.append(by)
        self.mask.finite |= by != float("-inf")

    def filled(self, fill: float) -> None:
        """Scores that a mask hides become this number."""
        self.became.add(fill)
        self.mask.finite |= fill != float("-inf")

    def consistent(self) -> bool:
        """Whether all hidden scores are alike, also where two masks hide them, and whatever is added to them."""
        numbers = [*self.lowered, *self.became]
        alike = len(numbers) < 2 or {*numbers} == {float("-inf")}
        return alike and (not self.mask.biases or all(-number > self.forgetting for number in self.became))

    def fits(self, shape: Any) -> bool:
        full = (self.batch, self.heads, self.queries)
        broadcast = all(same(size, 1) or same(size, whole) for size, whole in zip(shape, full, strict=False))
        return len(shape) == 4 and broadcast and (same(shape[3], self.length) or same(shape[3], 1))

    def window(self, bounds: Bounds) -> bool:
        """Take the bounds in, counted from where each query stands among the keys; False where they are not known."""
        offset = self.length - self.queries
        right = -1 if bounds.high is None else number(bounds.high - offset)
        left = -1 if bounds.low is None else number(offset - bounds.low)
        if right is None or left is None or (bounds.high is not None and right < 0):
            return False
        if bounds.low is not None and left < 0:
            return False
        if right == 0 and same(self.queries, 1):  # the one query is the last position
            right = -1
        self.mask.right = _tighter(self.mask.right, right)
        self.mask.left = _tighter(self.mask.left, left)
        return True


def _tighter(one: int, other: int) -> int:
    return max(one, other) if min(one, other) < 0 else min(one, other)


def number(size: Any) -> int | None:
    """A size that is the same number whatever the symbols in it are."""
    if isinstance(size, torch.SymInt):
        return int(size.node.expr) if size.node.expr.is_number else None
    return int(size)


def conjunction(term: Term) -> list[Term]:
    """The conditions that must all hold, broadcasts looked through."""
    node = term.node
    if called(node, *_NOT) or (called(node, aten.eq.Scalar) and literal(node.args[1]) == 0):
        return conjunction(replace(term.of(node.args[0]), hidden=not term.hidden))
    if called(node, aten.ne.Scalar) and literal(node.args[1]) == 0:
        return conjunction(term.of(node.args[0]))
    if called(node, *(_OR if term.hidden else _AND)) and not any(is_float(side) for side in node.args):
        return [part for side in node.args for part in conjunction(term.of(side))]
    if (called(node, aten.expand.default) or adds_leading_axes(node)) and not term.views:
        return conjunction(term.of(node.args[0]))
    if called(node, aten.to.dtype) and not is_float(node) and called(node.args[0], *_AND):
        return conjunction(term.of(node.args[0]))
    return [term]


def is_float(node: Any) -> bool:
    return not is_tensor(node) or bool(value(node).dtype.is_floating_point)


def adds_leading_axes(node: Node) -> bool:
    """A view that does what broadcasting would do."""
    if not called(node, *RESHAPES, aten.unsqueeze.default):
        return False
    before, after = value(node.args[0]).shape, value(node).shape
    more = len(after) - len(before)
    return more > 0 and all(same(size, 1) for size in after[:more]) and all(map(same, before, after[more:]))


def always(term: Term) -> bool:
    """Provably nothing is hidden."""
    known = constant_of(term.node)
    if known is not None:
        return bool(known) is not term.hidden
    return bounds_of(term.node, term.hidden) == Bounds()


def unwrapped(term: Term) -> Term:
    """A float term without the views that broadcasting would take, and under those that a mask can imitate."""
    while called(term.node, *_VIEWS):
        broadcast = called(term.node, aten.expand.default) or adds_leading_axes(term.node)
        if (broadcast and not term.views) or called(term.node, aten.contiguous.default):
            term = term.of(term.node.args[0])
        else:
            term = term.under()
    return term


def masked_value(node: Any) -> tuple[Any, Any, float, bool] | None:
    """(condition, value, what it is elsewhere, whether the condition hides) of a tensor that a mask was written into,
    None where there is none, or one that does not hide."""
    if called(node, aten.masked_fill.Scalar, aten.masked_fill.Tensor):
        kept, condition, fill = node.args
        choices = [(kept, fill, True)]
    elif called(node, *_WHERE):
        condition, one, other = node.args
        choices = [(one, other, False), (other, one, True)]
    else:
        return None
    for kept, fill, hides in choices:
        lowest = constant_of(fill)
        if lowest is not None and lowest <= HIDES and is_tensor(condition):
            return condition, kept, float(lowest), hides
    return None


def materialized(graph: Graph, term: Term) -> Node:
    """The term as a tensor, its views taken; a bool one says what is seen."""
    node = term.node
    if not is_float(node):
        if value(node).dtype != torch.bool:
            node = call(graph, aten.ne.Scalar, node, 0)
        if term.hidden:
            node = call(graph, aten.logical_not.default, node)
    for view in term.views:
        node = imitated(graph, expanded(graph, node, view.args[0]), view)  # type: ignore[arg-type]
    return node if term.factor == 1.0 else call(graph, aten.mul.Tensor, node, term.factor)


def imitated(graph: Graph, node: Node, view: Node) -> Node:
    """What `view` is of its first argument, of another node; without copies."""
    if called(view, aten.contiguous.default, aten.clone.default):
        return node
    target: Any = aten.reshape.default if view.target in RESHAPES else view.target
    return call(graph, target, node, *view.args[1:], **view.kwargs)


def expanded(graph: Graph, node: Node, like: Node) -> Node:
    """The node broadcast to the shape of another."""
    before, after = value(node).shape, value(like).shape
    if same_shape(before, after):
        return node
    short = [1] * (len(after) - len(before))
    pairs = enumerate(zip([*short, *before], after, strict=True))
    sizes = [-1 if same(a, b) else size(graph, like, axis) for axis, (a, b) in pairs]
    return call(graph, aten.expand.default, node, sizes)


def key_inputs(graph: Graph, mask: Mask, q: Node) -> tuple[Node | None, Node | None]:
    """(key_lengths [B] int32, key_mask [B, Sk] bool) of the mask's key terms.

    A key mask need not be a prefix; the length is one past its last True, which bounds the keys that are visited.
    """
    if not mask.keys:
        return None, None
    rows = [_rows(graph, term) for term in mask.keys]
    both = rows[0]
    for row in rows[1:]:
        both = call(graph, aten.logical_and.default, both, row)
    if not same(value(both).shape[0], value(q).shape[0]):
        both = call(graph, aten.expand.default, both, [size(graph, q, 0), -1])
    ones = call(graph, aten.ones_like.default, both, dtype=torch.int32)
    positions = call(graph, aten.cumsum.default, ones, 1, dtype=torch.int32)
    lengths = call(graph, aten.amax.default, call(graph, aten.mul.Tensor, positions, both), [1])
    return lengths, both


def _rows(graph: Graph, term: Term) -> Node:
    """The key term [1|B, 1, 1, Sk], leading axes of size 1 perhaps missing, as [1|B, Sk]"""
    whole = looked_up_whole(graph, term.node) if not term.views else None
    node = materialized(graph, term if whole is None else term.of(whole))
    while value(node).dim() > 2:
        node = call(graph, aten.select.int, node, 1, 0)
    return node if value(node).dim() == 2 else call(graph, aten.unsqueeze.default, node, 0)


def looked_up_whole(graph: Graph, node: Node) -> Node | None:
    """m [B, Sk] where the node is `m[b, k]` with b and k counting every row and column: transformers' broadcast. Where
    they may be fewer than m has, the first rows and columns of m."""
    table, places = (node.args[0], node.args[1]) if called(node, aten.index.Tensor) else (None, ())
    if not is_tensor(table, rank=2) or len(places) != 2:  # type: ignore[arg-type]
        return None
    row, column = map(line_of, places)  # type: ignore[arg-type]
    if row != Line({4: 1}) or column != Line({KEY: 1}):
        return None
    for axis, place in enumerate(places):  # type: ignore[arg-type]
        counted = value(node).shape[0 if axis == 0 else -1]
        if not same(value(table).shape[axis], counted):
            end = _counted(place)
            if end is None:
                return None
            table = call(graph, aten.slice.Tensor, table, axis, 0, end)
    return table  # type: ignore[return-value]


def _counted(place: Any) -> Any:
    """n where the node is a view of arange(n)"""
    while called(place, *_VIEWS):
        place = place.args[0]
    return place.args[0] if called(place, aten.arange.default) else None


def bias_input(graph: Graph, mask: Mask, q: Node, k: Node) -> Node | None:
    """What is added to the scores, [1|B, 1|H, 1|Sq, Sk]: biases, and -inf for what only a mask of its own can say."""
    total = None
    for term in mask.biases:
        bias = materialized(graph, term)
        total = bias if total is None else call(graph, aten.add.Tensor, total, bias)
    for term in mask.others:
        hidden = call(graph, aten.logical_not.default, materialized(graph, term))
        if total is None:
            total = call(graph, aten.zeros_like.default, hidden, dtype=value(q).dtype)
        total = call(graph, aten.where.ScalarSelf, hidden, float("-inf"), total)
    while total is not None and value(total).dim() < 4:
        total = call(graph, aten.unsqueeze.default, total, 0)
    if total is not None and not same(value(total).shape[3], value(k).shape[2]):  # the same for every key
        total = call(graph, aten.expand.default, total, [-1, -1, -1, size(graph, k, 2)])
    return total
