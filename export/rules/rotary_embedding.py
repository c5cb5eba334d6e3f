"""Rotary position embeddings of q and k in one op, as an operator or written out: pairs of halves or of neighbours, of
the whole head or of its first part.

    x * cos + rotated(x) * sin                                      cos and sin as wide as x: transformers concat(x1 *
    cos - x2 * sin, x2 * cos + x1 * sin)                half as wide: the original, com.microsoft's, opset 23
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx_ir as ir

from trimaran.export.algebra import Expansion, close, multiply, variable
from trimaran.export.algebra import add as plus
from trimaran.export.onnx_graph import (
    Inserter,
    alike,
    attribute,
    dims,
    dtype_of,
    is_same,
    made_by,
    only_user,
    operand,
    readable,
    replace_value,
    same,
    sides,
    source,
    standard,
    uncast,
    users,
)
from trimaran.export.report import Fault
from trimaran.export.rules.heads import PLAIN, ROWS, Operand, as_heads, as_rows, followed, put_back
from trimaran.export.schemas import DOMAIN
from trimaran.export.shapes import slice_arguments, typed
from trimaran.kernels.rotary_embedding import rotary_embedding

ROTARY_ANCHORS = ("Add", "Concat", "Reshape", "RotaryEmbedding")


@dataclass(frozen=True)
class Turned:
    """x, [B, H, S, D] or, where heads_axis is 2, [B, S, H, D], turned by cos and sin; `end` is the result, in x's
    dtype. positions: rows of the tables, of which cos and sin are whole then."""

    end: ir.Value
    x: ir.Value
    cos: ir.Value
    sin: ir.Value
    interleaved: bool = False
    rotary_dim: int = 0
    heads_axis: int = 1
    positions: ir.Value | None = None
    num_heads: int = 0  # of an x that is rows [B, S, H*D]
    first: ir.Value | None = None  # [1], the position of the first row, instead of the positions of all


@dataclass(frozen=True)
class Pair:
    q: Turned
    k: Turned | None


def check_rotary(node: ir.Node) -> Pair | str | None:
    first = read_operator(node) if node.op_type == "RotaryEmbedding" else written_out(node)
    if not isinstance(first, Turned):
        return first
    others = {candidate for value in (first.cos, first.sin) for candidate in turned_by(value)}
    if node.op_type == "RotaryEmbedding" and node.graph is not None:
        others |= {other for other in node.graph if other.op_type == "RotaryEmbedding"}
    order = {other: place for place, other in enumerate(node.graph)} if others and node.graph is not None else {}
    for other in sorted((o for o in others if o in order), key=lambda o: order[o]):
        second = None
        if other is not node and used_after(node, other, order):
            second = read_operator(other) if other.op_type == "RotaryEmbedding" else written_out(other)
        if isinstance(second, Turned) and fits(first, second, order):
            pair = sorted((first, second), key=lambda turned: -heads_of(turned))
            return Pair(*pair)
    return Pair(first, None)


def turned_by(table: ir.Value) -> set[ir.Node]:
    """The nodes that may end an embedding by this table."""
    near = {n for n in users(table) if standard(n, "Mul") or n.op_type == "RotaryEmbedding"}
    for _ in range(3):
        near |= {
            n
            for node in near
            for n in users(node.outputs[0])
            if standard(n, "Add", "Sub", "Concat", "Unsqueeze", "Reshape")
        }
    return {node for node in near if node.op_type in ROTARY_ANCHORS}


def used_after(node: ir.Node, other: ir.Node, order: dict[ir.Node, int]) -> bool:
    return node in order and order[other] > order[node]


def fits(one: Turned, other: Turned, order: dict[ir.Node, int]) -> bool:
    """The two can be turned at once, where the later one is: nobody needs the earlier one before."""
    if not all(alike(getattr(one, name), getattr(other, name)) for name in ("cos", "sin", "positions", "first")):
        return False
    styles = all(getattr(one, name) == getattr(other, name) for name in ("interleaved", "rotary_dim", "heads_axis"))
    a, b = (dims(turned.x) or () for turned in (one, other))
    if not styles or one.x.dtype != other.x.dtype or bool(one.num_heads) != bool(other.num_heads) or len(a) != len(b):
        return False
    same_rest = all(
        same(m, n) for i, (m, n) in enumerate(zip(a, b, strict=True)) if i != (2 if one.num_heads else one.heads_axis)
    )
    return same_rest and not one.end.is_graph_output() and not depends(other.x, one, order)


def depends(value: ir.Value, on: Turned, order: dict[ir.Node, int]) -> bool:
    """Whether a value is computed from what another embedding gives."""
    start = on.end.producer()
    seen: set[ir.Node] = set()
    todo = [value.producer()]
    while todo:
        node = todo.pop()
        if node is start:
            return True
        if node is None or node in seen or (start is not None and order.get(node, -1) < order.get(start, -1)):
            continue
        seen.add(node)
        todo += [part.producer() for part in node.inputs if part is not None]
    return False


def heads_of(turned: Turned) -> int:
    size = turned.num_heads or (dims(turned.x) or (0,) * 4)[turned.heads_axis]
    return size if isinstance(size, int) else 0


# ---- reading


def part(value: ir.Value | None) -> tuple[ir.Value, int, int] | None:
    """(x, start, step) where the value is x[.., start::step] of the last dimension, as far as it goes."""
    value = source(value)
    node = value.producer() if value is not None else None
    if value is None or node is None or not node.inputs or node.inputs[0] is None:
        return None
    rank = len(dims(value) or ())
    whole = source(node.inputs[0])
    if standard(node, "Split") and attribute(node, "axis", 0) in (-1, rank - 1):
        widths = [(dims(out) or (None,))[-1] for out in node.outputs[: list(node.outputs).index(value)]]
        return (whole, sum(widths), 1) if all(isinstance(n, int) for n in widths) and whole is not None else None
    bounds = slice_arguments(node) if standard(node, "Slice") else None
    if not bounds or [*bounds] != [rank - 1] or whole is None:
        return None
    start, _, step = bounds[rank - 1]
    size = (dims(whole) or (None,))[-1]
    if isinstance(start, int) and start < 0 and isinstance(size, int):
        start += size
    return (whole, start, step) if isinstance(start, int) and isinstance(step, int) else None


def joined(value: ir.Value | None) -> tuple[ir.Value, ir.Value, bool] | None:
    """(first, second, interleaved) where the value is both side by side, or their elements in turn."""
    node = made_by(value, "Concat")
    rank = len(dims(value) or ())
    if node is not None and len(node.inputs) == 2 and attribute(node, "axis", 0) in (-1, rank - 1):
        return node.inputs[0], node.inputs[1], False  # type: ignore[return-value]
    merge = made_by(value, "Reshape")
    node = made_by(merge.inputs[0], "Concat") if merge is not None else None
    if node is None or len(node.inputs) != 2 or attribute(node, "axis", 0) not in (-1, rank):
        return None
    inner = [made_by(side, "Unsqueeze", "Reshape") for side in node.inputs]
    shapes = [dims(n.inputs[0]) if n is not None else None for n in inner]
    whole = dims(value) or ()
    for n, shape in zip(inner, shapes, strict=True):
        if (
            n is None
            or shape is None
            or len(shape) != rank
            or dims(n.outputs[0]) != (*shape, 1)
            or shape[:-1] != whole[:-1]
        ):
            return None
    return inner[0].inputs[0], inner[1].inputs[0], True  # type: ignore[union-attr, return-value]


def written_out(node: ir.Node) -> Turned | str | None:
    found = from_sum(node) if node.op_type == "Add" else from_parts(node)
    if found is None:
        return None
    x, cos, sin, interleaved, width = found
    end = node.outputs[0]
    plain = uncast(x)
    after = only_user(end, "Cast")
    if plain is not x and after is not None and after.outputs[0].dtype == plain.dtype:
        x, end = plain, after.outputs[0]
    turned = partial_of(Turned(end, x, cos, sin, interleaved), width)
    return with_layout(turned)


def from_sum(node: ir.Node) -> tuple[ir.Value, ir.Value, ir.Value, bool, int] | None:
    """x * cos + rotated(x) * sin"""
    for one, other in sides(node):
        for crossed, sin in sides(made_by(other, "Mul")):
            halves = joined(uncast(crossed))
            minus = made_by(halves[0], "Neg") if halves is not None else None
            if halves is None or minus is None:
                continue
            x = pair_of(halves[1], minus.inputs[0], halves[2])
            if x is None:
                continue
            for turned, cos in sides(made_by(one, "Mul")):
                width = (dims(x) or (None,))[-1]
                if is_same(uncast(turned), uncast(x)) and isinstance(width, int):
                    return source(turned) or x, cos, sin, halves[2], width
    return None


def pair_of(first: ir.Value | None, second: ir.Value | None, interleaved: bool) -> ir.Value | None:
    """x of which these are the two halves, or its even and odd elements."""
    a, b = part(uncast(first)) if first is not None else None, part(uncast(second)) if second is not None else None
    if a is None or b is None or a[0] is not b[0]:
        return None
    width, half, other = ((dims(value) or (None,))[-1] for value in (a[0], first, second))
    if not isinstance(width, int) or not isinstance(half, int) or width != 2 * half or other != half:
        return None
    expected = ((0, 2), (1, 2)) if interleaved else ((0, 1), (half, 1))
    return a[0] if (a[1:], b[1:]) == expected else None


def from_parts(node: ir.Node) -> tuple[ir.Value, ir.Value, ir.Value, bool, int] | None:
    """concat(x1 * cos - x2 * sin, x2 * cos + x1 * sin)"""
    halves = joined(node.outputs[0])
    if halves is None or made_by(halves[0], "Sub", "Add") is None or made_by(halves[1], "Add", "Sub") is None:
        return None
    first = made_by(halves[0], "Sub", "Add")
    products = [made_by(side, "Mul") for side in first.inputs]  # type: ignore[union-attr]
    if None in products:
        return None
    for x1, cos in sides(products[0]):
        for x2, sin in sides(products[1]):
            x = pair_of(x1, x2, halves[2])
            if x is None:
                continue
            values = tuple(source(uncast(v)) for v in (x1, x2, cos, sin))
            expansion = Expansion(others=values)  # type: ignore[arg-type]
            a, b, c, s = (expansion.of(v) or {} for v in values)
            if all(len(p) == 1 for p in (a, b, c, s)) and matches(expansion, halves, values):
                return x, cos, sin, halves[2], (dims(x) or (0,))[-1]
    return None


def matches(expansion: Expansion, halves: Any, values: Any) -> bool:

    x1, x2, cos, sin = (variable(value) for value in values)
    first = plus(multiply(x1, cos), multiply(x2, sin), -1.0)
    second = plus(multiply(x2, cos), multiply(x1, sin))
    found = [expansion.of(half) or {} for half in halves[:2]]
    return close(found[0], first) and close(found[1], second)


def partial_of(turned: Turned, width: int) -> Turned:
    """With the rest of the head, where only its first part is turned."""
    piece = part(turned.x)
    concat = only_user(turned.end, "Concat")
    if piece is None or piece[1:] != (0, 1) or concat is None or len(concat.inputs) != 2:
        return turned
    rest = part(concat.inputs[1])
    rank, full = len(dims(turned.x) or ()), (dims(piece[0]) or (None,))[-1]
    joins = is_same(concat.inputs[0], turned.end) and attribute(concat, "axis", 0) in (-1, rank - 1)
    if not joins or rest is None or rest[0] is not piece[0] or rest[1:] != (width, 1):
        return turned
    if not isinstance(full, int) or (dims(concat.inputs[1]) or (None,))[-1] != full - width:
        return turned
    return replace(turned, end=concat.outputs[0], x=piece[0], rotary_dim=width)


def with_layout(turned: Turned) -> Turned | str | None:
    shape = dims(turned.x)
    if shape is None or len(shape) != 4 or dtype_of(turned.x) not in rotary_embedding.types["T"]:
        return None
    if turned.end.dtype != turned.x.dtype:
        return f"q is {dtype_of(turned.x)} and turned it is {dtype_of(turned.end)}"
    width = turned.rotary_dim or shape[3]
    for axis in (1, 2):
        if all(of_positions(table, shape, width, axis) for table in (turned.cos, turned.sin)):
            return replace(turned, heads_axis=axis) if isinstance(shape[axis], int) else None
    sizes = [dims(table) for table in (turned.cos, turned.sin)]
    found = f"cos and sin have shapes {readable(sizes[0])} and {readable(sizes[1])}"
    return Fault.of(f"{found}, expected [1|B, 1, S, R] of q {readable(shape)}", turned.cos)


def of_positions(table: ir.Value, shape: tuple[Any, ...], width: Any, heads_axis: int) -> bool:
    """Whether a table has a row for each position of x, whose heads lie on that axis."""
    sizes = dims(table) or ()
    full = (1,) * (4 - len(sizes)) + tuple(sizes)
    fits = len(sizes) in (2, 3, 4) and full[3] in (width, width // 2) and (full[0] == 1 or same(full[0], shape[0]))
    return fits and full[heads_axis] == 1 and same(full[3 - heads_axis], shape[3 - heads_axis])


def read_operator(node: ir.Node) -> Turned | str:
    """The standard operator, and onnxruntime's, which has positions first."""
    own = node.domain == "com.microsoft"
    x, cos, sin, positions = (operand(node, index) for index in ((0, 2, 3, 1) if own else (0, 1, 2, 3)))
    if x is None or cos is None or sin is None:
        return "cos or sin is absent"
    shape, heads = dims(x) or (), attribute(node, "num_heads", 0)
    if dtype_of(x) not in rotary_embedding.types["T"] or dtype_of(cos) not in rotary_embedding.types["C"]:
        return f"q is {dtype_of(x)} and cos {dtype_of(cos)}"
    if attribute(node, "scale", 1.0) != 1.0 or attribute(node, "is_packed_batching", 0):
        return "it scales, or its rows are packed"
    batch, length = (shape[0], shape[1 if len(shape) == 3 else 2]) if len(shape) in (3, 4) else (None, None)
    rank = len(dims(cos) or ())
    first = positions if own and dims(positions) == (1,) and dtype_of(positions) == "int64" and rank == 2 else None
    positions = None if first is not None else positions
    if positions is not None and (len(dims(positions) or ()) != 2 or rank != 2 or dtype_of(positions) != "int64"):
        return Fault.of(
            f"its positions are {dtype_of(positions)}{readable(dims(positions))}, expected int64 [B, S]", positions
        )
    rows = (1, length) if first is not None else dims(positions if positions is not None else cos)
    rows = rows if first is not None or positions is not None else (rows or ())[:-1]
    if (
        batch is None
        or rows is None
        or len(rows) != 2
        or not same(rows[1], length)
        or not (rows[0] == 1 or same(rows[0], batch))
    ):
        return f"q has shape {readable(shape)}, and its positions {readable(rows)}"
    width = 2 * (dims(cos) or (0,))[-1]
    if len(shape) == 3 and not heads:
        return "the number of heads is not known"
    head = shape[3] if len(shape) == 4 else shape[2] // heads if isinstance(shape[2], int) else None
    if head is None or not isinstance(head, int) or not isinstance(width, int) or width > head:
        return f"q has shape {readable(shape)} and cos {readable(dims(cos))}"
    found = Turned(node.outputs[0], x, cos, sin, bool(attribute(node, "interleaved", 0)), 0 if width == head else width)
    return replace(found, positions=positions, first=first, num_heads=heads if len(shape) == 3 else 0)


