"""The model as it is: eager, in other precisions, in one CUDA graph, and with each backend of torch's attention."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from trimaran.benchmarks.engines.contract import Built, Engine, Inputs, Subject, torch_model, torch_on_gpu
from trimaran.benchmarks.engines.graphs import Graphed

GROUP = "transformers"
REFERENCE = "transformers eager"  # whose error sets what is allowed
AUTOCAST = "transformers autocast fp16"  # the baseline of Kernl's table
BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "memory-efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}


def eager(subject: Subject, example: Inputs) -> Built:
    return Built(lambda inputs: subject.forward(subject.model, inputs))


def floats(inputs: Inputs, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    return {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in inputs.items()}


def in_fp32(subject: Subject, example: Inputs) -> Built:
    twin = copy.deepcopy(subject.model).float()
    return Built(lambda inputs: subject.forward(twin, floats(inputs, torch.float32)))


def autocast(subject: Subject, example: Inputs) -> Built:
    """Weights in fp32, cast anew in each call, as `torch.autocast` does without its cache in no_grad mode."""
    twin = copy.deepcopy(subject.model).float()

    def call(inputs: Inputs) -> torch.Tensor:
        with torch.autocast("cuda", torch.float16):
            return subject.forward(twin, inputs)

    return Built(call)


def only_in_half(subject: Subject) -> str | None:
    return torch_model(subject) or (None if subject.dtype != torch.float32 else f"the run is in fp32: see {REFERENCE}")


def only_in_fp16_on_gpu(subject: Subject) -> str | None:
    return torch_on_gpu(subject) or (None if subject.dtype == torch.float16 else f"the run is in {subject.dtype}")


def graphed(subject: Subject, example: Inputs) -> Built:
    """The 2-D mask is as the caller gives it; the model expands it inside the graph."""
    return Built(Graphed(lambda inputs: subject.forward(subject.model, inputs)))


def with_backend(backend: SDPBackend) -> Callable[[Subject, Inputs], Built]:
    """In a CUDA graph, so that what differs is the attention and not the host."""

    def build(subject: Subject, example: Inputs) -> Built:
        def call(inputs: Inputs) -> torch.Tensor:
            with sdpa_kernel(backend):
                return subject.forward(subject.model, inputs)

        return Built(Graphed(call))

    return build


def uses_sdpa(subject: Subject) -> str | None:
    if reason := torch_on_gpu(subject):
        return reason
    chosen = getattr(getattr(subject.module, "config", None), "_attn_implementation", None)
    return None if chosen == "sdpa" else f"the model's attention is {chosen}, not torch's scaled_dot_product_attention"


ENGINES = (
    Engine(REFERENCE, GROUP, eager, torch_model),
    Engine("transformers eager fp32", GROUP, in_fp32, only_in_half),
    Engine(AUTOCAST, GROUP, autocast, only_in_fp16_on_gpu),
    Engine("transformers CUDA graph", GROUP, graphed, torch_on_gpu),
    *(
        Engine(f"transformers CUDA graph SDPA {name}", GROUP, with_backend(backend), uses_sdpa)
        for name, backend in BACKENDS.items()
    ),
)
