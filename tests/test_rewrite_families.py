"""Every family of models, as each exporter writes it: the file's rules find what PyTorch's rules find in the model."""

from __future__ import annotations

import warnings
from collections import Counter

import exports
import models
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch

import trimaran
from trimaran.export.functions import count_nodes
from trimaran.export.rewrite_onnx import rewrite

NORMS = ("layer_norm", "rms_norm", "linear_norm")
QUICK = {("bert", "dynamo", 20), ("llama", "torchscript", 14), ("gpt2", "torchscript", 17), ("vit", "dynamo", 23)}
# By onnxruntime: rotary embeddings of opset 23 for more than one row, and masks of nn.MultiheadAttention.
UNRUNNABLE = {"torch-encoder": (23, 24)}
WRITERS = [("dynamo", 18), ("dynamo", 20), ("dynamo", 23), ("dynamo", 24), ("torchscript", 14), ("torchscript", 17)]
REFUSED = {"whisper": ("torchscript", "dynamo"), "torch-encoder": ("torchscript",), "plain": ("torchscript",)}
CASES = [
    pytest.param(name, *writer, marks=[] if (name, *writer) in QUICK else pytest.mark.slow)
    for name in models.FAMILIES
    for writer in WRITERS
    if writer[0] not in REFUSED.get(name, ())
]


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("exports")


def run(path, feeds):
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, feeds)


def default(name):
    return models.FAMILIES[name].attentions[0]


@pytest.mark.parametrize(("name", "exporter", "opset"), CASES)
def test_a_family(name, exporter, opset, folder, tmp_path):
    source = exports.exported(folder, name, exporter, opset, attention=default(name))
    target = tmp_path / "out.onnx"
    report = trimaran.rewrite_onnx(source, target, inputs=exports.feeds(name))
    wanted = models.FAMILIES[name].counts
    rotary = wanted.get("rotary_embedding", 0)
    assert report.replaced["attention"] == wanted["attention"], report
    assert sum(report.replaced[norm] for norm in NORMS) == sum(wanted.get(norm, 0) for norm in NORMS), report
    assert report.replaced["rotary_embedding"] == rotary, report
    assert not report.near_misses
    broken = (opset == 23 and rotary) or opset in UNRUNNABLE.get(name, ())
    assert report.verified.startswith("not verified: the source file does not run" if broken else "verified"), report
    onnx.checker.check_model(target)
    onnx.shape_inference.infer_shapes(onnx.load(target))
    for size, length in ((1, 9), (7, 5)):
        if name in ("clip", "whisper"):
            continue
        feeds = exports.feeds(name, "left", size=size, length=length)
        wanted = exports.expected(name, default(name), "left", size, length) if broken else run(source, feeds)
        for ours, theirs in zip(run(target, feeds), wanted, strict=True):
            seen = (
                feeds["attention_mask"].astype(bool)
                if theirs.shape[:2] == (size, length) and "attention_mask" in feeds
                else ...
            )
            np.testing.assert_allclose(ours[seen], theirs[seen], atol=2e-4 * max(1.0, np.abs(theirs).max()))
    again = tmp_path / "again.onnx"
    trimaran.rewrite_onnx(target, again, verify=False)
    assert count_nodes(ir.load(again)) == report.replaced


HALF = {"bert", "gpt2", "llama", "modernbert", "mistral", "qwen2", "electra", "vit", "timm-like", "distilbert"}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name == "llama" else pytest.mark.slow) for name in sorted(HALF)]
)
def test_half_precision_finds_what_the_model_holds(name, folder, tmp_path):
    """Linear layers too, in the same numbers as PyTorch's rules."""
    source = exports.exported(folder, name, "dynamo", 18, attention=default(name), dtype=torch.float16)
    report = trimaran.rewrite_onnx(source, tmp_path / "out.onnx", inputs=exports.feeds(name, dtype=torch.float16))
    assert report.replaced == Counter(models.FAMILIES[name].counts), report
    assert report.verified.startswith("verified")


def test_the_kernels_run_a_rewritten_llama(folder, tmp_path):
    """Packed rows through the rotary embedding into attention, gated layers, joined norms."""
    source = exports.exported(folder, "llama", "dynamo", 18, dtype=torch.float16)
    trimaran.rewrite_onnx(source, tmp_path / "out.onnx", verify=False)
    feeds = exports.feeds("llama", "left", torch.float16, size=2, length=5)
    with trimaran.interpret():
        got = trimaran.ort_session(tmp_path / "out.onnx", ["CPUExecutionProvider"]).run(None, feeds)
    seen = feeds["attention_mask"].astype(bool)
    np.testing.assert_allclose(got[0][seen], run(source, feeds)[0][seen], atol=2e-2)
    attention = [n for n in ir.load(tmp_path / "out.onnx").graph if n.op_type == "attention"]
    assert all(n.inputs[1] is None and n.inputs[0].producer().op_type == "rotary_embedding" for n in attention)


# ---- the onnx package's own tests of these operators

OPERATORS = ("attention", "layer_normalization", "rms_normalization", "rotary_embedding", "gelu", "swish")


def node_cases(operator):
    from onnx.backend.test.case.node import collect_testcases

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return [case for case in collect_testcases(None) if f"test_{operator}" in case.name]


@pytest.mark.parametrize(
    "operator",
    [pytest.param(op, marks=[] if op in ("gelu", "rms_normalization") else pytest.mark.slow) for op in OPERATORS],
)
def test_the_node_tests_of_onnx(operator):
    """Plain and `_expanded`, against the outputs they come with."""
    found = 0
    for case in node_cases(operator):
        model = ir.from_proto(case.model)
        rewrite(model)
        if not count_nodes(model):
            continue
        found += 1
        proto = ir.to_proto(model)
        onnx.checker.check_model(proto)
        session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
        for inputs, outputs in case.data_sets:
            feeds = {value.name: array for value, array in zip(case.model.graph.input, inputs, strict=False)}
            for got, expected in zip(session.run(None, feeds), outputs, strict=True):
                half = got.dtype.itemsize < 4
                np.testing.assert_allclose(
                    got.astype(np.float64), np.asarray(expected).astype(np.float64), atol=4e-3 if half else 1e-5,
                    rtol=4e-3 if half else 1e-4, err_msg=case.name,
                )  # fmt: skip
    assert found >= {"attention": 90, "layer_normalization": 12, "rms_normalization": 7}.get(operator, 0)
