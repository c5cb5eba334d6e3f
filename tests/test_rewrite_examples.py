"""onnxscript's example models, which have the shapes of what exporters write: each is rewritten and compared."""

from __future__ import annotations

import importlib
import inspect
import pkgutil

import onnx
import onnx_ir as ir
import onnxscript.rewriter.models as examples
import pytest

import trimaran

EXPECTED = {  # of each class that makes a model
    "_BartEncoderTest": {"attention": 2, "layer_norm": 5},
    "_Phi2LMTest": {"attention": 1, "layer_norm": 2},
    "_Phi4LMTest": {"attention": 1, "rms_norm": 3, "rotary_embedding": 1},
    "_TestCase1": {"rotary_embedding": 1},
    "_TestCase2": {"rotary_embedding": 1},
    "_PartialRotaryTestCase": {"rotary_embedding": 1},
    "_SmollmTest1": {"attention": 1, "rms_norm": 3, "rotary_embedding": 1},
    "_WhisperDecoderTest": {"attention": 2, "layer_norm": 4},
    "_WhisperEncoderTest": {"attention": 1, "layer_norm": 3},
}
LARGE = ("_Phi2LMTest", "_Phi4LMTest")  # gigabytes of random weights
QUICK = ("_TestCase1", "_PartialRotaryTestCase")


def sources():
    for module in pkgutil.iter_modules(examples.__path__):
        if module.name != "_test_models":  # makes its own exports
            found = importlib.import_module(f"{examples.__name__}.{module.name}")
            for name, kind in inspect.getmembers(found, inspect.isclass):
                if kind.__module__ == found.__name__ and hasattr(kind, "get_onnx_model"):
                    yield name, kind


SOURCES = dict(sources())


def test_no_example_is_forgotten():
    assert SOURCES.keys() >= EXPECTED.keys()


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in QUICK else pytest.mark.slow) for n in SOURCES])
def test_an_example(name, tmp_path):
    made = SOURCES[name]()
    ir.save(made.get_onnx_model(), tmp_path / "in.onnx", external_data="in.data")
    inputs = made.get_ort_inputs() if hasattr(made, "get_ort_inputs") else None
    report = trimaran.rewrite_onnx(tmp_path / "in.onnx", tmp_path / "out.onnx", inputs=inputs, verify=name not in LARGE)
    assert dict(report.replaced) == EXPECTED.get(name, dict(report.replaced)), report
    assert report.verified.startswith("verified") or name in LARGE, report
    onnx.checker.check_model(tmp_path / "out.onnx")
