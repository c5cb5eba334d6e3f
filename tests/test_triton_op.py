"""`trimaran.triton_op`: a kernel and two rules are an operator of ONNX Runtime."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import triton
import triton.language as tl
from onnx import TensorProto
from ort import CPU, CUDA, PROVIDERS, bound_run, graph_model, node, quiet

from trimaran.kernels.catalog import add_op
from trimaran.kernels.contract import INTERPRETER, Tensor
from trimaran.kernels.interpreter import interpret
from trimaran.kernels.plans import PlanCache
from trimaran.kernels.sizes import cdiv, product
from trimaran.ort_ops.domain import Domain
from trimaran.ort_ops.session import ort_session
from trimaran.ort_ops.triton_op import triton_op


@triton.jit
def scale_rows(x_ptr, rows_ptr, y_ptr, sums_ptr, columns, factor, MODE: tl.constexpr, BLOCK: tl.constexpr):
    """y = x * factor, or + factor; sums[i] = the sum of row rows[i] of y, which int32 numbers choose."""
    row = tl.load(rows_ptr + tl.program_id(0))
    at = tl.arange(0, BLOCK)
    inside = at < columns
    y = tl.load(x_ptr + row * columns + at, mask=inside, other=0.0).to(tl.float32)
    if MODE == "add":
        y = tl.where(inside, y + factor, 0.0)
    else:
        y = y * factor
    tl.store(y_ptr + tl.program_id(0) * columns + at, y.to(y_ptr.dtype.element_ty), mask=inside)
    tl.store(sums_ptr + tl.program_id(0), tl.sum(y, axis=0))


RULES: dict[str, Any] = {
    "shapes": {"y": lambda i: (i.rows.shape[0], i.x.shape[1]), "sums": lambda i: i.rows.shape},
    "grid": lambda i: i.rows.shape,
    "values": {"columns": lambda i: i.x.shape[1], "BLOCK": 64},
    "attrs": {"factor": float, "MODE": "mul"},
    "types": {"rows": "int32", "sums": "float32"},
    "dtypes": ("float32", "float16"),
    "options": {"num_warps": 1},
}
SCALE = triton_op(**RULES, version=2, name="scaled")(scale_rows)
MINE = Domain("test.mine", [SCALE])


def session(dtype: torch.dtype, provider: str, **attrs: Any) -> Any:
    element = TensorProto.FLOAT if dtype == torch.float32 else TensorProto.FLOAT16
    made = node("scaled", ["x", "rows"], ["y", "sums"], "test.mine", **attrs)
    inputs = {"x": (element, ["n", "m"]), "rows": (TensorProto.INT32, ["k"])}
    proto = onnx.load_from_string(graph_model([made], inputs, {"y": element, "sums": TensorProto.FLOAT}))
    next(opset for opset in proto.opset_import if opset.domain == "test.mine").version = 2
    with interpret(provider == CPU):
        return ort_session(proto.SerializeToString(), [provider], domains=[MINE], session_options=quiet())


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("mode", ["mul", "add"])
def test_a_kernel_with_rules_is_an_operator(mode: str, dtype: torch.dtype, provider: str) -> None:
    device = "cuda" if provider == CUDA else "cpu"
    run = session(dtype, provider, factor=3.0, MODE=mode)
    misses = []
    for n, m, k in ((5, 33, 3), (9, 40, 7), (2, 64, 1)):
        x = torch.randint(-9, 9, (n, m), device=device).to(dtype)
        rows = torch.randint(0, n, (k,), device=device, dtype=torch.int32)
        y = (x[rows.long()].float() * 3 if mode == "mul" else x[rows.long()].float() + 3).to(dtype)
        got = bound_run(run, {"x": x, "rows": rows}, {"y": y.shape}, dtype) if provider == CUDA else {}
        if provider == CPU:
            outputs = run.run(None, {"x": x.numpy(), "rows": rows.numpy()})
            assert np.array_equal(outputs[1], y.float().sum(1).numpy())
            got["y"] = torch.from_numpy(outputs[0])
        assert torch.equal(got["y"], y)
        misses.append(MINE.plans["scaled"].misses)
    assert misses == [misses[0]] * 3, "one plan serves every shape"


def test_the_declaration() -> None:
    assert (SCALE.name, SCALE.version) == ("scaled", 2)
    assert [(port.name, port.type) for port in SCALE.inputs] == [("x", "T"), ("rows", "int32")]
    assert [(port.name, port.type) for port in SCALE.outputs] == [("y", "T"), ("sums", "float32")]
    assert [(attr.name, attr.kind, attr.default) for attr in SCALE.attrs] == [
        ("factor", "float", None),
        ("MODE", "string", "mul"),
    ]
    with pytest.raises(ValueError, match="op scaled has no reference, expected one; a Domain takes it for ONNX"):
        add_op(SCALE)
    with pytest.raises(ValueError, match="op scaled has no body"):
        add_op(replace(SCALE, reference=lambda x, rows, **_: ()))


def test_what_is_not_contiguous_is_declined() -> None:
    rows = Tensor("int32", (3,), (1,))
    attrs = SCALE.attributes({"factor": 1.0})
    for shape, strides, reason in (
        ((4, 8), (8, 1), None),
        ((4, 8), (16, 1), "x is not contiguous"),
        ((4, 8), (1, 4), "x is not contiguous"),
        ((1, 8), (99, 1), None),
    ):
        made, _ = PlanCache(SCALE).find([Tensor("float32", shape, strides), rows], attrs, INTERPRETER, (True, True))
        assert made.declined == reason


def test_a_missing_attribute_is_refused_at_load() -> None:
    with pytest.raises(Exception, match="scaled: attribute factor is missing, expected a float"):
        session(torch.float32, CPU)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"shapes": {"z": lambda i: ()}}, "shapes has z, expected some of x, rows, y, sums"),
        ({"types": {"columns": "int32"}}, "types has columns, expected some of x, rows, y, sums"),
        ({"values": {"BLOCK": 64, "width": 3}}, "values has width, expected some of columns, factor, MODE, BLOCK"),
        ({"attrs": {"x": 1}}, "attrs has x, expected some of columns"),
        ({"values": {"BLOCK": 64}}, "columns is a number, expected it in values or in attrs"),
        ({"attrs": {"factor": 1.0, "MODE": "mul", "BLOCK": 64}}, "BLOCK is a number, expected it in values or in"),
        ({"shapes": {}}, "tensors are x, rows, y, sums, expected an input and an output"),
        ({"types": {"x": "float32", "rows": "int32"}}, "no input has the dtype T of the outputs"),
        ({"attrs": {"factor": None, "MODE": "mul"}}, "factor is None, expected a float, int, bool or str"),
    ],
)
def test_declarations_that_do_not_fit_the_kernel(change: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=f"triton_op of scale_rows: {reason}"):
        triton_op(**{**RULES, **change})(scale_rows)


def test_what_is_no_kernel() -> None:
    with pytest.raises(TypeError, match=r"expected a function under @triton\.jit"):
        triton_op(shapes={}, grid=lambda i: (1,))(len)


def test_a_size_may_be_a_constexpr() -> None:
    op = triton_op(
        shapes={"y": lambda i: i.x.shape, "sums": lambda i: i.rows.shape},
        grid=lambda i: (cdiv(product(i.rows.shape), 1),),
        values={"columns": lambda i: i.x.shape[1], "BLOCK": lambda i: i.x.shape[1], "MODE": "mul", "factor": 2.0},
        types={"rows": "int32", "sums": "float32"},
    )(scale_rows)
    domain = Domain("test.pinned", [op])
    made = node("scale_rows", ["x", "rows"], ["y", "sums"], "test.pinned")
    inputs = {"x": (TensorProto.FLOAT, ["n", "m"]), "rows": (TensorProto.INT32, ["k"])}
    content = graph_model([made], inputs, {"y": TensorProto.FLOAT, "sums": TensorProto.FLOAT})
    with interpret():
        run = ort_session(content, [CPU], domains=[domain], session_options=quiet())
    for columns in (16, 32, 16):
        x = np.ones((2, columns), np.float32)
        assert run.run(["sums"], {"x": x, "rows": np.array([0, 1], np.int32)})[0].tolist() == [2 * columns] * 2
    assert domain.plans["scale_rows"].misses == 2
