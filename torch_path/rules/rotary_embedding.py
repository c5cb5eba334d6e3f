"""Rotary position embeddings, of q and k in one op, in every spelling of

    x * cos + crossed(x) * sin

The pairs that turn together are halves of a head (Llama: crossed is cat(-x[D/2:], x[:D/2])) or neighbours (GPT-J:
stack(-x[1::2], x[::2]), flattened), or the pairs are turned one kind at a time (cat(a cos - b sin, b cos + a sin)).
Where only the first elements of a head turn (GPT-NeoX, Phi), x is a slice, and what is left over is put behind it.
The anchor is the concatenation, or the stack, that brings the two kinds together.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, replace
from typing import Any

from torch.fx import Graph, Node

from trimaran.kernels.rotary_embedding import rotary_embedding
from trimaran.torch_path.graph import (
    RESHAPES,
    Part,
    argument,
    aten,
    call,
    called,
    dtype_of,
    erase,
    is_tensor,
    part_of,
    same,
    same_shape,
    value,
)
from trimaran.torch_path.graph import replace as replace_node
from trimaran.torch_path.ops import TORCH_OPS
from trimaran.torch_path.rules.attention import in_rows
from trimaran.torch_path.rules.residual import item, only_user

ROTARY_ANCHORS = (aten.cat.default, aten.stack.default)
_CASTS = (aten.to.dtype, aten.type_as.default)


@dataclass(frozen=True)
class Turned:
    """x, [B, H, S, D] or [B, S, H, D], of which the first `rotary_dim` elements of each head turn by cos and sin
    [1|B, 1, S, R], or [1|B, S, 1, R]; `end` is the result, in x's dtype."""

    end: Node
    x: Node
    cos: Node
    sin: Node
    rotary_dim: int
    interleaved: bool
    length_axis: int  # of S


@dataclass(frozen=True)
class Pair:
    q: Turned
    k: Turned | None


def check_rotary(node: Node) -> Pair | str | None:
    first = turned(node)
    if not isinstance(first, Turned):
        return first
    for anchor in node.graph.nodes:
        second = turned(anchor) if called(anchor, *ROTARY_ANCHORS) and anchor is not node else None
        if isinstance(second, Turned) and _fits(first, second):
            return Pair(*sorted((first, second), key=lambda turned: -_heads(turned)))
    return Pair(first, None)


def _heads(turned: Turned) -> Any:
    return value(turned.x).shape[3 - turned.length_axis]


def _fits(one: Turned, other: Turned) -> bool:
    """The two can be turned at once, where the later one is: nobody needs the earlier one before."""
    if replace(one, end=other.end, x=other.x) != other or dtype_of(one.x) != dtype_of(other.x):
        return False
    early, late = sorted((one.end, other.end))
    alike = all(same(a.shape[i], b.shape[i]) for a, b in ((value(one.x), value(other.x)),) for i in (0, 3))
    length = same(value(one.x).shape[one.length_axis], value(other.x).shape[one.length_axis])
    heads = all(isinstance(_heads(turned), int) for turned in (one, other))
    return alike and length and heads and all(late < user for user in early.users)


def turned(anchor: Node) -> Turned | str | None:
    """Read from the node that brings the two kinds of elements together; None where it is another one."""
    kinds: Any = anchor.args[0]
    axis = argument(anchor, 1, "dim", 0)
    if len(kinds) != 2 or not is_tensor(anchor) or axis not in (-1, value(anchor).dim() - 1):
        return None
    joined = anchor if called(anchor, aten.cat.default) else _flattened(anchor)
    if joined is None or not is_tensor(joined, rank=4):
        return None
    found = _of_crossed(joined, *kinds) if called(kinds[0], aten.neg.default) else _of_kinds(joined, *kinds)
    if found is None:
        return None
    end, x, cos, sin = found
    size = value(joined).shape[3]
    return _checked(*_uncast(*_whole_head(*_uncast(end, x), size)), cos, sin, size, joined is not anchor)


def _flattened(stack: Node) -> Node | None:
    """[.., R] of a stack [.., R / 2, 2]"""
    user = only_user(stack, *RESHAPES, aten.flatten.using_ints, aten.reshape_as.default, aten.view_as.default)
    if user is None or not same_shape(value(user).shape[:-1], value(stack).shape[:-2]):
        return None
    return user


