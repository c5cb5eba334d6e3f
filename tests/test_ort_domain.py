"""A domain of other ops: scratch memory, several launches, optional outputs, versions."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
import triton
import triton.language as tl
from ort import CPU, CUDA, PROVIDERS, bound_run, failure, feeds, model, quiet

from trimaran.benchmarks.memory import of_host
from trimaran.kernels.catalog import OPS
from trimaran.kernels.contract import Attr, Divisible, Input, Launch, Op, Output, Scratch, Tensor, expect_shape
from trimaran.ort_ops.domain import Domain
from trimaran.ort_ops.session import ort_session, register

pytestmark = pytest.mark.usefixtures("interpreted")


@triton.jit
def add_rows_kernel(x_ptr, shift_ptr, sums_ptr, columns, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    at = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * columns + at, mask=at < columns, other=0.0).to(tl.float32)
    total = tl.load(sums_ptr + row) + tl.sum(x, axis=0)  # of memory that is zero
    if shift_ptr is not None:
        total += tl.load(shift_ptr).to(tl.float32)
    tl.store(sums_ptr + row, total)


@triton.jit
def copy_kernel(sums_ptr, y_ptr, negative_ptr, double_ptr):
    row = tl.program_id(0)
    total = tl.load(sums_ptr + row)
    tl.store(y_ptr + row, total.to(y_ptr.dtype.element_ty))
    if negative_ptr is not None:
        tl.store(negative_ptr + row, (-total).to(y_ptr.dtype.element_ty))
    if double_ptr is not None:
        tl.store(double_ptr + row, (2 * total).to(y_ptr.dtype.element_ty))


def row_sums_infer(inputs: Any, attrs: Any) -> tuple[Tensor, ...]:
    expect_shape("row_sums", "shift", inputs.shift, (), "a scalar")
    return (Tensor(inputs.x.dtype, inputs.x.shape[:1]),) * 3


def row_sums_plan(inputs: Any, outputs: Any, attrs: Any, device: Any) -> list[Launch]:
    rows, columns = inputs.x.shape
    sums = Scratch("float32", attrs.elements, zero=True)
    args = {"x_ptr": inputs.x, "shift_ptr": inputs.shift, "sums_ptr": sums, "columns": Divisible(columns)}
    return [
        Launch(add_rows_kernel, (rows,), args, {"BLOCK": 64}, {"num_warps": 1}),
        Launch(copy_kernel, (rows,), {"sums_ptr": sums, **{f"{name}_ptr": out for name, out in vars(outputs).items()}}),
    ]


row_sums = Op(
    name="row_sums",
    version=3,
    inputs=(Input("x"), Input("shift", "I", optional=True)),
    outputs=(Output("y"), Output("negative", optional=True), Output("double", optional=True)),
    attrs=(Attr("elements", "int"),),
    types={"T": ("float32", "float16"), "I": ("int32", "int64")},
    infer=row_sums_infer,
    plan=row_sums_plan,
    reference=lambda x, shift, *, elements: (x.sum(-1) + (0 if shift is None else shift),),
    body=lambda g, inputs, attrs: (),
)
MINE = Domain("test.domain", [row_sums])
DOMAINS = [MINE]


def row_sums_session(
    inputs: dict[str, torch.Tensor], provider: str, elements: int, outputs: Sequence[str] = ("y",)
) -> onnxruntime.InferenceSession:
    content = with_version(model(row_sums, inputs, outputs, "test.domain", elements=elements), row_sums.version)
    options = quiet()
    assert register(options, [provider], MINE) == ("row_sums",)
    assert register(options, [provider], MINE) == ("row_sums",)
    return ort_session(content, [provider], session_options=options)


def with_version(content: bytes, version: int) -> bytes:
    """The model, with this version of the domain test.domain."""
    proto = onnx.load_from_string(content)
    next(opset for opset in proto.opset_import if opset.domain == "test.domain").version = version
    return proto.SerializeToString()


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("shift", [None, torch.int32, torch.int64], ids=str)
def test_another_domain(dtype: torch.dtype, shift: torch.dtype | None, provider: str) -> None:
    device = "cuda" if provider == CUDA else "cpu"
    inputs = {"x": torch.randint(-9, 9, (5, 33), device=device).to(dtype)}
    if shift is not None:
        inputs["shift"] = torch.tensor(7, dtype=shift, device=device)
    session = row_sums_session(inputs, provider, 5)
    exact = row_sums.reference(inputs["x"], inputs.get("shift"), elements=5)[0]
    for _ in range(3):  # the scratch is the last run's, and must be zero again
        assert torch.equal(bound_run(session, inputs, {"y": exact.shape}, dtype)["y"], exact)


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("others", [(), ("negative",), ("double",), ("negative", "double")], ids="_".join)
def test_optional_outputs_are_computed_where_the_node_has_them(others: tuple[str, ...], provider: str) -> None:
    x = torch.randint(-9, 9, (5, 33), device="cuda" if provider == CUDA else "cpu").float()
    session = row_sums_session({"x": x}, provider, 5, ("y", *others))
    got = bound_run(session, {"x": x}, dict.fromkeys(("y", *others), torch.Size([5])), torch.float32)
    factor = {"y": 1, "negative": -1, "double": 2}
    assert {name: torch.equal(out, factor[name] * x.sum(-1)) for name, out in got.items()} == dict.fromkeys(got, True)


@pytest.mark.usefixtures("path")
def test_scratch_memory_is_given_back() -> None:
    inputs = {"x": torch.ones(1, 33)}
    session = row_sums_session(inputs, CPU, elements=1 << 18)  # 1 MiB
    session.run(None, feeds(inputs))
    before = of_host()
    for _ in range(300):
        session.run(None, feeds(inputs))
    assert of_host() - before < 100


@pytest.mark.usefixtures("path")
@pytest.mark.gpu
@pytest.mark.skipif("PYTEST_XDIST_WORKER" in os.environ, reason="other workers take the device's memory")
def test_scratch_memory_is_given_back_on_the_gpu() -> None:
    inputs = {"x": torch.ones(1, 33, device="cuda")}
    session = row_sums_session(inputs, CUDA, elements=1 << 20)  # 4 MiB
    for _ in range(3):
        bound_run(session, inputs, {"y": torch.Size([1])}, torch.float32)
    before, _ = torch.cuda.mem_get_info()
    for _ in range(1000):
        bound_run(session, inputs, {"y": torch.Size([1])}, torch.float32)
    after, _ = torch.cuda.mem_get_info()
    assert before - after < 100 << 20


def test_a_model_of_an_earlier_version_does_not_get_the_op() -> None:
    options = quiet()
    register(options, [CPU], MINE)
    content = with_version(model(row_sums, {"x": torch.ones(1, 33)}, ["y"], "test.domain", elements=1), 2)
    assert "row_sums" in failure(lambda: ort_session(content, [CPU], session_options=options))


def test_an_op_of_an_unknown_dtype() -> None:
    options = quiet()
    with pytest.raises(ValueError, match=r"test\.strange\.row_sums: unknown dtype float7, expected one of float32"):
        register(options, [CPU], Domain("test.strange", [replace(row_sums, types={"T": ("float7",), "I": ("int32",)})]))
    assert register(options, [CPU]) == tuple(OPS)


def test_a_domain_with_two_ops_of_one_name() -> None:
    with pytest.raises(ValueError, match="two ops of one name"):
        Domain("test.twice", [row_sums, row_sums])
