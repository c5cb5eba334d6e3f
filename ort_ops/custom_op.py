"""The declarations of `kernels/` as ONNX Runtime custom operators.

Each op becomes one OrtCustomOp struct for each execution provider and each combination of its dtypes, all under the
op's name. The structs differ in data alone: one set of callbacks serves them all, and looks up by the struct's address
what it is about. ONNX Runtime keeps plain pointers to structs and callbacks for as long as any session lives, which may
be longer than this module, so they are never freed.
"""

from __future__ import annotations

import ctypes
import itertools
import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from ctypes import c_void_p
from typing import Any

from trimaran.kernels.contract import Op
from trimaran.kernels.plans import PlanCache
from trimaran.ort_ops import inference
from trimaran.ort_ops.abi import (
    API_VERSION,
    CALLBACKS,
    DEFAULT_MEMORY,
    ELEMENT_TYPE,
    OPTIONAL,
    REQUIRED,
    Api,
    OrtCustomOp,
    immortalize,
)
from trimaran.ort_ops.context import Node, node_name
from trimaran.ort_ops.hot_path import HotKernel, compute_address
from trimaran.ort_ops.kernel import KERNELS, Kernel, status

log = logging.getLogger("trimaran")
_VARIANTS: dict[int, Variant] = {}  # by the address of the struct
_HANDLES = itertools.count(1)  # of kernels that ctypes runs; those that C runs have their addresses
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
        if hot := compute_address(op):
            self.struct.KernelComputeV2 = hot
        self.hot = hot != 0
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


# Callbacks. None of them may raise: ctypes would print the exception and return garbage.


def _create(struct: int, _api: int, info: int, out: int) -> int | None:
    variant = _VARIANTS[struct]
    label = variant.label
    try:
        label = f"{label}, node {node_name(variant.api, info)!r}"
        kernel = Kernel(variant, Node(variant.api, info, variant.op, variant.provider))
        if variant.hot:
            hot = HotKernel(kernel)
            KERNELS[hot.address] = hot
            c_void_p.from_address(out).value = hot.address
        else:
            handle = c_void_p.from_address(out).value = next(_HANDLES)
            KERNELS[handle] = kernel
    except BaseException as error:
        return status(variant.api, label, error)
    return None


def _compute(handle: int, context: int) -> int | None:
    kernel: Kernel = KERNELS[handle]
    try:
        if not hasattr(_THREAD, "kept"):
            _keep_thread_state()
        kernel.compute(context)
    except BaseException as error:
        return kernel.status(error)
    return None


def _destroy(handle: int, kernels: dict[int, Any] = KERNELS) -> None:
    """`kernels` is bound here because a session may outlive this module's names when the interpreter exits."""
    if kernel := kernels.pop(handle, None):
        kernel.close()


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


_CALLBACKS = _callbacks()
for _callback in _CALLBACKS.values():
    immortalize(_callback)