def _of_crossed(joined: Node, negated: Node, low: Any) -> tuple[Node, Node, Any, Any] | None:
    """(end, x, cos, sin) of x * cos + joined * sin, where joined is the two kinds of x exchanged, one negated"""
    x = _kinds_of(low, negated.args[0], joined)
    times_sin = only_user(joined, aten.mul.Tensor)
    end = only_user(times_sin, aten.add.Tensor)
    if x is None or times_sin is None or end is None or end.kwargs:
        return None
    times_cos = _other(end, times_sin)
    if not called(times_cos, aten.mul.Tensor) or x not in times_cos.args:
        return None
    return end, x, _other(times_cos, x), _other(times_sin, joined)


def _of_kinds(joined: Node, first: Any, second: Any) -> tuple[Node, Node, Any, Any] | None:
    """(end, x, cos, sin) of a * cos - b * sin and b * cos + a * sin, brought together"""
    if not called(first, aten.sub.Tensor) or not called(second, aten.add.Tensor) or first.kwargs or second.kwargs:
        return None
    if not all(called(product, aten.mul.Tensor) for product in (*first.args, *second.args)):
        return None
    for products in (second.args, second.args[::-1]):
        for low, cos in (first.args[0].args, first.args[0].args[::-1]):
            high, sin = _other(products[0], cos), _other(products[1], low)
            if {*products[0].args} == {high, cos} and {*first.args[1].args} == {high, sin} and low in products[1].args:
                x = _kinds_of(low, high, joined)
                if x is not None:
                    return joined, x, cos, sin
    return None


def _other(call: Any, side: Any) -> Any:
    """The other one of a call's two arguments."""
    return next((arg for arg in call.args if arg is not side), None)


