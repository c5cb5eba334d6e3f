"""Reading and writing ONNX files: checked before they are opened, written beside and moved into place."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import onnx_ir as ir

from trimaran.export.external import check_tensor, tensors
from trimaran.export.functions import _content, body_function, our_nodes
from trimaran.export.onnx_graph import dtype_of
from trimaran.export.reading import read_model
from trimaran.export.schemas import DOMAIN
from trimaran.export.structure import check_structure
from trimaran.kernels.catalog import OPS

Paths = str | os.PathLike[str]
EXTERNAL_ABOVE = 1 << 30  # bytes of weights from which they go to a file of their own; protobuf ends at 2 GiB


def source_path(argument: str, path: Paths) -> Path:
    """The path of an existing file. TypeError, FileNotFoundError or ValueError name the argument."""
    found = Path(_checked(argument, path))
    if not found.exists():
        raise FileNotFoundError(f"{argument} is {str(found)!r}, which does not exist")
    if not found.is_file():
        raise ValueError(f"{argument} is {str(found)!r}, expected a file, not a folder")
    return found


def target_path(argument: str, path: Paths, overwrite: bool) -> Path:
    """The path of a file to be written. FileExistsError, FileNotFoundError or TypeError name the argument."""
    found = Path(_checked(argument, path))
    if not found.parent.is_dir():
        raise FileNotFoundError(f"{argument} is {str(found)!r}, whose folder does not exist")
    if found.is_dir():
        raise IsADirectoryError(f"{argument} is {str(found)!r}, expected a file, not a folder")
    for what, file in (("", found), ("whose weights may go to ", found.with_name(f"{found.name}.data"))):
        if file.exists() and not overwrite:
            place = f"{what}{str(file)!r}, " if what else ""
            raise FileExistsError(f"{argument} is {str(found)!r}, {place}which exists; overwrite=True replaces it")
    return found


def load(argument: str, path: Path) -> ir.Model:
    """The model in the file, its weights read when they are needed.

    ValueError where it is not ONNX, its graph is none, a weight is not what it says or lies outside the model's folder,
    or where it has functions under our name that are not ours; FileNotFoundError where a weight's file is missing."""
    try:
        proto = read_model(path)
    except Exception as error:  # protobuf raises its own kinds for what is not a model at all
        raise ValueError(f"{argument} is {str(path)!r}, which is not an ONNX model: {error}") from error
    if not proto.graph.node and not proto.graph.output:
        raise ValueError(f"{argument} is {str(path)!r}, which is not an ONNX model: it has an empty graph")
    check_structure(argument, proto)
    for tensor in tensors(proto):
        check_tensor(argument, path.parent, tensor)
    try:
        model = ir.serde.deserialize_model(proto)
    except Exception as error:
        raise ValueError(f"{argument} is {str(path)!r}, which is not an ONNX model: {error}") from error
    if not in_order(model.graph):  # onnxruntime sorts nodes, rules read them in order
        model.graph.sort()
    for graph in (model.graph, *(function.graph for function in model.functions.values())):
        ir.external_data.set_base_dir(graph, path.parent)
    check_bodies(argument, model)
    return model


def in_order(graph: ir.Graph) -> bool:
    """Whether every node comes after what it reads, itself and in its bodies."""
    seen: set[ir.Node] = set()
    for node in graph:
        makers = (value.producer() for value in read_by(node))
        if any(maker is not None and maker.graph is graph and maker not in seen for maker in makers):
            return False
        if not all(in_order(body) for body in bodies(node)):
            return False
        seen.add(node)
    return True


def bodies(node: ir.Node) -> Iterator[ir.Graph]:
    for attr in node.attributes.values():
        if attr.type == ir.AttributeType.GRAPH:
            yield attr.as_graph()
        elif attr.type == ir.AttributeType.GRAPHS:
            yield from attr.as_graphs()


def read_by(node: ir.Node) -> Iterator[ir.Value]:
    yield from (value for value in node.inputs if value is not None)
    for body in bodies(node):
        yield from body.outputs
        for inner in body:
            yield from read_by(inner)


