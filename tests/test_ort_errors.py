"""What goes wrong in a node is an exception of ONNX Runtime's that says where and why, and the session works on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from oracle import assert_close
from ort import failure, feeds, graph_model, model, node, session_of
from ort_cases import CASES, GROUPED, expected, tensors

from trimaran.kernels.attention import attention
from trimaran.kernels.interpreter import Interpreter
from trimaran.kernels.layer_norm import layer_norm

pytestmark = pytest.mark.usefixtures("interpreted")


@pytest.mark.usefixtures("path")
def test_shapes_that_disagree_and_the_session_works_on() -> None:
    case = CASES["rows_lengths"]
    inputs = tensors(case, torch.float32)
    session = session_of(model(attention, inputs, ["out"], **GROUPED))
    exact, peer = expected(case, inputs, True)["out"], expected(case, inputs, False)["out"]
    for _ in range(3):
        text = failure(lambda: session.run(None, feeds({**inputs, "k": inputs["k"][:, :, :8]})))
        assert text.startswith("InvalidArgument")
        assert "trimaran.attention, node 'the_attention': ValueError: attention: k has shape [2, 2, 13, 4]" in text
        assert_close(torch.from_numpy(session.run(None, feeds(inputs))[0]), exact, peer)


@pytest.mark.parametrize(
    ("made", "reason"),
    [
        (node("layer_norm", ["x"], ["y"]), "ValueError: layer_norm: attribute eps is missing, expected a float"),
        (node("layer_norm", ["x"], ["y"], eps="small"), "TypeError: layer_norm: eps is 'small', expected a float"),
        (node("layer_norm", ["x"], ["y"], eps=[1.0, 2.0]), "TypeError: layer_norm: eps is [1.0, 2.0], expected"),
        (
            node("attention", ["x"], ["y"], scale=1.0, num_heads=1.5),
            "TypeError: attention: num_heads is 1.5, expected a int",
        ),
        (
            node("attention", ["x"], ["y"], scale=1.0, num_heads=1, masked_row="nan"),
            "ValueError: attention: masked_row is 'nan', expected one of zero, mean",
        ),
    ],
    ids=lambda value: None if isinstance(value, str) else value.op_type,
)
def test_wrong_attributes_are_refused_at_load(made: onnx.NodeProto, reason: str) -> None:
    text = failure(lambda: session_of(graph_model([made], {"x": (1, ["a", "b", "c"])}, {"y": 1})))
    assert f"trimaran.{made.op_type}, node 'the_{made.op_type}'" in text
    assert reason in text


def test_attributes_have_defaults_and_an_int_may_be_a_float() -> None:
    x = torch.randn(2, 8)
    session = session_of(graph_model([node("layer_norm", ["x"], ["y"], eps=1)], {"x": (1, ["a", "b"])}, {"y": 1}))
    (y,) = session.run(None, {"x": x.numpy()})
    assert torch.allclose(torch.from_numpy(y), torch.nn.functional.layer_norm(x, (8,), eps=1.0), atol=1e-5)


@pytest.mark.parametrize("name", ["k", "bias"])
def test_dtypes_that_differ_are_refused_at_load(name: str) -> None:
    inputs = tensors(CASES["heads_bias"], torch.float32)
    inputs[name] = inputs[name].half()
    text = failure(lambda: session_of(model(attention, inputs, ["out"], scale=1.0)))
    assert "the_attention" in text
    takes = (
        "takes q: T, k?: T, v?: T, bias?: T, key_lengths?: int32, key_mask?: bool; T is float32 or float16 or bfloat16"
    )
    assert takes in text


def test_a_dtype_that_the_op_has_not_is_refused_at_load() -> None:
    text = failure(lambda: session_of(model(layer_norm, {"x": torch.zeros(2, 8).double()}, ["y"], eps=1.0)))
    assert "tensor(double)" in text


@pytest.mark.usefixtures("path")
def test_a_declined_plan_is_an_error_with_its_reason() -> None:
    session = session_of(model(attention, {name: torch.zeros(1, 1, 2, 8) for name in "qkv"}, ["out"], scale=1.0))
    wide = feeds({name: torch.zeros(1, 1, 2, 264) for name in "qkv"})
    text = failure(lambda: session.run(None, wide))
    assert text.startswith("NotImplemented")
    assert "attention has no kernel for these inputs: head dimension of more than 256" in text
    assert session.run(None, feeds({name: torch.zeros(1, 1, 2, 8) for name in "qkv"}))[0].shape == (1, 1, 2, 8)


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("error", [RuntimeError("broken \0 é"), KeyboardInterrupt(), SystemExit(3)], ids=repr)
def test_any_exception_becomes_a_status(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(2, 8)
    session = session_of(model(layer_norm, {"x": x}, ["y"], eps=1e-5))

    def launch(*_: Any) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(Interpreter, "launch", launch)
        text = failure(lambda: session.run(None, {"x": x.numpy()}))
    assert text.startswith("Fail")
    assert f"trimaran.layer_norm, node 'the_layer_norm': {type(error).__name__}: " in text
    assert f"({Path(__file__).name}:" in text
    assert session.run(None, {"x": x.numpy()})[0].shape == (2, 8)


@pytest.mark.usefixtures("path")
def test_an_output_without_the_input_it_needs() -> None:
    session = session_of(model(layer_norm, {"x": torch.zeros(2, 8)}, ["y", "sum"], eps=1e-5))
    text = failure(lambda: session.run(None, {"x": torch.zeros(2, 8).numpy()}))
    assert "output sum is asked for, but the inputs it needs are missing" in text


@pytest.mark.usefixtures("path")
def test_an_absent_output_before_one_that_is_there() -> None:
    """`y` is required: what computes nothing for it is an error, never an empty value."""
    inputs = {"x": torch.zeros(2, 8), "residual": torch.zeros(2, 8)}
    text = failure(lambda: session_of(model(layer_norm, inputs, ["sum"], eps=1e-5)).run(None, feeds(inputs)))
    assert "the_layer_norm" in text
    assert "output 0" in text
