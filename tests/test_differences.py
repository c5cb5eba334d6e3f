"""`trimaran verify`: where two files part, and which nodes half precision cannot do without fp32."""

import json

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import parser
from typer.testing import CliRunner

import trimaran
from trimaran.cli import app
from trimaran.export.differences import Probe, smallest, verify_files
from trimaran.export.verify import CannotVerify, example_inputs, known_sizes

CHAIN = """<ir_version: 8, opset_import: ["" : 17]> g (TYPE[n, 8] x) => (TYPE[n, 8] y) {
    c = Constant<value = float {FACTOR}>() k = Cast<to = NUMBER>(c)
    a = Abs(x) big = Mul(a, k) square = Mul(big, big) root = Sqrt(square) small = Div(root, k) y = Neg(small)
}"""


def chain(path, type_="float", factor=300.0):
    """y = -|x|, by a number that half precision does not hold."""
    number = {"float": 1, "float16": 10, "bfloat16": 16}[type_]
    text = CHAIN.replace("TYPE", type_).replace("FACTOR", str(factor)).replace("NUMBER", str(number))
    onnx.save(parser.parse_model(text), path)
    return path


def test_equal_files_agree_in_several_shapes(tmp_path):
    found = verify_files(chain(tmp_path / "a.onnx"), chain(tmp_path / "b.onnx", factor=200.0))
    assert found.ok
    assert [shapes for shapes, _ in found.runs] == ["x [2, 8]", "x [1, 8]", "x [7, 8]"]
    assert found.parting is None
    assert found.keep is None


def test_the_first_node_where_files_part(tmp_path):
    second = onnx.load(chain(tmp_path / "a.onnx"))
    second.graph.node[5].op_type = "Exp"  # root
    second.graph.node[5].name = "wrong"
    onnx.save(second, tmp_path / "b.onnx")
    found = verify_files(tmp_path / "a.onnx", tmp_path / "b.onnx")
    assert not found.ok
    assert (found.parting.node, found.parting.value) == ("Exp wrong", "root")
    assert "they part at Exp wrong: root differs by" in "\n".join(found.lines())


@pytest.mark.parametrize("type_", ["float16", "bfloat16"])
def test_half_precision_is_rounded_as_a_gpu_rounds_it(tmp_path, type_):
    probe = Probe(chain(tmp_path / "a.onnx", type_), tmp_path)
    dtype = {"float16": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16)}[type_]
    x = np.linspace(0.1, 2, 16).reshape(2, 8).astype(dtype)
    big = (x.astype("f") * 300).astype(dtype).astype("f")
    root = np.sqrt((big * big).astype(dtype).astype("f")).astype(dtype).astype("f")
    expected = -(root / np.float32(300)).astype(dtype).astype("f")
    np.testing.assert_array_equal(probe.run({"x": x})["y"], expected)
    kept = probe.run({"x": x}, probe.switches)["y"]
    np.testing.assert_array_equal(kept, (-x.astype("f") * np.float32(300) / np.float32(300)).astype(dtype).astype("f"))


def test_what_overflows_in_fp16_is_found(tmp_path):
    """300 x squared is more than 65504: the product and the root after it have to stay in fp32, nothing else."""
    found = verify_files(chain(tmp_path / "a.onnx"), chain(tmp_path / "b.onnx", "float16"))
    assert not found.ok
    assert found.parting.node == "Mul, which makes square"
    assert found.keep == ["Mul, which makes square", "Sqrt, which makes root"]


def test_what_no_precision_mends_is_said(tmp_path):
    second = onnx.load(chain(tmp_path / "b.onnx", "float16", factor=2.0))
    second.graph.node[-1].op_type = "Exp"
    onnx.save(second, tmp_path / "b.onnx")
    found = verify_files(chain(tmp_path / "a.onnx"), tmp_path / "b.onnx")
    assert found.keep is None
    assert found.lines()[-1] == "no list of nodes to keep in fp32 makes them agree"


@pytest.mark.parametrize("needed", [{3}, {0, 9}, {2, 3, 4, 11}, set(range(12))])
def test_delta_debugging_finds_what_is_needed(needed):
    items = [str(i) for i in range(12)]
    found = smallest(items, lambda part: needed <= {int(item) for item in part})
    assert {int(item) for item in found} == needed
    assert smallest(items, lambda _: False) is None


def test_given_inputs(tmp_path):
    a, b = chain(tmp_path / "a.onnx"), chain(tmp_path / "b.onnx", "float16")
    assert verify_files(a, b, {"x": np.full((1, 8), 0.1, "f")}).ok
    assert not verify_files(a, b, {"x": np.full((1, 8), 10, "f")}).ok


def test_sizes_follow_their_names():
    shapes = [
        ["batch", "sequence"],
        ["batch", "past + sequence"],
        ["batch", 2, "past", 8],
        [None, None, None],
        ["n + 1"],
    ]
    assert known_sizes(shapes, (2, 7)) == [[2, 7], [2, 10], [2, 2, 3, 8], [2, 7, 3], [2]]


def test_an_input_of_unknown_shape_is_asked_for(tmp_path):
    model = ir.load(chain(tmp_path / "a.onnx"))
    model.graph.inputs[0].shape = None
    with pytest.raises(CannotVerify, match="the shape or type of input x is not known"):
        example_inputs(model)


def test_other_ports_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"first has the outputs \['y'\], second \['z'\]: expected the same"):
        verify_files(chain(tmp_path / "a.onnx"), renamed(tmp_path))


def renamed(folder):
    model = onnx.load(chain(folder / "b.onnx"))
    model.graph.output[0].name = model.graph.node[-1].output[0] = "z"
    onnx.save(model, folder / "b.onnx")
    return folder / "b.onnx"


def test_a_rewritten_file_in_half_precision(tmp_path):
    """A trimaran node is one node: its body computes in fp32 inside."""
    text = """<ir_version: 8, opset_import: ["" : 17]> g (float16[n, 8] x) => (float16[n, 8] y) {
        f = Constant<value = float[8] {1,2,3,4,5,6,7,8}>() w = Cast<to = 10>(f) y = LayerNormalization(x, w) }"""
    onnx.save(parser.parse_model(text), tmp_path / "a.onnx")
    report = trimaran.rewrite_onnx(tmp_path / "a.onnx", tmp_path / "b.onnx")
    assert report.replaced == {"layer_norm": 1}
    assert verify_files(tmp_path / "a.onnx", tmp_path / "b.onnx").ok


def command(*arguments):
    return CliRunner().invoke(app, ["verify", *map(str, arguments)])


def test_the_command(tmp_path):
    a, b = chain(tmp_path / "a.onnx"), chain(tmp_path / "b.onnx", "float16")
    assert command(a, a).exit_code == 0
    failed = command(a, b)
    assert failed.exit_code == 1
    assert "they agree with 2 nodes of the second file in fp32" in failed.stdout
    np.savez(tmp_path / "small.npz", x=np.full((1, 8), 0.1, "f"))
    given = command(a, b, "--inputs", tmp_path / "small.npz", "--json")
    assert given.exit_code == 0
    assert json.loads(given.stdout)["ok"] is True


@pytest.mark.parametrize("bad", ["missing.onnx", "text.onnx"])
def test_the_command_refuses_bad_files(tmp_path, bad):
    (tmp_path / "text.onnx").write_text("no model")
    refused = command(chain(tmp_path / "a.onnx"), tmp_path / bad)
    assert refused.exit_code == 2
    assert "second is" in refused.output
