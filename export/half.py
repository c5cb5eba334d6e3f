"""Half precision as a GPU computes it, on the CPU: each node in float32, what it gives rounded to the half type.

onnxruntime's CPU provider has few half kernels: it computes fp16 in fp32 and skips the rounding between nodes, which
hides what overflows, and bfloat16 not at all. So a half file is run as a float32 twin with the rounding written out,
and with a switch for each node that keeps it, and what passes between it and others that are kept, in fp32.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir

from trimaran.export.twin import graphs, to_float32

HALVES = {ir.DataType.FLOAT16: np.dtype(np.float16), ir.DataType.BFLOAT16: np.dtype(ml_dtypes.bfloat16)}
SWITCHES = "keep_in_fp32"  # the name of the input that the switches are


def is_half(model: ir.Model) -> bool:
    """Whether the model computes in half precision: any value of its graphs that has such a type."""
    return any(
        value.dtype in HALVES
        for graph in graphs(model)
        for node in graph.all_nodes()
        for value in [*node.outputs, *(value for value in node.inputs if value is not None)]
    )


def label(node: ir.Node) -> str:
    """What a node is called in reports."""
    return f"{node.op_type} {node.name}" if node.name else f"{node.op_type}, which makes {node.outputs[0].name}"


def add_switches(model: ir.Model) -> tuple[list[str], dict[str, str]]:
    """Make the model, in place, its float32 twin with rounding and switches: an input `keep_in_fp32`, bool [nodes].

    The nodes that the switches are for, in order; and, for each value that is rounded, the name of what it became."""
    nodes = [node for node in model.graph if any(value.dtype in HALVES for value in node.outputs)]
    half = {value: value.dtype for node in nodes for value in node.outputs if value.dtype in HALVES}
    uses = {value: list(value.uses()) for value in half}
    to_float32(model, HALVES)
    switches = _Switches(model.graph, nodes)
    rounded = {}
    for value, dtype in half.items():
        assert dtype is not None
        plain = switches.rounded(value, dtype)
        for use in uses[value]:
            source = switches.either(value, plain, use.node)
            use.node.replace_input_with(use.idx, source)
        _replace_output(model.graph, value, plain)
        rounded[str(value.name).removesuffix("_unrounded")] = str(plain.name)
    model.graph.sort()
    return [label(node) for node in nodes], rounded


class _Switches:
    """Adds to the graph what the switches take."""

    def __init__(self, graph: ir.Graph, nodes: Sequence[ir.Node]) -> None:
        self.graph = graph
        self.number = {node: index for index, node in enumerate(nodes)}
        self.input = ir.val(SWITCHES, ir.DataType.BOOL, [len(nodes)])
        graph.inputs.append(self.input)
        self.made: dict[Any, ir.Value] = {}

    def add(self, op_type: str, *inputs: ir.Value, **attributes: Any) -> ir.Value:
        node = ir.node(op_type, inputs, attributes)
        self.graph.append(node)
        return node.outputs[0]

    def rounded(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        """The Identity keeps onnxruntime from taking two casts in a row for nothing."""
        half = self.add("Identity", self.add("Cast", value, to=int(dtype)))
        plain = self.add("Cast", half, to=int(ir.DataType.FLOAT))
        plain.name = f"{value.name}_rounded"
        return plain

    def either(self, value: ir.Value, plain: ir.Value, user: ir.Node) -> ir.Value:
        """What `user` reads: the value as it is where both it and its maker are kept in fp32."""
        maker = value.producer()
        if user not in self.number or maker is None:
            return plain
        if (value, user) not in self.made:
            both = self._once(("and", maker, user), "And", self.switch(maker), self.switch(user))
            self.made[value, user] = self.add("Where", both, value, plain)
        return self.made[value, user]

    def switch(self, node: ir.Node) -> ir.Value:
        key = ("switch", node)
        if key not in self.made:
            index = ir.tensor(np.array(self.number[node], np.int64))
            self.made[key] = self.add("Gather", self.input, self.add("Constant", value=index))
        return self.made[key]

    def _once(self, key: Any, op_type: str, *inputs: ir.Value) -> ir.Value:
        if key not in self.made:
            self.made[key] = self.add(op_type, *inputs)
        return self.made[key]


def _replace_output(graph: ir.Graph, value: ir.Value, plain: ir.Value) -> None:
    """A graph output is rounded, under the name that it had."""
    if value.is_graph_output():
        plain.name, value.name = value.name, f"{value.name}_unrounded"
        plain.shape, plain.type = value.shape, value.type
        for index, output in enumerate(graph.outputs):
            if output is value:
                graph.outputs[index] = plain


def chosen(labels: Sequence[str], kept: Sequence[str]) -> np.ndarray[Any, Any]:
    """The switches, on for these nodes."""
    on = {*kept}
    return np.array([name in on for name in labels], bool)


def as_float32(feeds: Mapping[str, np.ndarray[Any, Any]]) -> dict[str, np.ndarray[Any, Any]]:
    return {name: x.astype(np.float32) if x.dtype in HALVES.values() else x for name, x in feeds.items()}
