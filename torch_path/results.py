"""What a recorded graph returns, made the caller's own.

Numbers stay what they are, arguments are returned themselves, views of arguments are views of them, and everything else
is copied; outputs that share memory are copied together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

Finish = Callable[[Sequence[Any], Sequence[torch.Tensor]], Any]  # (arguments, copies) -> output


class Results:
    """made: what the recorded call returned; inputs: what it was given; copied: the places of inputs that stand for
    arguments which lie elsewhere."""

    def __init__(self, made: Sequence[Any], inputs: Sequence[Any], copied: Sequence[int]) -> None:
        self.kind: Any = type(made)
        self.inputs, self.copied = inputs, copied
        self.homes = {_home(t): place for place, t in enumerate(inputs) if isinstance(t, torch.Tensor)}
        self.sources: list[torch.Tensor] = []
        tenants = {id(out): _home(out) for out in made if isinstance(out, torch.Tensor)}
        self.finish = [self._finish(out, list(tenants.values())) for out in made]
        del self.inputs

    def copies(self) -> list[torch.Tensor]:
        """Fresh copies of what the graph wrote last."""
        return [source.clone() for source in self.sources]

    def of(self, args: Sequence[Any], copies: Sequence[torch.Tensor]) -> Any:
        """The outputs of a call with these arguments."""
        return self.kind(finish(args, copies) for finish in self.finish)

    def _finish(self, out: Any, tenants: list[int]) -> Finish:
        if not isinstance(out, torch.Tensor):
            return _constant(out)
        for place, given in enumerate(self.inputs):
            if given is out:
                return _argument(place)
        home, shape, stride, offset = _home(out), out.shape, out.stride(), out.storage_offset()
        if out.numel() and home in self.homes:
            place = self.homes[home]
            if place not in self.copied:
                return lambda args, copies: args[place].as_strided(shape, stride, offset)
            skip = offset - self.inputs[place].storage_offset()
            return lambda args, copies: args[place].as_strided(shape, stride, args[place].storage_offset() + skip)
        if tenants.count(home) == 1:
            return _copy(self._source(out))
        whole = torch.empty(0, dtype=out.dtype, device=out.device).set_(out.untyped_storage())
        index = self._source(whole)
        return lambda args, copies: copies[index].as_strided(shape, stride, offset)

    def _source(self, tensor: torch.Tensor) -> int:
        """The place of a tensor, or of its equal, among those that are copied."""
        form = (_home(tensor), tensor.dtype, tensor.shape, tensor.stride(), tensor.storage_offset())
        for index, known in enumerate(self.sources):
            if (_home(known), known.dtype, known.shape, known.stride(), known.storage_offset()) == form:
                return index
        self.sources.append(tensor)
        return len(self.sources) - 1


def _constant(value: Any) -> Finish:
    return lambda args, copies: value


def _argument(place: int) -> Finish:
    return lambda args, copies: args[place]


def _copy(index: int) -> Finish:
    return lambda args, copies: copies[index]


def _home(tensor: torch.Tensor) -> int:
    """Where the tensor's allocation starts."""
    return tensor.untyped_storage().data_ptr()
