"""Calls of a text model brought to a few lengths, so that a few CUDA graphs answer them all.

Rows are padded on the right and the padding is masked, so that only models that obey their attention mask may be
bucketed. Which axes of the outputs count tokens is found out once for a kind of call: the model is run on two lengths,
and the axes that grow are the ones to be cut.
"""

from __future__ import annotations

import inspect
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree

PADDED = ("input_ids", "attention_mask", "token_type_ids")  # [batch, length] each
Axes = list[tuple[int, ...]]  # of each tensor in the outputs, those that count tokens


class Buckets:
    """lengths: to which calls are padded; longer ones stay as they are. ValueError for what is no list of different
    positive lengths."""

    def __init__(self, lengths: Sequence[int]) -> None:
        if not lengths or any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in lengths):
            raise ValueError(f"buckets is {lengths!r}, expected lengths of at least 1")
        self.lengths = sorted(set(lengths))
        self._axes: dict[Any, Axes] = {}

    def __call__(
        self, model: torch.nn.Module, run: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        """What `run(*args, **kwargs)` answers, by a call of `run` at a bucket's length where that is possible."""
        given = _named(model, args, kwargs)
        length = _length(given)
        place = bisect_left(self.lengths, length)
        if length < 1 or place == len(self.lengths) or not _bucketable(given):
            return run(*args, **kwargs)
        more = self.lengths[place] - length
        axes = self._counting(model, given)
        return _cut(run(**_padded(model, given, more)), axes, length) if more else run(**_padded(model, given, 0))

    def _counting(self, model: torch.nn.Module, given: Mapping[str, Any]) -> Axes:
        key = tuple((name, repr(value) if name not in PADDED else None) for name, value in sorted(given.items()))
        if key not in self._axes:
            short = {
                name: value[:, :1] if name in PADDED and value is not None else value for name, value in given.items()
            }
            with torch.no_grad():
                shapes = [_shapes(model._call_impl(**_padded(model, short, more))) for more in (1, 2)]
            if [len(shape) for shape in shapes[0]] != [len(shape) for shape in shapes[1]]:
                raise ValueError("buckets: the model returns other outputs for other lengths")
            self._axes[key] = [
                tuple(axis for axis, (one, two) in enumerate(zip(*pair, strict=True)) if one != two)
                for pair in zip(*shapes, strict=True)
            ]
        return self._axes[key]


def _named(model: torch.nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    names = list(inspect.signature(model.forward).parameters)
    return {**dict(zip(names, args, strict=False)), **kwargs}


def _length(given: Mapping[str, Any]) -> int:
    ids = given.get("input_ids")
    return int(ids.shape[1]) if isinstance(ids, torch.Tensor) and ids.dim() == 2 else 0


def _bucketable(given: Mapping[str, Any]) -> bool:
    """Whether its only tensors are those that are known to be padded, of one shape."""
    tensors = {name: value for name, value in given.items() if value is not None and name in PADDED}
    plain = all(isinstance(v, (bool, int, float, str, type(None))) for n, v in given.items() if n not in PADDED)
    return plain and len({getattr(tensor, "shape", None) for tensor in tensors.values()}) == 1


def _padded(model: torch.nn.Module, given: Mapping[str, Any], more: int) -> dict[str, Any]:
    """The arguments with so many masked tokens at the end of each row; with a mask in any case."""
    found, ids = dict(given), given["input_ids"]
    mask = found.get("attention_mask")
    found["attention_mask"] = torch.ones_like(ids) if mask is None else mask
    filler = getattr(getattr(model, "config", None), "pad_token_id", None) or 0
    for name in PADDED:
        if more and found.get(name) is not None:
            value = filler if name == "input_ids" else 0
            found[name] = torch.nn.functional.pad(found[name], (0, more), value=value)
    return dict(sorted(found.items()))  # one kind of call, in whatever order it was made


def _shapes(outputs: Any) -> list[torch.Size]:
    return [leaf.shape for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, torch.Tensor)]


def _cut(outputs: Any, axes: Axes, length: int) -> Any:
    counting = iter(axes)

    def cut(leaf: Any) -> Any:
        if isinstance(leaf, torch.Tensor):
            for axis in next(counting):
                leaf = leaf.narrow(axis, 0, length)
        return leaf

    return pytree.tree_map(cut, outputs)
