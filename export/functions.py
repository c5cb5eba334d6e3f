"""Function bodies: every trimaran node can also be run as the standard ONNX ops that its declaration's `body` gives.

A runtime without our library inlines the body; one with it ignores it. A body is written for one presence of optional
inputs, one set of attribute values, one dtype and the model's opset (a runtime ignores a function's own opset import);
nodes that agree in these share a body, told apart from the others by the function's `overload`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from trimaran.export.schemas import DOMAIN, ONNX_TYPE
from trimaran.kernels.catalog import OPS
from trimaran.kernels.contract import Op

OVERLOADS_SINCE = 10  # the IR version that has function overloads


class BodyBuilder:
    """The `g` of `Op.body`: `g.MatMul(a, b)` adds that node; `opset` and `types` say what is being written for.

    A trailing None input is left out. Operators whose form changed between opsets have a method of their own.
    """

    def __init__(self, opset: int, types: dict[str, str]) -> None:
        self.opset, self.types = opset, types
        self.nodes: list[ir.Node] = []
        self._constants: dict[Any, ir.Value] = {}

    def __getattr__(self, op_type: str) -> Any:
        if not op_type[0].isupper():
            raise AttributeError(op_type)
        return lambda *inputs, **attributes: self.node(op_type, inputs, attributes)

    def node(self, op_type: str, inputs: Iterable[ir.Value | None], attributes: dict[str, Any]) -> ir.Value:
        given = list(inputs)
        while given and given[-1] is None:
            given.pop()
        node = ir.node(op_type, given, attributes)
        self.nodes.append(node)
        return node.outputs[0]

    def constant(self, value: Any, dtype: str) -> ir.Value:
        """A scalar, or a 1-D tensor from a list."""
        key = (tuple(value) if isinstance(value, list) else value, dtype)
        if key not in self._constants:
            array = np.array(value, ir.DataType(ONNX_TYPE[dtype]).numpy())
            self._constants[key] = self.node("Constant", [], {"value": ir.tensor(array)})
        return self._constants[key]

    def cast(self, x: ir.Value, dtype: str) -> ir.Value:
        return self.node("Cast", [x], {"to": int(ONNX_TYPE[dtype])})

    def unsqueeze(self, x: ir.Value, axes: list[int]) -> ir.Value:
        if self.opset >= 13:
            return self.node("Unsqueeze", [x, self.constant(axes, "int64")], {})
        return self.node("Unsqueeze", [x], {"axes": axes})

    def reduce_mean(self, x: ir.Value, axis: int) -> ir.Value:
        return self._reduce("ReduceMean", x, axis)

    def reduce_max(self, x: ir.Value, axis: int) -> ir.Value:
        return self._reduce("ReduceMax", x, axis)

    def softmax(self, x: ir.Value) -> ir.Value:
        """Over the last axis, which is also what the flattening Softmax before opset 13 does there."""
        return self.node("Softmax", [x], {"axis": -1})

    def _reduce(self, op_type: str, x: ir.Value, axis: int) -> ir.Value:
        """Keeps the reduced axis, with size 1."""
        if self.opset >= 18:
            return self.node(op_type, [x, self.constant([axis], "int64")], {"keepdims": 1})
        return self.node(op_type, [x], {"axes": [axis], "keepdims": 1})


def attach_functions(model: ir.Model) -> None:
    """Give every trimaran node of the model its function body; replaces bodies of ours that no node uses any more."""
    for key in [key for key in model.functions if key[0] == DOMAIN]:
        del model.functions[key]
    opset = model.opset_imports.get("", model.opset_imports.get("ai.onnx"))
    if opset is None:
        raise ValueError("the model imports no version of the standard ONNX operators")
    for node in our_nodes(model):
        op = OPS[node.op_type]
        trim(node, op)
        function = body_function(op, node, opset)
        node.overload = function.overload
        model.functions.setdefault(function.identifier(), function)
        model.opset_imports[DOMAIN] = op.version
    if any(key[0] == DOMAIN for key in model.functions):
        model.ir_version = max(model.ir_version, OVERLOADS_SINCE)


def our_nodes(model: ir.Model) -> list[ir.Node]:
    """The trimaran nodes of the graph and its subgraphs."""
    return [
        node
        for node in ir.traversal.RecursiveGraphIterator(model.graph)
        if node.domain == DOMAIN and node.op_type in OPS
    ]


def count_nodes(model: ir.Model) -> dict[str, int]:
    """Trimaran nodes by op."""
    counts = dict.fromkeys(sorted(OPS), 0)
    for node in our_nodes(model):
        counts[node.op_type] += 1
    return {name: count for name, count in counts.items() if count}


def trim(node: ir.Node, op: Op) -> None:
    """Drop trailing optional outputs that nobody uses, and trailing absent inputs."""
    last = len(node.outputs)
    while last > 1 and op.outputs[last - 1].optional and not _used(node.outputs[last - 1]):
        last -= 1
    node.resize_outputs(last)
    inputs = len(node.inputs)
    while inputs and node.inputs[inputs - 1] is None:
        inputs -= 1
    node.resize_inputs(inputs)


def _used(value: ir.Value) -> bool:
    return bool(value.uses()) or value.is_graph_output()


def body_function(op: Op, node: ir.Node, opset: int) -> ir.Function:
    """The node's function body. Its overload is a digest of what it computes."""
    inputs = [
        None if value is None else ir.val(port.name, value.dtype, value.shape)
        for port, value in zip(op.inputs, node.inputs, strict=False)
    ]
    given = {name: attribute.value for name, attribute in node.attributes.items()}
    attrs = op.attributes(given)
    g = BodyBuilder(opset, bound_types(op, node))
    assert op.body is not None  # as `add_op` asks
    results = op.body(g, op.input_namespace(inputs), attrs)
    for value in inputs:
        if value is not None:
            value.shape = None  # another node that shares the body may have another
    outputs = list(results)[: len(node.outputs)]
    name_values(op, g.nodes, outputs)
    graph = ir.Graph(
        [
            value if value is not None else ir.val(f"{port.name}_absent")
            for port, value in zip(op.inputs, inputs, strict=False)
        ],
        outputs,
        nodes=used_nodes(g.nodes, outputs),
        opset_imports={"": opset},
        name=op.name,
    )
    overload = hashlib.sha256(_content(graph).encode()).hexdigest()[:12]
    declared = [ir.Attr(name, attribute.type, None) for name, attribute in node.attributes.items()]
    return ir.Function(DOMAIN, op.name, overload, graph=graph, attributes=declared)


