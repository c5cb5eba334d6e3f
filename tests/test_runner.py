"""`trimaran.Runner`: tensors of torch, CuPy and NumPy through a session, without copies, and CUDA graphs by shape."""

from __future__ import annotations

import gc
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from onnx import TensorProto, helper
from ort import CPU, ELEMENT, graph_model, hammered, python, runner, sums

from trimaran.ort_ops import calls, dlpack
from trimaran.ort_ops.runner import Runner
from trimaran.ort_ops.session import ort_session
from trimaran.ort_ops.tensors import library_of

DTYPES = [str(dtype).removeprefix("torch.") for dtype in ELEMENT]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def identity(dtype: str) -> bytes:
    """y = x, which a runtime still copies; z = its shape."""
    nodes = [helper.make_node("Identity", ["x"], ["y"]), helper.make_node("Shape", ["x"], ["z"])]
    element = ELEMENT[getattr(torch, dtype)]
    return graph_model(nodes, {"x": (element, None)}, {"y": element, "z": TensorProto.INT64})


def sample(dtype: str, shape: tuple[int, ...] = (3, 5)) -> torch.Tensor:
    return torch.randint(0, 2 if dtype == "bool" else 100, shape).to(getattr(torch, dtype))


# What goes in and comes out


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_torch_tensors_of_every_dtype(dtype: str, device: str) -> None:
    x = sample(dtype).to(device)
    y = runner(identity(dtype), device)({"x": x})["y"]
    assert isinstance(y, torch.Tensor)
    assert (y.device, y.dtype) == (x.device, x.dtype)
    assert torch.equal(y, x)


@pytest.mark.parametrize("dtype", DTYPES)
def test_numpy_arrays_of_every_dtype(dtype: str) -> None:
    x = np.arange(15).reshape(3, 5).astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    found = runner(identity(dtype))({"x": x})
    assert isinstance(found["y"], np.ndarray)
    assert found["y"].dtype == x.dtype
    assert np.array_equal(found["y"], x)
    assert found["z"].tolist() == [3, 5]


@pytest.mark.parametrize("shape", [(), (0, 3), (1,), (2, 0)])
@pytest.mark.parametrize("library", [torch, np])
def test_scalars_and_empty_tensors(library: Any, shape: tuple[int, ...]) -> None:
    y = runner(identity("float32"))({"x": library.ones(shape, dtype=library.float32)})["y"]
    assert tuple(y.shape) == shape
    assert bool((y == 1).all())


def test_a_numpy_scalar_and_a_read_only_array() -> None:
    run = runner(identity("float32"))
    assert run({"x": np.float32(3)})["y"] == 3
    x = np.arange(4, dtype=np.float32)
    x.flags.writeable = False
    assert np.array_equal(run({"x": x})["y"], x)


