"""Doing what the first calls of an optimized model would do, before they come: capture, compile, record."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from rich.progress import Progress

from trimaran.torch_path.optimize import inner_model, report
from trimaran.torch_path.report import Report

CALLS = 3  # the first captures and compiles, the second records a CUDA graph, the third replays it


def warm_up(
    model: torch.nn.Module, shapes: Iterable[Mapping[str, Any] | Sequence[int]], *, progress: bool = True
) -> Report:
    """Call an optimized model for each kind of input that is going to come, so that none of them is slow when it does.

    shapes: for each kind, keyword arguments as the model will get them (their names, dtypes and strides matter), or a
    shape of its main input alone: (batch, length) of `input_ids`, to which an `attention_mask` of ones is added, or
    (batch, channels, height, width) of `pixel_values`. progress: whether a bar is shown. Returns the model's report.

    ValueError where the model is not optimized, or a shape has neither two nor four sizes of at least 1.
    """
    found = report(model)
    inner = inner_model(model)
    calls = [dict(shape) if isinstance(shape, Mapping) else example(inner, shape) for shape in shapes]
    with Progress(transient=True, disable=not progress) as bar, torch.no_grad():
        task = bar.add_task("", total=CALLS * len(calls))
        for inputs in calls:
            for _ in range(CALLS):
                bar.update(task, description=f"warming up {found.model}: {described(inputs)}")
                inner(**inputs)
                bar.advance(task)
    return found


def example(model: torch.nn.Module, shape: Sequence[int]) -> dict[str, torch.Tensor]:
    """Inputs of this shape, on the model's device."""
    sizes = tuple(shape)
    if len(sizes) not in (2, 4) or any(not isinstance(size, int) or size < 1 for size in sizes):
        raise ValueError(f"a shape is {shape!r}, expected (batch, length) or (batch, channels, height, width)")
    first = next(model.parameters())
    if len(sizes) == 4:
        return {"pixel_values": torch.zeros(sizes, dtype=first.dtype, device=first.device)}
    ids = torch.zeros(sizes, dtype=torch.long, device=first.device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def described(inputs: Mapping[str, Any]) -> str:
    tensors = {name: value for name, value in inputs.items() if isinstance(value, torch.Tensor)}
    return ", ".join(f"{name} {'x'.join(map(str, tensor.shape))}" for name, tensor in tensors.items())
