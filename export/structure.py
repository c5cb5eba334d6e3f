"""Is this a model at all? What a graph needs to mean one thing, checked before anything reads further: every value
made once, every value read made somewhere, nothing made of itself."""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterable, Mapping, Sequence
from graphlib import CycleError, TopologicalSorter
from typing import Any

import onnx
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto
from onnx.defs import OpSchema

from trimaran.export.schemas import register_schemas

DEEPEST = 64  # subgraphs in subgraphs


def check_structure(argument: str, model: ModelProto) -> None:
    """ValueError names the first thing that is wrong."""
    register_schemas()
    opsets = {_domain(opset.domain): opset.version for opset in model.opset_import}
    _check_graph(argument, model.graph, set(), opsets, 0)
    _check_functions(argument, model)


def _check_graph(
    argument: str, graph: GraphProto, outer: Collection[str], opsets: Mapping[str, int], depth: int
) -> None:
    where = f"{argument}: graph {graph.name!r}"
    if depth > DEEPEST:
        raise ValueError(f"{where} is nested more than {DEEPEST} times")
    inputs = [value.name for value in graph.input]
    weights = [tensor.name for tensor in graph.initializer] + [s.values.name for s in graph.sparse_initializer]
    _check_once(f"{where}: input", inputs)
    _check_once(f"{where}: weight", weights)
    outputs = [value.name for value in graph.output]
    _check_nodes(argument, where, graph.node, {*outer}, {*inputs, *weights}, outputs, opsets, depth)


def _check_nodes(
    argument: str,
    where: str,
    nodes: Sequence[NodeProto],
    outer: Collection[str],
    given: Collection[str],
    outputs: Sequence[str],
    opsets: Mapping[str, int],
    depth: int,
) -> None:
    made = [name for node in nodes for name in node.output if name]
    _check_once(f"{where}: value", [*given, *made])
    known = {*outer, *given, *made}
    for node in nodes:
        check_node(f"{where}: node {_label(node)}", node, opsets)
        for graph in _subgraphs(node):
            _check_graph(argument, graph, known, opsets, depth + 1)
        missing = next((name for name in node.input if name and name not in known), None)
        if missing is not None:
            raise ValueError(f"{where}: node {_label(node)} reads {missing!r}, which nothing makes")
    missing = next((name for name in outputs if name not in known), None)
    if missing is not None:
        raise ValueError(f"{where}: output {missing!r} is made by nothing")
    _check_acyclic(where, nodes)


def check_node(where: str, node: NodeProto, opsets: Mapping[str, int]) -> None:
    """ValueError where a node of a known operator has inputs, outputs or attributes that the operator has not."""
    if not isinstance(node.op_type, str) or not isinstance(node.domain, str):
        raise ValueError(f"{where}: its operator's name is no text")
    domain = _domain(node.domain)
    schema = schema_of(node.op_type, opsets.get(domain, 0), domain)
    if schema is None:  # somebody else's, or newer than our onnx
        return
    for what, names, least, most, ports in (
        ("inputs", node.input, schema.min_input, schema.max_input, schema.inputs),
        ("outputs", node.output, schema.min_output, schema.max_output, schema.outputs),
    ):
        if not least <= len(names) <= most:
            raise ValueError(f"{where} has {len(names)} {what}, the operator {least} to {most}")
        for name, port in zip(names, ports, strict=False):
            if not name and port.option == OpSchema.FormalParameterOption.Single:
                raise ValueError(f"{where} lacks {port.name}")
    given = {attribute.name: attribute for attribute in node.attribute}
    for name, attribute in given.items():
        if name not in schema.attributes:
            raise ValueError(f"{where} has an attribute {name!r}, the operator has none of that name")
        kind: Any = schema.attributes[name].type
        if int(attribute.type) != kind.value and not attribute.ref_attr_name:
            raise ValueError(f"{where}: attribute {name!r} is of another type than the operator's")
    missing = next((name for name, a in schema.attributes.items() if a.required and name not in given), None)
    if missing is not None:
        raise ValueError(f"{where} lacks the attribute {missing!r}")


def _domain(name: str) -> str:
    return "" if name == "ai.onnx" else name


@functools.cache
def schema_of(op_type: str, opset: int, domain: str) -> OpSchema | None:
    try:
        return onnx.defs.get_schema(op_type, opset, domain)
    except onnx.defs.SchemaError:
        return None


def _check_once(what: str, names: Iterable[str]) -> None:
    seen: set[str] = set()
    for name in names:
        if not name:
            raise ValueError(f"{what} has no name")
        if name in seen:
            raise ValueError(f"{what} {name!r} is there twice")
        seen.add(name)


def _check_acyclic(where: str, nodes: Sequence[NodeProto]) -> None:
    maker = {name: index for index, node in enumerate(nodes) for name in node.output if name}
    order = TopologicalSorter(
        {index: {maker[name] for name in _read(node) if name in maker} for index, node in enumerate(nodes)}
    )
    try:
        order.prepare()
    except CycleError as error:
        circle = " -> ".join(_label(nodes[index]) for index in reversed(error.args[1]))
        raise ValueError(f"{where} goes in a circle: {circle}") from error


def _read(node: NodeProto) -> Iterable[str]:
    """What a node reads, itself and in its subgraphs."""
    yield from (name for name in node.input if name)
    for graph in _subgraphs(node):
        own = {value.name for value in graph.input} | {tensor.name for tensor in graph.initializer}
        own |= {name for inner in graph.node for name in inner.output}
        read = {value.name for value in graph.output}.union(*map(_read, graph.node))
        yield from read - own


def _check_functions(argument: str, model: ModelProto) -> None:
    functions = {(f.domain, f.name, f.overload): f for f in model.functions}
    if len(functions) < len(model.functions):
        raise ValueError(f"{argument} has two functions of one name")
    calls = {}
    for key, function in functions.items():
        where = f"{argument}: function {function.domain}::{function.name}"
        _check_once(f"{where}: input", function.input)
        opsets = {_domain(opset.domain): opset.version for opset in function.opset_import}
        _check_nodes(argument, where, function.node, (), function.input, function.output, opsets, 0)
        calls[key] = {k for k in _called(function.node) if k in functions}
    try:
        TopologicalSorter(calls).prepare()
    except CycleError as error:
        names = " -> ".join(f"{domain}::{name}" for domain, name, _ in error.args[1])
        raise ValueError(f"{argument}: functions call each other in a circle: {names}") from error


def _called(nodes: Iterable[NodeProto]) -> Iterable[tuple[str, str, str]]:
    for node in nodes:
        yield node.domain, node.op_type, node.overload
        for graph in _subgraphs(node):
            yield from _called(graph.node)


def _subgraphs(node: NodeProto) -> list[GraphProto]:
    found = []
    for attribute in node.attribute:
        if attribute.type == AttributeProto.GRAPH or attribute.HasField("g"):
            found.append(attribute.g)
        found += attribute.graphs
    return found


def _label(node: NodeProto) -> str:
    return f"{node.op_type} {node.name!r}" if node.name else node.op_type
