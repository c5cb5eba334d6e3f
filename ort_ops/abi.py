"""The slice of ONNX Runtime's C interface that custom operators need, in ctypes.

No header and no compiler: OrtApi is a table of functions to which releases only append, so a function is its index, and
`OrtCustomOp` is a struct of 26 pointers. Everything here is version 18 of the interface, which onnxruntime 1.18 and
every later release answers.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from ctypes import c_char_p, c_float, c_int, c_int64, c_size_t, c_uint32, c_void_p
from typing import TYPE_CHECKING, Any

API_VERSION = 18
CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"

# ONNXTensorElementDataType
ELEMENT_TYPE = {
    "float32": 1,
    "uint8": 2,
    "int8": 3,
    "int32": 6,
    "int64": 7,
    "bool": 9,
    "float16": 10,
    "float64": 11,
    "bfloat16": 16,
}
DTYPE = {element_type: dtype for dtype, element_type in ELEMENT_TYPE.items()}
REQUIRED, OPTIONAL = 0, 1  # OrtCustomOpInputOutputCharacteristic
DEFAULT_MEMORY = 0  # OrtMemType: where the execution provider works
FAIL, INVALID_ARGUMENT, NOT_IMPLEMENTED = 1, 2, 9  # OrtErrorCode
INT_ATTRIBUTE, FLOAT_ATTRIBUTE, STRING_ATTRIBUTE = 1, 3, 5  # OrtOpAttrType

P, SIZE = c_void_p, c_size_t

# name: (index in OrtApi, argument types). Each but those in _RESULTS returns an OrtStatus*, null where all went well.
SLOTS: dict[str, tuple[int, tuple[Any, ...]]] = {
    "CreateStatus": (0, (c_int, c_char_p)),
    "GetErrorMessage": (2, (P,)),
    "CreateCustomOpDomain": (26, (c_char_p, P)),
    "CustomOpDomain_Add": (27, (P, P)),
    "AddCustomOpDomain": (28, (P, P)),
    "GetTensorMutableData": (51, (P, P)),
    "CreateTensorTypeAndShapeInfo": (57, (P,)),
    "SetTensorElementType": (58, (P, c_int)),
    "SetDimensions": (59, (P, P, SIZE)),
    "GetTensorElementType": (60, (P, P)),
    "GetDimensionsCount": (61, (P, P)),
    "GetDimensions": (62, (P, P, SIZE)),
    "GetSymbolicDimensions": (63, (P, P, SIZE)),
    "GetTensorTypeAndShape": (65, (P, P)),
    "MemoryInfoGetId": (72, (P, P)),
    "AllocatorAlloc": (75, (P, SIZE, P)),
    "AllocatorFree": (76, (P, P)),
    "AllocatorGetInfo": (77, (P, P)),
    "KernelInfoGetAttribute_float": (85, (P, c_char_p, P)),
    "KernelInfoGetAttribute_int64": (86, (P, c_char_p, P)),
    "KernelInfoGetAttribute_string": (87, (P, c_char_p, P, P)),
    "KernelContext_GetInput": (90, (P, SIZE, P)),
    "KernelContext_GetOutput": (91, (P, SIZE, P, SIZE, P)),
    "ReleaseStatus": (93, (P,)),
    "ReleaseTensorTypeAndShapeInfo": (99, (P,)),
    "ReleaseAllocator": (132, (P,)),
    "KernelInfoGetAttributeArray_float": (162, (P, c_char_p, P, P)),
    "KernelInfoGetAttributeArray_int64": (163, (P, c_char_p, P, P)),
    "KernelContext_GetGPUComputeStream": (193, (P, P)),
    "KernelInfo_GetInputCount": (230, (P, P)),
    "KernelInfo_GetOutputCount": (231, (P, P)),
    "KernelInfo_GetOutputName": (233, (P, SIZE, P, P)),
    "KernelInfo_GetNodeName": (244, (P, P, P)),
    "KernelInfoGetConstantInput_tensor": (249, (P, SIZE, P, P)),
    "ShapeInferContext_GetInputCount": (267, (P, P)),
    "ShapeInferContext_GetInputTypeShape": (268, (P, SIZE, P)),
    "ShapeInferContext_GetAttribute": (269, (P, c_char_p, P)),
    "ShapeInferContext_SetOutputTypeShape": (270, (P, SIZE, P)),
    "SetSymbolicDimensions": (271, (P, P, SIZE)),
    "ReadOpAttr": (272, (P, c_int, P, SIZE, P)),
    "KernelContext_GetScratchBuffer": (277, (P, P, SIZE, P)),
    "KernelInfoGetAllocator": (278, (P, c_int, P)),
}
# name: (index in OrtApi, the release of onnxruntime that appended it)
NEWER_SLOTS = {"GetTensorElementTypeAndShapeDataReference": (414, (1, 24))}
_RESULTS: dict[str, Any] = {
    "GetErrorMessage": c_char_p,
    "ReleaseStatus": None,
    "ReleaseTensorTypeAndShapeInfo": None,
    "ReleaseAllocator": None,
}

_CALLBACK = ctypes.CFUNCTYPE  # takes the interpreter's lock
_FUNCTION = ctypes.PYFUNCTYPE  # keeps the interpreter's lock: cheaper, and no switch of threads within a node

# The fields of OrtCustomOp after `version`, in order. None: ORT allows it to be null, and it is.
CALLBACKS: dict[str, Any] = {
    "CreateKernel": None,
    "GetName": _CALLBACK(P, P),
    "GetExecutionProviderType": _CALLBACK(P, P),
    "GetInputType": _CALLBACK(c_int, P, SIZE),
    "GetInputTypeCount": _CALLBACK(SIZE, P),
    "GetOutputType": _CALLBACK(c_int, P, SIZE),
    "GetOutputTypeCount": _CALLBACK(SIZE, P),
    "KernelCompute": None,
    "KernelDestroy": _CALLBACK(None, P),
    "GetInputCharacteristic": _CALLBACK(c_int, P, SIZE),
    "GetOutputCharacteristic": _CALLBACK(c_int, P, SIZE),
    "GetInputMemoryType": _CALLBACK(c_int, P, SIZE),
    "GetVariadicInputMinArity": None,
    "GetVariadicInputHomogeneity": None,
    "GetVariadicOutputMinArity": None,
    "GetVariadicOutputHomogeneity": None,
    "CreateKernelV2": _CALLBACK(P, P, P, P, P),
    "KernelComputeV2": _CALLBACK(P, P, P),
    "InferOutputShapeFn": _CALLBACK(P, P, P),
    "GetStartVersion": _CALLBACK(c_int, P),
    "GetEndVersion": _CALLBACK(c_int, P),
    "GetMayInplace": None,
    "ReleaseMayInplace": None,
    "GetAliasMap": None,
    "ReleaseAliasMap": None,
}
REGISTER_CUSTOM_OPS = _CALLBACK(P, P, P)  # (OrtSessionOptions*, const OrtApiBase*) -> OrtStatus*


class OrtCustomOp(ctypes.Structure):
    """struct OrtCustomOp of interface version 18."""

    _fields_ = [("version", c_uint32), *((name, P) for name in CALLBACKS)]


class OrtError(RuntimeError):
    """A call into ONNX Runtime failed; the text is its own."""


class Api:
    """ONNX Runtime's functions by name, from an OrtApiBase*. OrtError where the library is too old."""

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Callable[..., Any]: ...

    def __init__(self, base: int) -> None:
        table = ctypes.cast(base, ctypes.POINTER(P))
        self.version_text: str = _FUNCTION(c_char_p)(table[1])().decode()
        self.version = tuple(int(part) for part in self.version_text.split(".")[:2])
        address = _FUNCTION(P, c_uint32)(table[0])(API_VERSION)
        if not address:
            raise OrtError(f"onnxruntime {self.version_text} is too old, expected 1.{API_VERSION} or newer")
        self._functions = ctypes.cast(address, ctypes.POINTER(P))
        for name, (index, arguments) in SLOTS.items():
            setattr(self, name, _FUNCTION(_RESULTS.get(name, P), *arguments)(self._functions[index]))

    def address(self, name: str) -> int:
        """The address of a function; 0 for one that this release has not."""
        index, since = NEWER_SLOTS[name] if name in NEWER_SLOTS else (SLOTS[name][0], (1, API_VERSION))
        return (self._functions[index] or 0) if self.version >= since else 0

    def check(self, status: int | None) -> None:
        """OrtError where a call returned a status."""
        if status:
            raise OrtError(self.message(status))

    def message(self, status: int) -> str:
        """The text of a status, which is released."""
        text: bytes = self.GetErrorMessage(status)
        self.ReleaseStatus(status)
        return text.decode("utf-8", "replace")

    def status(self, code: int, text: str) -> int:
        """A new OrtStatus*, for a callback to return."""
        status: int = self.CreateStatus(code, text.encode("utf-8", "replace").replace(b"\0", b"?"))
        return status

    def pointer(self, function: Callable[..., Any], *arguments: Any) -> int:
        """Call a function whose last argument is a pointer that it writes; 0 for null."""
        out = P()
        self.check(function(*arguments, ctypes.byref(out)))
        return out.value or 0

    def count(self, function: Callable[..., Any], *arguments: Any) -> int:
        """Call a function whose last argument is a size_t that it writes."""
        out = SIZE()
        self.check(function(*arguments, ctypes.byref(out)))
        return out.value

    def text(self, function: Callable[..., Any], *arguments: Any) -> str:
        """Call a function that fills a buffer, once for the size and once for the text."""
        size = SIZE(0)
        self.check(function(*arguments, None, ctypes.byref(size)))
        buffer = ctypes.create_string_buffer(size.value)
        self.check(function(*arguments, buffer, ctypes.byref(size)))
        return buffer.value.decode("utf-8", "replace")


_SCALARS = {"float": (c_float, FLOAT_ATTRIBUTE), "int": (c_int64, INT_ATTRIBUTE), "bool": (c_int64, INT_ATTRIBUTE)}


def scalar_attribute(kind: str) -> tuple[Any, int]:
    """(C type, OrtOpAttrType) of an attribute that is no string; a bool is an ONNX int."""
    return _SCALARS[kind]


def immortalize(value: object) -> None:
    """Never free what ONNX Runtime or others hold plain pointers to."""
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(value))
