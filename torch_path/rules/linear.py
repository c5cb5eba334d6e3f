"""Linear layers, and what follows them or stands beside them: one op each.

Rules, in their order: every linear layer becomes the op; a product of an activated one with another of the same input
becomes `gated_linear`; activations go into the layer before them; layers of one input (q, k and v) become one; the norm
of a layer's sum with a residual becomes `linear_norm`; what residuals are left go into their layer.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

from torch.fx import Graph, Node

from trimaran.kernels.linear import linear
from trimaran.torch_path.graph import (
    RESHAPES,
    aten,
    base,
    call,
    called,
    dtype_of,
    is_call,
    is_tensor,
    read_later,
    replace,
    same,
    same_shape,
    value,
)
from trimaran.torch_path.ops import TORCH_OPS
from trimaran.torch_path.rules.activations import activation_of
from trimaran.torch_path.rules.residual import item, known_before, only_user
from trimaran.torch_path.rules.statistics import uncast, vector_of

LINEAR = TORCH_OPS["linear"].overload
_PRODUCTS = (aten.matmul.default, aten.mm.default)
LINEAR_ANCHORS = (aten.linear.default, aten.addmm.default, *_PRODUCTS)
GATED_ANCHORS = (aten.mul.Tensor,)
SHARED_ANCHORS = RESIDUAL_ANCHORS = (LINEAR,)
NORM_ANCHORS = (TORCH_OPS["layer_norm"].overload, TORCH_OPS["rms_norm"].overload)
MOST_SHARED = 3


@dataclass(frozen=True)
class Layer:
    """x W^T + bias, or x W + bias where transposed; `end` is what is replaced."""

    end: Node
    x: Node
    weight: Node
    bias: Node | None
    transposed: bool = False


def check_linear(node: Node) -> Layer | str | None:
    if node.target is aten.linear.default:
        layer: Layer | None = _whole(node)
    else:
        layer = _product(node) if node.target in _PRODUCTS else _written_out(node)
    if layer is None or read_later(node, layer.end):
        return None
    if not is_tensor(layer.weight, rank=2) or (layer.bias is not None and not is_tensor(layer.bias, rank=1)):
        return "its weight is no matrix, or its bias no vector"
    for name, tensor in (("x", layer.x), ("weight", layer.weight), ("bias", layer.bias)):
        if tensor is not None and (dtype_of(tensor) not in linear.types["T"] or dtype_of(tensor) != dtype_of(layer.x)):
            return f"{name} is {dtype_of(tensor)}, supported are {', '.join(linear.types['T'])}, all alike"
    return layer if value(layer.x).dim() >= 2 else None


def _whole(node: Node) -> Layer:
    x, weight, *bias = node.args
    return Layer(node, x, weight, bias[0] if bias else node.kwargs.get("bias"))  # type: ignore[arg-type]


def _written_out(node: Node) -> Layer | None:
    """bias + x W, with the views that make rows of x and undo that (GPT-2's Conv1D)."""
    bias, rows, weight = node.args[:3]
    if node.kwargs or not is_tensor(bias, rank=1):
        return None
    layer = Layer(node, rows, weight, bias, True)  # type: ignore[arg-type]
    x = rows.args[0] if called(rows, *RESHAPES) else None  # type: ignore[union-attr]
    end = next(iter(node.users)) if len(node.users) == 1 else None
    if not is_tensor(x) or not called(end, *RESHAPES) or not same(value(x).shape[-1], value(rows).shape[-1]):
        return layer
    undone = same_shape(value(end).shape[:-1], value(x).shape[:-1])
    return Layer(end, x, weight, bias, True) if undone else layer  # type: ignore[arg-type]


def _product(node: Node) -> Layer | None:
    """x W with a parameter W, or the transpose of one, and the bias that is added to it."""
    x, weight = node.args
    transposed = not called(weight, aten.transpose.int)
    weight = weight if transposed else weight.args[0]  # type: ignore[union-attr]
    if not is_tensor(weight, rank=2) or uncast(weight).op not in ("placeholder", "get_attr") or not is_tensor(x):
        return None
    total = only_user(node, aten.add.Tensor)
    bias = None if total is None else next((side for side in total.args if side is not node), None)
    if total is None or total.kwargs or vector_of(bias, node) is None or dtype_of(bias) != dtype_of(node):
        return Layer(node, x, weight, None, transposed)  # type: ignore[arg-type]
    return Layer(total, x, weight, bias, transposed)  # type: ignore[arg-type]


def rewrite_linear(graph: Graph, node: Node, match: Layer) -> None:
    with graph.inserting_before(match.end):
        out = call(graph, LINEAR, match.x, match.weight, match.bias, transpose_weight=match.transposed)
    replace(match.end, out)
    graph.erase_node(match.end)


def is_plain(node: Any, *users: Node) -> bool:
    """A linear op without activation or residual, of use to these nodes only."""
    if not called(node, LINEAR) or node.kwargs.get("activation", "none") != "none" or len(node.args) > 3:
        return False
    return {*node.users} <= {*users}


def inside(end: Node, start: Node) -> set[Node]:
    """The end, and the nodes between `start` and it."""
    found, todo = {end}, [end]
    while todo:
        for source in todo.pop().all_input_nodes:
            if source is not start and source not in found and start < source:
                found.add(source)
                todo.append(source)
    return found


@dataclass(frozen=True)
class Activated:
    layer: Node
    activation: str


def check_activation(node: Node) -> Activated | None:
    found = activation_of(node)
    plain = found is not None and is_plain(found[1], *inside(node, found[1]))
    return Activated(found[1], found[0]) if plain else None  # type: ignore[index]


def rewrite_activation(graph: Graph, node: Node, match: Activated) -> None:
    out = call(graph, LINEAR, *match.layer.args, **{**match.layer.kwargs, "activation": match.activation})
    replace(node, out)
    graph.erase_node(node)


@dataclass(frozen=True)
class Gated:
    gate: Node
    up: Node | None  # None: the gate's layer is both, one half after the other
    activation: str
    half: str = "first"


def check_gated(node: Node) -> Gated | None:
    if len(node.args) != 2 or not all(map(is_tensor, node.args)):
        return None
    for one, other in (node.args, node.args[::-1]):
        found = activation_of(one)
        if found is None:
            continue
        activation, gate = found
        users = inside(one, gate)  # type: ignore[arg-type]
        if is_plain(gate, *users) and is_plain(other, node) and _same_form(gate, other):  # type: ignore[arg-type]
            return Gated(gate, other, activation)  # type: ignore[arg-type]
        halves = _halves(gate, other)
        if halves is not None and {*gate.users} <= users and {*other.users} == {node}:  # type: ignore[union-attr]
            return Gated(halves[0], None, activation, halves[1])
    return None


def _same_form(one: Node, other: Node) -> bool:
    alike = one.args[0] is other.args[0] and one.kwargs == other.kwargs
    return alike and same_shape(value(one.args[1]).shape, value(other.args[1]).shape)


def _halves(gate: Node, up: Any) -> tuple[Node, str] | None:
    """(layer, which half is the gate) where both are the halves of one layer's output."""
    split = gate.args[0] if getattr(gate.target, "__name__", "") == "getitem" else None
    if not called(split, aten.chunk.default, aten.split.Tensor) or not isinstance(up, Node) or up.args[:1] != (split,):
        return None
    layer: Any = split.args[0]  # type: ignore[union-attr]
    if not is_plain(layer, split) or len(split.users) != 2:  # type: ignore[arg-type, union-attr]
        return None
    axis = split.args[2] if len(split.args) > 2 else split.kwargs.get("dim", 0)  # type: ignore[union-attr]
    half, whole = value(gate).shape[-1], value(layer).shape[-1]
    last = axis in (-1, value(layer).dim() - 1) and isinstance(whole, int) and whole == 2 * half
    return (layer, "second" if gate.args[1] else "first") if last else None


def rewrite_gated(graph: Graph, node: Node, match: Gated) -> None:
    x, weight, bias = match.gate.args
    up = (None, None) if match.up is None else match.up.args[1:]
    transposed = match.gate.kwargs["transpose_weight"]
    attrs = {"activation": match.activation, "gate": match.half, "transpose_weight": transposed}
    out = call(graph, TORCH_OPS["gated_linear"].overload, x, weight, up[0], bias, up[1], **attrs)
    replace(node, out)
    graph.erase_node(node)


def check_shared(node: Node) -> list[Node] | None:
    """The layers, this one first, that share its input and belong together; None where there is no other."""
    x: Any = node.args[0]
    if not is_plain(node, *node.users):
        return None
    group = [
        user for user in sorted(x.users)
        if is_plain(user, *user.users) and user.args[0] is x and user.kwargs == node.kwargs and siblings(node, user)
    ][:MOST_SHARED]  # fmt: skip
    if len(group) < 2 or group[0] is not node:
        return None
    known = all(known_before(node, given, layer) for layer in group[1:] for given in layer.args)
    return group if known and all(isinstance(value(layer).shape[-1], int) for layer in group) else None


def counts_on_memory(layer: Node) -> bool:
    """Whether its rows must lie together: for an operator of somebody else's, and for as_strided."""
    if any(getattr(user.target, "namespace", "aten") not in ("aten", "prims", "trimaran") for user in layer.users):
        return True
    return any(is_call(node, aten.as_strided.default) and base(node) is layer for node in layer.graph.nodes)


def siblings(one: Node, other: Node) -> bool:
    """Layers of one module, as far as the graph tells."""
    parents = []
    for node in (one, other):
        stack = list((node.meta.get("nn_module_stack") or {}).values())
        parents.append(str(stack[-1][0]).rpartition(".")[0] if stack else "")
    return parents[0] == parents[1]


def rewrite_shared(graph: Graph, node: Node, match: list[Node]) -> None:
    parts = [param for layer in match[1:] for param in layer.args[1:]]
    wide = call(graph, LINEAR, *match[0].args, None, *parts, **node.kwargs)
    ends = list(itertools.accumulate(value(layer).shape[-1] for layer in match))
    starts = [0, *ends]
    slices = [call(graph, aten.slice.Tensor, wide, -1, *span) for span in zip(starts, ends, strict=False)]
    for i, layer in enumerate(match):
        if counts_on_memory(layer):
            slices[i] = call(graph, aten.contiguous.default, slices[i])
    for layer, part in zip(match, slices, strict=True):
        replace(layer, part)
        graph.erase_node(layer)
    for user in graph.nodes:  # rows are further apart now
        if is_call(user, aten.view.default) and base(user) is wide:
            user.target = aten.reshape.default


@dataclass(frozen=True)
class Normed:
    layer: Node
    residual: Node | None
    total: Node | None = None  # their sum in fp32, of a layer in half precision, which the norm did not take in


def check_linear_norm(node: Node) -> Normed | None:
    params = 2 if node.target is NORM_ANCHORS[0] else 1
    x, residual = node.args[0], node.args[1 + params]
    for layer, other in ((x, residual), (residual, x)):
        if is_plain(layer, node) and (other is None or is_tensor(other)):
            return Normed(layer, other)  # type: ignore[arg-type]
    given: Any = node.args[1 : 1 + params]
    known = isinstance(x, Node) and all(known_before(x, param, node) for param in given)
    return _mixed_sum(x, node) if residual is None and known else None  # type: ignore[arg-type]


def _mixed_sum(total: Node, norm: Node) -> Normed | None:
    """Of x W^T in half precision, and a residual in fp32: what autocast makes of layers between norms."""
    if not called(total, aten.add.Tensor, aten.to.dtype) or total.kwargs or dtype_of(total) != "float32":
        return None
    sides = total.args if called(total, aten.add.Tensor) else (total.args[0], None)
    for layer, other in (sides, sides[::-1]):
        if not is_plain(layer, total) or dtype_of(layer) == "float32":
            continue
        alike = is_tensor(other) and dtype_of(other) == "float32" and same_shape(value(other).shape, value(total).shape)
        if alike or (other is None and norm.args[1] is not None):  # something must say that y is fp32
            return Normed(layer, other, total)  # type: ignore[arg-type]
    return None


def rewrite_linear_norm(graph: Graph, node: Node, match: Normed) -> None:
    layer_norm = node.target is NORM_ANCHORS[0]
    x, weight, bias = match.layer.args
    params = node.args[1:3] if layer_norm else (node.args[1], None)
    summed = node.kwargs["return_sum"]
    if match.total is not None:
        summed = len(match.total.users) > 1
    attrs: dict[str, Any] = {"eps": node.kwargs["eps"], "norm": "layer" if layer_norm else "rms"}
    attrs |= {"cast": node.kwargs.get("cast", "torch"), "return_sum": summed}
    attrs["transpose_weight"] = match.layer.kwargs["transpose_weight"]
    with graph.inserting_before(node if match.total is None else match.total.next):
        both = call(graph, TORCH_OPS["linear_norm"].overload, x, weight, bias, match.residual, *params, **attrs)
        outputs = item(graph, both, 0), item(graph, both, 1) if summed else None
    for user in list(node.users):
        replace(user, outputs[user.args[1]])  # type: ignore[arg-type, index]
        graph.erase_node(user)
    graph.erase_node(node)
    if match.total is not None and outputs[1] is not None:
        replace(match.total, outputs[1])


def check_residual(node: Node) -> tuple[Node, Node] | None:
    """(the sum, the residual)"""
    total = next(iter(node.users)) if len(node.users) == 1 else None
    if not called(total, aten.add.Tensor) or total.kwargs or len(node.args) > 3:  # type: ignore[union-attr]
        return None
    others = [side for side in total.args if side is not node]  # type: ignore[union-attr]
    if len(others) != 1 or not is_tensor(others[0]) or not same_shape(value(others[0]).shape, value(node).shape):
        return None
    alike = value(others[0]).dtype == value(node).dtype == value(total).dtype
    return (total, others[0]) if alike else None  # type: ignore[return-value]


def rewrite_residual(graph: Graph, node: Node, match: tuple[Node, Node]) -> None:
    total, residual = match
    with graph.inserting_before(total):
        out = call(graph, LINEAR, *node.args, residual, **node.kwargs)
    replace(total, out)
    graph.erase_node(total)
