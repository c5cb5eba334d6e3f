"""What norms have in common: an addition before the norm, a residual connection, that the op takes in."""

from __future__ import annotations

import operator
from typing import Any

from torch.fx import Graph, Node

from trimaran.torch_path.graph import aten, call, called, is_tensor, mutation_between, replace, same_shape, value


def is_residual(x: Node) -> bool:
    """x = a + b of one shape and dtype."""
    if not called(x, aten.add.Tensor) or x.kwargs.get("alpha", 1) != 1:
        return False
    if not all(is_tensor(side) and value(side).dtype == value(x).dtype for side in x.args):
        return False
    return all(same_shape(value(side).shape, value(x).shape) for side in x.args)


def known_before(x: Node, param: Node | None, norm: Node) -> bool:
    """Whether a parameter of the norm is at x what it is at the norm."""
    return param is None or (param < x and mutation_between(param, x, norm) is None)


def rewrite_norm(
    graph: Graph, norm: Node, target: Any, x: Node, params: tuple[Any, ...], attrs: dict[str, Any]
) -> None:
    """Replace `norm` of x by the op, called as target(x, *params, residual, **attrs). Where x is an addition of which
    every parameter is known before, the op adds, at the place of the addition, and gives the sum to its other users."""
    fused = is_residual(x) and all(known_before(x, param, norm) for param in params)
    with graph.inserting_before(x.next if fused else norm):
        sides = x.args if fused else (x, None)
        interior = _between(x, norm)
        summed = fused and any(user is not norm and user not in interior for user in x.users)
        both = call(graph, target, sides[0], *params, sides[1], **attrs, return_sum=summed)
        y, total = item(graph, both, 0), item(graph, both, 1) if summed else None
    replace(norm, y)
    graph.erase_node(norm)
    if total is not None:
        replace(x, total)


def _between(x: Node, norm: Node) -> set[Node]:
    """The nodes that lead from x to the norm and nowhere else: they go with it."""
    inside, found = {norm}, [norm]
    while found:
        for source in found.pop().all_input_nodes:
            if source is not x and source not in inside and all(user in inside for user in source.users):
                inside.add(source)
                found.append(source)
    return inside


def only_user(node: Any, *targets: Any) -> Node | None:
    """The one user of a node, where it is a call of one of these targets, or any are."""
    user = next(iter(node.users)) if isinstance(node, Node) and len(node.users) == 1 else None
    return user if not targets or called(user, *targets) else None


def item(graph: Graph, node: Node, index: int) -> Node:
    """One of the outputs of a call."""
    found = graph.call_function(operator.getitem, (node, index))
    found.meta["val"] = node.meta["val"][index]
    return found
