"""An unpadded forward: padding is taken out before the first layer and put back after the last, and attention is
`torch.nn.attention.varlen` on the packed rows. How many rows there are the host has to ask the GPU, in each call."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import torch
import torch.nn.functional as F

from trimaran.benchmarks.engines.contract import Built, Engine, Inapplicable, Inputs, Subject, torch_on_gpu

NAME = "unpadded"  # transformers refuses names of attention that say "flash" and are none of its own
FIRST_POSITION = {"bert": 0, "electra": 0, "distilbert": 0, "gpt2": 0, "llama": 0, "mistral": 0, "qwen2": 0}
AFTER_PADDING = ("roberta", "xlm-roberta", "camembert")  # their positions start after the number of the padding token


class Packing:
    """Where the sequences start, for the attention of the call that is going on."""

    starts: torch.Tensor
    longest: int


def packed_attention(packing: Packing) -> Any:
    from torch.nn.attention.varlen import varlen_attn

    attend: Any = varlen_attn
    # torch 2.11 has a window, releases before it a flag
    causal = {"window_size": (-1, 0)} if "window_size" in inspect.signature(attend).parameters else {"is_causal": True}

    def attention(
        module: Any, query: Any, key: Any, value: Any, mask: Any, scaling: float | None = None, **others: Any
    ) -> tuple[torch.Tensor, None]:
        """q, k, v [1, H, tokens, D] -> [1, tokens, H, D]"""
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
        options: dict[str, Any] = dict(causal) if getattr(module, "is_causal", False) else {}
        if q.shape[1] != k.shape[1]:
            options["enable_gqa"] = True
        starts, longest = packing.starts, packing.longest
        return attend(q, k, v, starts, starts, longest, longest, scale=scaling, **options)[None], None

    return attention


def build(subject: Subject, example: Inputs) -> Built:
    from transformers import AttentionInterface, AttentionMaskInterface

    packing = Packing()
    AttentionInterface.register(NAME, packed_attention(packing))
    AttentionMaskInterface.register(NAME, lambda *args, **kwargs: None)
    twin: Any = copy.deepcopy(subject.model)
    twin.set_attn_implementation(NAME)
    first = first_position(twin.config)

    def call(inputs: Inputs) -> torch.Tensor:
        if "attention_mask" not in inputs:
            raise Inapplicable("nothing is padded here")
        mask = inputs["attention_mask"]
        size, length = mask.shape
        kept = mask.flatten().nonzero()[:, 0]
        packing.starts = F.pad(mask.sum(1).cumsum(0), (1, 0)).int()
        packing.longest = length
        rows = {name: tensor.flatten()[kept][None] for name, tensor in inputs.items() if name != "attention_mask"}
        rows["position_ids"] = (kept % length + first)[None]
        found = subject.forward(twin, rows)[0]
        result = found.new_zeros(size * length, found.shape[1])
        return result.index_copy_(0, kept, found).view(size, length, -1)

    return Built(call)


def first_position(config: Any) -> int:
    if config.model_type in AFTER_PADDING:
        return int(config.pad_token_id) + 1
    return FIRST_POSITION[config.model_type]


def can_be_unpadded(subject: Subject) -> str | None:
    if reason := torch_on_gpu(subject):
        return reason
    kind = getattr(getattr(subject.module, "config", None), "model_type", "")
    if kind in FIRST_POSITION or kind in AFTER_PADDING:
        return None
    return f"{kind or 'this model'} takes no positions, or its attention is not transformers' interface"


ENGINES = (Engine("transformers unpadded varlen", "transformers", build, can_be_unpadded),)