def bound_types(op: Op, node: ir.Node) -> dict[str, str]:
    """The dtype of each type name, from the node's inputs."""
    names = {value: key for key, value in ONNX_TYPE.items()}
    bound = {}
    for port, value in zip(op.inputs, node.inputs, strict=False):
        if port.type in op.types and value is not None:
            if value.dtype is None or int(value.dtype) not in names:
                raise ValueError(f"{op.name} node {node.name!r}: the type of {port.name} is not known")
            bound[port.type] = names[int(value.dtype)]
    return bound


def used_nodes(nodes: Sequence[ir.Node], outputs: Sequence[ir.Value]) -> list[ir.Node]:
    """The nodes that the outputs depend on, in order."""
    needed: set[ir.Node] = set()
    waiting = [output.producer() for output in outputs]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in needed:
            needed.add(node)
            waiting += [value.producer() for value in node.inputs if value is not None]
    return [node for node in nodes if node in needed]


def name_values(op: Op, nodes: Sequence[ir.Node], outputs: Sequence[ir.Value]) -> None:
    for index, node in enumerate(nodes):
        node.name = f"{node.op_type}_{index}"
        node.outputs[0].name = f"value_{index}"
    for port, value in zip(op.outputs, outputs, strict=False):
        value.name = port.name


def _content(graph: ir.Graph) -> str:
    """The graph as text, all that makes it differ from another body."""
    lines = [",".join(str(value.name) for value in graph.inputs), ",".join(str(value.name) for value in graph.outputs)]
    for node in graph:
        attributes = [
            (name, ir.serde.serialize_attribute(a).SerializeToString()) for name, a in sorted(node.attributes.items())
        ]
        names = [value.name if value is not None else "" for value in node.inputs]
        lines.append(f"{node.op_type}{names}{attributes}{[value.name for value in node.outputs]}")
    return f"{graph.opset_imports}\n" + "\n".join(lines)
