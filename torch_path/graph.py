"""Reading and editing pre-dispatch ATen graphs: what rules are written with.

Every node that a rule sees carries `meta["val"]`, a fake tensor (or SymInt) with its dtype, device and, possibly
symbolic, shape. Nodes made through `call` get theirs by running the operator on the fake tensors of its arguments.

Captured graphs are not functional. What rules look at, they look at through `called`, which sees no call that reads or
gives memory that is written into later: all that they do see may be computed later, or elsewhere, as well.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch._subclasses.fake_tensor import FakeTensor, is_fake
from torch.fx import Graph, Node
from torch.fx.node import map_arg

aten = torch.ops.aten
_CASTS = (aten.to.dtype, aten.to.device, aten.to.dtype_layout, aten.to.other)
_SPLITS = (aten.chunk.default, aten.split.Tensor, aten.split_with_sizes.default)
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


@dataclass(frozen=True)
class Part:
    """source[.., start:stop:step] along an axis, counted from the front."""

    source: Node
    axis: int
    start: Any
    stop: Any
    step: Any


def part_of(node: Any) -> Part | None:
    """What a slice, or an item of a chunk or split, is a part of; None for anything else."""
    if not is_tensor(node):
        return None
    if called(node, aten.slice.Tensor):
        source, axis = node.args[0], argument(node, 1, "dim", 0) % value(node).dim()
        size, start, stop = value(source).shape[axis], argument(node, 2, "start") or 0, argument(node, 3, "end")
        stop = size if stop is None or (isinstance(stop, int) and isinstance(size, int) and stop >= size) else stop
        return Part(source, axis, start, stop, argument(node, 4, "step", 1))
    if node.target is not operator.getitem or not called(node.args[0], *_SPLITS):
        return None
    split, place = node.args
    axis = argument(split, 2, "dim", 0) % value(node).dim()
    sizes = [part.shape[axis] for part in value(split)]
    start = sum(sizes[:place])
    return Part(split.args[0], axis, start, start + sizes[place], 1)


def called(node: Any, *targets: Any) -> bool:
    """A call of one of these, which reads and gives what nothing writes into later."""
    return is_call(node, *targets) and settled(node)


def is_call(node: Any, *targets: Any) -> bool:
    """A call of one of these: enough for what is replaced where it stands, or only looked at."""
    return isinstance(node, Node) and node.op == "call_function" and node.target in targets


def call(graph: Graph, target: Any, *args: Any, **kwargs: Any) -> Node:
    """Insert a call at the graph's insertion point, with its fake value."""
    node = graph.call_function(target, args, kwargs)
    fakes = map_arg((args, kwargs), lambda n: n.meta["val"])
    tensors = [leaf for leaf in torch.utils._pytree.tree_leaves(fakes) if isinstance(leaf, FakeTensor)]
    with tensors[0].fake_mode:
        node.meta["val"] = target(*fakes[0], **fakes[1])
    return node


def size(graph: Graph, node: Node, axis: int) -> Any:
    """A size of a tensor as an argument: the number, or a call that asks for it."""
    known = value(node).shape[axis]
    return known if isinstance(known, int) else call(graph, aten.sym_size.int, node, axis)


def replace(old: Node, new: Node) -> None:
    """Let every user of `old` use `new`, which takes over where it came from in the user's source."""
    for key in ("stack_trace", "nn_module_stack"):
        if key in old.meta:
            new.meta.setdefault(key, old.meta[key])
    old.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)


def erase(node: Node) -> None:
    """Erase a node that nobody uses, and what is then of no use, so that no rule looks at it."""
    sources = node.all_input_nodes
    node.graph.erase_node(node)
    for source in sources:
        if not source.users and not source._erased and source.op == "call_function" and not source.is_impure():
            erase(source)


def written(node: Node) -> list[Node]:
    """The tensors that a call writes into."""
    if not isinstance(node.target, torch._ops.OpOverload) or not node.target._schema.is_mutable:
        return []
    places = enumerate(node.target._schema.arguments)
    into = [argument(node, i, arg.name) for i, arg in places if arg.alias_info is not None and arg.alias_info.is_write]
    return [tensor for tensor in into if isinstance(tensor, Node)]


def base(node: Node) -> Node:
    """The node whose memory this one may be a view of: itself where it is fresh."""
    while True:
        if node.target is operator.getitem:
            node = node.args[0]  # type: ignore[assignment]
        elif isinstance(node.target, torch._ops.OpOverload) and node.args and isinstance(node.args[0], Node):
            first, source = node.target._schema.arguments[0], node.args[0]
            cast = node.target in _CASTS and value(node).dtype != value(source).dtype
            if first.alias_info is None or cast:
                return node
            node = source
        else:
            return node


_WRITES: WeakKeyDictionary[Graph, list[Node]] = WeakKeyDictionary()


def note_writes(graph: Graph) -> None:
    """Find what writes into memory, for `settled`; calls that are made after that must not."""
    _WRITES[graph] = [node for node in graph.nodes if _into(node)]


def _into(node: Node) -> list[Node]:
    """What a call writes into; all that a higher-order one is given, since nothing says what that is."""
    return node.all_input_nodes if isinstance(node.target, torch._ops.HigherOrderOperator) else written(node)


def settled(node: Node) -> bool:
    """Whether nothing writes later into the memory that a call reads, or into that of its result."""
    later = [write for write in _WRITES.get(node.graph, ()) if not write._erased and node < write]
    if not later:
        return True
    memory = {base(n) for n in (node, *node.all_input_nodes)}
    return not any(base(tensor) in memory for write in later for tensor in _into(write))


def mutation_between(source: Node, first: Node, last: Node) -> Node | None:
    """The first operation strictly between `first` and `last` that writes into the memory of `source`: captured graphs
    are not functional, so a fusion may not carry a read across it."""
    memory, node = base(source), first.next
    while node is not last and node.op != "root":
        if any(base(tensor) is memory for tensor in written(node)):
            return node
        node = node.next
    return None


def read_later(node: Node, last: Node) -> bool:
    """Whether the call would read something else if it stood at `last`: one of its inputs is written into before."""
    return node is not last and any(mutation_between(source, node, last) for source in node.all_input_nodes)


def literal(node: Any) -> float | None:
    """The number that an argument is: a Python number, or a tensor of one element made from constants alone."""
    if isinstance(node, (int, float)) and not isinstance(node, bool):
        return node
    if not isinstance(node, Node) or not is_tensor(node) or value(node).numel() != 1:
        return None
    found = _constant(node)
    return None if found is None else found.item()


def _constant(node: Any) -> Any:
    """The value of an argument made from constants alone; None where it depends on an input, or is None."""
    if not isinstance(node, Node):
        return node
    if node.op == "get_attr" and str(node.target).startswith("_tensor_constant"):  # what torch.tensor(3) becomes
        held = getattr(node.graph.owning_module, str(node.target), None) if settled(node) else None
        return held if isinstance(held, torch.Tensor) and held.numel() == 1 and not is_fake(held) else None
    if not isinstance(node.target, torch._ops.OpOverload) or node.all_input_nodes == [] or len(node.args) > 2:
        return None
    if node.target._schema.is_mutable or not settled(node):
        return None
    args = [_constant(arg) for arg in node.args]
    return None if any(arg is None for arg in args) else node.target(*args, **node.kwargs)


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
