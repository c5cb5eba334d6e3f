"""`trimaran.ort_session` and `register`: where ops are registered, what happens elsewhere, what bad arguments get."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper
from ort import CPU, CUDA, VERSION, graph_model, model, quiet

from trimaran.kernels.catalog import OPS
from trimaran.kernels.contract import Device
from trimaran.kernels.cuda import CudaError
from trimaran.kernels.interpreter import interpret
from trimaran.kernels.layer_norm import layer_norm
from trimaran.ort_ops import session as session_module
from trimaran.ort_ops.domain import Domain
from trimaran.ort_ops.session import default_providers, ort_session, register

X = np.random.default_rng(1).standard_normal((2, 8)).astype(np.float32)
NORMAL = torch.nn.functional.layer_norm(torch.from_numpy(X), (8,)).numpy()
PLAIN = model(layer_norm, {"x": torch.zeros(2, 8)}, ["y"], eps=1e-5)


def body(overload: str, added: float) -> onnx.FunctionProto:
    """A function body that adds a number instead of normalizing, so that one sees what ran."""
    nodes = [
        helper.make_node("Constant", [], ["added"], value_float=added),
        helper.make_node("Add", ["x", "added"], ["y"]),
    ]
    opsets = [helper.make_opsetid("", 17)]
    made = helper.make_function("trimaran", "layer_norm", ["x"], ["y"], nodes, opsets, attributes=["eps"])
    made.overload = overload
    return made


def with_body(overload: str = "x" if VERSION >= (1, 27) else "") -> bytes:
    proto = onnx.load_from_string(PLAIN)
    proto.graph.node[0].overload = overload
    proto.functions.append(body(overload, 1.0))
    return proto.SerializeToString()


def run(session: onnxruntime.InferenceSession) -> Any:
    return session.run(None, {"x": X})[0]


# Where the ops are registered


def test_a_cpu_session_runs_the_function_body() -> None:
    assert register(quiet(), [CPU]) == ()
    assert np.array_equal(run(ort_session(with_body(), [CPU])), X + 1)


@pytest.mark.parametrize("overload", ["first", "second"])
def test_bodies_of_one_op_are_told_apart(overload: str) -> None:
    proto = onnx.load_from_string(with_body(overload))
    del proto.functions[:]
    proto.functions.extend([body("first", 1.0), body("second", 2.0)])
    if VERSION < (1, 27):
        with pytest.raises(RuntimeError, match=r"need onnxruntime 1\.27"):
            ort_session(proto.SerializeToString(), [CPU])
    else:
        assert np.array_equal(
            run(ort_session(proto.SerializeToString(), [CPU])), X + {"first": 1, "second": 2}[overload]
        )


def test_an_interpreting_cpu_session_runs_the_kernel() -> None:
    with interpret():
        assert register(quiet(), [CPU]) == tuple(OPS)
        session = ort_session(with_body(), [CPU])
    assert np.allclose(run(session), NORMAL, atol=1e-5)  # decided when it was made


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Pretend: an onnxruntime that has CUDA, and devices of these capabilities. Nothing is run."""
    capabilities: list[int] = []

    def device(index: int) -> Device:
        if index >= len(capabilities):
            raise CudaError("no such device")
        return Device("cuda", index, capabilities[index])

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [CUDA, CPU])
    monkeypatch.setattr(session_module, "device", device)
    return capabilities


def kernels_of(monkeypatch: pytest.MonkeyPatch, providers: list[Any]) -> set[str]:
    """The execution providers for which `register` registers kernels."""
    with monkeypatch.context() as patch:
        seen: list[set[str]] = [set()]
        patch.setattr(session_module.TRIMARAN, "register", lambda _, kernels: seen.append(kernels) or ("all",))
        register(quiet(), providers)
        return seen[-1]


