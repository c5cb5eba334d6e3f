"""What a call looks like from outside: its tensors, and a key of all else.

Equal keys mean that the inputs of one call can be copied into the buffers of the other. Whether the model would do the
same with both is for Dynamo's guards to say.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

_PLAIN = (bool, int, float, str, bytes, type(None), torch.dtype, torch.device)


class Call:
    """One call of a model.

    tensors: those among its arguments, in order. key: None where `opaque` names the type of an argument that is neither
    a tensor nor a plain value. guess: what was replayed for it before the model was asked. ran: whether a rewritten
    graph answered it.
    """

    def __init__(self, owner: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """owner: what is called; its identity is part of the key."""
        self.tensors: list[torch.Tensor] = []
        self.opaque = ""
        self.guess: Any = None
        self.ran = False
        cuda = (torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda"))
        facts: list[Any] = [id(owner), torch.is_inference_mode_enabled(), *cuda]
        self._read(args, facts)
        self._read(kwargs, facts)
        self.key = None if self.opaque else tuple(facts)

    def _read(self, value: Any, facts: list[Any]) -> None:
        kind = type(value)
        facts.append(kind)
        if kind is torch.Tensor or kind is torch.nn.Parameter:
            self.tensors.append(value)
            facts += (value.dtype, value.shape, value.stride(), value.device)
        elif kind is dict:
            facts.extend(value)
            for part in value.values():
                self._read(part, facts)
        elif kind is tuple or kind is list:
            facts.append(len(value))
            for part in value:
                self._read(part, facts)
        elif kind in _PLAIN:
            facts.append(value)
        else:
            self.opaque = kind.__name__


def strides_overlap(tensor: torch.Tensor) -> bool:
    """Whether elements of the tensor may share memory, other than by an axis of stride 0."""
    reach = 0
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride:
            if stride <= reach:
                return True
            reach += stride * (size - 1)
    return False
