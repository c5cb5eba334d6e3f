"""The declarations of `kernels/` as ONNX Runtime custom operators.

Each op becomes one OrtCustomOp struct for each execution provider and each combination of its dtypes, all under the
op's name. The structs differ in data alone: one set of callbacks serves them all, and looks up by the struct's address
what it is about. ONNX Runtime keeps plain pointers to structs and callbacks for as long as any session lives, which may
be longer than this module, so they are never freed.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import logging
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from ctypes import c_void_p
from pathlib import Path
from typing import Any

from trimaran.kernels.contract import ALIGNMENT, INTERPRETER, Decline, Op, Tensor
from trimaran.kernels.driver import driver
from trimaran.kernels.execute import Executor, execute
from trimaran.kernels.interpreter import Interpreter
from trimaran.kernels.plans import Plan, PlanCache, Work
from trimaran.ort_ops import inference
from trimaran.ort_ops.abi import (
    API_VERSION,
    CALLBACKS,
    CPU,
    DEFAULT_MEMORY,
    ELEMENT_TYPE,
    FAIL,
    INVALID_ARGUMENT,
    NOT_IMPLEMENTED,
    OPTIONAL,
    REQUIRED,
    Api,
    OrtCustomOp,
)
from trimaran.ort_ops.context import Node, Run, node_name

log = logging.getLogger("trimaran")
_VARIANTS: dict[int, Variant] = {}  # by the address of the struct
_KERNELS: dict[int, Kernel] = {}  # by the handle that ORT keeps
_HANDLES = itertools.count(1)
_THREAD = threading.local()


class Variant:
    """One op for one execution provider and one combination of dtypes: `types` gives each type name its dtype.

    ValueError for a dtype that ONNX has not.
    """

    def __init__(
        self, api: Api, domain: str, op: Op, provider: str, types: Mapping[str, str], plans: PlanCache
    ) -> None:
        self.api, self.op, self.provider, self.plans = api, op, provider, plans
        self.label = f"{domain}.{op.name}"
        self.input_types = tuple(types.get(port.type, port.type) for port in op.inputs)
        self.input_elements = tuple(element_type(self.label, dtype) for dtype in self.input_types)
        self.output_elements = tuple(element_type(self.label, types.get(port.type, port.type)) for port in op.outputs)
        self.name = ctypes.create_string_buffer(op.name.encode())
        self.provider_name = ctypes.create_string_buffer(provider.encode())
        self.struct = OrtCustomOp(API_VERSION)
        for name, callback in _CALLBACKS.items():
            if name != "InferOutputShapeFn" or inference.can_infer(api, op):
                setattr(self.struct, name, ctypes.cast(callback, c_void_p).value)
        self.address = ctypes.addressof(self.struct)
        _VARIANTS[self.address] = self
        immortalize(self)


def element_type(label: str, dtype: str) -> int:
    if dtype not in ELEMENT_TYPE:
        raise ValueError(f"{label}: unknown dtype {dtype}, expected one of {', '.join(ELEMENT_TYPE)}")
    return ELEMENT_TYPE[dtype]


def variants(api: Api, domain: str, op: Op, provider: str, plans: PlanCache) -> Iterator[Variant]:
    """A new variant for each combination of the op's dtypes."""
    for dtypes in itertools.product(*op.types.values()):
        yield Variant(api, domain, op, provider, dict(zip(op.types, dtypes, strict=True)), plans)


class Kernel:
    """What computes one node of one session."""

    def __init__(self, variant: Variant, node: Node) -> None:
        self.variant, self.node = variant, node
        self.label = f"{variant.label}, node {node.name!r}"
        if variant.provider == CPU:
            self.device, self.executor = INTERPRETER, _interpreter()
        else:
            found = driver(node.device_index)
            self.device, self.executor = found.device, found

    def compute(self, context: int) -> None:
        """Raises Decline where the op has no kernel for these sizes, ValueError or TypeError where they are wrong."""
        run = Run(self.variant.api, context, self.node)
        types = self.variant.input_types
        inputs: list[Tensor | None] = [None] * len(types)
        addresses = [0] * len(types)
        for index in range(self.node.input_count):
            inputs[index], addresses[index] = run.input(index, types[index])
        plan, work = self.plan(inputs, True)
        outputs = [0 if shape is None else run.output(index, shape) for index, shape in enumerate(work.outputs)]
        if any(address % ALIGNMENT for address in outputs):
            plan, work = self.plan(inputs, False)
        try:
            execute(plan, work, addresses, outputs, self.executor, run.allocate, run.stream())
        finally:
            run.release()

    def plan(self, inputs: list[Tensor | None], aligned_outputs: bool) -> tuple[Plan, Work]:
        node = self.node
        plan, sizes = self.variant.plans.find(inputs, node.attrs, self.device, node.wanted, aligned_outputs)
        if plan.declined is not None:
            raise Decline(f"{self.variant.op.name} has no kernel for these inputs: {plan.declined}")
        return plan, plan.evaluate(sizes)


