"""Rotary position embeddings in the style of Llama: x * cos + cat(-x[D/2:], x[:D/2]) * sin, of q and k in one op."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch.fx import Graph, Node

from trimaran.kernels.rotary_embedding import rotary_embedding
from trimaran.torch_path.graph import argument, aten, call, called, dtype_of, is_tensor, replace, same, value
from trimaran.torch_path.ops import TORCH_OPS
from trimaran.torch_path.rules.attention import in_rows
from trimaran.torch_path.rules.residual import item

ROTARY_ANCHORS = (aten.cat.default,)
_CASTS = (aten.to.dtype, aten.type_as.default)


@dataclass(frozen=True)
class Turned:
    """x [B, H, S, D] turned by cos and sin [1|B, 1, S, D]; `end` is the result, in x's dtype."""

    end: Node
    x: Node
    cos: Node
    sin: Node


@dataclass(frozen=True)
class Pair:
    q: Turned
    k: Turned | None


def check_rotary(node: Node) -> Pair | str | None:
    first = turned(node)
    if not isinstance(first, Turned):
        return first
    for cat in node.graph.nodes:
        second = turned(cat) if called(cat, *ROTARY_ANCHORS) and cat is not node else None
        if isinstance(second, Turned) and _fits(first, second):
            return Pair(*sorted((first, second), key=lambda turned: -value(turned.x).shape[1]))
    return Pair(first, None)


def _fits(one: Turned, other: Turned) -> bool:
    """The two can be turned at once, where the later one is: nobody needs the earlier one before."""
    if one.cos is not other.cos or one.sin is not other.sin:
        return False
    early, late = sorted((one.end, other.end))
    alike = dtype_of(one.x) == dtype_of(other.x) and same(value(one.x).shape[2], value(other.x).shape[2])
    heads = all(isinstance(value(turned.x).shape[1], int) for turned in (one, other))
    return alike and heads and all(late < user for user in early.users)


def turned(cat: Node) -> Turned | str | None:
    """Read from the concatenation that exchanges the halves; None where it is another one."""
    halves: Any = cat.args[0]
    if len(halves) != 2 or not called(halves[0], aten.neg.default) or argument(cat, 1, "dim", 0) not in (-1, 3):
        return None
    high, low = halves[0].args[0], halves[1]
    if not all(called(half, aten.slice.Tensor) for half in (high, low)) or high.args[0] is not low.args[0]:
        return None
    wide = low.args[0]
    if not is_tensor(wide, rank=4) or not _split_in_half(low, high, value(wide).shape[3]):
        return None
    times_sin = _only(cat, aten.mul.Tensor)
    total = _only(times_sin, aten.add.Tensor)
    if times_sin is None or total is None:
        return None
    times_cos = next((side for side in total.args if side is not times_sin), None)
    if not called(times_cos, aten.mul.Tensor) or wide not in times_cos.args:  # type: ignore[union-attr]
        return None
    cos, sin = (next(s for s in m.args if s is not x) for m, x in ((times_cos, wide), (times_sin, cat)))  # type: ignore[union-attr]
    return _with_casts(total, wide, cos, sin)


def _split_in_half(low: Node, high: Node, length: Any) -> bool:
    def bounds(node: Node) -> tuple[Any, Any]:
        end = argument(node, 3, "end")
        return argument(node, 2, "start") or 0, length if end is None or end >= length else end

    axes = {argument(node, 1, "dim", 0) % 4 for node in (low, high)}
    whole = isinstance(length, int) and axes == {3} and length % 2 == 0
    return whole and bounds(low) == (0, length // 2) and bounds(high) == (length // 2, length)


def _with_casts(total: Node, wide: Node, cos: Any, sin: Any) -> Turned | str | None:
    """With the casts to fp32 and back of models that turn in fp32."""
    x, end = wide, total
    if called(wide, *_CASTS):
        after = _only(total, *_CASTS)
        if after is not None and dtype_of(after) == dtype_of(wide.args[0]):
            x, end = wide.args[0], after  # type: ignore[assignment]
    length, head_dim = value(x).shape[2:]
    for name, table in (("cos", cos), ("sin", sin)):
        if not is_tensor(table, rank=4) or not same(value(table).shape[1], 1):
            return f"{name} is no table [1|B, 1, S, D]"
        if not same(value(table).shape[2], length) or not same(value(table).shape[3], head_dim):
            return f"{name} has the shape {list(value(table).shape)}, expected [1|B, 1, S, D] of q's"
    if dtype_of(x) not in rotary_embedding.types["T"] or dtype_of(end) != dtype_of(x):
        return f"q is {dtype_of(x)} and turned it is {dtype_of(end)}"
    return Turned(end, x, cos, sin)


def _only(node: Node | None, *targets: Any) -> Node | None:
    user = next(iter(node.users)) if node is not None and len(node.users) == 1 else None
    return user if called(user, *targets) else None


def rewrite_rotary(graph: Graph, node: Node, match: Pair) -> None:
    both = [match.q] if match.k is None else [match.q, match.k]
    with graph.inserting_before(max(turned.end for turned in both)):
        tables = [call(graph, aten.squeeze.dim, table, 1) for table in (match.q.cos, match.q.sin)]
        rows = all(in_rows(turned.x) for turned in both)
        given = [_rows(graph, turned.x) if rows else turned.x for turned in both]
        heads = [value(turned.x).shape[1] for turned in both]
        attrs = {"num_heads": heads[0], "kv_num_heads": heads[-1]} if rows else {}
        target = TORCH_OPS["rotary_embedding"].overload
        out = call(graph, target, given[0], *tables, *given[1:], return_k_out=len(both) > 1, **attrs)
        for index, turned in enumerate(both):
            made = item(graph, out, index)
            if rows:
                split = call(graph, aten.unflatten.int, made, 2, [heads[index], value(turned.x).shape[3]])
                made = call(graph, aten.transpose.int, split, 1, 2)
            replace(turned.end, made)
    for turned in both:
        graph.erase_node(turned.end)


def _rows(graph: Graph, x: Node) -> Node:
    return call(graph, aten.flatten.using_ints, call(graph, aten.transpose.int, x, 1, 2), 2)
