"""Shape inference: `Op.infer` on what ONNX Runtime knows of a node while it loads the graph.

A dimension is an int or a `Symbol`. ONNX Runtime takes two tensors whose symbols are equal for two of equal size, so a
dimension of which nothing is known gets a name of its own.
"""

from __future__ import annotations

import ctypes
import itertools
from ctypes import byref, c_char_p, c_int, c_int64, c_void_p
from typing import Any

from trimaran.kernels.contract import Attr, Op, Tensor
from trimaran.kernels.sizes import Symbol
from trimaran.ort_ops.abi import DTYPE, ELEMENT_TYPE, SIZE, STRING_ATTRIBUTE, Api, scalar_attribute

_FRESH = itertools.count(1)
_ABSENT_INPUTS = (1, 24)  # before, ORT crashes on an absent optional input of an op that infers shapes
_CHECKED_OUTPUTS = (1, 28)  # before, ORT aborts where an output is set that the node has not


def can_infer(api: Api, op: Op) -> bool:
    """Whether this onnxruntime may be given shape inference for the op."""
    return api.version >= _ABSENT_INPUTS or not any(port.optional for port in op.inputs)


def infer(api: Api, context: int, op: Op) -> None:
    """Set the shapes of a node's outputs. ValueError or TypeError, naming the argument, where its inputs do not fit."""
    inputs = [input_tensor(api, context, index) for index in range(input_count(api, context, op))]
    # ORT shows an input of unknown rank as a scalar
    if any(tensor is not None and tensor.rank == 0 for tensor in inputs):
        return
    given = {attr.name: attribute(api, context, attr) for attr in op.attrs}
    attrs = op.attributes({name: value for name, value in given.items() if value is not None})
    for index, (port, tensor) in enumerate(zip(op.outputs, op.infer_outputs(inputs, attrs), strict=True)):
        if tensor is None or (port.optional and api.version < _CHECKED_OUTPUTS):
            continue
        status = set_output(api, context, index, tensor)
        if status:
            message = api.message(status)
            if not port.optional:
                raise RuntimeError(message)


def input_count(api: Api, context: int, op: Op) -> int:
    return min(api.count(api.ShapeInferContext_GetInputCount, context), len(op.inputs))


def input_tensor(api: Api, context: int, index: int) -> Tensor | None:
    """dtype and shape of an input; None for an absent one."""
    info = api.pointer(api.ShapeInferContext_GetInputTypeShape, context, index)  # borrowed
    element_type = c_int()
    api.check(api.GetTensorElementType(info, byref(element_type)))
    if not element_type.value:
        return None
    rank = api.count(api.GetDimensionsCount, info)
    sizes, names = (c_int64 * rank)(), (c_char_p * rank)()
    api.check(api.GetDimensions(info, sizes, rank))
    api.check(api.GetSymbolicDimensions(info, names, rank))
    shape = tuple(
        size if size >= 0 else Symbol(name.decode() if name else fresh_name())
        for size, name in zip(sizes, names, strict=True)
    )
    return Tensor(DTYPE.get(element_type.value, f"of element type {element_type.value}"), shape)


def attribute(api: Api, context: int, attr: Attr) -> Any:
    """The attribute; None where it is absent. OrtError where it is of another type."""
    out, size = c_void_p(), SIZE()
    if status := api.ShapeInferContext_GetAttribute(context, attr.name.encode(), byref(out)):
        api.message(status)
        return None
    if attr.kind == "string":
        buffer = ctypes.create_string_buffer(256)
        api.check(api.ReadOpAttr(out, STRING_ATTRIBUTE, buffer, len(buffer), byref(size)))
        return buffer.value.decode("utf-8", "replace")
    number, kind = scalar_attribute(attr.kind)
    value = number()
    api.check(api.ReadOpAttr(out, kind, byref(value), ctypes.sizeof(value), byref(size)))
    return value.value


def set_output(api: Api, context: int, index: int, tensor: Tensor) -> int | None:
    """The status of ORT's call, null where the output was set."""
    rank = len(tensor.shape)
    sizes = [-1 if isinstance(size, Symbol) else size for size in tensor.shape]
    names = [(size.name or fresh_name()).encode() if isinstance(size, Symbol) else b"" for size in tensor.shape]
    info = api.pointer(api.CreateTensorTypeAndShapeInfo)
    try:
        api.check(api.SetTensorElementType(info, ELEMENT_TYPE[tensor.dtype]))
        api.check(api.SetDimensions(info, (c_int64 * rank)(*sizes), rank))
        api.check(api.SetSymbolicDimensions(info, (c_char_p * rank)(*names), rank))
        status: int | None = api.ShapeInferContext_SetOutputTypeShape(context, index, info)
    finally:
        api.ReleaseTensorTypeAndShapeInfo(info)
    return status


def fresh_name() -> str:
    return f"trimaran_{next(_FRESH)}"
