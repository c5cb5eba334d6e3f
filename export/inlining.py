"""Model-local functions: what stands in one matches nothing, as its types and sizes are its callers'. So functions are
inlined, as every runtime does that reads the file, but only those of which something is replaced: others survive."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable

import onnx_ir as ir
from onnx_ir.passes.common import InlinePass, RemoveUnusedNodesPass

from trimaran.export.functions import count_nodes
from trimaran.export.report import FileMiss
from trimaran.export.schemas import DOMAIN
from trimaran.export.shapes import STANDARD
from trimaran.export.structure import schema_of

Function = tuple[str, str, str]  # domain, name, overload
_MARK = "trimaran.inlined."  # in the metadata of a node that comes from a call


def inlined_where_needed(model: ir.Model, rules: Callable[[ir.Model], list[FileMiss]]) -> list[FileMiss]:
    """Inline, in place, the functions in which the rules replace something; what cannot be inlined, and why.

    rules: applies them to a model in place. They are tried on copies, which share the weights."""
    misses = {key: reason for key in model.functions if key[0] != DOMAIN and (reason := obstacle(model, key))}
    open_to = {key for key in model.functions if key[0] != DOMAIN} - misses.keys()
    if open_to:
        whole, touched = _tried(model, open_to, rules)
        if touched != open_to and touched and _tried(model, touched, rules)[0] != whole:
            touched = open_to  # one between two others is needed too
        if touched:
            _inline(model, touched)
    return [FileMiss("functions", "::".join(key[:2]), reason) for key, reason in misses.items()]


def obstacle(model: ir.Model, key: Function) -> str | None:
    """Why the function, or one that it calls, cannot be inlined."""
    function = model.functions[key]
    for domain, version in function.opset_imports.items():
        plain = "" if domain in STANDARD else domain
        own = next((v for d, v in model.opset_imports.items() if ("" if d in STANDARD else d) == plain), version)
        if own != version and differs(function.graph, plain, version, own):
            return f"it is written for version {version} of {plain or 'ai.onnx'}, the model for {own}"
    if any(attr.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for attr in function.attributes.values()):
        return "it takes a graph as an attribute"
    return next((reason for inner in called(function.graph, model) if (reason := obstacle(model, inner))), None)


def differs(graph: ir.Graph, domain: str, *versions: int) -> bool:
    """Whether an operator of the domain that the graph has means something else in these versions, or may."""
    for node in ir.traversal.RecursiveGraphIterator(graph):
        if ("" if node.domain in STANDARD else node.domain) == domain:
            found = [schema_of(node.op_type, version, domain) for version in versions]
            if len({schema.since_version if schema is not None else None for schema in found} - {None}) != 1:
                return True
    return False


def called(graph: ir.Graph, model: ir.Model) -> set[Function]:
    """The model's functions that nodes of a graph call."""
    nodes = ir.traversal.RecursiveGraphIterator(graph)
    return {node.op_identifier() for node in nodes} & {key for key in model.functions if key[0] != DOMAIN}


def _tried(model: ir.Model, keys: Collection[Function], rules: Callable[[ir.Model], list[FileMiss]]) -> tuple[
    dict[str, int], set[Function]
]:  # fmt: skip
    """(trimaran nodes, functions of which nodes went or are read by new ones) if these functions are inlined."""
    trial = model.clone()
    graphs = [trial.graph, *(function.graph for function in trial.functions.values())]
    for node in (node for graph in graphs for node in ir.traversal.RecursiveGraphIterator(graph)):
        if (key := node.op_identifier()) in keys:
            node.metadata_props[_MARK + "|".join(key)] = ""
    _inline(trial, keys)
    RemoveUnusedNodesPass()(trial)
    before = _marks(ir.traversal.RecursiveGraphIterator(trial.graph))
    rules(trial)
    after = _marks(ir.traversal.RecursiveGraphIterator(trial.graph))
    return count_nodes(trial), {key for key in keys if before["|".join(key)] != after["|".join(key)]}


def _inline(model: ir.Model, keys: Collection[Function]) -> None:
    for key in keys:
        imports = model.functions[key].opset_imports
        imports.update({domain: model.opset_imports.get(domain, version) for domain, version in imports.items()})
    InlinePass(lambda function: function.identifier() in keys)(model)


def _marks(nodes: Iterable[ir.Node]) -> Counter[str]:
    """How many nodes come from each function."""
    names = (name for node in nodes for name in node.metadata_props)
    return Counter(name.removeprefix(_MARK) for name in names if name.startswith(_MARK))
