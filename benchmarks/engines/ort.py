"""onnxruntime on every file there is of a model: IO binding to fixed memory, and one CUDA graph for each shape."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from trimaran.benchmarks.engines.contract import Built, Engine, Inapplicable, Inputs, Subject, missing
from trimaran.benchmarks.engines.graphs import kind_of
from trimaran.benchmarks.engines.onnx_files import file_of
from trimaran.ort_ops.abi import CPU, CUDA, DTYPE, ELEMENT_TYPE
from trimaran.ort_ops.session import Provider, ort_session

GROUP = "onnxruntime"
TENSORRT = "TensorrtExecutionProvider"
GIVEN = "onnxruntime given file"  # the reference where there is no other
GRAPH_IDS = itertools.count(1)


@dataclass
class Bound:
    """Fixed memory for one kind of inputs. read: what the caller's inputs are copied to, in their order."""

    names: list[str]
    read: list[torch.Tensor]
    written: torch.Tensor
    binding: Any
    options: Any
    kept: Any


class Bindings:
    """A session, called on torch's tensors: copied to where it reads, its output copied away. On a GPU the session
    works on the stream that was current when it was made, so nobody waits. An attention mask that the file asks for and
    the call does not have is one of ones that is made once."""

    def __init__(self, session: Any, subject: Subject, graph: bool) -> None:
        self.session, self.device, self.graph = session, subject.device, graph
        self.inputs = [value.name for value in session.get_inputs()]
        outputs = [value.name for value in session.get_outputs()]
        self.outputs = outputs
        self.wanted = outputs.index(subject.output) if subject.output in outputs else 0
        self.bound: dict[Any, Bound] = {}

    def __call__(self, inputs: Inputs) -> torch.Tensor:
        kind = kind_of(inputs)
        if kind not in self.bound:
            self.bound[kind] = self.bind(inputs)
        bound = self.bound[kind]
        torch._foreach_copy_(bound.read, [inputs[name] for name in bound.names])
        self.session.run_with_iobinding(bound.binding, bound.options)
        return bound.written.clone()

    def bind(self, inputs: Inputs) -> Bound:
        fed = {name: inputs[name].clone() for name in self.inputs if name in inputs}
        if "attention_mask" in self.inputs and "attention_mask" not in fed:
            fed["attention_mask"] = torch.ones_like(next(iter(inputs.values())))
        if lacking := [name for name in self.inputs if name not in fed]:
            raise Inapplicable(f"the file asks for {', '.join(lacking)}")
        shapes = self.shapes(fed)
        written = [torch.empty(shape, dtype=dtype, device=self.device) for shape, dtype in shapes]
        binding = self.bound_inputs(fed)
        for name, tensor in zip(self.outputs, written, strict=True):
            binding.bind_output(name, *self.place(), ELEMENT_TYPE[dtype_name(tensor)], list(tensor.shape),
                                tensor.data_ptr())  # fmt: skip
        options = self.options(str(next(GRAPH_IDS)) if self.graph else None)
        names = [name for name in self.inputs if name in inputs]
        return Bound(names, [fed[name] for name in names], written[self.wanted], binding, options, (fed, written))

    def shapes(self, fed: Inputs) -> list[tuple[list[int], torch.dtype]]:
        """Of the outputs: from one run without a graph, in which also everything is made that is made once."""
        binding = self.bound_inputs(fed)
        for name in self.outputs:
            binding.bind_output(name, *self.place())
        self.session.run_with_iobinding(binding, self.options("-1" if self.graph else None))
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        found = binding.get_outputs()
        return [(value.shape(), getattr(torch, DTYPE[value.element_type()])) for value in found]

    def bound_inputs(self, fed: Inputs) -> Any:
        binding = self.session.io_binding()
        for name, tensor in fed.items():
            element = ELEMENT_TYPE[dtype_name(tensor)]
            binding.bind_input(name, *self.place(), element, list(tensor.shape), tensor.data_ptr())
        return binding

    def place(self) -> tuple[str, int]:
        return self.device.type, self.device.index or 0

    def options(self, graph: str | None) -> Any:
        import onnxruntime

        options = onnxruntime.RunOptions()
        if self.device.type == "cuda":
            options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        if graph is not None:
            options.add_run_config_entry("gpu_graph_id", graph)
        return options


