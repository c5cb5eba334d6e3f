"""Reading an ONNX file without holding it twice.

`onnx.load` reads the whole file and then parses it: twice its size. Protobuf messages may be parsed in pieces, as what
is merged one after the other is the same as what is parsed at once; so a model is, and its graph, field by field.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import onnx

GRAPH = 7  # the field of ModelProto
SMALL = 1 << 20  # bytes of a file that is read at once
VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5  # wire types
SIZES = {FIXED64: 8, FIXED32: 4}


def read_model(path: Path) -> onnx.ModelProto:
    """The model in a file, weights in other files left there. ValueError, or protobuf's own error, where it is none."""
    size = path.stat().st_size
    if size <= SMALL:
        return onnx.load(path, load_external_data=False)
    model = onnx.ModelProto()
    with path.open("rb") as file:
        for number, start, content, end in fields(file, 0, size):
            if number != GRAPH or content == start:
                model.MergeFromString(piece(file, start, end))
                continue
            for _, first, _, last in fields(file, content, end):
                model.graph.MergeFromString(piece(file, first, last))
    return model


def piece(file: BinaryIO, start: int, end: int) -> bytes:
    file.seek(start)
    return file.read(end - start)


def fields(file: BinaryIO, start: int, end: int) -> Iterator[tuple[int, int, int, int]]:
    """(number, where it starts, where the content of one with a length starts, where it ends) of each field."""
    while start < end:
        file.seek(start)
        tag = varint(file)
        kind, content = tag & 7, start
        if kind == BYTES:
            length = varint(file)
            content = file.tell()
            after = content + length
        elif kind == VARINT:
            varint(file)
            after = file.tell()
        elif kind in SIZES:
            after = file.tell() + SIZES[kind]
        else:
            raise ValueError(f"the field at byte {start} is of wire type {kind}")
        if after > end:
            raise ValueError(f"the field at byte {start} goes beyond the end of what it is in")
        yield tag >> 3, start, content, after
        start = after


def varint(file: BinaryIO) -> int:
    """The number that starts where the file stands."""
    value = 0
    for shift in range(0, 70, 7):
        byte = file.read(1)
        if not byte:
            raise ValueError("the file ends within a number")
        value |= (byte[0] & 127) << shift
        if byte[0] < 128:
            return value
    raise ValueError(f"a number of more than ten bytes before byte {file.tell()}")