def addresses_bound(run: Runner, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The addresses that the session gets for inputs."""
    found: list[int] = []
    before = run._binding

    def binding(memories: Any) -> Any:
        found.extend(memory.address for memory in memories)
        return before(memories)

    monkeypatch.setattr(run, "_binding", binding)
    return found


@pytest.mark.parametrize("library", [torch, np])
def test_nothing_is_copied(library: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    run = runner(identity("float32"))
    bound = addresses_bound(run, monkeypatch)
    made: list[int] = []
    tensor = library_of(type(library.zeros(1))).tensor
    monkeypatch.setattr(library_of(type(library.zeros(1))), "tensor", lambda m: made.append(m.address) or tensor(m))
    x = library.ones((64, 64), dtype=library.float32)
    y = run({"x": x})["y"]
    address = (lambda t: t.data_ptr()) if library is torch else (lambda t: t.ctypes.data)
    assert bound == [address(x)]
    assert made[0] == address(y)


def test_what_is_not_contiguous_is_made_so() -> None:
    x = torch.arange(12.0).reshape(3, 4)
    run = runner(identity("float32"))
    for given in (x.t(), x[:, ::2], x[:, 1:2], x.expand(2, 3, 4)):
        assert torch.equal(run({"x": given})["y"], given)
    assert np.array_equal(run({"x": x.numpy().T})["y"], x.numpy().T)


class Mine(torch.Tensor):
    """Of a module that is no library."""


class Foreign:
    """Of a library of which nothing is known but that it speaks DLPack."""

    __module__ = "foreign"

    def __init__(self, array: Any) -> None:
        self.array, self.dtype, self.device = array, array.dtype, "here"

    def __dlpack__(self, **_: Any) -> Any:
        return self.array.__dlpack__()


@pytest.fixture(autouse=True)
def foreign(monkeypatch: pytest.MonkeyPatch) -> None:
    """The library: two functions."""
    library = SimpleNamespace(__name__="foreign", ascontiguousarray=lambda x: Foreign(np.ascontiguousarray(x.array)))
    library.from_dlpack = lambda shared: Foreign(torch.from_dlpack(shared).numpy())
    monkeypatch.setitem(sys.modules, "foreign", library)


def test_what_else_is_a_tensor() -> None:
    run = runner(identity("float32"))
    x = torch.arange(12.0).reshape(3, 4)
    parameter = torch.nn.Parameter(x, requires_grad=False)
    for given in (
        parameter,
        x.as_subclass(Mine),
        torch._neg_view(x),
        x.contiguous(memory_format=torch.preserve_format),
    ):
        y = run({"x": given})["y"]
        assert isinstance(y, torch.Tensor)
        assert torch.equal(y, given)
    for given in (x.numpy(), x.numpy()[:, ::2]):
        y = run({"x": Foreign(given)})["y"]
        assert isinstance(y, Foreign)
        assert np.array_equal(y.array, given)


def test_calls_of_many_kinds(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is known of a kind of call is kept, and forgotten where there are too many."""
    monkeypatch.setattr(calls, "KINDS", 4)
    run = runner(identity("float32"))
    seen: list[int] = []
    checked = run._reader._checked
    monkeypatch.setattr(run._reader, "_checked", lambda name, x: seen.append(len(x)) or checked(name, x))
    for size in (1, 2, 1, 2, 3, 4, 1, 5, 1):
        x = torch.ones(size)
        assert torch.equal(run({"x": x})["y"], x)
        assert len(run._reader.calls) <= 4
    assert seen == [1, 2, 3, 4, 5, 1]


def test_outputs_outlive_the_runner_and_give_their_memory_back() -> None:
    run = runner(identity("float32"))
    y = run({"x": torch.arange(6.0)})["y"]
    held = len(dlpack._LIVE)
    del run
    gc.collect()
    assert y.tolist() == [0, 1, 2, 3, 4, 5]
    y += 1
    del y
    gc.collect()
    assert len(dlpack._LIVE) == held - 1


def test_results_of_two_calls_are_apart() -> None:
    run = runner(identity("float32"))
    first = run({"x": torch.zeros(8)})["y"]
    second = run({"x": torch.ones(8)})["y"]
    assert first.sum() == 0
    assert second.sum() == 8


def test_a_capsule_that_nobody_takes_gives_its_memory_back() -> None:
    before = len(dlpack._LIVE)
    capsule = dlpack.Shared(dlpack.read(torch.zeros(3))[0]).__dlpack__()
    assert len(dlpack._LIVE) == before + 1
    del capsule
    assert len(dlpack._LIVE) == before


@pytest.mark.parametrize(
    ("change", "error", "reason"),
    [
        ({"b": None}, ValueError, r"inputs: missing \['b'\], unknown \[\], expected \['a', 'b'\]"),
        ({"c": torch.zeros(4)}, ValueError, r"missing \[\], unknown \['c'\]"),
        ({"a": [[1.0] * 4]}, TypeError, "a is a list, expected a tensor of torch, CuPy or NumPy"),
        ({"a": torch.zeros(3, 4).double()}, TypeError, "a is float64, expected float32"),
        ({"a": np.zeros((3, 4), "c8")}, TypeError, "a is of dtype complex64"),
        ({"a": np.zeros((3, 4), ">f4")}, TypeError, "a is of dtype >f4"),
        ({"a": torch.zeros(3, 4, dtype=torch.complex64)}, TypeError, "a is of dtype torch.complex64 on cpu"),
        ({"a": torch.zeros(3, 4, device="meta")}, TypeError, "a is of dtype torch.float32 on meta"),
        ({"a": torch.zeros(3, 4).to_sparse()}, TypeError, r"a is laid out as torch.sparse_coo, expected torch.strided"),
        ({"a": torch.zeros(3, 4, requires_grad=True)}, TypeError, "a requires a gradient, .*: pass it detached"),
        ({"a": Foreign(np.zeros((3, 4), "c8"))}, TypeError, "a is of dtype complex64"),
    ],
)
def test_wrong_inputs(change: dict[str, Any], error: type[Exception], reason: str) -> None:
    run = runner(sums())
    inputs = {"a": torch.ones(3, 4), "b": torch.ones(4)}
    changed = {name: value for name, value in (inputs | change).items() if value is not None}
    with pytest.raises(error, match=reason):
        run(changed)
    assert run(inputs)["total"].sum() == 24


def test_wrong_shapes_are_onnxruntimes_to_refuse() -> None:
    with pytest.raises(RuntimeError, match=r"(?i)invalid dimensions for input: a"):
        runner(sums())({"a": torch.ones(3, 5), "b": torch.ones(4)})


def test_a_session_whose_values_are_no_numbers() -> None:
    nodes = [helper.make_node("Identity", ["x"], ["y"])]
    graph = helper.make_graph(
        nodes,
        "text",
        [helper.make_tensor_value_info("x", TensorProto.STRING, [1])],
        [helper.make_tensor_value_info("y", TensorProto.STRING, [1])],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
    with pytest.raises(ValueError, match=r"x is tensor\(string\), expected one of tensor\(float\)"):
        runner(made.SerializeToString())


def test_a_model_without_inputs() -> None:
    constant = helper.make_node("Constant", [], ["y"], value_floats=[1.0, 2.0])
    assert runner(graph_model([constant], {}, {"y": 1}))({})["y"].tolist() == [1, 2]


@pytest.mark.parametrize(
    ("device", "graph"),
    [
        ("cpu", False),
        pytest.param("cuda", False, marks=pytest.mark.gpu),
        pytest.param("cuda", True, marks=pytest.mark.gpu),
    ],
)
def test_many_threads_on_two_runners_of_one_session(device: str, graph: bool) -> None:
    """Inputs are made before: CUDA refuses memory to other threads while one captures."""
    first = runner(sums(), device, cuda_graph=graph)
    runners, b = [first, Runner(first.session)], torch.ones(4, device=device)
    turns = [100 * thread + turn for thread in range(8) for turn in range(25)]
    given = {turn: torch.full((1 + turn % 3, 4), float(turn), device=device) for turn in turns}

    def right(turn: int) -> bool:
        total = runners[turn % 2]({"a": given[turn], "b": b})["total"].cpu()
        return total.shape == given[turn].shape and bool((total == turn + 1).all())

    assert hammered(right, threads=8, times=25) == []


def test_exit_with_live_outputs(tmp_path: Path) -> None:
    code = f"""
import torch, sys
from trimaran.ort_ops.runner import Runner
from trimaran.ort_ops.session import ort_session
sys.kept = Runner(ort_session({identity("float32")!r}, ["CPUExecutionProvider"]))({{"x": torch.ones(3)}})
print(sys.kept["y"].sum().item())
"""
    assert python(code, tmp_path) == "3.0\n"


def test_graphs_take_cuda() -> None:
    with pytest.raises(ValueError, match="cuda_graph is True, which takes CUDAExecutionProvider; providers are CPUEx"):
        ort_session(sums(), [CPU], cuda_graph=True)
