"""Weights in files of their own: looked at before anything opens them.

An ONNX file names the files that its weights are in. A file from elsewhere may name any file of this machine, so a
name has to stay in the model's folder, without links out of it, and what it names has to hold the weight.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath

import onnx
from onnx import TensorProto

BITS = {
    **dict.fromkeys(("FLOAT", "INT32", "UINT32"), 32),
    **dict.fromkeys(("FLOAT16", "BFLOAT16", "INT16", "UINT16"), 16),
    **dict.fromkeys(("DOUBLE", "INT64", "UINT64", "COMPLEX64"), 64),
    "COMPLEX128": 128,
    **dict.fromkeys(("INT4", "UINT4", "FLOAT4E2M1"), 4),
    **dict.fromkeys(("INT2", "UINT2"), 2),
}  # the others have 8


def check_tensor(argument: str, folder: Path, tensor: TensorProto) -> None:
    """ValueError or FileNotFoundError where a tensor's data are not where, or not as many as, it says."""
    what = f"{argument}: weight {tensor.name!r}"
    if tensor.data_type not in TensorProto.DataType.values() or tensor.data_type == TensorProto.UNDEFINED:
        raise ValueError(f"{what} has no known type ({tensor.data_type})")
    if any(dim < 0 for dim in tensor.dims):
        raise ValueError(f"{what} has the shape {list(tensor.dims)}")
    if tensor.data_location == TensorProto.EXTERNAL:
        _check_external(what, folder, tensor)
    elif tensor.HasField("raw_data") and len(tensor.raw_data) != byte_size(tensor):
        raise ValueError(f"{what} has {len(tensor.raw_data)} bytes, its shape and type take {byte_size(tensor)}")
    elif not tensor.HasField("raw_data"):
        _check_listed(what, tensor)


def byte_size(tensor: TensorProto) -> int:
    return (_elements(tensor) * BITS.get(_name(tensor), 8) + 7) // 8


def location(argument: str, folder: Path, name: str) -> Path:
    """The file that `name` means to a model in `folder`. ValueError where it leads out of it."""
    parts = PurePosixPath(name).parts
    if not name or "\0" in name or PurePosixPath(name).is_absolute() or PureWindowsPath(name).drive or ".." in parts:
        raise ValueError(f"{argument} is in {name!r}, expected a file in the model's folder")
    path = folder.joinpath(name)
    if not path.resolve().is_relative_to(folder.resolve()) or path.is_symlink():
        raise ValueError(f"{argument} is in {name!r}, a link: copy what it points to into the model's folder")
    if not path.exists():
        raise FileNotFoundError(f"{argument} is in {name!r}, which does not exist beside the model")
    if not path.is_file():
        raise ValueError(f"{argument} is in {name!r}, expected a file")
    if os.stat(path).st_nlink > 1:
        raise ValueError(f"{argument} is in {name!r}, which has other names (hard links): copy it")
    return path


def external_files(model: onnx.ModelProto) -> set[str]:
    """The files that the model's tensors are in."""
    apart = (tensor for tensor in tensors(model) if tensor.data_location == TensorProto.EXTERNAL)
    return {entry.value for tensor in apart for entry in tensor.external_data if entry.key == "location"}


def tensors(model: onnx.ModelProto) -> Iterator[TensorProto]:
    """Every tensor of the model: weights and attributes, also of subgraphs and functions."""
    yield from _graph_tensors(model.graph)
    for function in model.functions:
        yield from _node_tensors(function.node)


def _graph_tensors(graph: onnx.GraphProto) -> Iterator[TensorProto]:
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)
    yield from _node_tensors(graph.node)


def _node_tensors(nodes: object) -> Iterator[TensorProto]:
    for node in nodes:  # type: ignore[attr-defined]
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors
            for graph in [*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs]:
                yield from _graph_tensors(graph)


def _elements(tensor: TensorProto) -> int:
    count = 1
    for dim in tensor.dims:
        count *= dim
    return count


def _check_external(what: str, folder: Path, tensor: TensorProto) -> None:
    entries: Mapping[str, str] = {entry.key: entry.value for entry in tensor.external_data}
    size = location(what, folder, entries.get("location", "")).stat().st_size
    try:
        offset, length = int(entries.get("offset", 0)), int(entries.get("length", byte_size(tensor)))
    except ValueError as error:
        raise ValueError(f"{what} has no number as its offset or length: {error}") from error
    if offset < 0 or length != byte_size(tensor) or offset + length > size:
        raise ValueError(
            f"{what} is at {offset} to {offset + length} of {entries['location']!r}, which has {size} bytes; its shape "
            f"and type take {byte_size(tensor)}"
        )


def _check_listed(what: str, tensor: TensorProto) -> None:
    """Data in one of the typed fields."""
    field = onnx.helper.tensor_dtype_to_field(tensor.data_type)
    found = len(getattr(tensor, field))
    bits = BITS.get(_name(tensor), 8)
    elements = _elements(tensor)
    wanted = 2 * elements if field in ("float_data", "double_data") and "COMPLEX" in _name(tensor) else elements
    if bits < 8:
        wanted = (elements * bits + 7) // 8
    if found != wanted:
        raise ValueError(f"{what} has {found} numbers, its shape and type take {wanted}")


def _name(tensor: TensorProto) -> str:
    return str(TensorProto.DataType.Name(tensor.data_type))