@functools.cache
def _interpreter() -> Executor:
    return Interpreter()


# Callbacks. None of them may raise: ctypes would print the exception and return garbage.


def _create(struct: int, _api: int, info: int, out: int) -> int | None:
    variant = _VARIANTS[struct]
    label = variant.label
    try:
        label = f"{label}, node {node_name(variant.api, info)!r}"
        node = Node(variant.api, info, variant.op, variant.provider)
        handle = next(_HANDLES)
        _KERNELS[handle] = Kernel(variant, node)
        c_void_p.from_address(out).value = handle
    except BaseException as error:
        return _status(variant.api, label, error)
    return None


def _compute(handle: int, context: int) -> int | None:
    kernel = _KERNELS[handle]
    try:
        if not hasattr(_THREAD, "kept"):
            _keep_thread_state()
        kernel.compute(context)
    except BaseException as error:
        return _status(kernel.variant.api, kernel.label, error)
    return None


def _destroy(handle: int, kernels: dict[int, Kernel] = _KERNELS) -> None:
    """`kernels` is bound here because a session may outlive this module's names when the interpreter exits."""
    if kernel := kernels.pop(handle, None):
        kernel.node.close()


def _infer(struct: int, context: int) -> None:
    """ORT drops a status that this returns, so what is wrong is logged here; the run tells the user."""
    variant = _VARIANTS[struct]
    try:
        inference.infer(variant.api, context, variant.op)
    except BaseException as error:
        log.warning("%s, while shapes are inferred: %s: %s", variant.label, type(error).__name__, error)


def _keep_thread_state() -> None:
    """On a thread of ORT's, ctypes makes a Python thread state for each callback and destroys it after; one more
    reference, never given back, keeps it."""
    _THREAD.kept = True
    ctypes.pythonapi.PyGILState_Ensure()


def _status(api: Api, label: str, error: BaseException) -> int:
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


def _characteristic(optional: bool) -> int:
    return OPTIONAL if optional else REQUIRED


def _callbacks() -> dict[str, Any]:
    functions: dict[str, Callable[..., Any]] = {
        "GetName": lambda op: ctypes.addressof(_VARIANTS[op].name),
        "GetExecutionProviderType": lambda op: ctypes.addressof(_VARIANTS[op].provider_name),
        "GetInputType": lambda op, index: _VARIANTS[op].input_elements[index],
        "GetInputTypeCount": lambda op: len(_VARIANTS[op].op.inputs),
        "GetOutputType": lambda op, index: _VARIANTS[op].output_elements[index],
        "GetOutputTypeCount": lambda op: len(_VARIANTS[op].op.outputs),
        "GetInputCharacteristic": lambda op, index: _characteristic(_VARIANTS[op].op.inputs[index].optional),
        "GetOutputCharacteristic": lambda op, index: _characteristic(_VARIANTS[op].op.outputs[index].optional),
        "GetInputMemoryType": lambda op, index: DEFAULT_MEMORY,
        "GetStartVersion": lambda op: _VARIANTS[op].op.version,
        "GetEndVersion": lambda op: _VARIANTS[op].op.version,
        "CreateKernelV2": _create,
        "KernelComputeV2": _compute,
        "KernelDestroy": _destroy,
        "InferOutputShapeFn": _infer,
    }
    return {name: CALLBACKS[name](function) for name, function in functions.items()}


def immortalize(value: object) -> None:
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(value))


_CALLBACKS = _callbacks()
for _callback in _CALLBACKS.values():
    immortalize(_callback)
