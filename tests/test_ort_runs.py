"""Sessions with nodes of ours under every option, in threads, in processes that fork or end."""

from __future__ import annotations

import gc
import threading
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper
from ort import CPU, PROVIDERS, feeds, graph_model, hammered, model, node, python, quiet, session_of
from ort_cases import NORM, Case, expected, tensors

from trimaran.kernels.attention import attention
from trimaran.kernels.layer_norm import layer_norm
from trimaran.ort_ops import custom_op, kernel
from trimaran.ort_ops.session import ort_session

pytestmark = pytest.mark.usefixtures("interpreted")


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("level", ["DISABLE_ALL", "ENABLE_BASIC", "ENABLE_EXTENDED", "ENABLE_ALL"])
def test_every_level_of_optimization(level: str, provider: str) -> None:
    """Nodes among others that are folded, fused or left."""
    nodes = [
        helper.make_node("Add", ["x", "r"], ["sum"], name="add"),
        node("layer_norm", ["sum", "w", "b"], ["y"], eps=1e-5),
        helper.make_node("Identity", ["y"], ["z"], name="identity"),
        helper.make_node("Relu", ["z"], ["out"], name="relu"),
    ]
    shapes: dict[str, tuple[Any, ...]] = {"x": ("n", 8), "r": ("n", 8), "w": (8,), "b": (8,)}
    options = quiet()
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, f"ORT_{level}")
    content = graph_model(nodes, {name: (1, list(shape)) for name, shape in shapes.items()}, {"out": 1})
    session = ort_session(content, [provider], session_options=options)
    x, r, w, b = torch.randn(3, 8), torch.randn(3, 8), torch.randn(8), torch.randn(8)
    (out,) = session.run(None, feeds({"x": x, "r": r, "w": w, "b": b}))
    assert torch.allclose(torch.from_numpy(out), torch.nn.functional.layer_norm(x + r, (8,), w, b).relu(), atol=1e-5)


def test_a_half_precision_model_in_a_cpu_session() -> None:
    """ONNX Runtime has no fp16 kernel for some neighbours there, and may run the node in fp32 between casts."""
    nodes = [
        helper.make_node("Erf", ["x"], ["e"], name="before"),
        node("layer_norm", ["e"], ["y"], eps=1e-5),
        helper.make_node("Erf", ["y"], ["z"], name="after"),
    ]
    session = session_of(graph_model(nodes, {"x": (TensorProto.FLOAT16, ["n", 33])}, {"z": TensorProto.FLOAT16}))
    x = torch.randn(5, 33).half()
    (z,) = session.run(None, feeds({"x": x}))
    exact = torch.erf(torch.nn.functional.layer_norm(torch.erf(x.double()), (33,)))
    assert z.dtype == "float16"
    assert torch.allclose(torch.from_numpy(z).double(), exact, atol=5e-3)


KEPT: list[Any] = []


def test_run_async() -> None:
    x = torch.randn(3, 33)
    options = quiet()
    options.intra_op_num_threads = 2  # it takes one of them
    session = ort_session(model(layer_norm, {"x": x}, ["y"], eps=1e-5), [CPU], session_options=options)
    done = threading.Event()
    found: list[Any] = []

    def finished(results: Any, data: Any, error: str) -> None:
        found.extend([results, error])
        done.set()

    # A session that is dropped waits, holding the GIL, for its thread, and that may need the GIL to leave the callback.
    KEPT.append(session)
    session.run_async(None, feeds({"x": x}), finished, None)
    assert done.wait(60)
    assert found[1] == ""
    assert torch.allclose(torch.from_numpy(found[0][0]), torch.nn.functional.layer_norm(x, (33,)), atol=1e-4)


