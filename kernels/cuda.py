"""The CUDA driver by ctypes: its functions, the structs that a launch takes, what a device is. No CUDA headers."""

from __future__ import annotations

import ctypes
import functools
from typing import Any

from trimaran.kernels.contract import ITEMSIZE, Device

_DEVICE_ATTRIBUTES = {"sm_count": 16, "major": 75, "minor": 76, "shared_memory": 97}
# Functions that are called at every replay of a graph: with types, ctypes takes plain numbers
_P = ctypes.c_void_p
_TYPES: dict[str, tuple[Any, ...]] = {
    "cuCtxGetCurrent": (_P,),
    "cuEventRecord": (_P, _P),
    "cuStreamWaitEvent": (_P, _P, ctypes.c_uint),
    "cuStreamSynchronize": (_P,),
    "cuMemcpyAsync": (ctypes.c_uint64, ctypes.c_uint64, ctypes.c_size_t, _P),
}
# CUtensorMapDataType
TENSOR_MAP_TYPES = {"float16": 6, "float32": 7, "float64": 8, "bfloat16": 9}
TENSOR_MAP_BYTES, TENSOR_MAP_ALIGNMENT = 128, 64
_L2_128B = 2  # CU_TENSOR_MAP_L2_PROMOTION_L2_128B


class Attribute(ctypes.Structure):
    """CUlaunchAttribute"""

    _fields_ = [("id", ctypes.c_int), ("pad", ctypes.c_int), ("value", ctypes.c_uint32 * 16)]


class Config(ctypes.Structure):
    """CUlaunchConfig"""

    _fields_ = [
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(Attribute)),
        ("attribute_count", ctypes.c_uint),
    ]


class Functions(ctypes.Structure):
    """Addresses for a launcher that is not written in Python: the driver's functions, or stand-ins of the same
    signatures, and the context to be in (all null where there are no contexts)."""

    _fields_ = [
        ("launch", ctypes.c_void_p),  # cuLaunchKernelEx
        ("zero", ctypes.c_void_p),  # cuMemsetD8Async
        ("encode", ctypes.c_void_p),  # cuTensorMapEncodeTiled
        ("get_context", ctypes.c_void_p),
        ("push_context", ctypes.c_void_p),
        ("pop_context", ctypes.c_void_p),
        ("context", ctypes.c_void_p),
    ]


class CudaError(RuntimeError):
    """A call of the CUDA driver failed; the text says which and why."""


@functools.cache
def library() -> ctypes.CDLL:
    try:
        found = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise CudaError(f"no CUDA driver on this machine: {error}") from error
    status = found.cuInit(0)
    if status:
        raise CudaError(f"cuInit failed with CUresult {status}: no usable CUDA device")
    for name, types in _TYPES.items():
        getattr(found, name).argtypes = types
    return found


def call(name: str, *arguments: Any) -> None:
    """Call a driver function; CudaError where it fails."""
    status = getattr(library(), name)(*arguments)
    if status:
        raise error(name, status)


def error(name: str, status: int) -> CudaError:
    """What a driver function's CUresult means."""
    text = ctypes.c_char_p()
    library().cuGetErrorString(status, ctypes.byref(text))
    return CudaError(f"{name}: {(text.value or b'unknown error').decode()} (CUresult {status})")


@functools.cache
def device(index: int) -> Device:
    """What plans may know of the CUDA device `index`."""
    handle, value = ctypes.c_int(), ctypes.c_int()
    call("cuDeviceGet", ctypes.byref(handle), index)
    facts = {}
    for name, attribute in _DEVICE_ATTRIBUTES.items():
        call("cuDeviceGetAttribute", ctypes.byref(value), attribute, handle)
        facts[name] = value.value
    capability = 10 * facts["major"] + facts["minor"]
    return Device("cuda", index, capability, facts["sm_count"], facts["shared_memory"])


@functools.lru_cache(maxsize=4096)
def tensor_map(
    dtype: str, address: int, shape: tuple[int, ...], strides: tuple[int, ...], box: tuple[int, ...], swizzle: int
) -> Any:
    """A CUtensorMap: boxes of the tensor at the address, of this shape and strides (in elements), which are put into
    shared memory swizzled so (a CUtensorMapSwizzle)."""
    rank, itemsize = len(shape), ITEMSIZE[dtype]
    room = ctypes.create_string_buffer(TENSOR_MAP_BYTES + TENSOR_MAP_ALIGNMENT)
    start = -ctypes.addressof(room) % TENSOR_MAP_ALIGNMENT
    found = (ctypes.c_uint8 * TENSOR_MAP_BYTES).from_buffer(room, start)
    steps = [stride * itemsize for stride in strides[:-1]]
    call(
        "cuTensorMapEncodeTiled",
        ctypes.byref(found),
        TENSOR_MAP_TYPES[dtype],
        rank,
        ctypes.c_void_p(address),
        (ctypes.c_uint64 * rank)(*reversed(shape)),
        (ctypes.c_uint64 * rank)(*reversed(steps)),
        (ctypes.c_uint32 * rank)(*reversed(box)),
        (ctypes.c_uint32 * rank)(*[1] * rank),
        0,  # not interleaved
        swizzle,
        _L2_128B,
        0,  # zeros beyond the shape
    )
    return found


def primary_context(index: int) -> ctypes.c_void_p:
    """The context that the CUDA runtime, and with it torch and ONNX Runtime, uses on the device."""
    handle, context = ctypes.c_int(), ctypes.c_void_p()
    call("cuDeviceGet", ctypes.byref(handle), index)
    call("cuDevicePrimaryCtxRetain", ctypes.byref(context), handle)
    return context
