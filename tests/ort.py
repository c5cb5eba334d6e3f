"""Models of a few nodes, and sessions that run them: what the tests of ONNX Runtime share."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper

from trimaran.kernels.contract import Op
from trimaran.ort_ops import custom_op
from trimaran.ort_ops.domain import TRIMARAN, Domain
from trimaran.ort_ops.runner import Runner
from trimaran.ort_ops.session import ort_session

ROOT = Path(__file__).resolve().parents[1]
VERSION = tuple(int(part) for part in onnxruntime.__version__.split(".")[:2])
ELEMENT = {
    torch.float32: TensorProto.FLOAT,
    torch.float16: TensorProto.FLOAT16,
    torch.bfloat16: TensorProto.BFLOAT16,
    torch.float64: TensorProto.DOUBLE,
    torch.int32: TensorProto.INT32,
    torch.int64: TensorProto.INT64,
    torch.int8: TensorProto.INT8,
    torch.uint8: TensorProto.UINT8,
    torch.bool: TensorProto.BOOL,
}
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
PROVIDERS = [CPU, pytest.param(CUDA, marks=pytest.mark.gpu)]


def through_ctypes(monkeypatch: pytest.MonkeyPatch, *domains: Domain) -> None:
    """Nodes of sessions that are made now run as where there is no C hot path."""
    monkeypatch.setattr(custom_op, "compute_address", lambda op: 0)
    for domain in (TRIMARAN, *domains):
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


def sums() -> bytes:
    """total = a + b, product = a * b, of fp32."""
    nodes = [helper.make_node("Add", ["a", "b"], ["total"]), helper.make_node("Mul", ["a", "b"], ["product"])]
    return graph_model(nodes, {"a": (1, ["n", 4]), "b": (1, [4])}, {"total": 1, "product": 1})


def runner(content: bytes, device: str = "cpu", **kwargs: Any) -> Runner:
    provider = CUDA if device == "cuda" else CPU
    return Runner(ort_session(content, [provider], session_options=quiet(), **kwargs))


def failure(call: Any) -> str:
    with pytest.raises(Exception) as caught:  # noqa: PT011  # ORT's exceptions have no public base
        call()
    assert caught.value.__class__.__module__.startswith("onnxruntime"), repr(caught.value)
    return "\n".join([f"{caught.value.__class__.__name__}: {caught.value}", *getattr(caught.value, "__notes__", [])])


def hammered(run: Callable[[int], bool], threads: int, times: int) -> list[Any]:
    """What went wrong in `threads` threads that each call `run` so many times, with another number each time."""
    wrong: list[Any] = []

    def work(seed: int) -> None:
        try:
            wrong.extend(seed for turn in range(times) if not run(100 * seed + turn))
        except Exception as error:
            wrong.append(error)

    started = [threading.Thread(target=work, args=(seed,)) for seed in range(threads)]
    for thread in started:
        thread.start()
    for thread in started:
        thread.join()
    return wrong


def python(code: str, temporary: Path) -> str:
    """What `code` prints in a process of its own, which leaves no temporary file and, but for what libraries
    have to say of a GPU, prints no more."""
    path = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path, "TMPDIR": str(temporary)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == "" or "cuda" in code, done.stderr
    assert [path.name for path in temporary.iterdir() if path.name != ".ses"] == []  # onnxruntime's own
    return done.stdout