def check_bodies(argument: str, model: ir.Model) -> None:
    """Refuse functions under our name whose body we did not write: its name is a digest of it."""
    for domain, name, overload in model.functions:
        if domain == DOMAIN:
            digest = hashlib.sha256(_content(model.functions[domain, name, overload].graph).encode()).hexdigest()[:12]
            if name not in OPS or overload != digest or model.opset_imports.get(DOMAIN, 0) > OPS[name].version:
                raise ValueError(
                    f"{argument} has a function {domain}::{name} (overload {overload!r}) that this version of trimaran "
                    "did not write, and would not compute"
                )
    for node in our_nodes(model):
        if (DOMAIN, node.op_type, node.overload) in model.functions:
            check_call(argument, model, node)


def check_call(argument: str, model: ir.Model, node: ir.Node) -> None:
    """Refuse a node that says other than the body that it calls."""
    op = OPS[node.op_type]
    try:
        for port, value in zip(op.inputs, node.inputs, strict=False):
            allowed = op.types.get(port.type)
            if value is not None and allowed is not None and dtype_of(value) not in allowed:
                raise ValueError(f"{port.name} is {dtype_of(value)}, supported are {', '.join(allowed)}")
        overload = body_function(op, node, model.opset_imports.get("", 0)).overload
    except ValueError as error:
        raise ValueError(f"{argument}: node {node.name!r}: {error}") from error
    if overload != node.overload:
        raise ValueError(
            f"{argument}: node {node.name!r} says other than the function that it calls, {node.overload!r}"
        )


@contextlib.contextmanager
def beside(path: Path) -> Iterator[Path]:
    """A folder next to `path`, gone afterwards; `publish` moves from it into place. PermissionError where there can be
    none."""
    try:
        folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    except OSError as error:
        raise PermissionError(
            f"{str(path.parent)!r}, the folder of {path.name!r}, cannot be written: {error}"
        ) from error
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def save(model: ir.Model, folder: Path, name: str) -> Path:
    """Write the model as `name` in `folder`; large weights beside it as `name`.data. ValueError where `publish` would
    put these in the place of weights that the model is read from."""
    for value in model.graph.initializers.values():
        if isinstance(value.const_value, ir.ExternalTensor):
            source = Path(value.const_value.path).resolve()
            if source == (folder.parent / f"{name}.data").resolve():
                raise ValueError(f"{name}.data are the weights of the source, choose another name for what is written")
    keep_constants(model)
    size = sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value is not None)
    external = f"{name}.data" if size > EXTERNAL_ABOVE or _has_external(model) else None
    ir.save(model, folder / name, external_data=external)
    return folder / name


def keep_constants(model: ir.Model) -> None:
    """Take what attributes and bodies hold in other files into the model: only its own weights go beside it."""
    for graph in (model.graph, *(function.graph for function in model.functions.values())):
        for body in graph.subgraphs():
            for value in body.initializers.values():
                if isinstance(value.const_value, ir.ExternalTensor):
                    value.const_value = ir.tensor(value.const_value.numpy().copy(), name=value.name)
        for node in ir.traversal.RecursiveGraphIterator(graph):
            for name, attr in list(node.attributes.items()):
                if attr.type == ir.AttributeType.TENSOR and isinstance(attr.value, ir.ExternalTensor):
                    tensor = attr.as_tensor()
                    node.attributes[name] = ir.AttrTensor(name, ir.tensor(tensor.numpy().copy(), name=tensor.name))


def publish(folder: Path, path: Path) -> None:
    """Move what `save` wrote to `path`: the weights first, so that the model never stands without them."""
    for part in (f"{path.name}.data", path.name):
        if (folder / part).exists():
            os.replace(folder / part, path.parent / part)


def _has_external(model: ir.Model) -> bool:
    return any(isinstance(value.const_value, ir.ExternalTensor) for value in model.graph.initializers.values())


def _checked(argument: str, path: Paths) -> Paths:
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"{argument} is a {type(path).__name__}, expected a path")
    return path
