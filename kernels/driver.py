"""Launching compiled kernels through the CUDA driver, by ctypes: no torch, no CuPy, no CUDA headers.

torch and ONNX Runtime work in the device's primary context, and so do we: a module loaded here runs on either's stream.
"""

from __future__ import annotations

import ctypes
import functools
import threading
import weakref
from collections.abc import Callable, Iterable
from typing import Any

from trimaran.kernels.compiler import Binary, compile_launch
from trimaran.kernels.cuda import (
    Attribute,
    Config,
    CudaError,
    Functions,
    call,
    device,
    error,
    library,
    primary_context,
    tensor_map,
)
from trimaran.kernels.plans import Param, PlannedLaunch
from trimaran.kernels.programs import Loaded

PARAMETER_TYPES = {
    "i32": ctypes.c_int32,
    "i64": ctypes.c_int64,
    "fp32": ctypes.c_float,
}
_MAX_DYNAMIC_SHARED_MEMORY = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
_NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING
_DISABLE_TIMING = 2  # CU_EVENT_DISABLE_TIMING
_COOPERATIVE, _CLUSTER_DIMENSION, _PROGRAMMATIC_STREAM_SERIALIZATION = 2, 4, 6  # CUlaunchAttributeID


@functools.cache
def driver(index: int) -> Driver:
    return Driver(index)


class Driver:
    """Executes launches on one CUDA device; see `execute.execute`. `driver(index)` gives the one of a device."""

    def __init__(self, index: int) -> None:
        self.device = device(index)
        self._functions: weakref.WeakKeyDictionary[PlannedLaunch, _Function] = weakref.WeakKeyDictionary()
        self._loaded: dict[int, tuple[Binary, int]] = {}
        self._lock = threading.Lock()
        self._context = primary_context(index)

    def launch(
        self,
        launch: PlannedLaunch,
        grid: tuple[int, int, int],
        arguments: list[Any],
        stream: int,
        allocate: Callable[[int], int],
    ) -> None:
        pushed = self._push()
        try:
            function = self._function(launch)
            binary = function.binary
            count = binary.global_scratch * grid[0] * grid[1] * grid[2] * binary.num_ctas
            function(grid, [*arguments, allocate(count) if count else 0, 0], stream)
        finally:
            if pushed:
                call("cuCtxPopCurrent_v2", ctypes.byref(ctypes.c_void_p()))

    def zero(self, address: int, count: int, stream: int) -> None:
        self._in_context(
            "cuMemsetD8Async", ctypes.c_uint64(address), 0, ctypes.c_size_t(count), ctypes.c_void_p(stream)
        )

    def _in_context(self, name: str, *arguments: Any) -> None:
        pushed = self._push()
        try:
            call(name, *arguments)
        finally:
            if pushed:
                call("cuCtxPopCurrent_v2", ctypes.byref(ctypes.c_void_p()))

    def load(self, launch: PlannedLaunch) -> Loaded:
        """The launch's kernel, compiled and loaded, for launchers that are not written in Python."""
        pushed = self._push()
        try:
            function = self._function(launch)
        finally:
            if pushed:
                call("cuCtxPopCurrent_v2", ctypes.byref(ctypes.c_void_p()))
        binary = function.binary
        return Loaded(
            function.handle,
            binary.threads,
            binary.shared,
            binary.num_ctas,
            binary.global_scratch,
            launch_attributes(binary),
            binary.boxes,
        )

    @functools.cached_property
    def functions(self) -> Functions:
        names = ["LaunchKernelEx", "MemsetD8Async", "TensorMapEncodeTiled"]
        names += ["CtxGetCurrent", "CtxPushCurrent_v2", "CtxPopCurrent_v2"]
        found = library()
        addresses = [ctypes.cast(getattr(found, f"cu{name}"), ctypes.c_void_p).value for name in names]
        return Functions(*addresses, self._context.value)

    @functools.cached_property
    def stream(self) -> int:
        """A stream of our own that does not wait for the default one. It lives as long as the process."""
        stream = ctypes.c_void_p()
        self._in_context("cuStreamCreate", ctypes.byref(stream), _NON_BLOCKING)
        return stream.value or 0

    def copy(self, copies: Iterable[tuple[int, int, int]], stream: int, after: Iterable[int] = ()) -> None:
        """Copy (target, source, bytes) each, between any addresses of the host or a device, in the stream's order, and
        once all is done that other streams have queued now."""
        pushed = self._push()
        try:
            for other in after:
                with self._lock:  # the event is one, and no other may come between
                    call("cuEventRecord", self._event, other)
                    call("cuStreamWaitEvent", stream, self._event, 0)
            for target, source, count in copies:
                if count:
                    call("cuMemcpyAsync", target, source, count, stream)
        finally:
            if pushed:
                call("cuCtxPopCurrent_v2", ctypes.byref(ctypes.c_void_p()))

    @functools.cached_property
    def _event(self) -> ctypes.c_void_p:
        event = ctypes.c_void_p()
        call("cuEventCreate", ctypes.byref(event), _DISABLE_TIMING)
        return event

    def synchronize(self, stream: int) -> None:
        """Wait for all that is queued on the stream."""
        self._in_context("cuStreamSynchronize", stream)

    def failure(self, status: int) -> CudaError:
        """What went wrong in one of `functions`."""
        return error("launching", status)

    def _push(self) -> bool:
        """Make this device's context current, where a thread has none or that of another device; whether that was
        needed."""
        current = ctypes.c_void_p()
        call("cuCtxGetCurrent", ctypes.byref(current))
        if current.value == self._context.value:
            return False
        call("cuCtxPushCurrent_v2", self._context)
        return True

    def _function(self, launch: PlannedLaunch) -> _Function:
        found = self._functions.get(launch)
        if found is None:
            with self._lock:
                found = self._functions[launch] = self._load(launch)
        return found

    def _load(self, launch: PlannedLaunch) -> _Function:
        binary = compile_launch(launch, self.device.capability)
        if id(binary) not in self._loaded:
            module, function = ctypes.c_void_p(), ctypes.c_void_p()
            call("cuModuleLoadData", ctypes.byref(module), binary.cubin)
            call("cuModuleGetFunction", ctypes.byref(function), module, binary.name.encode())
            if binary.shared > 48 * 1024:
                call("cuFuncSetAttribute", function, _MAX_DYNAMIC_SHARED_MEMORY, binary.shared)
            self._loaded[id(binary)] = (binary, function.value or 0)
        return _Function(self._loaded[id(binary)][1], binary, launch.params)


