"""A model that is read field by field is the one that is read at once."""

import io
import random

import numpy as np
import onnx
import pytest
from graph_text import model
from onnx import helper, numpy_helper, parser

from trimaran.export import files, reading


@pytest.fixture
def content(monkeypatch):
    monkeypatch.setattr(reading, "SMALL", 0)
    proto = parser.parse_model("""<ir_version: 10, opset_import: ["" : 17, "my" : 1], producer_name: "somebody">
        g (float[b, 8] x) => (float[b, 8] y) <float[8] w = {1, 2, 3, 4, 5, 6, 7, 8}> { n = my.f (x, w) y = Relu (n) }
        <domain: "my", opset_import: ["" : 17]> f (x, w) => (y) { y = Mul (x, w) }""")
    for name in ("big", "unused"):
        proto.graph.initializer.append(numpy_helper.from_array(np.arange(300, dtype=np.float32), name))
    helper.set_model_props(proto, {"author": "somebody"})
    return proto.SerializeToString()


def test_the_same_model(content, tmp_path):
    (tmp_path / "m.onnx").write_bytes(content)
    assert reading.read_model(tmp_path / "m.onnx") == onnx.load_from_string(content)


def outcome(read):
    try:
        return read()
    except Exception as error:
        return type(error).__name__


def test_what_is_no_model_is_none_in_pieces_either(content, tmp_path):
    """Cut, or with another byte."""
    rng, kinds = random.Random(0), set()
    for _ in range(150):
        data = bytearray(content)
        data[rng.randrange(len(data))] = rng.randrange(256)
        data = data[: rng.choice([len(data), rng.randrange(len(data))])]
        (tmp_path / "m.onnx").write_bytes(data)
        whole = outcome(lambda data=data: onnx.load_from_string(bytes(data)))
        pieces = outcome(lambda: reading.read_model(tmp_path / "m.onnx"))
        assert pieces == whole if isinstance(whole, onnx.ModelProto) else pieces in ("ValueError", "DecodeError")
        kinds.add(type(whole))
    assert len(kinds) == 2, "some are models, some are not"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"\x0b", "the field at byte 0 is of wire type 3"),
        (b"\x0a\x05ab", "goes beyond the end of what it is in"),
        (b"\x0d\x00", "goes beyond the end of what it is in"),
        (b"\xff" * 12, "a number of more than ten bytes"),
        (b"\x08", "the file ends within a number"),
    ],
)
def test_broken_fields(data, message):
    with pytest.raises(ValueError, match=message):
        list(reading.fields(io.BytesIO(data), 0, len(data)))


def test_nodes_that_bodies_wait_for_come_first(tmp_path):
    """A condition whose branch reads what is only made later is sorted, as onnxruntime does."""
    then = "t () => (float[b] a) { a = Neg (late) }"
    other = "e () => (float[b] c) { c = Identity (x) }"
    body = f"y = If (on) <then_branch = {then}, else_branch = {other}> late = Relu (x)"
    onnx.save(model(body, "float[b] x, bool on", "float[b] y"), tmp_path / "m.onnx")
    assert [node.op_type for node in files.load("m", tmp_path / "m.onnx").graph] == ["Relu", "If"]
