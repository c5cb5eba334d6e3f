"""Trimaran in PyTorch, and its files in onnxruntime: exported by us, and rewritten from torch's export."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch

from trimaran.benchmarks.engines.contract import Built, Engine, Inputs, Subject, torch_model
from trimaran.benchmarks.engines.onnx_files import file_of
from trimaran.benchmarks.engines.ort import exporters, graph_obstacle, no_provider, running
from trimaran.ort_ops.abi import CPU, CUDA
from trimaran.ort_ops.runner import Runner
from trimaran.ort_ops.session import ort_session
from trimaran.torch_path.optimize import optimize_model

GROUP = "trimaran"
IN_PYTORCH = "trimaran PyTorch"


def optimized(subject: Subject, example: Inputs) -> Built:
    twin = copy.deepcopy(subject.model)
    optimize_model(twin, max_graphs=subject.max_graphs)
    return Built(lambda inputs: subject.forward(twin, inputs))


def by_runner(kind: str) -> Callable[[Subject, Inputs], Built]:
    """As a user calls it: `trimaran.Runner` on torch's tensors, graphs captured and outputs copied by it."""

    def build(subject: Subject, example: Inputs) -> Built:
        path = file_of(kind, subject, example)
        note = graph_obstacle(subject, path) if subject.cuda else ""
        session = ort_session(path, [CUDA, CPU] if subject.cuda else [CPU], cuda_graph=subject.cuda and not note)
        run = Runner(session, max_graphs=subject.max_graphs)
        output = subject.output if subject.output in run.outputs else next(iter(run.outputs))
        masks: dict[torch.Size, torch.Tensor] = {}

        def call(inputs: Inputs) -> torch.Tensor:
            fed = {name: tensor for name, tensor in inputs.items() if name in run.inputs}
            if "attention_mask" in run.inputs and "attention_mask" not in fed:
                ids = next(iter(inputs.values()))
                if ids.shape not in masks:
                    masks[ids.shape] = torch.ones_like(ids)
                fed["attention_mask"] = masks[ids.shape]
            return run(fed)[output]  # type: ignore[no-any-return]

        return Built(call, note)

    return build


ENGINES = (
    Engine(IN_PYTORCH, GROUP, optimized, torch_model, ours=True),
    Engine("trimaran ORT export Runner", GROUP, by_runner("trimaran"), exporters, ours=True),
    Engine("trimaran ORT rewritten Runner", GROUP, by_runner("trimaran-rewritten"), no_provider,
           ours=True),
    Engine("trimaran ORT export IO binding", GROUP, running("trimaran"), exporters, ours=True),
    Engine("trimaran ORT rewritten IO binding", GROUP, running("trimaran-rewritten"), no_provider,
           ours=True),
)  # fmt: skip
