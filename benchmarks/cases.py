"""What a benchmark of an op declares: cases, each with its inputs, contenders, exact result and useful work."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from trimaran.benchmarks.measure import Contender

Inputs = dict[str, Any]  # tensors by name; None where a case has none


@dataclass(frozen=True)
class Case:
    """One row of a table. work: FLOP or bytes that the result needs, whoever computes it. `inputs(copy)` makes one copy
    of the inputs, alike in all but the values; `contenders(inputs)` gets the function that hands the copies out."""

    name: str
    shape: dict[str, Any]
    work: float
    inputs: Callable[[int], Inputs]
    contenders: Callable[[Callable[[int], Inputs]], list[Contender]]
    exact: Callable[[Inputs], tuple[torch.Tensor, ...]]


@dataclass(frozen=True)
class Suite:
    """The cases of an op. ceiling: which measured ceiling bounds it, `matmul` (TFLOP/s) or `copy` (TB/s)."""

    op: str
    ceiling: str
    cases: list[Case]

    @property
    def unit(self) -> str:
        return {"matmul": "TFLOP/s", "copy": "TB/s"}[self.ceiling]


def on_copies(inputs: Callable[[int], Inputs], call: Callable[..., Any]) -> Callable[[int], Callable[[], Any]]:
    """`prepare` of a contender that takes the inputs as they are, by name."""

    def prepare(copy: int) -> Callable[[], Any]:
        mine = inputs(copy)
        return lambda: call(**mine)

    return prepare


def generator(device: torch.device, seed: int) -> torch.Generator:
    return torch.Generator(device).manual_seed(seed)


def only_on_gpu(device: torch.device) -> None:
    """RuntimeError on a CPU, where compiling takes longer than all the rest: the contender is listed with it."""
    if device.type != "cuda":
        raise RuntimeError("compiled only on a GPU")
