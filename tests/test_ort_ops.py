"""ONNX Runtime custom operators: every op in every form against the fp64 reference, interpreted on the CPU or on a GPU.

The helpers (`model`, `graph_model`) serve test_ort_session.py as well.
"""

from __future__ import annotations

import gc
import itertools
import logging
import os
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
import triton
import triton.language as tl
from onnx import TensorProto, helper
from oracle import assert_close, widened

from trimaran.kernels.attention import attention
from trimaran.kernels.catalog import OPS
from trimaran.kernels.contract import Attr, Divisible, Input, Launch, Op, Output, Scratch, Tensor, expect_shape
from trimaran.kernels.gated_linear import gated_linear
from trimaran.kernels.interpreter import Interpreter, interpret
from trimaran.kernels.layer_norm import layer_norm
from trimaran.kernels.linear import linear
from trimaran.kernels.linear_norm import linear_norm
from trimaran.kernels.plans import PlanCache
from trimaran.kernels.rms_norm import rms_norm
from trimaran.kernels.rotary_embedding import rotary_embedding
from trimaran.ort_ops import custom_op, kernel, stub_library
from trimaran.ort_ops.domain import TRIMARAN, Domain
from trimaran.ort_ops.session import ort_session, register
from trimaran.torch_path.ops import TORCH_OPS, on_decline

ELEMENT = {
    torch.float32: TensorProto.FLOAT,
    torch.float16: TensorProto.FLOAT16,
    torch.bfloat16: TensorProto.BFLOAT16,
    torch.float64: TensorProto.DOUBLE,
    torch.int32: TensorProto.INT32,
    torch.int64: TensorProto.INT64,
    torch.bool: TensorProto.BOOL,
}
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
BUILT_IN = tuple(OPS.values())  # before a test adds one
CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
PROVIDERS = [CPU, pytest.param(CUDA, marks=pytest.mark.gpu)]


@pytest.fixture(autouse=True)
def interpreted(request: pytest.FixtureRequest) -> Iterator[None]:
    with interpret(request.node.get_closest_marker("gpu") is None):
        yield


