"""Tensors of torch, CuPy, NumPy and of whoever speaks DLPack: what they are, where they lie, and new ones.

No library is imported: the class of a tensor says which one it is of. The three are read by attributes of their own,
because DLPack takes 20 us a tensor and they take one.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from trimaran.kernels.contract import ITEMSIZE
from trimaran.ort_ops.abi import ELEMENT_TYPE
from trimaran.ort_ops.dlpack import Memory, Shared, Spec, read


class Library:
    """A library that speaks DLPack."""

    def __init__(self, module: Any) -> None:
        self.module, self.name = module, module.__name__

    def kind(self, tensor: Any) -> Any:
        """Hashable, and equal for tensors of this library that differ in address and content alone."""
        memory, dense = read(tensor)
        return memory.spec, dense

    def spec(self, tensor: Any) -> tuple[Spec, bool]:
        """What the tensor is, and whether it is contiguous. TypeError, without the tensor's name, for one that cannot
        be an input."""
        memory, dense = read(tensor)
        return memory.spec, dense

    def address(self, tensor: Any) -> int:
        """Of a contiguous tensor."""
        return read(tensor)[0].address

    def contiguous(self, tensor: Any) -> Any:
        return self.module.ascontiguousarray(tensor)

    def queue(self, index: int) -> int:
        """The CUstream of the device on which the library queues the work of this thread now. TypeError for a library
        of which that is not known."""
        raise TypeError(f"is on a GPU and of {self.name}, expected torch or CuPy")

    def maker(self, spec: Spec) -> Callable[[], Any]:
        """What makes new tensors, their content undefined, in the order of `queue`."""
        return lambda: self.tensor(allocated(spec))

    def tensor(self, memory: Memory) -> Any:
        """The memory as a tensor, without a copy. What is in it must be there already: no stream waits."""
        return self.module.from_dlpack(Shared(memory))


class Torch(Library):
    def __init__(self, module: Any) -> None:
        super().__init__(module)
        self._raw_stream = getattr(module._C, "_cuda_getCurrentRawStream", None)  # as code that torch compiles calls it

    def kind(self, tensor: Any) -> Any:
        dense = tensor.is_contiguous() and not tensor.is_neg()  # negated, but not yet in memory
        return tensor.dtype, tensor.shape, tensor.device, tensor.layout, tensor.requires_grad, dense

    def spec(self, tensor: Any) -> tuple[Spec, bool]:
        dtype, shape, device, layout, gradient, dense = self.kind(tensor)
        name = str(dtype).removeprefix("torch.")
        if name not in ITEMSIZE or device.type not in ("cpu", "cuda"):
            raise TypeError(f"is of dtype {dtype} on {device}")
        if layout != self.module.strided:
            raise TypeError(f"is laid out as {layout}, expected torch.strided")
        if gradient:
            raise TypeError("requires a gradient, which ONNX Runtime does not compute: pass it detached")
        return Spec(name, tuple(shape), device.type, device.index or 0), dense

    def address(self, tensor: Any) -> int:
        return tensor.data_ptr()  # type: ignore[no-any-return]

    def contiguous(self, tensor: Any) -> Any:
        return tensor.resolve_neg().contiguous()

    def queue(self, index: int) -> int:
        if self._raw_stream is not None:
            return self._raw_stream(index)  # type: ignore[no-any-return]
        return self.module.cuda.current_stream(index).cuda_stream  # type: ignore[no-any-return]

    def maker(self, spec: Spec) -> Callable[[], Any]:
        device = (
            self.module.device(spec.device, spec.device_index) if spec.device == "cuda" else self.module.device("cpu")
        )
        return functools.partial(
            self.module.empty, spec.shape, dtype=getattr(self.module, spec.dtype), device=device, requires_grad=False
        )

    def tensor(self, memory: Memory) -> Any:
        return self.module.utils.dlpack.from_dlpack(Shared(memory).__dlpack__())  # a capsule is taken faster


class Cupy(Library):
    def kind(self, tensor: Any) -> Any:
        return tensor.dtype, tensor.shape, tensor.data.device_id, tensor.flags.c_contiguous

    def spec(self, tensor: Any) -> tuple[Spec, bool]:
        dtype = _native(tensor.dtype)
        return Spec(dtype, tensor.shape, "cuda", tensor.data.device_id), tensor.flags.c_contiguous

    def address(self, tensor: Any) -> int:
        return tensor.data.ptr  # type: ignore[no-any-return]

    def queue(self, index: int) -> int:
        return self.module.cuda.get_current_stream().ptr  # type: ignore[no-any-return]


class Numpy(Library):
    def kind(self, tensor: Any) -> Any:
        return tensor.dtype, tensor.shape, tensor.flags.c_contiguous

    def spec(self, tensor: Any) -> tuple[Spec, bool]:
        # a scalar is no array, and lies nowhere
        return Spec(_native(tensor.dtype), tensor.shape), isinstance(tensor, np.ndarray) and tensor.flags.c_contiguous

    def address(self, tensor: Any) -> int:
        return tensor.__array_interface__["data"][0]  # type: ignore[no-any-return]

    def contiguous(self, tensor: Any) -> Any:
        return np.asarray(tensor, order="C")

    def maker(self, spec: Spec) -> Callable[[], Any]:
        return functools.partial(np.empty, spec.shape, _numpy_dtype(spec.dtype))

    def tensor(self, memory: Memory) -> Any:
        """Not by DLPack, which has no bf16 here."""
        return np.asarray(_Array(memory)).view(_numpy_dtype(memory.spec.dtype))


@functools.lru_cache(maxsize=256)
def library_of(kind: type) -> Library:
    """The library that a class of tensors, or one that it is derived from, is of. TypeError for other classes."""
    for base in kind.__mro__:
        root = base.__module__.partition(".")[0]
        if root in _KNOWN and hasattr(kind, "dtype"):
            return library(root)
    if not hasattr(kind, "__dlpack__"):
        raise TypeError(f"is a {kind.__name__}, expected a tensor of torch, CuPy or NumPy")
    return library(kind.__module__.partition(".")[0])


_KNOWN: dict[str, type[Library]] = {"torch": Torch, "cupy": Cupy, "numpy": Numpy}


@functools.cache
def library(name: str) -> Library:
    return _KNOWN.get(name, Library)(sys.modules[name])


def allocated(spec: Spec) -> Memory:
    """New memory from ONNX Runtime."""
    import onnxruntime

    make = onnxruntime.OrtValue.ortvalue_from_shape_and_type
    value = make(list(spec.shape), ELEMENT_TYPE[spec.dtype], spec.device, spec.device_index)
    return Memory(value.data_ptr(), spec, value)


def _native(dtype: Any) -> str:
    if dtype.name not in ITEMSIZE or not dtype.isnative:
        raise TypeError(f"is of dtype {dtype}")
    return str(dtype.name)


def _numpy_dtype(name: str) -> Any:
    if name == "bfloat16":
        import ml_dtypes

        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype(name)


class _Array:
    """What NumPy makes an array of, without a copy and with this as its base."""

    def __init__(self, memory: Memory) -> None:
        self.memory = memory
        kind = "<u2" if memory.spec.dtype == "bfloat16" else np.dtype(memory.spec.dtype).str
        address = memory.address or ctypes.addressof(_NOTHING)
        self.__array_interface__ = {
            "version": 3, "data": (address, False), "typestr": kind, "shape": memory.spec.shape,
        }  # fmt: skip


_NOTHING = ctypes.c_char()
