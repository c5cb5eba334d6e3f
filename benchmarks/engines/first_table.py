"""What stood in this field's first table, Kernl's of 2022: nvFuser, DeepSpeed, AITemplate and Kernl itself. Each runs
where it can be installed, which none of them can beside a current torch at the time of writing."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch

from trimaran.benchmarks.engines.contract import Built, Engine, Inputs, Subject, missing, torch_on_gpu
from trimaran.benchmarks.engines.onnx_files import Flat

GROUP = "first table"


def nvfuser(subject: Subject, example: Inputs) -> Built:
    """TorchScript with nvFuser, as it stood in that table."""
    flat = Flat(subject, subject.model, list(example)).eval()
    with torch.jit.fuser("fuser2"):  # type: ignore[attr-defined]
        traced: Any = torch.jit.trace(flat, tuple(example.values()), check_trace=False)
        frozen = torch.jit.freeze(traced)

    def call(inputs: Inputs) -> torch.Tensor:
        with torch.jit.fuser("fuser2"):  # type: ignore[attr-defined]
            return frozen(*flat.filled(inputs))  # type: ignore[no-any-return]

    return Built(call)


def no_nvfuser(subject: Subject) -> str | None:
    if reason := torch_on_gpu(subject):
        return reason
    there = hasattr(torch._C, "_jit_nvfuser_enabled")
    return (
        None if there else f"torch {torch.__version__.split('+')[0]} is built without nvFuser, which left in torch 2.2"
    )


def deepspeed(subject: Subject, example: Inputs) -> Built:
    from deepspeed import init_inference

    engine = init_inference(copy.deepcopy(subject.model), dtype=subject.dtype, replace_with_kernel_inject=True)
    return Built(lambda inputs: subject.forward(engine, inputs).clone())


def kernl(subject: Subject, example: Inputs) -> Built:
    from kernl.model_optimization import optimize_model

    twin = copy.deepcopy(subject.model)
    optimize_model(twin)

    def call(inputs: Inputs) -> torch.Tensor:
        with torch.autocast("cuda", torch.float16):
            return subject.forward(twin, inputs).clone()

    return Built(call)


def aitemplate(subject: Subject, example: Inputs) -> Built:
    raise NotImplementedError("AITemplate compiles models written in its own frontend, and this is a torch module")


def needs(package: str) -> Callable[[Subject], str | None]:
    return lambda subject: torch_on_gpu(subject) or missing(package)


ENGINES = (
    Engine("nvFuser", GROUP, nvfuser, no_nvfuser),
    Engine("DeepSpeed inference", GROUP, deepspeed, needs("deepspeed")),
    Engine("AITemplate", GROUP, aitemplate, needs("aitemplate")),
    Engine("Kernl", GROUP, kernl, needs("kernl")),
)