@pytest.fixture(params=["c", "ctypes"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nodes run by the C hot path, and by what serves where there is none."""
    if request.param == "ctypes":
        through_ctypes(monkeypatch)


def through_ctypes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(custom_op, "compute_address", lambda op: 0)
    for domain in (TRIMARAN, MINE):
        monkeypatch.setattr(domain, "_pointers", {})  # structs are made anew


# Models of one node


def attribute(name: str, value: Any) -> onnx.AttributeProto:
    return helper.make_attribute(name, int(value) if isinstance(value, bool) else value)


def node(
    op: str, inputs: Sequence[str], outputs: Sequence[str], domain: str = "trimaran", **attrs: Any
) -> onnx.NodeProto:
    """A node named `the_<op>`; a name that is empty is an absent input or output."""
    made = helper.make_node(op, inputs, outputs, name=f"the_{op}", domain=domain)
    made.attribute.extend(attribute(name, value) for name, value in attrs.items())
    return made


def graph_model(nodes: list[onnx.NodeProto], inputs: dict[str, Any], outputs: dict[str, int], **kwargs: Any) -> bytes:
    """inputs: name -> (element type, shape); outputs: name -> element type, their shapes not declared."""
    for index, made in enumerate(nodes[1:]):
        made.name += f"_{index}"
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info(name, element, shape) for name, (element, shape) in inputs.items()],
        [helper.make_tensor_value_info(name, element, None) for name, element in outputs.items()],
    )
    domains = {made.domain for made in nodes} | {"trimaran"}
    opsets = [helper.make_opsetid(domain, 17 if domain == "" else 1) for domain in sorted(domains | {""})]
    made = helper.make_model(graph, opset_imports=opsets, ir_version=10, **kwargs)
    return made.SerializeToString()


def model(
    op: Op, inputs: dict[str, torch.Tensor], outputs: Sequence[str], domain: str = "trimaran", **attrs: Any
) -> bytes:
    """One node with these inputs, all of symbolic shape, and these outputs. Trailing absent inputs are left out."""
    names = [port.name if port.name in inputs else "" for port in op.inputs]
    while names[-1] == "":
        names.pop()
    wanted = [port.name if port.name in outputs else "" for port in op.outputs]
    while wanted[-1] == "":
        wanted.pop()
    shapes = {name: (ELEMENT[t.dtype], [f"{name}{axis}" for axis in range(t.ndim)]) for name, t in inputs.items()}
    dtype = next(iter(inputs.values())).dtype
    return graph_model([node(op.name, names, wanted, domain, **attrs)], shapes, dict.fromkeys(outputs, ELEMENT[dtype]))


def quiet() -> onnxruntime.SessionOptions:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    return options


def session_of(content: bytes, provider: str = CPU) -> onnxruntime.InferenceSession:
    options = quiet()
    if provider == CUDA:
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    return ort_session(content, [provider], session_options=options)


def feeds(inputs: dict[str, torch.Tensor]) -> dict[str, Any]:
    return {name: tensor.numpy() for name, tensor in inputs.items()}


def bound_run(
    session: onnxruntime.InferenceSession,
    inputs: dict[str, torch.Tensor],
    shapes: dict[str, torch.Size],
    dtype: torch.dtype,
    offset: int = 0,
) -> dict[str, torch.Tensor]:
    """Run on torch's memory, where bf16 is as good as any. All lies `offset` elements into its buffer; outputs start as
    NaN."""
    device = next(iter(inputs.values())).device
    place = (device.type, device.index or 0)
    binding, outputs, kept = session.io_binding(), {}, []
    for name, tensor in inputs.items():
        kept.append(torch.empty(tensor.numel() + offset + 1, dtype=tensor.dtype, device=device))
        kept[-1][offset:-1] = tensor.flatten()
        binding.bind_input(name, *place, int(ELEMENT[tensor.dtype]), list(tensor.shape), kept[-1][offset:].data_ptr())
    for name, shape in shapes.items():
        buffer = torch.full((shape.numel() + offset + 1,), float("nan"), dtype=dtype, device=device)
        outputs[name] = buffer[offset : offset + shape.numel()].view(shape)
        binding.bind_output(name, *place, int(ELEMENT[dtype]), list(shape), buffer[offset:].data_ptr())
    if device.type == "cuda":
        torch.cuda.synchronize()  # what torch has queued on its own stream
    session.run_with_iobinding(binding)
    return outputs


# Cases


@dataclass
class Case:
    """One use of an op. inputs: shapes by name, the floating ones random; other inputs as tensors."""

    op: Op
    inputs: dict[str, tuple[int, ...]]
    attrs: dict[str, Any] = field(default_factory=dict)
    others: dict[str, torch.Tensor] = field(default_factory=dict)
    outputs: tuple[str, ...] = ("out",)


LENGTHS = {"key_lengths": torch.tensor([5, 11], dtype=torch.int32)}
MASK = {"key_mask": torch.tensor([[True] * 9 + [False] * 4, [False] * 13])}
HEADS = {"q": (2, 4, 7, 8), "k": (2, 2, 13, 8), "v": (2, 2, 13, 8)}
ROWS = {"q": (2, 7, 32), "k": (2, 13, 16), "v": (2, 13, 16)}
GROUPED = {"scale": 0.3, "num_heads": 4, "kv_num_heads": 2}
PACKED = {"q": (2, 13, 64)}
BIAS = {"bias": (1, 4, 1, 13)}
NORM = {"x": (3, 5, 33)}
ALL = {"weight": (33,), "bias": (33,), "residual": (3, 5, 33)}
LAYER = {"x": (2, 3, 24), "weight": (20, 24)}
MORE = {"weight_1": (12, 24), "bias_1": (12,), "weight_2": (7, 24)}
GATED = {"x": (5, 24), "gate_weight": (20, 24), "up_weight": (20, 24)}
JOINED = {**LAYER, "bias": (20,), "residual": (2, 3, 20), "norm_weight": (20,)}
TURNED = {"q": (2, 4, 7, 8), "k": (2, 2, 7, 8)}
TABLES = {"cos": torch.linspace(-1, 1, 7 * 8).view(7, 8), "sin": torch.linspace(1, -1, 7 * 8).view(7, 8)}
BOTH = ("y", "sum")

CASES = {
    "heads": Case(attention, HEADS, {"scale": 0.3}),
    "heads_causal": Case(attention, HEADS, {"scale": 0.3, "causal": True}),
    "heads_bias": Case(attention, {**HEADS, "bias": (2, 1, 7, 13)}, {"scale": 0.3}),
    "heads_lengths": Case(attention, HEADS, {"scale": 0.3}, LENGTHS),
    "heads_mask": Case(attention, HEADS, {"scale": 0.3}, MASK),
    "heads_mask_mean": Case(attention, HEADS, {"scale": 0.3, "masked_row": "mean"}, MASK),
    "heads_bias_mask": Case(attention, {**HEADS, **BIAS}, {"scale": 0.3}, MASK),
    "heads_everything": Case(attention, {**HEADS, **BIAS}, {"scale": 0.3, "causal": True}, {**LENGTHS, **MASK}),
    "rows": Case(attention, ROWS, GROUPED),
    "rows_lengths": Case(attention, ROWS, GROUPED, LENGTHS),
    "rows_everything": Case(attention, {**ROWS, **BIAS}, {**GROUPED, "causal": True}, {**LENGTHS, **MASK}),
    "packed": Case(attention, PACKED, GROUPED),
    "packed_mask": Case(attention, PACKED, GROUPED, MASK),
    "packed_everything": Case(attention, {**PACKED, **BIAS}, {**GROUPED, "causal": True}, {**LENGTHS, **MASK}),
    "batch_0": Case(attention, {"q": (0, 4, 7, 8), "k": (0, 2, 13, 8), "v": (0, 2, 13, 8)}, {"scale": 0.3}),
    "no_keys": Case(attention, {"q": (2, 4, 7, 8), "k": (2, 2, 0, 8), "v": (2, 2, 0, 8)}, {"scale": 0.3}),
    "no_queries": Case(attention, {"q": (2, 0, 32), "k": (2, 13, 16), "v": (2, 13, 16)}, GROUPED),
    "norm_no_rows": Case(layer_norm, {"x": (0, 33), "weight": (33,)}, {"eps": 1e-5}, outputs=("y",)),
    "norm_no_columns": Case(layer_norm, {"x": (3, 0)}, {"eps": 1e-5}, outputs=("y",)),
    "norm_vector": Case(layer_norm, {"x": (33,), "bias": (33,)}, {"eps": 1e-5}, outputs=("y",)),
    "norm_sum": Case(layer_norm, {**NORM, **ALL}, {"eps": 1e-5}, outputs=("y", "sum")),
    "norm_large_eps": Case(layer_norm, NORM, {"eps": 2.0}, outputs=("y",)),
    "rms": Case(rms_norm, NORM, {"eps": 1e-5}, outputs=("y",)),
    "rms_sum": Case(rms_norm, {**NORM, "residual": (3, 5, 33)}, {"eps": 1e-5, "cast": "gemma"}, outputs=BOTH),
    "rms_llama": Case(rms_norm, {**NORM, "weight": (33,)}, {"eps": 1e-5, "cast": "llama"}, outputs=("y",)),
    "rms_weight_in_fp32": Case(rms_norm, NORM, {"eps": 1e-5}, {"weight": torch.linspace(-2, 2, 33)}, ("y",)),
    "linear": Case(linear, LAYER),
    "linear_activation": Case(linear, {**LAYER, "bias": (20,), "residual": (2, 3, 20)}, {"activation": "gelu"}),
    "linear_transposed": Case(linear, {"x": (5, 24), "weight": (24, 20)}, {"transpose_weight": True}),
    "linear_of_three": Case(linear, {**LAYER, "bias": (20,), **MORE}, {"activation": "silu"}),
    "linear_no_rows": Case(linear, {"x": (0, 24), "weight": (20, 24)}),
    "gated": Case(gated_linear, GATED, {"activation": "silu"}),
    "gated_biases": Case(gated_linear, {**GATED, "gate_bias": (20,), "up_bias": (20,)}, {"activation": "gelu_tanh"}),
    "gated_second": Case(
        gated_linear, {"x": (5, 24), "gate_weight": (40, 24)}, {"activation": "relu", "gate": "second"}
    ),
    "joined": Case(linear_norm, LAYER, {"eps": 1e-5, "norm": "rms"}, outputs=("y",)),
    "joined_sum": Case(linear_norm, {**JOINED, "norm_bias": (20,)}, {"eps": 1e-5, "norm": "layer"}, outputs=BOTH),
    "joined_llama": Case(linear_norm, JOINED, {"eps": 1e-5, "norm": "rms", "cast": "llama"}, outputs=BOTH),
    "turned": Case(rotary_embedding, {**TURNED, "cos": (7, 8), "sin": (7, 8)}, outputs=("q_out", "k_out")),
    "turned_alone": Case(rotary_embedding, {"q": (2, 4, 7, 8)}, {"interleaved": True}, TABLES, ("q_out",)),
    "turned_packed": Case(
        rotary_embedding, {"q": (2, 7, 64)}, {"num_heads": 4, "kv_num_heads": 2, "packed": True}, TABLES, ("q_out",)
    ),
    "turned_positions": Case(
        rotary_embedding,
        TURNED,
        {"rotary_dim": 4},
        {name: table[:, :4] for name, table in TABLES.items()} | {"positions": torch.tensor([[6, 5, 4, 3, 2, 1, 0]])},
        ("q_out", "k_out"),
    ),
}
for chosen in itertools.chain.from_iterable(itertools.combinations(ALL, count) for count in range(4)):
    name = "_".join(["norm", *chosen])
    CASES[name] = Case(layer_norm, {**NORM, **{key: ALL[key] for key in chosen}}, {"eps": 1e-5}, outputs=("y",))


def tensors(case: Case, dtype: torch.dtype, device: str = "cpu") -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    floating = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in case.inputs.items()}
    return {name: tensor.to(device) for name, tensor in {**floating, **case.others}.items()}


def expected(case: Case, inputs: dict[str, torch.Tensor], wide: bool) -> dict[str, torch.Tensor]:
    attrs = vars(case.op.attributes(case.attrs))
    values = [inputs.get(port.name) for port in case.op.inputs]
    outputs = case.op.reference(*(map(widened, values) if wide else values), **attrs)
    return {port.name: out for port, out in zip(case.op.outputs, outputs, strict=True) if port.name in case.outputs}


def check(case: Case, dtype: torch.dtype, provider: str, offset: int = 0, torch_too: bool = False) -> None:
    inputs = tensors(case, dtype, "cuda" if provider == CUDA else "cpu")
    session = session_of(model(case.op, inputs, case.outputs, **case.attrs), provider)
    exact, peer = expected(case, inputs, True), expected(case, inputs, False)
    shapes = {name: out.shape for name, out in exact.items()}
    if provider == CUDA and dtype == torch.float32 and "linear" in case.op.name:
        assert "in fp32 is slower than the vendor's" in failure(lambda: bound_run(session, inputs, shapes, dtype))
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
    check(case, dtype, provider, torch_too=True)


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


# What else a session may be


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("op", ["layer_norm", "attention"])
def test_nan_and_infinity_are_the_references(op: str, provider: str) -> None:
    """In one row each of several; the others are as always."""
    case = CASES["norm_sum" if op == "layer_norm" else "heads"]
    inputs = tensors(case, torch.float32, "cuda" if provider == CUDA else "cpu")
    first = inputs["x" if op == "layer_norm" else "q"]
    for row, value in enumerate((float("nan"), float("inf"), -float("inf"))):
        first.view(-1, first.shape[-1])[row, 1] = value
    session = session_of(model(case.op, inputs, case.outputs, **case.attrs), provider)
    exact, peer = expected(case, inputs, True), expected(case, inputs, False)
    assert any(out.isnan().any() for out in exact.values())
    got = bound_run(session, inputs, {name: out.shape for name, out in exact.items()}, torch.float32)
    for name, out in got.items():
        infinite = exact[name].isinf()
        assert torch.equal(out.isinf(), infinite)
        assert torch.equal(out[infinite].double(), exact[name][infinite])
        assert_close(*(tensor.masked_fill(infinite, 0) for tensor in (out, exact[name], peer[name])))


@pytest.mark.parametrize("level", ["DISABLE_ALL", "ENABLE_BASIC", "ENABLE_EXTENDED", "ENABLE_ALL"])
def test_every_level_of_optimization(level: str) -> None:
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
    session = ort_session(content, [CPU], session_options=options)
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


# Shapes


def test_a_growing_sequence_keeps_its_plan() -> None:
    misses = []
    inputs = tensors(CASES["rows_lengths"], torch.float32)
    session = session_of(model(attention, inputs, ["out"], **GROUPED))
    for keys in (33, 34, 47, 60, 61):
        case = Case(attention, {"q": (2, 1, 32), "k": (2, keys, 16), "v": (2, keys, 16)}, GROUPED, LENGTHS)
        inputs = tensors(case, torch.float32)
        (out,) = session.run(None, feeds(inputs))
        assert_close(torch.from_numpy(out), expected(case, inputs, True)["out"], expected(case, inputs, False)["out"])
        misses.append(TRIMARAN.plans["attention"].misses)
    assert misses == [misses[0]] * 5


def test_nodes_and_sessions_share_plans() -> None:
    inputs = tensors(Case(layer_norm, {"x": (2, 77)}), torch.float32)
    before = TRIMARAN.plans["layer_norm"].misses
    for _ in range(2):
        nodes = [node("layer_norm", ["x"], ["y"], eps=1e-5), node("layer_norm", ["y"], ["z"], eps=1e-5)]
        session = session_of(graph_model(nodes, {"x": (1, ["a", "b"])}, {"z": 1}))
        session.run(None, feeds(inputs))
    assert TRIMARAN.plans["layer_norm"].misses == before + 1


@pytest.mark.usefixtures("path")
def test_initializers_are_constant_to_plans(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also behind an absent input; what a graph is fed is not."""
    seen: list[Any] = []
    find = PlanCache.find
    note = lambda self, inputs, *rest: seen.append([t and t.constant for t in inputs]) or find(self, inputs, *rest)  # noqa: E731
    monkeypatch.setattr(PlanCache, "find", note)
    made = node("layer_norm", ["x", "", "b"], ["y"], eps=0.125)
    proto = onnx.load_from_string(graph_model([made], {"x": (1, ["n", 8]), "b": (1, [8])}, {"y": 1}))
    fed = session_of(proto.SerializeToString())
    bias = proto.graph.input.pop()
    proto.graph.initializer.append(helper.make_tensor(bias.name, 1, [8], [1.0] * 8))
    x = torch.zeros(2, 8).numpy()
    assert session_of(proto.SerializeToString()).run(None, {"x": x})[0].sum() == 16
    assert fed.run(None, {"x": x, "b": torch.ones(8).numpy()})[0].sum() == 16
    assert seen == [[False, None, True, None], [False, None, False, None]]


def inferred(made: onnx.NodeProto, shapes: dict[str, list[Any]], outputs: Sequence[str]) -> list[list[Any]]:
    types = {name: (TensorProto.INT32 if name == "key_lengths" else 1, shape) for name, shape in shapes.items()}
    return [out.shape for out in session_of(graph_model([made], types, dict.fromkeys(outputs, 1))).get_outputs()]


VERSION = tuple(int(part) for part in onnxruntime.__version__.split(".")[:2])
infers = pytest.mark.skipif(
    VERSION < (1, 24), reason="this onnxruntime crashes on absent inputs where shapes are inferred"
)


@infers
def test_shapes_are_inferred() -> None:
    norm = node("layer_norm", ["x", "", "", "residual"], ["y", "sum"], eps=1e-5)
    shapes = inferred(norm, {"x": ["batch", "seq", 64], "residual": ["batch", "seq", 64]}, ["y", "sum"])
    assert shapes == [["batch", "seq", 64], ["batch", "seq", 64] if VERSION >= (1, 28) else []]
    norm = node("layer_norm", ["x"], ["y"], eps=1e-5)  # without `sum`, which older releases must not hear of
    assert inferred(norm, {"x": ["batch", "seq", 64]}, ["y"]) == [["batch", "seq", 64]]
    rows = node("attention", ["q", "k", "v", "", "key_lengths"], ["out"], scale=1.0, num_heads=4)
    shapes = inferred(
        rows, {"q": ["b", "s", 64], "k": ["b", "t", 64], "v": ["b", "t", 64], "key_lengths": ["b"]}, ["out"]
    )
    assert shapes == [["b", "s", 64]]
    heads = node("attention", ["q", "k", "v"], ["out"], scale=1.0)
    assert inferred(heads, {name: ["b", 4, "s", 16] for name in "qkv"}, ["out"]) == [["b", 4, "s", 16]]
    packed = node("attention", ["q"], ["out"], scale=1.0, num_heads=4, kv_num_heads=2)
    assert inferred(packed, {"q": ["b", 5, 128]}, ["out"]) == [["b", 5, 64]]


@infers
def test_unknown_dimensions_get_names_of_their_own() -> None:
    norm = node("layer_norm", ["x"], ["y"], eps=1e-5)
    ((first, second, last),) = inferred(norm, {"x": [None, None, 64]}, ["y"])
    assert isinstance(first, str)
    assert isinstance(second, str)
    assert first != second
    assert last == 64
    packed = node("attention", ["q"], ["out"], scale=1.0, num_heads=4)
    ((batch, length, width),) = inferred(packed, {"q": ["b", "s", "w"]}, ["out"])
    assert (batch, length) == ("b", "s")
    assert isinstance(width, str)
    assert width not in ("b", "s", "w")


def test_an_input_of_unknown_rank_is_no_error(caplog: pytest.LogCaptureFixture) -> None:
    norm = node("layer_norm", ["x"], ["y"], eps=1e-5)
    content = graph_model([norm], {"x": (1, None)}, {"y": 1})
    session = session_of(content)
    x = torch.randn(2, 8)
    (y,) = session.run(None, {"x": x.numpy()})
    assert torch.allclose(torch.from_numpy(y), torch.nn.functional.layer_norm(x, (8,)), atol=1e-5)
    assert caplog.records == []


@infers
def test_wrong_static_shapes_are_logged_at_load(caplog: pytest.LogCaptureFixture) -> None:
    norm = node("layer_norm", ["x", "w"], ["y"], eps=1e-5)
    with caplog.at_level(logging.WARNING, "trimaran"):
        inferred(norm, {"x": [2, 64], "w": [63]}, ["y"])
    assert "trimaran.layer_norm" in caplog.text
    assert "weight has shape [63], expected [N] = [64]" in caplog.text


# Errors


def failure(call: Any) -> str:
    with pytest.raises(Exception) as caught:  # noqa: PT011  # ORT's exceptions have no public base
        call()
    assert caught.value.__class__.__module__.startswith("onnxruntime"), repr(caught.value)
    return "\n".join([f"{caught.value.__class__.__name__}: {caught.value}", *getattr(caught.value, "__notes__", [])])


@pytest.mark.usefixtures("path")
def test_shapes_that_disagree_and_the_session_works_on() -> None:
    case = CASES["rows_lengths"]
    inputs = tensors(case, torch.float32)
    session = session_of(model(attention, inputs, ["out"], **GROUPED))
    exact, peer = expected(case, inputs, True)["out"], expected(case, inputs, False)["out"]
    for _ in range(3):
        text = failure(lambda: session.run(None, feeds({**inputs, "k": inputs["k"][:, :, :8]})))
        assert text.startswith("InvalidArgument")
        assert "trimaran.attention, node 'the_attention': ValueError: attention: k has shape [2, 2, 13, 4]" in text
        assert_close(torch.from_numpy(session.run(None, feeds(inputs))[0]), exact, peer)


@pytest.mark.parametrize(
    ("made", "reason"),
    [
        (node("layer_norm", ["x"], ["y"]), "ValueError: layer_norm: attribute eps is missing, expected a float"),
        (node("layer_norm", ["x"], ["y"], eps="small"), "TypeError: layer_norm: eps is 'small', expected a float"),
        (node("layer_norm", ["x"], ["y"], eps=[1.0, 2.0]), "TypeError: layer_norm: eps is [1.0, 2.0], expected"),
        (
            node("attention", ["x"], ["y"], scale=1.0, num_heads=1.5),
            "TypeError: attention: num_heads is 1.5, expected a int",
        ),
        (
            node("attention", ["x"], ["y"], scale=1.0, num_heads=1, masked_row="nan"),
            "ValueError: attention: masked_row is 'nan', expected one of zero, mean",
        ),
    ],
    ids=lambda value: None if isinstance(value, str) else value.op_type,
)
def test_wrong_attributes_are_refused_at_load(made: onnx.NodeProto, reason: str) -> None:
    text = failure(lambda: session_of(graph_model([made], {"x": (1, ["a", "b", "c"])}, {"y": 1})))
    assert f"trimaran.{made.op_type}, node 'the_{made.op_type}'" in text
    assert reason in text


def test_attributes_have_defaults_and_an_int_may_be_a_float() -> None:
    x = torch.randn(2, 8)
    session = session_of(graph_model([node("layer_norm", ["x"], ["y"], eps=1)], {"x": (1, ["a", "b"])}, {"y": 1}))
    (y,) = session.run(None, {"x": x.numpy()})
    assert torch.allclose(torch.from_numpy(y), torch.nn.functional.layer_norm(x, (8,), eps=1.0), atol=1e-5)


@pytest.mark.parametrize("name", ["k", "bias"])
def test_dtypes_that_differ_are_refused_at_load(name: str) -> None:
    inputs = tensors(CASES["heads_bias"], torch.float32)
    inputs[name] = inputs[name].half()
    text = failure(lambda: session_of(model(attention, inputs, ["out"], scale=1.0)))
    assert "the_attention" in text
    takes = (
        "takes q: T, k?: T, v?: T, bias?: T, key_lengths?: int32, key_mask?: bool; T is float32 or float16 or bfloat16"
    )
    assert takes in text


def test_a_dtype_that_the_op_has_not_is_refused_at_load() -> None:
    text = failure(lambda: session_of(model(layer_norm, {"x": torch.zeros(2, 8).double()}, ["y"], eps=1.0)))
    assert "tensor(double)" in text


@pytest.mark.usefixtures("path")
def test_a_declined_plan_is_an_error_with_its_reason() -> None:
    session = session_of(model(attention, {name: torch.zeros(1, 1, 2, 8) for name in "qkv"}, ["out"], scale=1.0))
    wide = feeds({name: torch.zeros(1, 1, 2, 264) for name in "qkv"})
    text = failure(lambda: session.run(None, wide))
    assert text.startswith("NotImplemented")
    assert "attention has no kernel for these inputs: head dimension of more than 256" in text
    assert session.run(None, feeds({name: torch.zeros(1, 1, 2, 8) for name in "qkv"}))[0].shape == (1, 1, 2, 8)


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("error", [RuntimeError("broken \0 é"), KeyboardInterrupt(), SystemExit(3)], ids=repr)
def test_any_exception_becomes_a_status(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(2, 8)
    session = session_of(model(layer_norm, {"x": x}, ["y"], eps=1e-5))

    def launch(*_: Any) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(Interpreter, "launch", launch)
        text = failure(lambda: session.run(None, {"x": x.numpy()}))
    assert text.startswith("Fail")
    assert f"trimaran.layer_norm, node 'the_layer_norm': {type(error).__name__}: " in text
    assert f"({Path(__file__).name}:" in text
    assert session.run(None, {"x": x.numpy()})[0].shape == (2, 8)


@pytest.mark.usefixtures("path")
def test_an_output_without_the_input_it_needs() -> None:
    session = session_of(model(layer_norm, {"x": torch.zeros(2, 8)}, ["y", "sum"], eps=1e-5))
    text = failure(lambda: session.run(None, {"x": torch.zeros(2, 8).numpy()}))
    assert "output sum is asked for, but the inputs it needs are missing" in text


@pytest.mark.usefixtures("path")
def test_an_absent_output_before_one_that_is_there() -> None:
    """`y` is required: what computes nothing for it is an error, never an empty value."""
    inputs = {"x": torch.zeros(2, 8), "residual": torch.zeros(2, 8)}
    text = failure(lambda: session_of(model(layer_norm, inputs, ["sum"], eps=1e-5)).run(None, feeds(inputs)))
    assert "the_layer_norm" in text
    assert "output 0" in text


# Threads and lifetime


@pytest.mark.usefixtures("path")
def test_eight_threads_on_one_session() -> None:
    case = Case(layer_norm, {**NORM, "weight": (33,)}, {"eps": 1e-5}, outputs=("y",))
    session = session_of(model(layer_norm, tensors(case, torch.float32), ["y"], eps=1e-5))
    wrong: list[Any] = []

    def work(seed: int) -> None:
        try:
            for turn in range(4):
                x = torch.randn(seed + 1, 5, 33, generator=torch.Generator().manual_seed(10 * seed + turn))
                inputs = {"x": x, "weight": torch.full((33,), float(seed))}
                (y,) = session.run(None, feeds(inputs))
                if not torch.allclose(torch.from_numpy(y), expected(case, inputs, False)["y"], atol=1e-4):
                    wrong.append((seed, turn))
        except Exception as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.usefixtures("path")
def test_nodes_on_threads_of_onnxruntime() -> None:
    names = [f"y{index}" for index in range(8)]
    nodes = [node("layer_norm", ["x"], [name], eps=1e-5) for name in names]
    options = quiet()
    options.execution_mode = onnxruntime.ExecutionMode.ORT_PARALLEL
    options.inter_op_num_threads = 4
    session = ort_session(graph_model(nodes, {"x": (1, ["a", "b"])}, dict.fromkeys(names, 1)), session_options=options)
    x = torch.randn(4, 33)
    for _ in range(5):
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


# A domain of other ops


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


def resident() -> int:
    """Bytes of this process that are in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.usefixtures("path")
def test_scratch_memory_is_given_back() -> None:
    inputs = {"x": torch.ones(1, 33)}
    session = row_sums_session(inputs, CPU, elements=1 << 18)  # 1 MiB
    session.run(None, feeds(inputs))
    before = resident()
    for _ in range(1000):
        session.run(None, feeds(inputs))
    assert resident() - before < 100 << 20


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


@pytest.mark.usefixtures("path")
@pytest.mark.gpu
def test_a_cuda_graph_replays_the_kernels() -> None:
    case = CASES["rows_everything"]
    inputs = tensors(case, torch.float16, "cuda")
    providers = [(CUDA, {"enable_cuda_graph": "1"})]
    session = ort_session(model(attention, inputs, ["out"], **case.attrs), providers, session_options=quiet())
    binding, out = session.io_binding(), torch.empty(2, 7, 32, dtype=torch.float16, device="cuda")
    for name, tensor in inputs.items():
        binding.bind_input(name, "cuda", 0, int(ELEMENT[tensor.dtype]), list(tensor.shape), tensor.data_ptr())
    binding.bind_output("out", "cuda", 0, int(ELEMENT[out.dtype]), list(out.shape), out.data_ptr())
    for turn in range(5):
        inputs["q"].copy_(torch.randn(2, 7, 32, generator=torch.Generator().manual_seed(turn)))
        out.fill_(float("nan"))
        torch.cuda.synchronize()
        session.run_with_iobinding(binding)
        assert_close(out, expected(case, inputs, True)["out"], expected(case, inputs, False)["out"])


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


# The library that is written without a compiler


def test_a_temporary_file_where_memory_files_do_not_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(*_: Any) -> int:
        raise PermissionError(13, "memfd_noexec")

    monkeypatch.setattr(stub_library.os, "memfd_create", refuse)
    monkeypatch.setattr(stub_library.tempfile, "gettempdir", lambda: str(tmp_path))
    stub_library._memory_file.cache_clear()
    session = session_of(model(layer_norm, {"x": torch.zeros(2, 8)}, ["y"], eps=1e-5))
    assert list(tmp_path.iterdir()) == []
    assert session.run(None, {"x": torch.zeros(2, 8).numpy()})[0].shape == (2, 8)
    stub_library._memory_file.cache_clear()


def test_no_library_can_be_loaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(path: str) -> None:
        raise OSError(f"{path}: operation not permitted")

    monkeypatch.setattr(stub_library.ctypes, "CDLL", refuse)
    monkeypatch.setattr(stub_library.tempfile, "gettempdir", lambda: str(tmp_path))
    stub_library._memory_file.cache_clear()
    options = quiet()
    with pytest.raises(OSError, match=r"a memory file: .*not permitted; .*" + str(tmp_path)):
        register(options, [CPU])
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    assert register(options, [CPU]) == tuple(OPS)  # nothing was left half done


def test_the_code_of_the_stub() -> None:
    target = 0x0123456789ABCDEF
    assert stub_library.jump("x86_64", target)[1][4:].hex() == "48b8" + target.to_bytes(8, "little").hex() + "ffe0"
    machine, code = stub_library.jump("aarch64", target)
    words = [int.from_bytes(code[at : at + 4], "little") for at in range(0, 16, 4)]
    load = words[1]
    assert load >> 24 == 0x58  # ldr of 64 bits, relative to its own address
    assert load & 31 == 16  # into x16, which a jump between functions may overwrite
    assert 4 + 4 * (load >> 5 & 0x7FFFF) == 16  # the target's offset
    assert words[2] == 0xD61F0000 | 16 << 5  # br x16
    assert int.from_bytes(code[16:], "little") == target
    library = stub_library.elf("RegisterCustomOps", target, "aarch64")
    assert (machine, library[18], library[:4]) == (183, 183, b"\x7fELF")
    assert library.index(code) % 8 == 0
    with pytest.raises(OSError, match="riscv64"):
        stub_library.elf("RegisterCustomOps", target, "riscv64")


def test_the_library_by_its_path_is_refused() -> None:
    from trimaran.ort_ops.domain import _stub

    session_of(model(layer_norm, {"x": torch.zeros(2, 8)}, ["y"], eps=1e-5))
    with stub_library.library_path(_stub()) as path:
        text = failure(lambda: onnxruntime.SessionOptions().register_custom_ops_library(path))
    assert "cannot be registered by its path" in text