class _Function:
    """One binary loaded on one device, with the C types of its parameters."""

    def __init__(self, handle: int, binary: Binary, params: tuple[Param, ...]) -> None:
        self.handle, self.binary = handle, binary
        types = [ctypes.c_uint64 if param.place else PARAMETER_TYPES[param.type] for param in params]
        self.types = [*types, ctypes.c_uint64, ctypes.c_uint64]
        described = [(index, param) for index, param in enumerate(params) if param.rank]
        self.descriptors = [(index, param, *box) for (index, param), box in zip(described, binary.boxes, strict=True)]
        attributes = [Attribute(id=number, value=words) for number, words in launch_attributes(binary)]
        self.attributes = (Attribute * len(attributes))(*attributes)

    def __call__(self, grid: tuple[int, int, int], arguments: list[Any], stream: int) -> None:
        values: list[Any] = [convert(argument) for convert, argument in zip(self.types, arguments, strict=True)]
        for index, param, swizzle, box in self.descriptors:
            shape, strides = (tuple(arguments[index + 1 + k * param.rank :][: param.rank]) for k in (0, 1))
            values[index] = tensor_map(param.dtype, arguments[index], shape, strides, box, swizzle)
        pointers = (ctypes.c_void_p * len(values))(*map(ctypes.addressof, values))
        config = Config(
            grid=(grid[0] * self.binary.num_ctas, grid[1], grid[2]),
            block=(self.binary.threads, 1, 1),
            shared=self.binary.shared,
            stream=stream,
            attributes=self.attributes,
            attribute_count=len(self.attributes),
        )
        call("cuLaunchKernelEx", ctypes.byref(config), ctypes.c_void_p(self.handle), pointers, None)


def launch_attributes(binary: Binary) -> tuple[tuple[int, tuple[int, ...]], ...]:
    """(CUlaunchAttributeID, words of its value) for each option that is one."""
    found: list[tuple[int, tuple[int, ...]]] = []
    if binary.launch_cooperative_grid:
        found.append((_COOPERATIVE, (1,)))
    if binary.num_ctas > 1:
        found.append((_CLUSTER_DIMENSION, (binary.num_ctas, 1, 1)))
    if binary.launch_pdl:
        found.append((_PROGRAMMATIC_STREAM_SERIALIZATION, (1,)))
    return tuple(found)