# ---- rewriting


def rewrite_rotary(node: ir.Node, match: Pair) -> None:
    both = [match.q] if match.k is None else [match.q, match.k]
    late = node if match.k is None else later(node, [turned.end.producer() for turned in both])
    add = Inserter(late)
    tables = [table(add, value, match.q) for value in (match.q.cos, match.q.sin)]
    given, orders = zip(*(laid_out(turned) for turned in both), strict=True)
    in_rows = all(order == ROWS for order in orders)
    attrs: dict[str, Any] = {}
    if match.q.interleaved:
        attrs["interleaved"] = 1
    if match.q.rotary_dim:
        attrs["rotary_dim"] = match.q.rotary_dim
    if in_rows:
        attrs |= {"num_heads": heads_of(both[0]), "kv_num_heads": heads_of(both[-1])}
    if match.q.num_heads:
        inputs = [turned.x for turned in both]
    else:
        inputs = [as_rows(add, x) if in_rows else as_heads(add, x) for x in given]
    positions = match.q.positions if match.q.first is None else counted(add, match.q)
    operands = [inputs[0], *tables, inputs[1] if len(both) > 1 else None, positions]
    new = add.node(
        rotary_embedding.name, operands, attrs, domain=DOMAIN, num_outputs=len(both), version=rotary_embedding.version,
        name=node.name,
    )  # fmt: skip
    for turned, x, made in zip(both, given, new.outputs, strict=True):
        typed(made, turned.x.dtype)
        put_in_place(add, turned, x, made, in_rows)


