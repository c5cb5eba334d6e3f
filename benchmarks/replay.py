"""What a replay costs the host: a `Runner` on torch's tensors against ONNX Runtime's own IO binding, which reads and
makes none. Part of `trimaran bench-nodes`.

The graph is one node of layer_norm with two inputs and two outputs. A call ends when the device is done, so its time is
the device's and the host's in turn; the host's is the call's less what the device works in it, kernels and copies.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from rich.box import SIMPLE
from rich.table import Table

from trimaran.benchmarks.kernels import SEED, spread
from trimaran.benchmarks.measure import Contender, HostWatch, Run, Timing, compare
from trimaran.kernels.interpreter import interpret
from trimaran.kernels.layer_norm import layer_norm_reference
from trimaran.ort_ops.abi import CPU, CUDA, ELEMENT_TYPE
from trimaran.ort_ops.runner import Runner
from trimaran.ort_ops.session import ort_session

EPS = 1e-5
TARGET_US = 60.0
PROFILED = 50  # calls over which the device's work is averaged
NAMES = {
    "copied": "trimaran.Runner, outputs copied",
    "own": "trimaran.Runner, the graph's own outputs",
    "bare": "onnxruntime's IO binding alone",
}


def model(dtype: torch.dtype, columns: int) -> bytes:
    """(y, sum) = layer_norm(x, residual)"""
    from onnx import TensorProto, helper

    element = TensorProto.FLOAT16 if dtype == torch.float16 else TensorProto.FLOAT
    node = helper.make_node("layer_norm", ["x", "", "", "residual"], ["y", "sum"], domain="trimaran", eps=EPS)
    inputs, outputs = (
        [helper.make_tensor_value_info(name, element, ["rows", columns]) for name in names]
        for names in (("x", "residual"), ("y", "sum"))
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("trimaran", 1)]
    graph = helper.make_graph([node], "replay", inputs, outputs)
    made: bytes = helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()
    return made


def measure(rows: int, columns: int, dtype: torch.dtype, device: torch.device, rounds: int) -> dict[str, Any]:
    """The result as it is written to JSON. Without a GPU nothing is replayed, and this only shows that it runs."""
    source = torch.Generator().manual_seed(SEED)
    inputs = {name: torch.randn(rows, columns, generator=source).to(device, dtype) for name in ("x", "residual")}
    exact = layer_norm_reference(inputs["x"].double(), None, None, inputs["residual"].double(), eps=EPS)
    runs: dict[str, Run] = {}

    def contender(kind: str) -> Contender:
        def prepare(copy: int) -> Run:
            runs[kind] = prepared(kind, inputs)
            return runs[kind]

        return Contender(NAMES[kind], prepare, ours=kind != "bare")

    timings = compare(
        [contender(kind) for kind in NAMES], exact=exact, dtype=dtype, watch=HostWatch(), rounds=rounds, seed=SEED
    )
    cuda = device.type == "cuda"
    contenders = [
        row(timing, device_us(runs[kind]) if cuda and timing.samples else 0.0)
        for kind, timing in zip(NAMES, timings, strict=True)
    ]
    return {"target_us": TARGET_US if cuda else None, "contenders": contenders}


def row(timing: Timing, busy: float | None) -> dict[str, Any]:
    """One contender; busy: what the device works in a call, in us, None where that is not known."""
    micro = [1e3 * sample for sample in timing.samples]
    host = [] if busy is None else [sample - busy for sample in micro]
    found = {"name": timing.name, "ours": timing.ours, "reason": timing.reason, "error": timing.error}
    found |= {"calls": timing.calls, "device_us": busy, "samples_us": micro}
    return found | {"call_us": spread(micro) if micro else None, "host_us": spread(host) if host else None}


def prepared(kind: str, inputs: dict[str, torch.Tensor]) -> Run:
    """One call on these inputs, its graph captured."""
    x = inputs["x"]
    cuda = x.device.type == "cuda"
    with interpret(not cuda):
        session = ort_session(model(x.dtype, x.shape[1]), [CUDA] if cuda else [CPU], cuda_graph=cuda)
    if kind == "bare":
        return bound(session, inputs, ["y", "sum"])
    runner = Runner(session, copy_outputs=kind == "copied")
    for _ in range(2):
        runner(inputs)
    return lambda: tuple(runner(inputs).values())


def bound(session: Any, inputs: dict[str, torch.Tensor], outputs: list[str]) -> Run:
    """A run over memory that stays where it is; outputs are as the first input is. ONNX Runtime returns when the device
    is done."""
    first = next(iter(inputs.values()))
    written = {name: torch.full_like(first, float("nan")) for name in outputs}
    binding, place = session.io_binding(), (first.device.type, first.device.index or 0)
    for bind, tensors in ((binding.bind_input, inputs), (binding.bind_output, written)):
        for name, tensor in tensors.items():
            element = ELEMENT_TYPE[str(tensor.dtype).removeprefix("torch.")]
            bind(name, *place, element, list(tensor.shape), tensor.data_ptr())
    if first.device.type == "cuda":
        torch.cuda.synchronize()

    def run() -> Any:
        session.run_with_iobinding(binding)
        return tuple(written.values()) if len(written) > 1 else written[outputs[0]]

    run.kept = (inputs, session)  # type: ignore[attr-defined]
    return run


def device_us(run: Callable[[], Any]) -> float | None:
    """What the device works in one call, kernels and copies, as CUPTI sees it; None where it sees nothing."""
    from torch.profiler import ProfilerActivity, profile

    run()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as seen:
        for _ in range(PROFILED):
            run()
        torch.cuda.synchronize()
    total = sum(float(event.self_device_time_total) for event in seen.key_averages())
    return total / PROFILED or None


def table(found: dict[str, Any]) -> Table:
    shown = Table(box=SIMPLE, title="us per replay, two inputs, two outputs", title_justify="left", padding=0)
    shown.add_column("", no_wrap=True)
    for name in ("call", "p20-p80", "device", "host", "target"):
        shown.add_column(name, justify="right", no_wrap=True)
    for row in found["contenders"]:
        style = "bold" if row["ours"] else ""
        if row["reason"]:
            shown.add_row(row["name"], "", "not timed", style=style)
            continue
        call, host = row["call_us"], row["host_us"]
        split = [f"{row['device_us']:.1f}", f"{host['median']:.1f}"] if host else ["", ""]
        target = str(found["target_us"] or "") if row["ours"] else ""
        spreads = (f"{call['median']:.1f}", f"{call['p20']:.0f}-{call['p80']:.0f}")
        shown.add_row(row["name"], *spreads, *split, target, style=style)
    return shown
