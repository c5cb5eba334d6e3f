"""Every op of the catalog as a node of ONNX Runtime, in every form and dtype: against the fp64 reference, and the bits
of PyTorch's operator. Interpreted on the CPU, or on a GPU."""

from __future__ import annotations

import itertools

import pytest
import torch
from oracle import assert_close
from ort import CUDA, DTYPES, PROVIDERS, bound_run, model, session_of, through_ctypes
from ort_cases import CASES, Case, expected, tensors

from trimaran.kernels.catalog import OPS
from trimaran.kernels.plans import PlanCache
from trimaran.ort_ops.domain import TRIMARAN
from trimaran.torch_path.ops import TORCH_OPS, on_decline

pytestmark = pytest.mark.usefixtures("interpreted")
BUILT_IN = tuple(OPS.values())  # before a test adds one


def check(case: Case, dtype: torch.dtype, provider: str, offset: int = 0, torch_too: bool = False) -> None:
    inputs = tensors(case, dtype, "cuda" if provider == CUDA else "cpu")
    session = session_of(model(case.op, inputs, case.outputs, **case.attrs), provider)
    exact, peer = expected(case, inputs, True), expected(case, inputs, False)
    shapes = {name: out.shape for name, out in exact.items()}
    if provider == CUDA and dtype == torch.float32 and "linear" in case.op.name:
        with pytest.raises(RuntimeError, match=r"no kernel for these inputs: .* in fp32 is slower than the vendor's"):
            bound_run(session, inputs, shapes, dtype)
        return
    got = bound_run(session, inputs, shapes, dtype, offset)
    assert got
    for name, out in got.items():
        assert_close(out, exact[name], peer[name])
    if torch_too:
        for name, out in of_torch(case, inputs).items():
            assert torch.equal(got[name].view(torch.uint8), out.view(torch.uint8)), f"{name} has other bits in PyTorch"


def of_torch(case: Case, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The outputs of torch's operator, which its kernel has computed."""
    declined: list[str] = []
    token = on_decline.set(lambda name, reason: declined.append(reason))
    given = [inputs.get(port.name) for port in case.op.inputs]
    returned = {f"return_{port.name}": port.name in case.outputs for port in case.op.outputs if port.optional}
    try:
        outputs = TORCH_OPS[case.op.name].overload(*given, **case.attrs, **returned)
    finally:
        on_decline.reset(token)
    assert not declined
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    named = zip((port.name for port in case.op.outputs), outputs, strict=True)
    return {name: out for name, out in named if name in case.outputs}


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_an_op_computes_what_its_reference_does_and_torch_the_same_bits(
    case: Case, dtype: torch.dtype, provider: str
) -> None:
    check(case, dtype, provider, torch_too=provider == CUDA or dtype == torch.float16)  # interpreting takes its time


def test_every_op_has_a_case() -> None:
    assert {case.op for case in CASES.values()} >= {*BUILT_IN}


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("name", ["rows_everything", "batch_0", "norm_no_rows", "joined_sum", "turned_positions"])
def test_an_op_computes_the_same_through_ctypes(name: str, provider: str, monkeypatch: pytest.MonkeyPatch) -> None:
    through_ctypes(monkeypatch)
    check(CASES[name], torch.float16, provider)


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["rows_everything", "norm_sum"])
def test_memory_that_is_not_aligned(name: str, dtype: torch.dtype, provider: str) -> None:
    """Bound by its address; ONNX Runtime's own buffers are aligned. What a plan assumes is read off its parameters."""
    case = CASES[name]
    plans = PlanCache(case.op)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(TRIMARAN.plans, case.op.name, plans)
        patch.setattr(TRIMARAN, "_pointers", {})  # structs that know this cache
        check(case, dtype, provider)
        assert assumed_aligned(plans) == [{"input": True, "output": True}]
        check(case, dtype, provider)
        check(case, dtype, provider, offset=1)
    unaligned = {"input": False, "output": False}
    assert assumed_aligned(plans)[1:] == [{"input": False, "output": True}, unaligned]


def assumed_aligned(plans: PlanCache) -> list[dict[str, bool]]:
    """For each plan in the order of making, whether its first input and output are taken for aligned."""
    found = []
    for plan in itertools.chain.from_iterable(plans._plans.values()):
        pointers = [param for param in plan.launches[0].params if param.index == 0]
        found.append({str(param.place): param.divisible for param in pointers})
    return found


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("name", ["heads", "norm_sum", "rms_sum", "linear_activation", "gated", "joined_sum", "turned"])
def test_nan_and_infinity_are_the_references(name: str, provider: str) -> None:
    """In one row each of several; the others are as always."""
    case = CASES[name]
    dtype = torch.float16 if "linear" in case.op.name else torch.float32  # which plans for a GPU decline in fp32
    inputs = tensors(case, dtype, "cuda" if provider == CUDA else "cpu")
    first = inputs[case.op.inputs[0].name]
    for row, value in enumerate((float("nan"), float("inf"), -float("inf"))):
        first.view(-1, first.shape[-1])[row, 1] = value
    session = session_of(model(case.op, inputs, case.outputs, **case.attrs), provider)
    exact, peer = expected(case, inputs, True), expected(case, inputs, False)
    assert any(out.isnan().any() for out in exact.values())
    got = bound_run(session, inputs, {name: out.shape for name, out in exact.items()}, dtype)
    for name, out in got.items():
        infinite = exact[name].isinf()
        assert torch.equal(out.isinf(), infinite)
        assert torch.equal(out[infinite].double(), exact[name][infinite])
        assert_close(*(tensor.masked_fill(infinite, 0) for tensor in (out, exact[name], peer[name])))