def counted(add: Inserter, turned: Turned) -> ir.Value:
    """[1, S], the positions from the first on"""
    axis = 1 if turned.num_heads else 2
    length = (dims(turned.x) or (None,) * 3)[axis]
    kind = ir.DataType.INT64
    sizes = add("Shape", turned.x, dtype=kind, shape=[len(dims(turned.x) or ())])
    size = add("Gather", sizes, add.constant(np.array(axis, np.int64)), axis=0, dtype=kind, shape=[])
    zero, one = (add.constant(np.array(n, np.int64)) for n in (0, 1))
    steps = add("Range", zero, size, one, dtype=kind, shape=[length])
    return add.reshape(add("Add", steps, turned.first, dtype=kind, shape=[length]), [1, -1], [1, length])


def later(node: ir.Node, ends: list[Any]) -> ir.Node:
    """Of two nodes the one that comes later in the graph."""
    wanted = {*ends}
    return [n for n in node.graph or () if n in wanted][-1]


def laid_out(turned: Turned) -> tuple[Operand, tuple[int, ...]]:
    """x as [B, H, S, D], and how it lies."""
    if turned.num_heads:
        return Operand(turned.x), ROWS
    found, factor = followed(turned.x, PLAIN if turned.heads_axis == 1 else ROWS)
    if found is None or factor != 1.0 or found.order not in (PLAIN, ROWS):
        found = Operand(turned.x, PLAIN if turned.heads_axis == 1 else ROWS)
    return found, found.order


