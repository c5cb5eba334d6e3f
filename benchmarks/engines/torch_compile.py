"""torch.compile in its modes, and AOTInductor. Each shape is compiled on its own, as that is fastest."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from typing import Any

import torch

from trimaran.benchmarks.engines.contract import Built, Engine, Inputs, Subject, torch_on_gpu
from trimaran.benchmarks.engines.graphs import Graphed
from trimaran.benchmarks.engines.onnx_files import Flat, axes_of

GROUP = "torch.compile"
MODES = {"default": None, "reduce-overhead": "reduce-overhead", "max-autotune": "max-autotune"}


def compiled(mode: str | None) -> Callable[[Subject, Inputs], Built]:
    """What a CUDA graph of torch's returns is cloned, as its next call overwrites it."""

    def build(subject: Subject, example: Inputs) -> Built:
        fast: Any = torch.compile(copy.copy(subject.model), mode=mode, dynamic=False)

        def call(inputs: Inputs) -> torch.Tensor:
            found = subject.forward(fast, inputs)
            return found if mode is None else found.clone()

        return Built(call)

    return build


def ahead_of_time(subject: Subject, example: Inputs) -> Built:
    """One compiled package for all shapes, then one CUDA graph for each."""
    flat = Flat(subject, copy.copy(subject.model), list(example)).eval()
    axes = tuple(dict.fromkeys(axes_of(name, tensor), torch.export.Dim.AUTO) for name, tensor in example.items())
    program = torch.export.export(flat, tuple(example.values()), dynamic_shapes=(axes,))
    path = torch._inductor.aoti_compile_and_package(program, package_path=str(subject.folder / "aoti.pt2"))
    package: Any = torch._inductor.aoti_load_package(path)

    def run(inputs: Inputs) -> torch.Tensor:
        found = package(*flat.filled(inputs))
        return found if isinstance(found, torch.Tensor) else found[0]

    return Built(Graphed(run))


def can_build_ahead(subject: Subject) -> str | None:
    return torch_on_gpu(subject) or (None if shutil.which("g++") or shutil.which("clang++") else "no C++ compiler here")


ENGINES = (
    *(Engine(f"torch.compile {name}", GROUP, compiled(mode), torch_on_gpu, slow=True) for name, mode in MODES.items()),
    Engine("AOTInductor CUDA graph", GROUP, ahead_of_time, can_build_ahead, slow=True),
)
