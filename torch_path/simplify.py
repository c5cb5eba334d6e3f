"""A smaller dialect for rules to read: what does nothing is removed, one thing is spelt one way, equal things are one.

Graphs that Dynamo captures are not functional. An in-place operation on a whole value becomes the plain one where no
view of the value is used after it; others stay, and nothing that touches the memory they write is moved or merged.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Graph, Node

from trimaran.torch_path.einsum import as_product
from trimaran.torch_path.graph import (
    RESHAPES,
    argument,
    aten,
    axes_of,
    base,
    call,
    called,
    is_tensor,
    note_writes,
    replace,
    same,
    same_shape,
    settled,
    value,
    written,
)

_MOVES = (aten.transpose.int, aten.expand.default, aten.unsqueeze.default, aten.reshape.default)
_ORDERS = (torch.contiguous_format, torch.channels_last, torch.channels_last_3d)
_SPLITS = (*RESHAPES, aten.unflatten.int, aten.flatten.using_ints)


def simplify(graph: Graph) -> None:
    """Simplify until nothing changes. Operators keep their order."""
    changed = True
    while changed:
        changed = False
        note_writes(graph)
        for node in list(graph.nodes):
            plain = _equivalent(node) or _respelt(graph, node)
            if plain is not None:
                replace(node, plain)
                graph.erase_node(node)
                changed = True
        changed |= _share(graph)
        changed |= _erase_dead(graph)


def _erase_dead(graph: Graph) -> bool:
    before = len(graph.nodes)
    graph.eliminate_dead_code()
    return len(graph.nodes) < before


def _share(graph: Graph) -> bool:
    """Compute once what is computed twice: a mask or position bias that every layer builds for itself."""
    memory = {base(tensor) for node in graph.nodes for tensor in written(node)}
    known: dict[Any, Node] = {}
    before = len(graph.nodes)
    for node in list(graph.nodes):
        if not _pure(node) or any(base(n) in memory for n in (node, *node.all_input_nodes)):
            continue
        key = (node.target, _frozen(node.args), _frozen(node.kwargs))
        if key not in known:
            known[key] = node
        else:
            node.replace_all_uses_with(known[key])
            graph.erase_node(node)
    return len(graph.nodes) < before


def _pure(node: Node) -> bool:
    target = node.target
    if node.op == "get_attr":
        return is_tensor(node)
    if node.op != "call_function" or not isinstance(target, torch._ops.OpOverload) or not is_tensor(node):
        return False
    return not target._schema.is_mutable and torch.Tag.nondeterministic_seeded not in target.tags


def _frozen(args: Any) -> Any:
    """Arguments as a dictionary key; numbers of different types are different, and so are symbolic ones."""
    if isinstance(args, (tuple, list)):
        return tuple(map(_frozen, args))
    if isinstance(args, dict):
        return tuple((key, _frozen(value)) for key, value in args.items())
    return (type(args), args if isinstance(args, (Node, int, float, str)) else str(args))


def _respelt(graph: Graph, node: Node) -> Node | None:
    """A new node, before this one, that says the same in the one way that rules know."""
    with graph.inserting_before(node):
        if called(node, aten.einsum.default):
            return as_product(graph, node)
        return _transpose(graph, node) or _functional(graph, node) or _cast_below(graph, node)


def _transpose(graph: Graph, node: Node) -> Node | None:
    """A permute that exchanges two axes, and torch's other names for it, as transpose.int of axes counted from the
    front"""
    if called(node, aten.swapaxes.default, aten.swapdims.default, aten.mT.default):
        axes = node.args[1:] or (-1, -2)
    elif called(node, aten.t.default, aten.numpy_T.default) and is_tensor(node, rank=2):
        axes = (0, 1)
    elif called(node, aten.transpose.int) and list(node.args[1:]) != sorted(axes_of(node)):
        axes = tuple(sorted(axes_of(node)))
    elif called(node, aten.permute.default):
        given: Any = node.args[1]
        order = [axis % len(given) for axis in given]
        axes = tuple(axis for axis, source in enumerate(order) if axis != source)
        if len(axes) != 2:
            return None
    else:
        return None
    return call(graph, aten.transpose.int, node.args[0], *axes)


def _cast_below(graph: Graph, node: Node) -> Node | None:
    """The view of a cast instead of the cast of a view, as autocast writes it."""
    view = node.args[0] if node.args else None
    if not called(node, aten.to.dtype) or len(node.args) != 2 or node.kwargs or _mutated(node):
        return None
    if not called(view, *_MOVES) or len(view.users) != 1:  # type: ignore[union-attr]
        return None
    target: Any = view.target  # type: ignore[union-attr]
    cast = call(graph, aten.to.dtype, view.args[0], node.args[1])  # type: ignore[union-attr]
    return call(graph, target, cast, *view.args[1:], **view.kwargs)  # type: ignore[union-attr]


def _functional(graph: Graph, node: Node) -> Node | None:
    """`x += y` on a fresh x is `x + y`, and x is that from there on."""
    into = written(node)
    if len(into) != 1 or into[0] is not node.args[0] or not node.target._schema.name.endswith("_"):  # type: ignore[union-attr]
        return None
    x = into[0]
    if x.op != "call_function" or base(x) is not x or _seen_through(x, node):
        return None
    target: Any = node.target
    packet = getattr(aten, target._schema.name.removeprefix("aten::")[:-1], None)
    if packet is None or target._overloadname not in packet.overloads():
        return None
    plain = call(graph, getattr(packet, target._overloadname), *node.args, **node.kwargs)
    if value(plain).dtype == value(node).dtype and same_shape(value(plain).shape, value(node).shape):
        x.replace_all_uses_with(plain, delete_user_cb=lambda user: user > node)
        return plain
    graph.erase_node(plain)
    return None


def _seen_through(x: Node, write: Node) -> bool:
    """Whether a view of x from before the write is used after it."""
    views = [n for n in x.graph.nodes if n is not x and n < write and base(n) is x]
    return any(user > write for view in views for user in view.users)


def _equivalent(node: Node) -> Node | None:
    """An earlier node with the same value, or None."""
    if not settled(node):  # it may be a copy of what is written into
        return None
    for rule in (_no_dropout, _alias, _nothing_done, _whole_slice, _joined_with_nothing, _same_cast, _double_transpose,
                 _undone_reshape, _contiguous_already):  # fmt: skip
        found = rule(node)
        if found is not None and is_tensor(found):
            return found
    return None


def _no_dropout(node: Node) -> Node | None:
    if called(node, aten.dropout.default) and (node.args[2] is False or node.args[1] == 0.0):
        return node.args[0]  # type: ignore[return-value]
    return None


def _alias(node: Node) -> Node | None:
    if called(node, aten.alias.default, aten.detach.default):
        return node.args[0]  # type: ignore[return-value]
    return None


def _nothing_done(node: Node) -> Node | None:
    """x * 1, x / 1, x + 0, x - 0"""
    if called(node, aten.mul.Tensor, aten.div.Tensor):
        neutral = 1
    elif called(node, aten.add.Tensor, aten.sub.Tensor):
        neutral = 0
    else:
        return None
    x, other = node.args
    if not isinstance(other, (int, float)) or other != neutral or not is_tensor(x) or not _settled(x):  # type: ignore[arg-type]
        return None
    return x if value(x).dtype == value(node).dtype and not _mutated(node) else None  # type: ignore[return-value]


def _settled(x: Node) -> bool:
    """Computed here, and never written into: a copy of it is as good as itself."""
    memory = base(x)
    return memory.op == "call_function" and not any(base(t) is memory for n in x.graph.nodes for t in written(n))


def _whole_slice(node: Node) -> Node | None:
    if not called(node, aten.slice.Tensor):
        return None
    start, end, step = (argument(node, i, n, d) for i, n, d in ((2, "start", None), (3, "end", None), (4, "step", 1)))
    size = value(node.args[0]).shape[argument(node, 1, "dim", 0)]
    over = end is None or end == 2**63 - 1 or (isinstance(end, int) and isinstance(size, int) and end >= size)
    return node.args[0] if over and start in (None, 0) and step == 1 else None  # type: ignore[return-value]


def _joined_with_nothing(node: Node) -> Node | None:
    """cat([x, y]) where y is empty"""
    if not called(node, aten.cat.default):
        return None
    parts: Any = node.args[0]
    full = [part for part in parts if not any(same(size, 0) for size in value(part).shape)]
    if len(full) != 1 or not _settled(full[0]) or value(full[0]).dtype != value(node).dtype or _mutated(node):
        return None
    return full[0] if same_shape(value(full[0]).shape, value(node).shape) else None


def _same_cast(node: Node) -> Node | None:
    casts = (aten.to.dtype, aten.to.device, aten.to.dtype_layout, aten._to_copy.default, aten.type_as.default)
    if not called(node, *casts) or not is_tensor(node) or not is_tensor(node.args[0]):
        return None
    before, after = value(node.args[0]), value(node)
    layout = not any(
        arg in _ORDERS for arg in (*node.args, *node.kwargs.values()) if isinstance(arg, torch.memory_format)
    )
    alike = (before.dtype, before.device, before.layout) == (after.dtype, after.device, after.layout)
    return node.args[0] if alike and layout and not _mutated(node) else None  # type: ignore[return-value]


def _double_transpose(node: Node) -> Node | None:
    if called(node, aten.transpose.int) and called(node.args[0], aten.transpose.int):
        inner: Node = node.args[0]  # type: ignore[assignment]
        return inner.args[0] if axes_of(node) == axes_of(inner) else None  # type: ignore[return-value]
    return None


def _undone_reshape(node: Node) -> Node | None:
    """A reshape to the shape that its input, or the input of the reshape before it, already has."""
    if not called(node, *_SPLITS):
        return None
    inner = node.args[0]
    for source in (inner, inner.args[0] if called(inner, *_SPLITS) else None):  # type: ignore[union-attr]
        if source is not None and is_tensor(source) and same_shape(value(source).shape, value(node).shape):
            return source  # type: ignore[return-value]
    return None


def _contiguous_already(node: Node) -> Node | None:
    if called(node, aten.contiguous.default) and len(node.args) == 1 and not node.kwargs and fresh(node.args[0]):
        return node.args[0]  # type: ignore[return-value]
    return None


def fresh(node: Any) -> bool:
    """Made by one of our own ops, whose outputs are always contiguous."""
    return isinstance(node, Node) and getattr(node.target, "namespace", "") == "trimaran"


def _mutated(node: Node) -> bool:
    """A cast that is a copy is kept where somebody writes into it."""
    return any(node in written(user) for user in node.users)