@pytest.mark.usefixtures("path")
def test_eight_threads_on_one_session() -> None:
    case = Case(layer_norm, {**NORM, "weight": (33,)}, {"eps": 1e-5}, outputs=("y",))
    session = session_of(model(layer_norm, tensors(case, torch.float32), ["y"], eps=1e-5))

    def right(turn: int) -> bool:
        x = torch.randn(1 + turn % 3, 5, 33, generator=torch.Generator().manual_seed(turn))
        inputs = {"x": x, "weight": torch.full((33,), float(turn))}
        (y,) = session.run(None, feeds(inputs))
        return torch.allclose(torch.from_numpy(y), expected(case, inputs, False)["y"], atol=1e-3)

    assert hammered(right, threads=8, times=3) == []


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("provider", PROVIDERS)
def test_nodes_on_threads_of_onnxruntime(provider: str) -> None:
    names = [f"y{index}" for index in range(8)]
    nodes = [node("layer_norm", ["x"], [name], eps=1e-5) for name in names]
    options = quiet()
    options.execution_mode = onnxruntime.ExecutionMode.ORT_PARALLEL
    options.inter_op_num_threads = 4
    content = graph_model(nodes, {"x": (1, ["a", "b"])}, dict.fromkeys(names, 1))
    session = ort_session(content, [provider], session_options=options)
    x = torch.randn(4, 33)
    for _ in range(3):
        for y in session.run(None, {"x": x.numpy()}):
            assert torch.allclose(torch.from_numpy(y), torch.nn.functional.layer_norm(x, (33,)), atol=1e-4)


@pytest.mark.usefixtures("path")
def test_a_hundred_sessions_leave_nothing_behind() -> None:
    x = torch.randn(2, 8)
    content = model(layer_norm, {"x": x}, ["y"], eps=1e-5)
    session_of(content)
    gc.collect()
    kernels, structs = len(kernel.KERNELS), len(custom_op._VARIANTS)
    for index in range(100):
        session = session_of(content)
        if index % 20 == 0:
            session.run(None, {"x": x.numpy()})
    assert len(kernel.KERNELS) == kernels + 1
    del session
    gc.collect()
    assert (len(kernel.KERNELS), len(custom_op._VARIANTS)) == (kernels, structs)


# Processes


START = f"""
import os, sys, numpy as np
from trimaran.kernels.interpreter import interpret
from trimaran.ort_ops.session import ort_session
interpret()
content = {model(layer_norm, {"x": torch.zeros(2, 8)}, ["y"], eps=1e-5)!r}
x = np.ones((2, 8), "f")
"""


def test_no_torch_is_needed(tmp_path: Path) -> None:
    inputs = {"q": torch.randn(1, 3, 16), "key_lengths": torch.tensor([2], dtype=torch.int32)}
    other = model(attention, inputs, ["out"], scale=0.5, num_heads=2, kv_num_heads=1, causal=True)
    inputs["q"] = torch.zeros(1, 3, 16)
    code = f"""
ort_session(content).run(None, {{"x": x}})
q, lengths = np.zeros((1, 3, 16), "f"), np.array([2], "i4")
print(ort_session({other!r}).run(None, {{"q": q, "key_lengths": lengths}})[0].shape)
print("torch" in sys.modules)
"""
    assert python(START + code, tmp_path).split("\n")[:2] == ["(1, 3, 8)", "False"]


@pytest.mark.parametrize(
    "keep",
    [
        "pass",
        "sys.kept = session",
        "session.me = [session]; session.me.append(session.me)",
        "import atexit; atexit.register(lambda s=session: s.run(None, {'x': x}))",
        "import threading, time; threading.Thread(target=lambda s=session: time.sleep(60), daemon=True).start()",
        "import ctypes; ctypes.pythonapi.Py_IncRef(ctypes.py_object(session))",
        "trimaran = sys.modules['trimaran.ort_ops.custom_op']; trimaran.__dict__['kept'] = session",
    ],
)
def test_exit_with_a_live_session(keep: str, tmp_path: Path) -> None:
    python(START + f"session = ort_session(content)\nsession.run(None, {{'x': x}})\n{keep}\n", tmp_path)


def test_fork(tmp_path: Path) -> None:
    code = """
import onnxruntime
def one():
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort_session(content, session_options=options)
    assert abs(session.run(None, {"x": x})[0]).max() == 0
    return session
before = one()
child = os.fork()
one()
assert before.run(None, {"x": x})[0].shape == (2, 8)
if not child:
    os._exit(7)  # at a normal exit onnxruntime 1.32 aborts in the child, with no op of ours as well
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    assert python(START + code, tmp_path) == "7\n"


def test_registering_after_the_file_descriptors_were_closed(tmp_path: Path) -> None:
    """As daemons do."""
    code = """
first = ort_session(content)
os.closerange(3, 256)
handles = [os.open("/dev/null", os.O_RDONLY) for _ in range(20)]
print(ort_session(content).run(None, {"x": x})[0].shape)
"""
    assert python(START + code, tmp_path) == "(2, 8)\n"
