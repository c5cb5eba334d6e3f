"""Stand-ins for the CUDA driver by which the hot path launches on the CPU: Triton's interpreter runs the kernel."""

from __future__ import annotations

import ctypes
import threading
from ctypes import c_int, c_size_t, c_ubyte, c_uint64, c_void_p
from typing import Any

from trimaran.kernels.cuda import Config, Functions
from trimaran.kernels.driver import PARAMETER_TYPES
from trimaran.kernels.interpreter import Interpreter
from trimaran.kernels.plans import PlannedLaunch
from trimaran.kernels.programs import Loaded
from trimaran.ort_ops.abi import immortalize

LAUNCH = ctypes.CFUNCTYPE(c_int, ctypes.POINTER(Config), c_void_p, ctypes.POINTER(c_void_p), c_void_p)
ZERO = ctypes.CFUNCTYPE(c_int, c_uint64, c_ubyte, c_size_t, c_void_p)


class Interpreted:
    """As `driver.Driver` for the hot path. A function's handle is its place among those loaded, counted from 1."""

    def __init__(self) -> None:
        self.interpreter = Interpreter()
        self._launches: list[PlannedLaunch] = []
        self._handles: dict[Any, int] = {}
        self._lock = threading.Lock()
        self._failures: dict[int, BaseException] = {}  # by thread
        callbacks = (LAUNCH(self._launch), ZERO(self._zero))
        for callback in callbacks:
            immortalize(callback)
        self.functions = Functions(*(ctypes.cast(callback, c_void_p).value for callback in callbacks))

    def load(self, launch: PlannedLaunch) -> Loaded:
        with self._lock:
            handle = self._handles.get(launch.variant)
            if handle is None:
                self._launches.append(launch)
                handle = self._handles[launch.variant] = len(self._launches)
        return Loaded(handle, threads=0, shared=0)

    def failure(self, status: int) -> BaseException:
        """The exception that this thread's last call ended in."""
        return self._failures.pop(threading.get_ident())

    def _launch(self, config: Any, function: int, parameters: Any, extra: Any) -> int:
        try:
            launch = self._launches[function - 1]
            types: list[Any] = [c_uint64 if param.place else PARAMETER_TYPES[param.type] for param in launch.params]
            arguments = [kind.from_address(parameters[index]).value for index, kind in enumerate(types)]
            self.interpreter.launch(launch, tuple(config.contents.grid), arguments, 0, _no_scratch)
        except BaseException as error:  # ctypes would print it and go on
            self._failures[threading.get_ident()] = error
            return 1
        return 0

    def _zero(self, address: int, value: int, count: int, stream: int) -> int:
        self.interpreter.zero(address, count, 0)
        return 0


def _no_scratch(count: int) -> int:
    raise AssertionError("the interpreter wants no scratch of its own")
