"""Ways to run a model of transformers: each takes its inputs on the device and returns the hidden states there.

An engine is a name, what it needs once for a model (`load`), and what it needs once for a shape (`ready`). What a
caller would have to do for each call is in the timed run: copying inputs to where a graph reads them, and outputs away.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from trimaran.benchmarks.measure import Run
from trimaran.export.export_onnx import export_onnx, quiet
from trimaran.ort_ops.abi import CPU, CUDA
from trimaran.ort_ops.runner import Runner
from trimaran.ort_ops.session import ort_session
from trimaran.torch_path.optimize import optimize_model

Inputs = Mapping[str, torch.Tensor]
Ready = Callable[[Inputs], Run]  # called once for each shape


@dataclass(frozen=True)
class Engine:
    """load(model, inputs, folder): what makes runs; `inputs` are an example, `folder` is its own to write into. slow:
    each new shape takes it many seconds, so a quick run leaves it out of most cases."""

    name: str
    load: Callable[[torch.nn.Module, Inputs, Path], Ready]
    ours: bool = False
    cuda: bool = False  # whether it needs a GPU
    slow: bool = False


def hidden(outputs: Any) -> torch.Tensor:
    return outputs["last_hidden_state"]  # type: ignore[no-any-return]


def eager(model: torch.nn.Module, inputs: Inputs, folder: Path) -> Ready:
    return lambda given: lambda: hidden(model(**given))


def graphed(model: torch.nn.Module, inputs: Inputs, folder: Path) -> Ready:
    """The whole model captured by torch; the mask is expanded in the graph, since making it waits for the GPU."""

    def call(given: Inputs) -> torch.Tensor:
        given = dict(given)
        if "attention_mask" in given:
            size, length = given["attention_mask"].shape
            given["attention_mask"] = given["attention_mask"][:, None, None].bool().expand(size, 1, length, length)
        return hidden(model(**given))

    def ready(given: Inputs) -> Run:
        buffers = {name: tensor.clone() for name, tensor in given.items()}
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            call(buffers)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = call(buffers)

        def run() -> torch.Tensor:
            for name, tensor in given.items():
                buffers[name].copy_(tensor)
            graph.replay()
            return result.clone()

        return run

    return ready


def compiled(mode: str | None) -> Callable[[torch.nn.Module, Inputs, Path], Ready]:
    """torch.compile for each shape on its own. What a CUDA graph of torch's returns is cloned, as its next call
    overwrites it."""

    def load(model: torch.nn.Module, inputs: Inputs, folder: Path) -> Ready:
        fast: Any = torch.compile(copy.copy(model), mode=mode, dynamic=False)

        def ready(given: Inputs) -> Run:
            def run() -> torch.Tensor:
                result = hidden(fast(**given))
                return result if mode is None else result.clone()

            with torch._dynamo.config.patch(recompile_limit=100):  # the modes share the model's code
                for _ in range(3):
                    run()
            return run

        return ready

    return load


def optimized(model: torch.nn.Module, inputs: Inputs, folder: Path) -> Ready:
    twin = copy.deepcopy(model)
    optimize_model(twin)

    def ready(given: Inputs) -> Run:
        for _ in range(3):  # the first compiles, the second captures
            twin(**given)
        return lambda: hidden(twin(**given))

    return ready


def session(path: Path) -> Ready:
    """A file in onnxruntime, through a CUDA graph where there is a GPU and nothing is copied from the host in between:
    a graph would copy from where that was when it was captured."""
    if torch.cuda.is_available():
        found = _on_gpu(path)
    else:
        found = ort_session(path, [CPU])
    run = Runner(found)
    names = set(run.inputs)
    output = next(iter(run.outputs))

    def ready(given: Inputs) -> Run:
        fed = {name: tensor for name, tensor in given.items() if name in names}
        if "attention_mask" in names and "attention_mask" not in fed:
            fed["attention_mask"] = torch.ones_like(fed["input_ids"])
        return lambda: run(fed)[output]

    return ready


def _on_gpu(path: Path) -> Any:
    import onnx
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(path.with_suffix(".optimized.onnx"))
    options.log_severity_level = 3
    plain = ort_session(path, [CUDA, CPU], session_options=options)
    partitioned = onnx.load(options.optimized_model_filepath, load_external_data=False)
    copies = any(node.op_type.startswith("Memcpy") for node in partitioned.graph.node)
    return plain if copies else ort_session(path, [CUDA, CPU], cuda_graph=True)


def ours_in_onnxruntime(model: torch.nn.Module, inputs: Inputs, folder: Path) -> Ready:
    path = folder / "trimaran.onnx"
    export_onnx(model, dict(inputs), path, verify=False)
    return session(path)


def onnxruntime_fused(model: torch.nn.Module, inputs: Inputs, folder: Path) -> Ready:
    """The TorchScript exporter on eager attention, then onnxruntime's own transformer optimizer: of its paths the one
    in which all attentions are fused."""
    from onnxruntime.transformers.optimizer import optimize_model as fuse

    twin = copy.deepcopy(model).requires_grad_(False)
    twin.set_attn_implementation("eager")  # type: ignore[operator]
    raw, path = folder / "torchscript.onnx", folder / "fused.onnx"
    names = list(inputs)
    axes = {name: {0: "batch", 1: "sequence"} for name in (*names, "last_hidden_state")}

    class Hidden(torch.nn.Module):
        def forward(self, *values: torch.Tensor) -> torch.Tensor:
            return hidden(twin(**dict(zip(names, values, strict=True))))

    with quiet(), torch.no_grad():
        torch.onnx.export(
            Hidden(), tuple(inputs.values()), str(raw), input_names=names, output_names=["last_hidden_state"],
            dynamic_axes=axes, opset_version=17, dynamo=False,
        )  # fmt: skip
    config: Any = model.config
    fused = fuse(
        str(raw), "bert", num_heads=config.num_attention_heads, hidden_size=config.hidden_size, opt_level=1,
        use_gpu=torch.cuda.is_available(),
    )  # fmt: skip
    fused.save_model_to_file(str(path))
    return session(path)


ENGINES = (
    Engine("transformers", eager),
    Engine("transformers, one CUDA graph", graphed, cuda=True),
    Engine("torch.compile", compiled(None), cuda=True, slow=True),
    Engine("torch.compile, reduce-overhead", compiled("reduce-overhead"), cuda=True, slow=True),
    Engine("onnxruntime, fused", onnxruntime_fused),
    Engine("trimaran in PyTorch", optimized, ours=True),
    Engine("trimaran in onnxruntime", ours_in_onnxruntime, ours=True),
)
