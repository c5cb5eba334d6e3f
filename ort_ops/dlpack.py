"""DLPack, by which any library's tensors are read and made without a copy."""

from __future__ import annotations

import ctypes
import functools
import itertools
import math
import struct
from ctypes import c_char_p, c_int, c_void_p
from typing import Any, NamedTuple

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


class Spec(NamedTuple):
    """All of a tensor but where it lies. device: "cpu" or "cuda"; device_index: 0 on the CPU."""

    dtype: str
    shape: tuple[int, ...]
    device: str = "cpu"
    device_index: int = 0

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * ITEMSIZE[self.dtype]


class Memory(NamedTuple):
    """A contiguous tensor. owner: what keeps the memory alive."""

    address: int
    spec: Spec
    owner: Any


def read(tensor: Any) -> tuple[Memory, bool]:
    """Where a tensor lies, and whether it is contiguous. What computes it is not waited for. TypeError for an unknown
    dtype or device."""
    capsule = tensor.__dlpack__(stream=-1)
    fields = _TENSOR.unpack(ctypes.string_at(_pointer(capsule, NAME), _TENSOR.size))
    data, device, index, rank, code, bits, lanes, shape_at, strides_at, offset, _, _ = fields
    dtype = DTYPES.get((code, bits)) if lanes == 1 else None
    if dtype is None or device not in DEVICES:
        raise TypeError(f"is of dtype {getattr(tensor, 'dtype', '?')} on {getattr(tensor, 'device', '?')}")
    shape, place = _numbers(shape_at, rank), DEVICES[device]
    dense = not strides_at or _dense(shape, _numbers(strides_at, rank))
    return Memory(data + offset, Spec(dtype, shape, place, index if place == "cuda" else 0), capsule), dense


def _numbers(address: int, count: int) -> tuple[int, ...]:
    return _NUMBERS[count].unpack(ctypes.string_at(address, 8 * count))


def _dense(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    wanted = _strides(shape)
    return (
        strides == wanted
        or 0 in shape
        or all(a == b or size == 1 for size, a, b in zip(shape, strides, wanted, strict=True))
    )


class Shared:
    """Memory that other libraries make a tensor of. What is in it must be there already: no stream waits."""

    def __init__(self, memory: Memory) -> None:
        self.memory = memory

    def __dlpack_device__(self) -> tuple[int, int]:
        spec = self.memory.spec
        return (2 if spec.device == "cuda" else 1), spec.device_index

    def __dlpack__(self, **_: Any) -> Any:
        """A capsule of the protocol's first form, which every library still takes."""
        spec = self.memory.spec
        rank = len(spec.shape)
        tensor = ctypes.create_string_buffer(_TENSOR.size + 16 * rank)
        address = ctypes.addressof(tensor)
        shape_at = address + _TENSOR.size
        code, bits = CODES[spec.dtype]
        where = (self.memory.address, *self.__dlpack_device__(), rank)
        _TENSOR.pack_into(tensor, 0, *where, code, bits, 1, shape_at, shape_at + 8 * rank, 0, 0, _DELETER)
        struct.pack_into(f"<{2 * rank}q", tensor, _TENSOR.size, *spec.shape, *_strides(spec.shape))
        _LIVE[address] = (tensor, self.memory)
        return _new_capsule(address, NAME, _DESTRUCTOR)


@functools.lru_cache(maxsize=1024)
def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    return contiguous_strides(shape)


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
