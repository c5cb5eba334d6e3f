"""Other kernels for a PyTorch model: Liger's, and those of the hub that transformers calls by `use_kernels`."""

from __future__ import annotations

import copy
from typing import Any

from trimaran.benchmarks.engines.contract import Built, Engine, Inputs, Subject, missing, torch_on_gpu
from trimaran.benchmarks.engines.graphs import Graphed


def liger(subject: Subject, example: Inputs) -> Built:
    from liger_kernel.transformers.monkey_patch import _apply_liger_kernel_to_instance

    twin = copy.deepcopy(subject.model)
    _apply_liger_kernel_to_instance(model=twin)
    return Built(Graphed(lambda inputs: subject.forward(twin, inputs)))


def no_liger(subject: Subject) -> str | None:
    if reason := torch_on_gpu(subject) or missing("liger_kernel"):
        return reason
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    kind = getattr(getattr(subject.module, "config", None), "model_type", "")
    return None if kind in MODEL_TYPE_TO_APPLY_LIGER_FN else f"Liger has nothing for {kind or 'this model'}"


def hub_kernels(subject: Subject, example: Inputs) -> Built:
    twin: Any = copy.deepcopy(subject.model)
    twin.set_use_kernels(True)
    return Built(Graphed(lambda inputs: subject.forward(twin, inputs)))


def no_hub_kernels(subject: Subject) -> str | None:
    return torch_on_gpu(subject) or missing("kernels")


ENGINES = (
    Engine("transformers Liger CUDA graph", "transformers", liger, no_liger),
    Engine("transformers use_kernels CUDA graph", "transformers", hub_kernels, no_hub_kernels),
)
