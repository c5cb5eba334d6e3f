"""Reading and editing pre-dispatch ATen graphs: what rules are written with.

Every node that a rule sees carries `meta["val"]`, a fake tensor (or SymInt) with its dtype, device and, possibly
symbolic, shape. Nodes made through `call` get theirs by running the operator on the fake tensors of its arguments.
"""

from __future__ import annotations

from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import Graph, Node
from torch.fx.node import map_arg

aten = torch.ops.aten
RESHAPES = (aten.view.default, aten.reshape.default, aten._unsafe_view.default)


def value(node: Any) -> Any:
    """The fake value of a node, or a constant itself."""
    return node.meta.get("val") if isinstance(node, Node) else node


def is_tensor(node: Any, *, rank: int | None = None) -> bool:
    """A node whose value is a tensor (of that rank)."""
    fake = value(node) if isinstance(node, Node) else None
    return isinstance(fake, torch.Tensor) and rank in (None, fake.dim())


def dtype_of(node: Any) -> str:
    return str(value(node).dtype).removeprefix("torch.")


def same(a: Any, b: Any) -> bool:
    """Provably equal sizes: equal ints, or the same symbolic expression. Asks nothing of the shape environment, so it
    adds no guard."""
    if isinstance(a, torch.SymInt) or isinstance(b, torch.SymInt):
        return isinstance(a, torch.SymInt) and isinstance(b, torch.SymInt) and a.node.expr == b.node.expr
    return bool(a == b)


def same_shape(a: Any, b: Any) -> bool:
    return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))


def argument(node: Node, position: int, name: str, default: Any = None) -> Any:
    """An argument of a call, given by position or by name."""
    return node.args[position] if position < len(node.args) else node.kwargs.get(name, default)


def axes_of(transpose: Node) -> set[int]:
    """The two axes that an `aten.transpose.int` exchanges, counted from the front."""
    axes: Any = transpose.args[1:]
    return {axis % value(transpose).dim() for axis in axes}


def called(node: Any, *targets: Any) -> bool:
    return isinstance(node, Node) and node.op == "call_function" and node.target in targets


def call(graph: Graph, target: Any, *args: Any, **kwargs: Any) -> Node:
    """Insert a call at the graph's insertion point, with its fake value."""
    node = graph.call_function(target, args, kwargs)
    fakes = map_arg((args, kwargs), lambda n: n.meta["val"])
    tensors = [leaf for leaf in torch.utils._pytree.tree_leaves(fakes) if isinstance(leaf, FakeTensor)]
    with tensors[0].fake_mode:
        node.meta["val"] = target(*fakes[0], **fakes[1])
    return node


def replace(old: Node, new: Node) -> None:
    """Let every user of `old` use `new`, which takes over where it came from in the user's source."""
    for key in ("stack_trace", "nn_module_stack"):
        if key in old.meta:
            new.meta.setdefault(key, old.meta[key])
    old.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)


def mutation_between(first: Node, last: Node) -> Node | None:
    """The first in-place operation strictly between two nodes of one graph: captured graphs are not functional, so a
    fusion may not carry a read across one."""
    node = first.next
    while node is not last and node.op != "root":
        if isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable:
            return node
        node = node.next
    return None


def source_line(node: Node) -> str:
    """Where in the user's Python the node came from: `file:line, code`, or the module path, or nothing."""
    lines = [line.strip() for line in (node.meta.get("stack_trace") or "").strip().splitlines()]
    places = [i for i, line in enumerate(lines) if line.startswith("File ")]
    if places:
        code = lines[places[-1] + 1] if places[-1] + 1 < len(lines) else ""
        file, line, *_ = lines[places[-1]].removeprefix("File ").split(",")
        return f"{file.strip(chr(34))}:{line.strip().removeprefix('line ')}, {code}"
    modules = list((node.meta.get("nn_module_stack") or {}).values())
    return str(modules[-1][0]) if modules else ""


def simplify(graph: Graph) -> None:
    """Remove what does nothing at inference or undoes itself, until nothing changes. Operators keep their order."""
    changed = True
    while changed:
        changed = False
        for node in list(graph.nodes):
            plain = _equivalent(node)
            if plain is not None:
                replace(node, plain)
                graph.erase_node(node)
                changed = True
        changed |= _erase_dead(graph)


def _erase_dead(graph: Graph) -> bool:
    before = len(graph.nodes)
    graph.eliminate_dead_code()
    return len(graph.nodes) < before


def _equivalent(node: Node) -> Node | None:
    """An earlier node with the same value, or None."""
    for rule in (_no_dropout, _whole_slice, _same_cast, _double_transpose, _undone_reshape, _contiguous_already):
        found = rule(node)
        if found is not None and is_tensor(found):
            return found
    return None


def _no_dropout(node: Node) -> Node | None:
    if called(node, aten.dropout.default) and (node.args[2] is False or node.args[1] == 0.0):
        return node.args[0]  # type: ignore[return-value]
    return None


def _whole_slice(node: Node) -> Node | None:
    if not called(node, aten.slice.Tensor):
        return None
    start, end, step = (argument(node, i, n, d) for i, n, d in ((2, "start", None), (3, "end", None), (4, "step", 1)))
    whole = start in (None, 0) and end in (None, 2**63 - 1) and step == 1
    return node.args[0] if whole else None  # type: ignore[return-value]


def _same_cast(node: Node) -> Node | None:
    casts = (aten.to.dtype, aten.to.device, aten.to.dtype_layout, aten._to_copy.default)
    if not called(node, *casts) or not is_tensor(node) or not is_tensor(node.args[0]):
        return None
    before, after = value(node.args[0]), value(node)
    layout = node.kwargs.get("memory_format") in (None, torch.preserve_format)
    alike = (before.dtype, before.device, before.layout) == (after.dtype, after.device, after.layout)
    return node.args[0] if alike and layout and not _mutated(node) else None  # type: ignore[return-value]


def _double_transpose(node: Node) -> Node | None:
    if called(node, aten.transpose.int) and called(node.args[0], aten.transpose.int):
        inner: Node = node.args[0]  # type: ignore[assignment]
        return inner.args[0] if axes_of(node) == axes_of(inner) else None  # type: ignore[return-value]
    return None


def _undone_reshape(node: Node) -> Node | None:
    """A reshape to the shape that its input, or the input of the reshape before it, already has."""
    if not called(node, *RESHAPES):
        return None
    inner = node.args[0]
    splits = (*RESHAPES, aten.unflatten.int)
    for source in (inner, inner.args[0] if called(inner, *splits) else None):  # type: ignore[union-attr]
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
    return any(isinstance(u.target, torch._ops.OpOverload) and u.target._schema.is_mutable for u in node.users)
