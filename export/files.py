"""Reading and writing ONNX files: checked before they are opened, written beside and moved into place."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import onnx_ir as ir

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
    if found.exists() and not overwrite:
        raise FileExistsError(f"{argument} is {str(found)!r}, which exists; overwrite=True replaces it")
    return found


def load(argument: str, path: Path) -> ir.Model:
    """The model in the file, its weights read when they are needed. ValueError where it is not ONNX."""
    try:
        model = ir.load(path)
    except Exception as error:  # protobuf raises its own kinds for what is not a model at all
        raise ValueError(f"{argument} is {str(path)!r}, which is not an ONNX model: {error}") from error
    if not len(model.graph) and not model.graph.outputs:
        raise ValueError(f"{argument} is {str(path)!r}, which is not an ONNX model: it has an empty graph")
    return model


@contextlib.contextmanager
def beside(path: Path) -> Iterator[Path]:
    """A folder next to `path`, gone afterwards; `publish` moves from it into place."""
    folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def save(model: ir.Model, folder: Path, name: str) -> Path:
    """Write the model as `name` in `folder`; large weights beside it as `name`.data."""
    size = sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value is not None)
    external = f"{name}.data" if size > EXTERNAL_ABOVE or _has_external(model) else None
    ir.save(model, folder / name, external_data=external)
    return folder / name


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