def test_cuda_kernels_are_for_gpus_that_run_them(gpu: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    assert kernels_of(monkeypatch, [CUDA, CPU]) == set()  # no device
    gpu += [75, 90]
    assert kernels_of(monkeypatch, [CUDA, CPU]) == set()
    assert kernels_of(monkeypatch, [(CUDA, {"device_id": "1"}), CPU]) == {CUDA}
    assert kernels_of(monkeypatch, [(CUDA, {"device_id": 2}), CPU]) == set()
    assert kernels_of(monkeypatch, [CPU]) == set()
    gpu[0] = 80
    assert kernels_of(monkeypatch, [CUDA]) == {CUDA}
    with interpret():
        assert kernels_of(monkeypatch, [CUDA, CPU]) == {CUDA, CPU}
        assert kernels_of(monkeypatch, [CPU]) == {CPU}


def test_the_device_may_be_named_in_provider_options(gpu: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    gpu += [75, 90]
    seen = []

    def stop(_: Any, kernels: set[str]) -> tuple[str, ...]:
        seen.append(kernels)
        raise InterruptedError

    monkeypatch.setattr(session_module.TRIMARAN, "register", stop)
    with pytest.raises(InterruptedError):
        ort_session(PLAIN, [CUDA, CPU], provider_options=[{"device_id": 1}, {}])
    assert seen == [{CUDA}]


def test_graphs_work_on_a_stream_that_is_known(gpu: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session_module, "driver", lambda index: SimpleNamespace(stream=77 + index))
    graphs = {"enable_cuda_graph": "1", "user_compute_stream": "78"}
    found = session_module._with_graphs([(CUDA, {"device_id": 1}), CPU])
    assert found == [(CUDA, {"device_id": 1} | graphs), (CPU, {})]
    ((_, options),) = session_module._with_graphs([(CUDA, {"user_compute_stream": "5"})])
    assert options == {"enable_cuda_graph": "1", "user_compute_stream": "5"}


def test_default_providers(gpu: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    assert default_providers() == [CPU]
    gpu.append(75)
    assert default_providers() == [CUDA, CPU]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [CPU])
    assert default_providers() == [CPU]


def test_cuda_kernels_do_not_load_where_cuda_is_not(gpu: list[int]) -> None:
    """The structs are as ORT wants them, but this session has the CPU alone: an error, no silent other kernel."""
    gpu.append(90)
    options = quiet()
    assert register(options, [CUDA, CPU]) == tuple(OPS)
    with pytest.raises(Exception, match="layer_norm"):
        onnxruntime.InferenceSession(PLAIN, options, providers=[CPU])


def test_the_same_options_twice() -> None:
    options = quiet()
    with interpret():
        assert np.allclose(run(ort_session(PLAIN, [CPU], session_options=options)), NORMAL, atol=1e-5)
        assert np.allclose(run(ort_session(PLAIN, [CPU], session_options=options)), NORMAL, atol=1e-5)
        beside = Domain("test.beside", [replace(layer_norm, name="other")])
        assert register(options, [CPU], beside) == ("other",)
        assert np.allclose(run(ort_session(PLAIN, [CPU], session_options=options)), NORMAL, atol=1e-5)


def test_the_same_options_with_other_choices(gpu: list[int]) -> None:
    gpu.append(90)
    options = quiet()
    with interpret():
        register(options, [CPU])
        with pytest.raises(
            ValueError, match=r"already have the ops of domain trimaran for CPUExec.*; make new Session"
        ):
            register(options, [CUDA, CPU])


# Arguments


def test_a_model_may_be_a_path_or_bytes(tmp_path: Path) -> None:
    path = tmp_path / "mödel.onnx"
    path.write_bytes(with_body())
    for given in (path, str(path), with_body()):
        assert np.array_equal(run(ort_session(given, [CPU])), X + 1)
    options = quiet()
    options.log_severity_level = 3
    session = ort_session(path, session_options=options, disabled_optimizers=["ConstantFolding"])
    assert np.array_equal(run(session), X + 1)
    assert session.get_session_options().log_severity_level == 3


def test_files_that_are_no_models(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        ort_session(tmp_path / "none.onnx")
    assert caught.value.filename == str(tmp_path / "none.onnx")
    with pytest.raises(ValueError, match="is a directory, expected an ONNX file"):
        ort_session(tmp_path)
    text = tmp_path / "text.onnx"
    text.write_text("hello world, this is text")
    with pytest.raises(ValueError, match=r"text\.onnx is not an ONNX model: it starts with b'hello world"):
        ort_session(text)
    text.write_bytes(b"")
    with pytest.raises(ValueError, match=r"text\.onnx is not an ONNX model: it has no graph"):
        ort_session(text)
    with pytest.raises(ValueError, match="the model of 7 bytes is not an ONNX model: it starts with b'hello w'"):
        ort_session(b"hello w")


@pytest.mark.parametrize(
    ("arguments", "error", "reason"),
    [
        ({"path": 3}, TypeError, "path is 3, expected a str, a PathLike or the bytes"),
        ({"path": None}, TypeError, "path is None"),
        ({"providers": CPU}, TypeError, "providers is 'CPUExecutionProvider', expected a list"),
        ({"providers": [7]}, TypeError, "a provider is 7, expected a name or a pair"),
        ({"providers": [(CPU, 3)]}, TypeError, "expected a name or a pair"),
        ({"providers": ["GPU", CPU]}, ValueError, "this onnxruntime has no GPU, but .*CPUExecutionProvider"),
        ({"provider_options": [{}, {}]}, ValueError, r"provider_options is \[{}, {}\], expected one mapping for each"),
        ({"provider_options": 3}, ValueError, "provider_options is 3, expected one mapping"),
        ({"session_options": "fast"}, TypeError, "options is 'fast', expected an onnxruntime.SessionOptions"),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], error: type[Exception], reason: str) -> None:
    with pytest.raises(error, match=reason):
        ort_session(**{"path": PLAIN, **arguments})


def test_no_onnxruntime(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ImportError, match=r"pip install trimaran\[cpu\], trimaran\[cuda12\]"):
        ort_session(PLAIN)


def test_a_node_with_neither_kernel_nor_body() -> None:
    for content in (PLAIN, in_subgraph(PLAIN)):
        with pytest.raises(
            ValueError, match=r"has nodes layer_norm of trimaran without a function body; ops registered: n"
        ):
            ort_session(content, [CPU])
    proto = onnx.load_from_string(PLAIN)
    proto.graph.node[0].op_type = "batch_norm"
    with (
        interpret(),
        pytest.raises(ValueError, match=r"has nodes batch_norm of .*; ops registered: attention, layer_norm"),
    ):
        ort_session(proto.SerializeToString(), [CPU])


def in_subgraph(content: bytes) -> bytes:
    """The model's node within both branches of an If."""
    proto = onnx.load_from_string(content)
    inner = onnx.GraphProto(name="branch", node=proto.graph.node, output=proto.graph.output)
    choice = helper.make_node("If", ["choose"], ["z"], then_branch=inner, else_branch=inner)
    return graph_model([choice], {"choose": (TensorProto.BOOL, []), "x": (1, ["a", "b"])}, {"z": 1})


def test_a_node_in_a_subgraph() -> None:
    with interpret():
        session = ort_session(in_subgraph(PLAIN), [CPU])
    (z,) = session.run(None, {"x": X, "choose": np.array(True)})
    assert np.allclose(z, NORMAL, atol=1e-5)


def test_bodies_that_an_old_onnxruntime_would_confuse(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxruntime, "__version__", "1.26.1")
    with pytest.raises(
        RuntimeError, match=r"nodes layer_norm of trimaran, .* need onnxruntime 1\.27 .* this is 1\.26\.1"
    ):
        ort_session(with_body("x"), [CPU])
    assert np.array_equal(run(ort_session(with_body(""), [CPU])), X + 1)
    with interpret():
        assert np.allclose(run(ort_session(with_body("x"), [CPU])), NORMAL, atol=1e-5)
    with pytest.raises(ValueError, match="is not an ONNX model"):
        ort_session(b"hello w")


def test_other_errors_stay_onnxruntimes_own() -> None:
    proto = onnx.load_from_string(with_body())
    proto.ir_version = 999
    with pytest.raises(Exception, match="999") as caught:
        ort_session(proto.SerializeToString(), [CPU])
    assert caught.value.__class__.__module__.startswith("onnxruntime")
