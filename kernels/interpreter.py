"""Running a planned launch in Triton's interpreter, on the CPU memory where the tensors lie.

The interpreter and the compiler share one process here: `@triton.jit` functions stay `JITFunction`s (the environment
variable TRITON_INTERPRET, which would replace them, must be unset), and only while a kernel is interpreted is the call
of one jit function from another routed through the interpreter. The interpreter keeps its state in globals, so one
lock is held around each kernel.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter as triton_interpreter
from triton.runtime.jit import JITFunction

from trimaran.kernels.plans import PlannedLaunch

_LOCK = threading.RLock()
_INTERPRETED: dict[Any, Any] = {}  # plain function -> InterpretedFunction
_BUILDER = triton_interpreter.interpreter_builder
_enabled = False


class interpret:
    """Make CPU tensors, and CPU sessions created from now on, run the Triton source in Triton's interpreter.

    `trimaran.interpret()` switches it on for the process, `trimaran.interpret(False)` off; as a context manager it
    returns to what was before. It is slow: a way to check kernels without a GPU, not to run models.
    """

    def __init__(self, enabled: bool = True) -> None:
        global _enabled
        self._before, _enabled = _enabled, enabled

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        global _enabled
        _enabled = self._before


def interpreting() -> bool:
    return _enabled


class HostPointer:
    """CPU memory as the interpreter wants a tensor: an address and a dtype. The other methods are those that its copy
    to and from the host asks for; here they copy nothing."""

    def __init__(self, address: int, dtype: str) -> None:
        self.address, self.dtype = address, dtype

    def data_ptr(self) -> int:
        return self.address

    def untyped_storage(self) -> HostPointer:
        return self

    def cpu(self) -> HostPointer:
        return self

    def new_empty(self, *_: Any, **__: Any) -> HostPointer:
        return self

    def set_(self, *_: Any) -> HostPointer:
        return self

    def copy_(self, *_: Any) -> HostPointer:
        return self

    def storage_offset(self) -> int:
        return 0

    def size(self) -> tuple[int, ...]:
        return ()

    stride = size


class Interpreter:
    """Executes launches on the CPU; see `execute.execute`."""

    def launch(
        self,
        launch: PlannedLaunch,
        grid: tuple[int, int, int],
        arguments: list[Any],
        stream: int,
        allocate: Callable[[int], int],
    ) -> None:
        named = {
            param.name: HostPointer(value, param.dtype) if param.place else value
            for param, value in zip(launch.params, arguments, strict=True)
        }
        with _LOCK:
            before, JITFunction.__call__ = JITFunction.__call__, _call_interpreted
            vars(_BUILDER).update(_BF16)
            try:
                _interpreted(launch.kernel)[grid](**named, **launch.constexprs)
            finally:
                JITFunction.__call__ = before
                for name in _BF16:
                    delattr(_BUILDER, name)

    def zero(self, address: int, count: int, stream: int) -> None:
        ctypes.memset(address, 0, count)


def _dot(a: Any, b: Any, *rest: Any) -> Any:
    """The interpreter keeps bf16 as bits in uint16, and its own dot multiplies those as integers."""
    a, b = (_cast(x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b))
    return type(_BUILDER).create_dot(_BUILDER, a, b, *rest)


def _cast(x: Any, to: Any) -> Any:
    """The interpreter's own cast from fp32 to bf16 cuts off what hardware rounds to nearest, ties to even."""
    if (x.dtype.scalar, to.scalar) != (tl.float32, tl.bfloat16):
        return type(_BUILDER).cast_impl(_BUILDER, x, to)
    bits = x.data.view(np.uint32)
    rounded = (bits + (np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1)))) >> np.uint32(16)
    rounded = np.where(np.isnan(x.data), np.uint32(0x7FC0), rounded)
    return triton_interpreter.TensorHandle(rounded.astype(np.uint16), tl.bfloat16)


_BF16 = {"create_dot": _dot, "cast_impl": _cast}  # replaced on the interpreter's builder while a kernel runs


def _interpreted(kernel: JITFunction[Any]) -> Any:
    if kernel.fn not in _INTERPRETED:  # not keyed by the JITFunction: hashing one parses its source
        _INTERPRETED[kernel.fn] = triton_interpreter.InterpretedFunction(kernel.fn)
    return _INTERPRETED[kernel.fn]


def _call_interpreted(self: JITFunction[Any], *args: Any, **kwargs: Any) -> Any:
    """`JITFunction.__call__` while interpreting: one kernel calling another function, tl.sum among them. Unlike
    Triton's own it takes its changes to triton.language back, without which nothing could be compiled afterwards."""
    function = _interpreted(self)
    scope = triton_interpreter._patch_lang(function.fn)
    try:
        return function.rewrite()(*args, **kwargs)
    finally:
        scope.restore()
