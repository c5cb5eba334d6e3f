"""Running a plan: the few lines that every runtime shares.

A runtime evaluates the plan, allocates the outputs, and calls `execute` with the addresses and with an executor: the
`Interpreter` on the CPU, a `driver.Driver` on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from trimaran.kernels.contract import ITEMSIZE
from trimaran.kernels.plans import Plan, PlannedLaunch, Work


class Executor(Protocol):
    def launch(
        self,
        launch: PlannedLaunch,
        grid: tuple[int, int, int],
        arguments: list[Any],
        stream: int,
        allocate: Callable[[int], int],
    ) -> None:
        """Launch one kernel; `arguments` are addresses and numbers in the order of `launch.params`."""

    def zero(self, address: int, count: int, stream: int) -> None:
        """Set `count` bytes to zero, in the order of the stream."""


def execute(
    plan: Plan,
    work: Work,
    inputs: Sequence[int],
    outputs: Sequence[int],
    executor: Executor,
    allocate: Callable[[int], int],
    stream: int = 0,
) -> None:
    """Launch all kernels of the plan.

    inputs, outputs: addresses, 0 for an absent one. allocate: bytes -> address of memory that lives until the launched
    work is done (scratch is asked for through it). stream: a CUstream, ignored on the CPU.
    """
    scratch = []
    for count, (_, zero) in zip(work.scratch, plan.scratch, strict=True):
        address = allocate(count) if count else 0
        if zero and count:
            executor.zero(address, count, stream)
        scratch.append(address)
    base = {"input": inputs, "output": outputs, "scratch": scratch}
    for launch, (grid, numbers) in zip(plan.launches, work.launches, strict=True):
        if 0 in grid:
            continue
        arguments = [
            number if param.place is None else base[param.place][param.index] + int(number) * ITEMSIZE[param.dtype]
            for param, number in zip(launch.params, numbers, strict=True)
        ]
        executor.launch(launch, grid, arguments, stream, allocate)
