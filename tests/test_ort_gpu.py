"""ONNX Runtime on a GPU: every option of a launch, the same bits as under PyTorch, and no copy of what stays."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from test_compiler import CASES as OPTIONS
from test_compiler import doubling
from test_ort_ops import CASES, CUDA, bound_run, model, quiet, session_of, tensors

from trimaran.kernels.layer_norm import layer_norm
from trimaran.ort_ops import custom_op
from trimaran.ort_ops.domain import TRIMARAN, Domain
from trimaran.ort_ops.session import ort_session, register

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("graph", [False, True], ids=["plain", "graph"])
@pytest.mark.parametrize("path", ["c", "ctypes"])
@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_of_a_launch(name: str, path: str, graph: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if path == "ctypes":
        monkeypatch.setattr(custom_op, "compute_address", lambda op: 0)
    kernel, options = OPTIONS[name]
    op = doubling(kernel, **options)
    x = torch.randn(4096, device="cuda")
    session_options = quiet()
    provider = (CUDA, {"enable_cuda_graph": "1"}) if graph else CUDA
    assert register(session_options, [provider], Domain("test.options", [op])) == ("double",)
    content = model(op, {"x": x}, ["y"], "test.options")
    session = ort_session(content, [provider], session_options=session_options)
    if graph:
        check_graph(session, x)
        return
    for _ in range(3):
        assert torch.equal(bound_run(session, {"x": x}, {"y": x.shape}, x.dtype)["y"], 2 * x)


def check_graph(session: Any, x: torch.Tensor) -> None:
    """Replays read what is in memory now."""
    y = torch.full_like(x, float("nan"))
    binding = session.io_binding()
    binding.bind_input("x", "cuda", 0, 1, list(x.shape), x.data_ptr())
    binding.bind_output("y", "cuda", 0, 1, list(y.shape), y.data_ptr())
    for _ in range(4):
        x.normal_()
        y.fill_(float("nan"))
        torch.cuda.synchronize()
        session.run_with_iobinding(binding)
        assert torch.equal(y, 2 * x)


def test_nodes_of_a_session_run_in_c() -> None:
    inputs = tensors(CASES["norm_sum"], torch.float16, "cuda")
    session_of(model(CASES["norm_sum"].op, inputs, CASES["norm_sum"].outputs, eps=1e-5), CUDA)
    assert all(variant.hot for variant in custom_op._VARIANTS.values() if variant.plans in TRIMARAN.plans.values())


def test_without_torch() -> None:
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
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=120, check=False
    )
    assert (done.returncode, done.stdout) == (0, "False\n"), done.stderr