def dtype_name(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def on_stream(graph: bool) -> dict[str, str]:
    """Options of a CUDA provider that works on the current stream."""
    return {"user_compute_stream": str(torch.cuda.current_stream().cuda_stream), "enable_cuda_graph": str(int(graph))}


def graph_obstacle(subject: Subject, path: Path) -> str:
    """Why runs of this file are captured in no CUDA graph; "" where they are.

    A graph that holds a copy from the host would read from where that was when it was captured, and one has been seen
    to fail at its launch. So the file is opened without a graph first, to see how onnxruntime partitions it."""
    options = quiet_options()
    optimized = path.with_name(f"{path.stem}.optimized.onnx")
    options.optimized_model_filepath = str(optimized)
    options.add_session_config_entry(
        "session.optimized_model_external_initializers_file_name", f"{optimized.name}.data"
    )
    ort_session(path, [(CUDA, on_stream(False)), CPU], session_options=options)
    return copies_in(optimized)


def opened(subject: Subject, path: Path, *, graph: bool) -> Any:
    """A session, on a GPU one that works on the current stream."""
    providers: list[Provider] = [(CUDA, on_stream(graph)), CPU] if subject.cuda else [CPU]
    return ort_session(path, providers, session_options=quiet_options())


def copies_in(path: Path) -> str:
    import onnx

    nodes = onnx.load(str(path), load_external_data=False).graph.node
    copies = sum(node.op_type.startswith("Memcpy") for node in nodes)
    return f"no CUDA graph: {copies} copies between host and GPU inside" if copies else ""


def quiet_options() -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return options


def running(kind: str, *, graph: bool = True) -> Callable[[Subject, Inputs], Built]:
    def build(subject: Subject, example: Inputs) -> Built:
        path = subject.file if kind == "as given" else file_of(kind, subject, example)
        assert path is not None
        note = graph_obstacle(subject, path) if graph and subject.cuda else ""
        captures = graph and subject.cuda and not note
        return Built(Bindings(opened(subject, path, graph=captures), subject, captures), note)

    return build


def tensorrt_provider(subject: Subject, example: Inputs) -> Built:
    import onnxruntime

    source = subject.file or file_of("dynamo-20", subject, example)
    half = {"trt_fp16_enable": "1"} if subject.dtype == torch.float16 else {}
    stream = {"user_compute_stream": str(torch.cuda.current_stream().cuda_stream)}
    providers = [(TENSORRT, half | stream), (CUDA, on_stream(False)), CPU]
    session = onnxruntime.InferenceSession(str(source), quiet_options(), providers=providers)
    if TENSORRT not in session.get_providers():
        raise Inapplicable("onnxruntime could not load TensorRT's libraries")
    return Built(Bindings(session, subject, graph=False))


def no_tensorrt(subject: Subject) -> str | None:
    import onnxruntime

    if not subject.cuda:
        return "needs a CUDA device"
    if TENSORRT not in onnxruntime.get_available_providers():
        return "this onnxruntime is built without TensorRT"
    return missing("tensorrt_libs") and missing("tensorrt")


def exporters(subject: Subject) -> str | None:
    """For engines that export the model themselves."""
    if subject.module is None:
        return "the file that is given is run instead"
    return no_provider(subject)


def no_provider(subject: Subject) -> str | None:
    if reason := missing("onnxruntime"):
        return reason
    import onnxruntime

    there = not subject.cuda or CUDA in onnxruntime.get_available_providers()
    return None if there else "this onnxruntime is built without CUDA"


def only_for_files(subject: Subject) -> str | None:
    return no_provider(subject) if subject.file else "for an ONNX file that is given; this is a PyTorch model"


def no_optimizer(subject: Subject) -> str | None:
    reason = no_provider(subject)
    if reason is None and getattr(getattr(subject.module, "config", None), "model_type", "") == "whisper":
        return "the TorchScript exporter fails on Whisper"
    return reason


def no_packing(subject: Subject) -> str | None:
    return no_provider(subject) or (None if subject.cuda else "ORT's packed attention needs a CUDA device")


def no_fusing_exporter(subject: Subject) -> str | None:
    if reason := exporters(subject) or missing("transformers.exporters"):
        return reason
    import transformers
    from transformers.exporters import OnnxConfig

    there = "ort_fusions" in OnnxConfig.__dataclass_fields__
    return None if there else f"the exporter of transformers {transformers.__version__} has no fusions for onnxruntime"


ENGINES = (
    Engine(GIVEN, GROUP, running("as given"), only_for_files),
    Engine("onnxruntime torch export opset 20", GROUP, running("dynamo-20"), exporters),
    Engine("onnxruntime torch export opset 23", GROUP, running("dynamo-23"), exporters),
    Engine("onnxruntime TorchScript + ORT optimizer", GROUP, running("optimized"), no_optimizer),
    Engine("onnxruntime TorchScript + ORT optimizer packed", GROUP, running("packed", graph=False), no_packing),
    Engine("onnxruntime onnxscript fusions", GROUP, running("onnxscript"), no_provider),
    Engine("onnxruntime transformers exporter fusions", GROUP, running("transformers"), no_fusing_exporter),
    Engine("onnxruntime TensorRT provider", GROUP, tensorrt_provider, no_tensorrt, slow=True),
)