def _kinds_of(low: Any, high: Any, joined: Node) -> Node | None:
    """x [.., R], of which `low` holds the first elements of the pairs and `high` the second ones."""
    size = value(joined).shape[-1]
    parts = [_neighbour(kind) or part_of(kind) for kind in (low, high)]
    if not isinstance(size, int) or size % 2 or any(part is None for part in parts):
        return None
    x = parts[0].source  # type: ignore[union-attr]
    halves = [(0, size // 2, 1), (size // 2, size, 1)]
    wanted = halves if called(joined, aten.cat.default) else [(0, size, 2), (1, size, 2)]
    found = [(part.source, part.axis, part.start, part.stop, part.step) for part in parts if part is not None]
    right = found == [(x, 3, *bounds) for bounds in wanted]
    return x if right and is_tensor(x, rank=4) and same(value(x).shape[3], size) else None


def _neighbour(kind: Any) -> Part | None:
    """The first or second element of each pair of x [.., R], looked at as [.., R / 2, 2]"""
    unbound = isinstance(kind, Node) and kind.target is operator.getitem and called(kind.args[0], aten.unbind.int)
    if not unbound and not called(kind, aten.select.int):
        return None
    chosen: Any = kind.args[0] if unbound else kind
    pairs, axis, place = chosen.args[0], argument(chosen, 1, "dim", 0), kind.args[-1]
    if not called(pairs, *RESHAPES, aten.unflatten.int) or not is_tensor(pairs, rank=5) or axis not in (-1, 4):
        return None
    x: Any = pairs.args[0]
    split = same_shape(value(pairs).shape[:3], value(x).shape[:-1]) and same(value(pairs).shape[4], 2)
    return Part(x, 3, place, value(x).shape[-1], 2) if split and place in (0, 1) else None


def _uncast(end: Node, x: Node) -> tuple[Node, Node]:
    """Before the cast to fp32, and after the cast back, of models that turn in fp32; where the tables are fp32 (under
    autocast) there is but the cast back."""
    back = only_user(end, *_CASTS)
    for source in (x, x.args[0] if called(x, *_CASTS) else x):
        if back is not None and dtype_of(back) == dtype_of(source) != dtype_of(end):
            return back, source  # type: ignore[return-value]
    return end, x


def _whole_head(end: Node, x: Node, size: int) -> tuple[Node, Node]:
    """Where x is the first elements of heads, and the others are put behind `end`: that, and the heads."""
    first, behind = part_of(x), only_user(end, aten.cat.default)
    if first is None or (first.axis, first.start, first.stop, first.step) != (3, 0, size, 1) or behind is None:
        return end, x
    whole, parts = first.source, behind.args[0]
    if len(parts) != 2 or parts[0] is not end or argument(behind, 1, "dim", 0) not in (-1, 3):  # type: ignore[arg-type, index]
        return end, x
    return (behind, whole) if part_of(parts[1]) == Part(whole, 3, size, value(whole).shape[3], 1) else (end, x)  # type: ignore[index]


def _checked(end: Node, x: Node, cos: Any, sin: Any, rotary_dim: int, interleaved: bool) -> Turned | str:
    axis = next((axis for axis in (2, 1) if all(_is_table(t, x, axis) for t in (cos, sin))), None)
    if axis is None:
        shapes = [list(value(t).shape) if is_tensor(t) else t for t in (cos, sin)]
        wanted = f"expected one row for each position of q {list(value(x).shape)}"
        return f"cos and sin are {shapes[0]} and {shapes[1]}, {wanted}"
    if dtype_of(x) not in rotary_embedding.types["T"] or dtype_of(end) != dtype_of(x):
        return f"q is {dtype_of(x)} and turned it is {dtype_of(end)}"
    if dtype_of(cos) != dtype_of(sin) or dtype_of(cos) not in rotary_embedding.types["C"]:
        return f"cos is {dtype_of(cos)} and sin {dtype_of(sin)}, supported are {', '.join(rotary_embedding.types['C'])}"
    return Turned(end, x, cos, sin, rotary_dim, interleaved, axis)


def _is_table(table: Any, x: Node, axis: int) -> bool:
    """[1|B, 1, S, R] or [S, R], or [1|B, S, 1, R] where positions are axis 1"""
    if is_tensor(table, rank=2):
        return axis == 2 and same(value(table).shape[0], value(x).shape[2])
    if not is_tensor(table, rank=4):
        return False
    shape, batch = value(table).shape, value(x).shape[0]
    shared = same(shape[0], 1) or same(shape[0], batch)
    return shared and same(shape[3 - axis], 1) and same(shape[axis], value(x).shape[axis])


def rewrite_rotary(graph: Graph, node: Node, match: Pair) -> None:
    both = [match.q] if match.k is None else [match.q, match.k]
    with graph.inserting_before(max(turned.end for turned in both)):
        given = [_heads_first(graph, turned, turned.x) for turned in both]
        heads = [value(x).shape[1] for x in given]
        attrs: dict[str, Any] = {"interleaved": match.q.interleaved}
        if not same(value(match.q.x).shape[3], match.q.rotary_dim):
            attrs["rotary_dim"] = match.q.rotary_dim
        rows = all(map(in_rows, given))
        if rows:
            given = [call(graph, aten.flatten.using_ints, call(graph, aten.transpose.int, x, 1, 2), 2) for x in given]
            attrs |= {"num_heads": heads[0], "kv_num_heads": heads[-1]}
        tables = [_rows_of(graph, table, match.q.length_axis) for table in (match.q.cos, match.q.sin)]
        target = TORCH_OPS["rotary_embedding"].overload
        out = call(graph, target, given[0], *tables, *given[1:], return_k_out=len(both) > 1, **attrs)
        for index, turned in enumerate(both):
            made = item(graph, out, index)
            if rows:
                split = call(graph, aten.unflatten.int, made, 2, [heads[index], value(turned.x).shape[3]])
                made = call(graph, aten.transpose.int, split, 1, 2)
            replace_node(turned.end, _heads_first(graph, turned, made))
    for turned in both:
        erase(turned.end)


def _heads_first(graph: Graph, turned: Turned, x: Node) -> Node:
    """[B, H, S, D] of what is laid out as turned.x, and back"""
    return x if turned.length_axis == 2 else call(graph, aten.transpose.int, x, 1, 2)


def _rows_of(graph: Graph, table: Node, length_axis: int) -> Node:
    return table if is_tensor(table, rank=2) else call(graph, aten.squeeze.dim, table, 3 - length_axis)
