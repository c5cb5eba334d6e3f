"""`trimaran compare-fusions`: nodes are counted by kind, for everybody by the same measure."""

import json

import onnx
import onnx_ir as ir
import pytest
from onnx import parser
from typer.testing import CliRunner

from trimaran.benchmarks.fusions import KINDS, _same_model, compare, fewer, markdown, ours, theirs
from trimaran.cli import app

NORM = """<ir_version: 8, opset_import: ["" : 17]> g (float[2, 3, 8] x, float[2, 3, 8] r) => (float[2, 3, 8] y) {
    w = Constant<value = float[8] {1, 1, 1, 1, 1, 1, 1, 1}>() s = Add(x, r) y = LayerNormalization<axis = -1>(s, w) }"""


@pytest.fixture
def norm(tmp_path):
    onnx.save(parser.parse_model(NORM), tmp_path / "norm.onnx")
    return tmp_path / "norm.onnx"


def test_each_optimizer_has_its_say(norm):
    found = compare([norm])["files"]["norm"]
    assert found["trimaran"] == {**dict.fromkeys(KINDS, 0), "norm": 1, "residual norm": 1}
    assert found["session"]["norm"] == found["onnxscript"]["norm"] == found["transformers optimizer"]["norm"] == 1
    assert found["transformers exporter"] == "not one of its models"
    assert fewer(found) == []


def test_a_file_that_an_optimizer_cannot_read_stays_in_the_table(tmp_path):
    (tmp_path / "text.onnx").write_text("no model")
    found = compare([tmp_path / "text.onnx"])
    assert all(isinstance(counts, str) for counts in found["files"]["text"].values())
    assert "- session on text: " in markdown(found)


def test_the_same_measure():
    node = onnx.helper.make_node
    assert theirs([node("RotaryEmbedding", ["q"], ["a"]), node("RotaryEmbedding", ["k"], ["b"])])["rotary"] == 2
    assert theirs([node("GroupQueryAttention", ["q"], ["y"], do_rotary=1)]) == {"attention": 1, "rotary": 2}
    assert theirs([node("FastGelu", ["x"], ["y"]), node("FastGelu", ["x", "b"], ["y"])])["activation"] == 1
    text = """<ir_version: 10, opset_import: ["" : 17, "trimaran" : 1]> g (float[2, 3, 8] x) => (float[2, 3, 8] y) {
        a, b = trimaran.rotary_embedding (x, x, x, x) c = trimaran.linear <activation = "gelu"> (a, x)
        d = trimaran.linear_norm (x, x, x, x, x) e = trimaran.gated_linear (x, x, x)
        y = trimaran.attention (x, x, x) }"""
    text = text.replace("y = trim", "p = trimaran.rotary_embedding <packed = 1> (x, x, x) y = trim")
    graph = ir.from_proto(parser.parse_model(text)).graph
    assert ours(graph) == {"rotary": 4, "activation": 1, "norm": 1, "residual norm": 1, "gated": 1, "attention": 1}


@pytest.mark.parametrize(
    ("stem", "family", "same"),
    [
        ("t5-dynamo-20-sdpa-right-float32", "t5", True),
        ("t5-dynamo-20-sdpa-right-float16", "t5", False),
        ("t5-dynamo-20-sdpa-right-float16", "t5-float16", True),
        ("t5-torchscript-14-sdpa-right-float32", "t5-float16", False),
        ("t5-gated-dynamo-20-sdpa-right-float32", "t5", False),
    ],
)
def test_an_exporters_own_fusions_are_compared_in_one_precision(stem, family, same):
    assert _same_model(stem, family) == same


def test_losing_rows_are_named():
    none = dict.fromkeys(KINDS, 0)
    assert fewer({"session": {**none, "norm": 2}, "onnxscript": "failed", "trimaran": {**none, "norm": 1}}) == ["norm"]
    assert fewer({"session": {**none, "norm": 2}, "trimaran": "failed"}) == ["norm"]


def test_the_command(norm, tmp_path):
    result = CliRunner().invoke(app, ["compare-fusions", str(norm), "--out", str(tmp_path / "out")])
    assert result.exit_code == 0
    assert result.stdout.startswith("1 files, somebody finds more than we in 0")
    assert json.loads((tmp_path / "out" / "fusions.json").read_text())["files"]["norm"]["trimaran"]["norm"] == 1
    assert "| norm | 0 1 " in (tmp_path / "out" / "fusions.md").read_text()
    assert CliRunner().invoke(app, ["compare-fusions", "gone.onnx"]).exit_code == 2
