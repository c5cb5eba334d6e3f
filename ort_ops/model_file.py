"""What a model file says of Trimaran's ops, read for error messages."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import onnx

DOMAIN = "trimaran"


def what_is_wrong(model: str | bytes, registered: Collection[str]) -> str:
    """Why a model that onnxruntime refused cannot run, where that can be said better; else an empty text.

    registered: the names of the ops registered.
    """
    head = _head(model)
    if head[4:8] == b"ORTM":  # onnxruntime's own format, of which onnx knows nothing
        return ""
    try:
        proto = _load(model)
    except Exception as error:
        first = next(iter(str(error).strip().splitlines()), "")
        return f"{_name(model)} is not an ONNX model: it starts with {head!r} ({type(error).__name__}: {first})"
    if not proto.HasField("graph"):
        return f"{_name(model)} is not an ONNX model: it has no graph" + (f", it starts with {head!r}" if head else "")
    bodies = {(function.name, function.overload) for function in proto.functions if function.domain == DOMAIN}
    missing = sorted(
        {
            node.op_type
            for node in trimaran_nodes(proto)
            if node.op_type not in registered and (node.op_type, node.overload) not in bodies
        }
    )
    if not missing:
        return ""
    known = ", ".join(registered) or f"none (that takes CUDAExecutionProvider and a GPU, or {DOMAIN}.interpret())"
    return f"{_name(model)} has nodes {', '.join(missing)} of {DOMAIN} without a function body; ops registered: {known}"


def require_bodies(model: str | bytes, version: str) -> None:
    """RuntimeError where the nodes' function bodies are of a kind that this onnxruntime would confuse."""
    try:
        proto = _load(model)
    except Exception:
        return  # onnxruntime refuses it as well, and `what_is_wrong` says why
    names = sorted({node.op_type for node in trimaran_nodes(proto) if node.overload})
    if names:
        raise RuntimeError(
            f"{_name(model)} has nodes {', '.join(names)} of {DOMAIN}, whose function bodies need onnxruntime 1.27 or "
            f"newer; this is {version}. It runs here on CUDAExecutionProvider, or under {DOMAIN}.interpret()"
        )


def trimaran_nodes(proto: onnx.ModelProto) -> Iterator[onnx.NodeProto]:
    """The nodes of Trimaran's domain, those in subgraphs and functions among them."""
    stack: list[Any] = [*proto.graph.node, *(node for function in proto.functions for node in function.node)]
    while stack:
        node = stack.pop()
        if node.domain == DOMAIN:
            yield node
        for attribute in node.attribute:
            stack += attribute.g.node
            stack += (inner for graph in attribute.graphs for inner in graph.node)


def _load(model: str | bytes) -> onnx.ModelProto:
    import onnx

    return onnx.load_from_string(model) if isinstance(model, bytes) else onnx.load(model, load_external_data=False)


def _head(model: str | bytes) -> bytes:
    if isinstance(model, bytes):
        return model[:16]
    with open(model, "rb") as file:
        return file.read(16)


def _name(model: str | bytes) -> str:
    return f"the model of {len(model)} bytes" if isinstance(model, bytes) else model
