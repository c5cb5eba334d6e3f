"""Shapes: inferred when a session is made, and planned for when it runs."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import onnx
import pytest
import torch
from onnx import TensorProto, helper
from oracle import assert_close
from ort import VERSION, feeds, graph_model, model, node, session_of
from ort_cases import CASES, GROUPED, LENGTHS, Case, expected, tensors

from trimaran.kernels.attention import attention
from trimaran.kernels.layer_norm import layer_norm
from trimaran.kernels.plans import PlanCache
from trimaran.ort_ops.domain import TRIMARAN

pytestmark = pytest.mark.usefixtures("interpreted")


def test_a_growing_sequence_keeps_its_plan() -> None:
    misses = []
    inputs = tensors(CASES["rows_lengths"], torch.float32)
    session = session_of(model(attention, inputs, ["out"], **GROUPED))
    for keys in (33, 34, 47, 60, 61):
        case = Case(attention, {"q": (2, 1, 32), "k": (2, keys, 16), "v": (2, keys, 16)}, GROUPED, LENGTHS)
        inputs = tensors(case, torch.float32)
        (out,) = session.run(None, feeds(inputs))
        assert_close(torch.from_numpy(out), expected(case, inputs, True)["out"], expected(case, inputs, False)["out"])
        misses.append(TRIMARAN.plans["attention"].misses)
    assert misses == [misses[0]] * 5


def test_nodes_and_sessions_share_plans() -> None:
    inputs = tensors(Case(layer_norm, {"x": (2, 77)}), torch.float32)
    before = TRIMARAN.plans["layer_norm"].misses
    for _ in range(2):
        nodes = [node("layer_norm", ["x"], ["y"], eps=1e-5), node("layer_norm", ["y"], ["z"], eps=1e-5)]
        session = session_of(graph_model(nodes, {"x": (1, ["a", "b"])}, {"z": 1}))
        session.run(None, feeds(inputs))
    assert TRIMARAN.plans["layer_norm"].misses == before + 1


@pytest.mark.usefixtures("path")
def test_initializers_are_constant_to_plans(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also behind an absent input; what a graph is fed is not."""
    seen: list[Any] = []
    find = PlanCache.find
    note = lambda self, inputs, *rest: seen.append([t and t.constant for t in inputs]) or find(self, inputs, *rest)  # noqa: E731
    monkeypatch.setattr(PlanCache, "find", note)
    made = node("layer_norm", ["x", "", "b"], ["y"], eps=0.125)
    proto = onnx.load_from_string(graph_model([made], {"x": (1, ["n", 8]), "b": (1, [8])}, {"y": 1}))
    fed = session_of(proto.SerializeToString())
    bias = proto.graph.input.pop()
    proto.graph.initializer.append(helper.make_tensor(bias.name, 1, [8], [1.0] * 8))
    x = torch.zeros(2, 8).numpy()
    assert session_of(proto.SerializeToString()).run(None, {"x": x})[0].sum() == 16
    assert fed.run(None, {"x": x, "b": torch.ones(8).numpy()})[0].sum() == 16
    assert seen == [[False, None, True, None], [False, None, False, None]]


def inferred(made: onnx.NodeProto, shapes: dict[str, list[Any]], outputs: Sequence[str]) -> list[list[Any]]:
    types = {name: (TensorProto.INT32 if name == "key_lengths" else 1, shape) for name, shape in shapes.items()}
    return [out.shape for out in session_of(graph_model([made], types, dict.fromkeys(outputs, 1))).get_outputs()]


infers = pytest.mark.skipif(
    VERSION < (1, 24), reason="this onnxruntime crashes on absent inputs where shapes are inferred"
)


@infers
def test_shapes_are_inferred() -> None:
    norm = node("layer_norm", ["x", "", "", "residual"], ["y", "sum"], eps=1e-5)
    shapes = inferred(norm, {"x": ["batch", "seq", 64], "residual": ["batch", "seq", 64]}, ["y", "sum"])
    assert shapes == [["batch", "seq", 64], ["batch", "seq", 64] if VERSION >= (1, 28) else []]
    norm = node("layer_norm", ["x"], ["y"], eps=1e-5)  # without `sum`, which older releases must not hear of
    assert inferred(norm, {"x": ["batch", "seq", 64]}, ["y"]) == [["batch", "seq", 64]]
    rows = node("attention", ["q", "k", "v", "", "key_lengths"], ["out"], scale=1.0, num_heads=4)
    shapes = inferred(
        rows, {"q": ["b", "s", 64], "k": ["b", "t", 64], "v": ["b", "t", 64], "key_lengths": ["b"]}, ["out"]
    )
    assert shapes == [["b", "s", 64]]
    heads = node("attention", ["q", "k", "v"], ["out"], scale=1.0)
    assert inferred(heads, {name: ["b", 4, "s", 16] for name in "qkv"}, ["out"]) == [["b", 4, "s", 16]]
    packed = node("attention", ["q"], ["out"], scale=1.0, num_heads=4, kv_num_heads=2)
    assert inferred(packed, {"q": ["b", 5, 128]}, ["out"]) == [["b", 5, 64]]


@infers
def test_unknown_dimensions_get_names_of_their_own() -> None:
    norm = node("layer_norm", ["x"], ["y"], eps=1e-5)
    ((first, second, last),) = inferred(norm, {"x": [None, None, 64]}, ["y"])
    assert isinstance(first, str)
    assert isinstance(second, str)
    assert first != second
    assert last == 64
    packed = node("attention", ["q"], ["out"], scale=1.0, num_heads=4)
    ((batch, length, width),) = inferred(packed, {"q": ["b", "s", "w"]}, ["out"])
    assert (batch, length) == ("b", "s")
    assert isinstance(width, str)
    assert width not in ("b", "s", "w")


def test_an_input_of_unknown_rank_is_no_error(caplog: pytest.LogCaptureFixture) -> None:
    norm = node("layer_norm", ["x"], ["y"], eps=1e-5)
    content = graph_model([norm], {"x": (1, None)}, {"y": 1})
    session = session_of(content)
    x = torch.randn(2, 8)
    (y,) = session.run(None, {"x": x.numpy()})
    assert torch.allclose(torch.from_numpy(y), torch.nn.functional.layer_norm(x, (8,)), atol=1e-5)
    assert caplog.records == []


@infers
def test_wrong_static_shapes_are_logged_at_load(caplog: pytest.LogCaptureFixture) -> None:
    norm = node("layer_norm", ["x", "w"], ["y"], eps=1e-5)
    with caplog.at_level(logging.WARNING, "trimaran"):
        inferred(norm, {"x": [2, 64], "w": [63]}, ["y"])
    assert "trimaran.layer_norm" in caplog.text
    assert "weight has shape [63], expected [N] = [64]" in caplog.text
