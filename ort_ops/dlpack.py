"""Memory of torch's, CuPy's and NumPy's tensors, in and out without a copy, by DLPack.

Neither library is imported: a tensor says by its protocol where it lies, and a result is handed to the library that the
inputs came from. NumPy arrays are taken and made by their array interface, which also has read-only ones and bf16.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import math
import struct
import sys
from ctypes import c_char_p, c_int, c_void_p
from typing import Any, NamedTuple

import numpy as np

from trimaran.kernels.contract import ITEMSIZE
from trimaran.kernels.sizes import contiguous_strides
from trimaran.ort_ops.abi import immortalize

DEVICES = {1: "cpu", 2: "cuda", 3: "cpu", 13: "cuda"}  # DLDeviceType: plain ones, pinned and managed memory
CODES = {  # (DLDataTypeCode, bits)
    "float32": (2, 32),
    "float16": (2, 16),
    "bfloat16": (4, 16),
    "float64": (2, 64),
    "int64": (0, 64),
    "int32": (0, 32),
    "int8": (0, 8),
    "uint8": (1, 8),
    "bool": (6, 8),
}
DTYPES = {code: dtype for dtype, code in CODES.items()}
NAME = b"dltensor"
_NUMBERS = [struct.Struct(f"<{count}q") for count in range(65)]


# DLManagedTensor: data, device type and index, rank, type code, bits, lanes, shape, strides, byte offset, manager,
# deleter
_TENSOR = struct.Struct("<QiiiBBHQQQQQ")


class Memory(NamedTuple):
    """A contiguous tensor. device: "cpu" or "cuda"; owner: what keeps the memory alive."""

    address: int
    dtype: str
    shape: tuple[int, ...]
    device: str
    device_index: int
    owner: Any

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * ITEMSIZE[self.dtype]


def memory_of(tensor: Any) -> Memory:
    """Where a tensor lies; one that is not contiguous is made so first, which copies it. What computes it is not waited
    for, see `queue_of`. TypeError for what is no tensor or of an unknown dtype."""
    if isinstance(tensor, (np.ndarray, np.generic)):
        return _of_numpy(tensor)
    if not hasattr(tensor, "__dlpack__"):
        raise TypeError(f"is a {type(tensor).__name__}, expected a tensor of torch, CuPy or NumPy")
    capsule = tensor.__dlpack__(stream=-1)
    fields = _TENSOR.unpack(ctypes.string_at(_pointer(capsule, NAME), _TENSOR.size))
    data, device, index, rank, code, bits, lanes, shape_at, strides_at, offset, _, _ = fields
    dtype = DTYPES.get((code, bits)) if lanes == 1 else None
    if dtype is None or device not in DEVICES:
        raise TypeError(f"is of dtype {getattr(tensor, 'dtype', '?')} on {getattr(tensor, 'device', '?')}")
    shape = _numbers(shape_at, rank)
    if strides_at and not _dense(shape, _numbers(strides_at, rank)):
        return memory_of(_contiguous(tensor))
    place = DEVICES[device]
    return Memory(data + offset, dtype, shape, place, index if place == "cuda" else 0, capsule)


def queue_of(tensor: Any) -> int:
    """The CUstream on which the tensor's library queues its work now. TypeError for a library that is neither torch
    nor CuPy."""
    library = library_of(tensor)
    if library.__name__ == "torch":
        return int(library.cuda.current_stream(tensor.device).cuda_stream)
    if library.__name__ == "cupy":
        return int(library.cuda.get_current_stream().ptr)
    raise TypeError(f"is on a GPU and of {library.__name__}, expected torch or CuPy")


def _numbers(address: int, count: int) -> tuple[int, ...]:
    return _NUMBERS[count].unpack(ctypes.string_at(address, 8 * count))


def _of_numpy(array: Any) -> Memory:
    if array.dtype.name not in ITEMSIZE or not array.dtype.isnative:
        raise TypeError(f"is of dtype {array.dtype}")
    array = np.asarray(array, order="C")
    return Memory(array.ctypes.data, array.dtype.name, array.shape, "cpu", 0, array)


def _dense(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    wanted = _strides(shape)
    return (
        strides == wanted
        or 0 in shape
        or all(a == b or size == 1 for size, a, b in zip(shape, strides, wanted, strict=True))
    )


def _contiguous(tensor: Any) -> Any:
    """torch has a method for it, CuPy a function."""
    if hasattr(tensor, "contiguous"):
        return tensor.contiguous()
    return library_of(tensor).ascontiguousarray(tensor)


def library_of(tensor: Any) -> Any:
    """The module that the tensor's class comes from: torch, cupy or numpy."""
    return sys.modules[type(tensor).__module__.partition(".")[0]]


