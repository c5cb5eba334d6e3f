"""Reading attention that a model writes out: softmax(scores) times v, back to q, k, scale, soft cap, masks and biases.

From the softmax the chain of operations is walked up to the product of queries and keys; what is added or masked on
the way is kept as terms. A cap is `c * tanh(x / c)`; it stands below every term.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

from torch.fx import Node

from trimaran.torch_path.graph import (
    RESHAPES,
    argument,
    aten,
    axes_of,
    called,
    is_tensor,
    literal,
    value,
)
from trimaran.torch_path.rules.masks import HIDES, Term, masked_value

_PRODUCTS = (aten.matmul.default, aten.bmm.default)
_VIEWS = (*RESHAPES, aten.unflatten.int, aten.flatten.using_ints)
_CASTS = (aten.to.dtype, aten.type_as.default)


@dataclass(frozen=True)
class Scores:
    """scale * q k^T, capped, with everything that was added (`terms`) and every mask that was filled in (`seen`)."""

    product: Node
    q: Any
    k: Any
    scale: float = 1.0
    softcap: float = 0.0
    terms: tuple[Term, ...] = ()
    seen: tuple[tuple[Term, float], ...] = field(default=())


Found: TypeAlias = Scores | str | None


def read_scores(node: Any, above: float = 1.0, views: tuple[Node, ...] = (), depth: int = 0) -> Found:
    """The scores that a node computes, times `above`; None where they come from no product of two tensors, a str
    where they do and something on the way is not understood."""
    if not is_tensor(node) or depth > 16:
        return None

    def below(inner: Any, factor: float = 1.0, seen_through: tuple[Node, ...] = views) -> Found:
        return read_scores(inner, above * factor, seen_through, depth + 1)

    if called(node, *_PRODUCTS, aten.baddbmm.default):
        return _product(node, above, views)
    if called(node, *_VIEWS):
        return below(node.args[0], seen_through=(node, *views))
    if called(node, *_CASTS) and value(node).dtype.is_floating_point:
        return below(node.args[0])
    if called(node, aten.mul.Tensor, aten.div.Tensor):
        return _scaled(node, below)
    if called(node, aten.add.Tensor, aten.sub.Tensor) and not node.kwargs:
        return _sum(node, above, views, below)
    if called(node, aten.tanh.default):
        return _capped(below(node.args[0], 1.0 / above), above) if above > 0 else None
    split = masked_value(node)
    if split is not None:
        condition, kept, fill, hides = split
        inner = below(kept)
        if isinstance(inner, Scores) and fill * above > HIDES:
            return f"masked scores become {fill * above}, which does not hide them"
        if isinstance(inner, Scores):
            term = Term(condition, views, hidden=hides)
            return replace(inner, seen=(*inner.seen, (term, fill * above)))
        return inner
    if called(node, aten.masked_fill.Scalar) and isinstance(below(node.args[0]), Scores):
        return f"masked scores become {node.args[2]}, which does not hide them"
    return None


def _scaled(node: Node, below: Callable[..., Found]) -> Found:
    one, other = node.args
    if literal(other) is not None:
        factor = literal(other)
        return below(one, factor if called(node, aten.mul.Tensor) else 1.0 / factor)  # type: ignore[operator]
    if literal(one) is not None and called(node, aten.mul.Tensor):
        return below(other, literal(one))
    return None


def _sum(node: Node, above: float, views: tuple[Node, ...], below: Callable[..., Found]) -> Found:
    sign = 1.0 if called(node, aten.add.Tensor) else -1.0
    one, other = node.args
    for kept, added, factor, through in ((one, other, sign, 1.0), (other, one, 1.0, sign)):
        inner = below(kept, through)
        if isinstance(inner, Scores) and is_tensor(added):
            term = Term(added, views, factor * above)  # type: ignore[arg-type]
            return replace(inner, terms=(*inner.terms, term))
        if isinstance(inner, str):
            return inner
    return None


def _capped(inner: Found, cap: float) -> Found:
    """cap * tanh(scores / cap), from what is inside the tanh, times cap"""
    if not isinstance(inner, Scores):
        return inner
    if inner.terms or inner.seen or inner.softcap:
        return "something is added to the scores, or masked in them, before they are capped"
    return replace(inner, scale=inner.scale * cap, softcap=cap)


def _product(node: Node, above: float, views: tuple[Node, ...]) -> Found:
    terms: tuple[Term, ...] = ()
    q, k = node.args[-2:]
    if called(node, aten.baddbmm.default):
        alpha, beta = (literal(node.kwargs.get(name, 1)) for name in ("alpha", "beta"))
        if alpha is None or beta is None:
            return "alpha or beta of its baddbmm is computed at run time"
        terms = (Term(node.args[0], views, above * beta),)  # type: ignore[arg-type]
        above *= alpha
    if not is_tensor(q) or not is_tensor(k) or value(q).dim() not in (3, 4) or value(k).dim() != value(q).dim():
        return None
    q, q_scale = scaled_by(q)
    k, k_scale = scaled_by(k)
    rank = value(q).dim()
    if not called(k, aten.transpose.int) or axes_of(k) != {rank - 1, rank - 2}:
        return "the second factor of the scores is no transpose of the keys"
    k, more = scaled_by(k.args[0])
    return Scores(node, q, k, above * q_scale * k_scale * more, terms=terms)


def scaled_by(node: Any) -> tuple[Any, float]:
    """(x, c) of x * c or x / c with a number c, and (the node, 1) of anything else."""
    factor = 1.0
    while called(node, aten.mul.Tensor, aten.div.Tensor) and is_tensor(node.args[0]):
        by = literal(node.args[1])
        if not by or value(node.args[0]).dtype != value(node).dtype:
            break
        factor *= by if called(node, aten.mul.Tensor) else 1.0 / by
        node = node.args[0]
    return node, factor


def weighted_values(softmax: Node) -> tuple[Node, Any] | str | None:
    """(the product, v) of `softmax(..) @ v`; None where no such product follows, a str where more than that does."""
    node = softmax
    while len(node.users) == 1:
        user = next(iter(node.users))
        if called(user, *_PRODUCTS) and user.args[0] is node:
            return user, user.args[1]
        if not called(user, *_CASTS, *_VIEWS):
            return _detour(user) if value(softmax).dim() > 2 else None
        node = user
    follows = any(called(user, *_PRODUCTS) and user.args[0] is node for user in node.users)
    return "its weights are used by something else too" if follows else None


def _detour(first: Node) -> str | None:
    """Where weights are multiplied with values after all, though something is done to them before."""
    node = first
    for _ in range(4):
        if len(node.users) != 1 or not is_tensor(node):
            return None
        user = next(iter(node.users))
        if called(user, *_PRODUCTS) and user.args[0] is node:
            return f"its weights go through {first.target} before they are multiplied with values"
        node = user
    return None


def is_last_axis(softmax: Node) -> bool:
    axis: Any = argument(softmax, 1, "dim")
    return bool(axis % value(softmax).dim() == value(softmax).dim() - 1)