def put_in_place(add: Inserter, turned: Turned, x: Operand, made: ir.Value, in_rows: bool) -> None:
    if turned.num_heads:
        replace_value(turned.end, made)
        return
    order = PLAIN if turned.heads_axis == 1 else ROWS
    if in_rows:
        for old, new in put_back(add, made, turned.end, order, x.shape or ()):
            replace_value(old, new)
        return
    made.meta["dims"] = x.shape
    replace_value(turned.end, made if order == PLAIN else add.transpose(made, order))


def table(add: Inserter, value: ir.Value, turned: Turned) -> ir.Value:
    """cos or sin as [1|B, S, R] or [S, R]"""
    shape = dims(value) or ()
    if turned.positions is not None or turned.first is not None or turned.num_heads or len(shape) == 2:
        return value
    if len(shape) == 3 and turned.heads_axis == 1 and standard_rows(turned, shape):
        return value
    full = (1,) * (4 - len(shape)) + tuple(shape)
    batch, length = full[0], full[2 if turned.heads_axis == 1 else 1]
    wide = made_by(value, "Unsqueeze")
    if wide is not None and dims(wide.inputs[0]) == (batch, length, full[3]) and len(shape) == 4:
        return wide.inputs[0]  # type: ignore[return-value]
    return add.reshape(value, [0 if len(shape) == 4 else 1, -1, full[3]], [batch, length, full[3]])


def standard_rows(turned: Turned, shape: tuple[Any, ...]) -> bool:
    """The operator's tables have a batch of their own, [B, S, R]; those of a written out one broadcast from the
    right."""
    node = turned.end.producer()
    return node is not None and node.op_type == "RotaryEmbedding"