def to_library(library: Any, memory: Memory) -> Any:
    """The memory as a tensor of this library. What is in it must be there already: no stream waits."""
    if library is np:
        return np.asarray(_Array(memory)).view(_numpy_dtype(memory.dtype))
    if library.__name__ == "torch":  # takes a capsule as well, and faster
        return library.utils.dlpack.from_dlpack(_Shared(memory).__dlpack__())
    return library.from_dlpack(_Shared(memory))


def _numpy_dtype(name: str) -> Any:
    if name == "bfloat16":
        import ml_dtypes

        return ml_dtypes.bfloat16
    return np.dtype(name)


class _Array:
    """What NumPy makes an array of, without a copy and with this as its base."""

    def __init__(self, memory: Memory) -> None:
        self.memory = memory
        kind = "<u2" if memory.dtype == "bfloat16" else np.dtype(memory.dtype).str
        address = memory.address or ctypes.addressof(_NOTHING)
        self.__array_interface__ = {"version": 3, "data": (address, False), "typestr": kind, "shape": memory.shape}


class _Shared:
    """What other libraries make a tensor of."""

    def __init__(self, memory: Memory) -> None:
        self.memory = memory

    def __dlpack_device__(self) -> tuple[int, int]:
        return (2 if self.memory.device == "cuda" else 1), self.memory.device_index

    def __dlpack__(self, **_: Any) -> Any:
        """A capsule of the protocol's first form, which every library still takes."""
        memory, rank = self.memory, len(self.memory.shape)
        tensor = ctypes.create_string_buffer(_TENSOR.size + 16 * rank)
        address = ctypes.addressof(tensor)
        shape_at = address + _TENSOR.size
        code, bits = CODES[memory.dtype]
        where = (memory.address, *self.__dlpack_device__(), rank)
        _TENSOR.pack_into(tensor, 0, *where, code, bits, 1, shape_at, shape_at + 8 * rank, 0, 0, _DELETER)
        struct.pack_into(f"<{2 * rank}q", tensor, _TENSOR.size, *memory.shape, *_strides(memory.shape))
        _LIVE[address] = (tensor, memory)
        return _new_capsule(address, NAME, _DESTRUCTOR)


@functools.lru_cache(maxsize=1024)
def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    return contiguous_strides(shape)


_NOTHING = ctypes.c_char()
_LIVE: dict[int, Any] = {}  # what consumers hold, by the address of its struct
_python = ctypes.pythonapi
_pointer = ctypes.PYFUNCTYPE(c_void_p, ctypes.py_object, c_char_p)(("PyCapsule_GetPointer", _python))
_new_capsule = ctypes.PYFUNCTYPE(ctypes.py_object, c_void_p, c_char_p, c_void_p)(("PyCapsule_New", _python))
# of a capsule that is being destroyed, so it may not be touched as an object
_dying_pointer = ctypes.PYFUNCTYPE(c_void_p, c_void_p, c_char_p)(("PyCapsule_GetPointer", _python))
_dying_is_valid = ctypes.PYFUNCTYPE(c_int, c_void_p, c_char_p)(("PyCapsule_IsValid", _python))


def _delete(address: int, live: dict[int, Any] = _LIVE) -> None:
    live.pop(address, None)


def _destroy(
    capsule: int, is_valid: Any = _dying_is_valid, pointer: Any = _dying_pointer, live: dict[int, Any] = _LIVE
) -> None:
    """A consumer renames the capsule; one that nobody consumed still has its name."""
    if is_valid(capsule, NAME):
        live.pop(pointer(capsule, NAME), None)


_callbacks = (ctypes.CFUNCTYPE(None, c_void_p)(_delete), ctypes.PYFUNCTYPE(None, c_void_p)(_destroy))
_DELETER, _DESTRUCTOR = (ctypes.cast(callback, c_void_p).value or 0 for callback in _callbacks)
for _kept in itertools.chain(_callbacks, [_LIVE]):  # consumers may outlive this module
    immortalize(_kept)
