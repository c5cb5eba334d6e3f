"""What computes one node of one session, in Python: plans for it, a run through ctypes, errors in words.

Where the hot path is there (see `hot_path`), it runs the node and asks this only for plans and for words.
"""

from __future__ import annotations

import functools
import logging
import traceback
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trimaran.kernels.contract import ALIGNMENT, INTERPRETER, Decline, Tensor
from trimaran.kernels.driver import driver
from trimaran.kernels.execute import Executor, execute
from trimaran.kernels.interpreter import Interpreter
from trimaran.kernels.plans import Plan
from trimaran.ort_ops.abi import CPU, FAIL, INVALID_ARGUMENT, NOT_IMPLEMENTED, Api
from trimaran.ort_ops.context import Node, Run

if TYPE_CHECKING:
    from trimaran.ort_ops.custom_op import Variant

log = logging.getLogger("trimaran")
KERNELS: dict[int, Any] = {}  # Kernel or HotKernel, by the handle that ORT keeps


class Kernel:
    """What computes one node of one session."""

    def __init__(self, variant: Variant, node: Node) -> None:
        self.variant, self.node = variant, node
        self.label = f"{variant.label}, node {node.name!r}"
        device = INTERPRETER if variant.provider == CPU else driver(node.device_index).device
        self.device = replace(device, fallback=False)  # a node has no second way once the session stands
        self.executor: Executor = _interpreter() if variant.provider == CPU else driver(node.device_index)

    def compute(self, context: int) -> None:
        """Raises Decline where the op has no kernel for these sizes, ValueError or TypeError where they are wrong."""
        run = Run(self.variant.api, context, self.node)
        types = self.variant.input_types
        inputs: list[Tensor | None] = [None] * len(types)
        addresses = [0] * len(types)
        for index in range(self.node.input_count):
            inputs[index], addresses[index] = run.input(index, types[index])
        plan, sizes = self.plan(inputs, True)
        work = plan.evaluate(sizes)
        outputs = [0 if shape is None else run.output(index, shape) for index, shape in enumerate(work.outputs)]
        if any(address % ALIGNMENT for address in outputs):
            plan, sizes = self.plan(inputs, False)
            work = plan.evaluate(sizes)
        try:
            execute(plan, work, addresses, outputs, self.executor, run.allocate, run.stream())
        finally:
            run.release()

    def plan(self, inputs: list[Tensor | None], aligned_outputs: bool) -> tuple[Plan, tuple[int, ...]]:
        """The plan for these inputs and the sizes to evaluate it with."""
        node = self.node
        plan, sizes = self.variant.plans.find(inputs, node.attrs, self.device, node.wanted, aligned_outputs)
        if plan.declined is not None:
            raise Decline(f"{self.variant.op.name} has no kernel for these inputs: {plan.declined}")
        return plan, sizes

    def status(self, error: BaseException) -> int:
        """A new OrtStatus* for the error."""
        return status(self.variant.api, self.label, error)

    def close(self) -> None:
        self.node.close()


@functools.cache
def _interpreter() -> Executor:
    return Interpreter()


def status(api: Api, label: str, error: BaseException) -> int:
    """A new OrtStatus* that says where and why something failed."""
    code, place = FAIL, ""
    if isinstance(error, Decline):
        code = NOT_IMPLEMENTED
    elif isinstance(error, (ValueError, TypeError)):
        code = INVALID_ARGUMENT
    else:  # not of the user's making: say where
        frames = traceback.extract_tb(error.__traceback__)
        place = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    log.debug("%s failed", label, exc_info=error)
    return api.status(code, f"{label}: {type(error).__name__}: {error}{place}")
