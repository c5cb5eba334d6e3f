"""`trimaran.Runner` on a GPU: CUDA graphs by shape, streams, CuPy."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from ort import CUDA, quiet, runner, sums

from trimaran.kernels import driver
from trimaran.ort_ops import tensors
from trimaran.ort_ops.runner import Runner
from trimaran.ort_ops.session import ort_session

pytestmark = pytest.mark.gpu


def test_a_tensor_of_another_device_is_refused() -> None:
    with pytest.raises(ValueError, match="a is on CUDA device 0, but the session works on the CPU"):
        runner(sums())({"a": torch.ones(3, 4, device="cuda"), "b": torch.ones(4)})


@pytest.mark.parametrize("graph", [False, True])
def test_cupy_arrays(graph: bool) -> None:
    cupy = pytest.importorskip("cupy")
    run = runner(sums(), "cuda", cuda_graph=graph)
    a, b = cupy.arange(12, dtype="float32").reshape(3, 4), cupy.ones(4, dtype="float32")
    for _ in range(3):
        found = run({"a": a, "b": b})
        assert isinstance(found["total"], cupy.ndarray)
        assert bool((found["total"] == a + 1).all())
        a += 1


@pytest.mark.parametrize("options", [{"enable_cuda_graph": "1"}, {}])
def test_a_session_whose_stream_nobody_knows(options: dict[str, str]) -> None:
    run = Runner(ort_session(sums(), [(CUDA, options)], session_options=quiet()))
    b = torch.ones(4, device="cuda")
    for turn in range(20):
        a = torch.full((64, 4), float(turn), device="cuda")
        assert torch.equal(run({"a": a, "b": b})["total"], a + 1)
    assert run.graphs == len(options)


@pytest.mark.parametrize("graph", [False, True])
def test_host_tensors_in_a_cuda_session(graph: bool) -> None:
    run = runner(sums(), "cuda", cuda_graph=graph)
    for turn in range(3):
        a = np.full((3, 4), turn, np.float32)
        assert np.array_equal(run({"a": a, "b": np.ones(4, np.float32)})["total"], a + 1)
    mixed = run({"a": torch.ones(3, 4, device="cuda"), "b": torch.ones(4)})["total"]
    assert mixed.device.type == "cuda"
    assert mixed.sum() == 24


@pytest.mark.parametrize("graph", [False, True])
def test_what_is_queued_on_the_callers_stream_is_waited_for(graph: bool) -> None:
    run = runner(sums(), "cuda", cuda_graph=graph)
    a, b = torch.zeros(3, 4, device="cuda"), torch.ones(4, device="cuda")
    run({"a": a, "b": b})
    slow = torch.randn(4096, 4096, device="cuda")
    for turn in range(1, 4):
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(20):
                slow = slow @ slow * 1e-4
            a.fill_(turn)
            assert (run({"a": a, "b": b})["total"] == turn + 1).all()


def test_one_graph_per_shape_and_no_more_than_allowed() -> None:
    run = Runner(ort_session(sums(), [CUDA], cuda_graph=True, session_options=quiet()), max_graphs=3)
    b = torch.ones(4, device="cuda")
    for turn in range(3):
        for rows in range(1, 6):
            a = torch.full((rows, 4), float(turn), device="cuda")
            found = run({"a": a, "b": b})
            assert torch.equal(found["total"], a + 1)
            assert torch.equal(found["product"], a)
    assert run.graphs == 3


def test_outputs_of_a_graph_are_the_callers_own() -> None:
    run = runner(sums(), "cuda", cuda_graph=True)
    b = torch.ones(4, device="cuda")
    found = [run({"a": torch.full((2, 4), float(turn), device="cuda"), "b": b})["total"] for turn in range(5)]
    assert [int(total[0, 0]) for total in found] == [1, 2, 3, 4, 5]


def test_two_runners_of_one_session_have_graphs_of_their_own() -> None:
    session = ort_session(sums(), [CUDA], cuda_graph=True, session_options=quiet())
    first, second = Runner(session), Runner(session)
    b = torch.ones(4, device="cuda")
    for turn in range(3):
        for factor, run in ((1, first), (10, second)):
            a = torch.full((2, 4), float(factor * turn), device="cuda")
            assert torch.equal(run({"a": a, "b": b})["total"], a + 1)


def test_outputs_may_be_the_graphs_own_memory() -> None:
    run = Runner(ort_session(sums(), [CUDA], cuda_graph=True, session_options=quiet()), copy_outputs=False)
    b = torch.ones(4, device="cuda")
    first = run({"a": torch.zeros(2, 4, device="cuda"), "b": b})["total"]
    second = run({"a": torch.ones(2, 4, device="cuda"), "b": b})["total"]
    assert first.data_ptr() == second.data_ptr()
    assert int(first[0, 0]) == 2
    on_host = run({"a": np.ones((2, 4), np.float32), "b": np.ones(4, np.float32)})["total"]
    assert int(on_host[0, 0]) == 2


@pytest.mark.parametrize("copy_outputs", [False, True])
def test_what_a_replay_asks_of_the_driver(copy_outputs: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """No more than it must, and nothing of DLPack; `trimaran bench-nodes` measures the time that it takes."""
    run = Runner(ort_session(sums(), [CUDA], cuda_graph=True, session_options=quiet()), copy_outputs=copy_outputs)
    inputs = {"a": torch.ones(3, 4, device="cuda"), "b": torch.ones(4, device="cuda")}
    for _ in range(2):
        run(inputs)
    asked: list[str] = []
    call = driver.call
    monkeypatch.setattr(driver, "call", lambda name, *arguments: asked.append(name) or call(name, *arguments))
    monkeypatch.setattr(tensors, "read", None)
    assert torch.equal(run(inputs)["total"], inputs["a"] + 1)
    assert Counter(asked) == {
        "cuCtxGetCurrent": 2 + copy_outputs,
        "cuEventRecord": 1,
        "cuStreamWaitEvent": 1,
        "cuMemcpyAsync": 2 + 2 * copy_outputs,
        "cuStreamSynchronize": 1,
    }
