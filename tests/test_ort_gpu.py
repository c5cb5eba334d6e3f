"""ONNX Runtime on a GPU: every option of a launch, CUDA graphs, processes without torch and such that end."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from oracle import assert_close
from ort import CUDA, model, python, quiet, session_of
from ort_cases import CASES, expected, tensors
from test_compiler import CASES as OPTIONS
from test_compiler import doubling

from trimaran.benchmarks.replay import bound
from trimaran.kernels.layer_norm import layer_norm
from trimaran.ort_ops.domain import Domain
from trimaran.ort_ops.hot_path import HotKernel
from trimaran.ort_ops.kernel import KERNELS
from trimaran.ort_ops.session import ort_session, register

pytestmark = pytest.mark.gpu


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("graph", [False, True], ids=["plain", "graph"])
@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_of_a_launch(name: str, graph: bool) -> None:
    kernel, options = OPTIONS[name]
    op = doubling(kernel, **options)
    x = torch.randn(4096, device="cuda")
    session_options = quiet()
    provider = (CUDA, {"enable_cuda_graph": "1"}) if graph else CUDA
    assert register(session_options, [provider], Domain("test.options", [op])) == ("double",)
    content = model(op, {"x": x}, ["y"], "test.options")
    session = ort_session(content, [provider], session_options=session_options)
    run = bound(session, {"x": x}, ["y"])
    for _ in range(4):
        x.normal_()
        torch.cuda.synchronize()
        assert torch.equal(run(), 2 * x)


@pytest.mark.usefixtures("path")
def test_a_cuda_graph_replays_the_kernels() -> None:
    case = CASES["rows_everything"]
    inputs = tensors(case, torch.float16, "cuda")
    providers = [(CUDA, {"enable_cuda_graph": "1"})]
    session = ort_session(model(case.op, inputs, ["out"], **case.attrs), providers, session_options=quiet())
    run = bound(session, inputs, ["out"])
    for turn in range(5):
        inputs["q"].copy_(torch.randn(2, 7, 32, generator=torch.Generator().manual_seed(turn)))
        torch.cuda.synchronize()
        assert_close(run(), expected(case, inputs, True)["out"], expected(case, inputs, False)["out"])


def test_nodes_of_a_session_run_in_c() -> None:
    before = set(KERNELS)
    inputs = tensors(CASES["norm_sum"], torch.float16, "cuda")
    session = session_of(model(CASES["norm_sum"].op, inputs, CASES["norm_sum"].outputs, eps=1e-5), CUDA)
    assert [type(KERNELS[handle]) for handle in KERNELS.keys() - before] == [HotKernel]
    del session


def test_without_torch(tmp_path: Path) -> None:
    """onnxruntime, numpy, cupy and trimaran are enough; the launcher that comes with Triton would import torch."""
    pytest.importorskip("cupy")
    content = model(layer_norm, {"x": torch.zeros(2, 8)}, ["y"], eps=1e-5)
    code = f"""
import sys
import onnxruntime
if hasattr(onnxruntime, "preload_dlls"):
    onnxruntime.preload_dlls(directory="")  # of the nvidia packages
import cupy
from trimaran.ort_ops.runner import Runner
from trimaran.ort_ops.session import ort_session
for graph in (False, True):
    run = Runner(ort_session({content!r}, ["CUDAExecutionProvider"], cuda_graph=graph))
    x = cupy.arange(16, dtype="float32").reshape(2, 8)
    y = run({{"x": x}})["y"]
    normal = (x - x.mean(1, keepdims=True)) / cupy.sqrt(x.var(1, keepdims=True) + 1e-5)
    assert bool((abs(y - normal) < 1e-5).all()), y
print("torch" in sys.modules)
"""
    assert python(code, tmp_path) == "False\n"


@pytest.mark.parametrize("graph", [False, True], ids=["plain", "graph"])
def test_exit_with_a_live_session(graph: bool, tmp_path: Path) -> None:
    code = f"""
import sys, torch
from trimaran.ort_ops.runner import Runner
from trimaran.ort_ops.session import ort_session
run = Runner(ort_session({model(layer_norm, {"x": torch.zeros(2, 8)}, ["y"], eps=1e-5)!r}, cuda_graph={graph}))
sys.kept = run, [run({{"x": torch.ones(2, 8, device="cuda")}}) for _ in range(3)]
print(sys.kept[1][2]["y"].abs().max().item())
"""
    assert python(code, tmp_path) == "0.0\n"
