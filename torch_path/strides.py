"""as_strided reads memory by numbers that were right for the strides its input had when the graph was captured. The ops
give other strides to what is computed, so those are written out before anything is replaced."""

from __future__ import annotations

from torch.fx import Graph, Node

from trimaran.torch_path.graph import aten, call, called, same, value


def pin_strides(graph: Graph) -> Node | None:
    """Copy what as_strided reads into the order of memory that it had. The answer is the first call for which that is
    not possible, since its input leaves gaps in memory, which it may read: such a graph stays as it is."""
    for node in [n for n in graph.nodes if called(n, aten.as_strided.default)]:
        source = node.args[0]
        order = _dense_order(source)
        if order is None:
            return node  # type: ignore[no-any-return]
        with graph.inserting_before(node):
            pinned = call(graph, aten.contiguous.default, call(graph, aten.permute.default, source, order))
            pinned = call(graph, aten.permute.default, pinned, [order.index(axis) for axis in range(len(order))])
        node.replace_input_with(source, pinned)
    return None


def _dense_order(node: Node) -> list[int] | None:
    """The axes from the one with the largest steps in memory on; None where there are gaps."""
    shape, strides = value(node).shape, value(node).stride()
    order: list[int] = []
    step = 1
    while len(order) < len(shape):
        left = [axis for axis in reversed(range(len(shape))) if axis not in order]
        single = [axis for axis in left if same(shape[axis], 1)]  # whose step says nothing
        fits = single or [axis for axis in left if same(strides[axis], step)]
        if not fits:
            return None
        order.insert(0, fits[0])
        step = step * shape[fits[0]]
    return order
