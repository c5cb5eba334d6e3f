"""What ONNX Runtime tells a kernel: of its node once, and of its tensors at every run.

An OrtKernelInfo is valid while the kernel is made, an OrtKernelContext during one run.
"""

from __future__ import annotations

import functools
from ctypes import byref, c_float, c_int, c_int64, c_void_p
from typing import Any

from trimaran.kernels.contract import ALIGNMENT, Op, Tensor
from trimaran.kernels.sizes import contiguous_strides
from trimaran.ort_ops.abi import CUDA, DEFAULT_MEMORY, SIZE, Api


class Node:
    """One node of one session.

    name: the node's; attrs: its attributes, checked, with defaults; input_count: its inputs, absent ones among them
    unless they trail; constant: for each input, whether it is an initializer; wanted: for each output of the op,
    whether the node has it; device_index: of the CUDA device.
    Raises ValueError or TypeError, naming the attribute, for attributes that the op does not take.
    """

    def __init__(self, api: Api, info: int, op: Op, provider: str) -> None:
        self.api, self.provider = api, provider
        self.name = node_name(api, info)
        given = {attr.name: node_attribute(api, info, attr.name) for attr in op.attrs}
        self.attrs = op.attributes({name: value for name, value in given.items() if value is not None})
        self.input_count = api.count(api.KernelInfo_GetInputCount, info)
        self.constant = tuple(is_initializer(api, info, index) for index in range(self.input_count))
        outputs = api.count(api.KernelInfo_GetOutputCount, info)
        self.wanted = tuple(
            not port.optional or (index < outputs and api.text(api.KernelInfo_GetOutputName, info, index) != "")
            for index, port in enumerate(op.outputs)
        )
        self.allocator = api.pointer(api.KernelInfoGetAllocator, info, DEFAULT_MEMORY)
        self.memory = api.pointer(api.AllocatorGetInfo, self.allocator)  # the allocator's own
        index = c_int()
        api.check(api.MemoryInfoGetId(self.memory, byref(index)))
        self.device_index = index.value

    def close(self) -> None:
        self.api.ReleaseAllocator(self.allocator)


def is_initializer(api: Api, info: int, index: int) -> bool:
    """Whether an input's value is in the file; not so an absent input."""
    found, value = c_int(), c_void_p()
    if status := api.KernelInfoGetConstantInput_tensor(info, index, byref(found), byref(value)):
        api.message(status)
        return False
    return bool(found.value)


def node_name(api: Api, info: int) -> str:
    return api.text(api.KernelInfo_GetNodeName, info)


def node_attribute(api: Api, info: int, name: str) -> Any:
    """The attribute in the type that the file gives it: a float, int, string or list of numbers; None where absent."""
    key = name.encode()
    for function, number in (
        (api.KernelInfoGetAttribute_float, c_float()),
        (api.KernelInfoGetAttribute_int64, c_int64()),
    ):
        if not (status := function(info, key, byref(number))):
            return number.value
        api.message(status)
    size = SIZE(0)
    if not (status := api.KernelInfoGetAttribute_string(info, key, None, byref(size))):
        return api.text(api.KernelInfoGetAttribute_string, info, key)
    api.message(status)
    for function, item in (
        (api.KernelInfoGetAttributeArray_float, c_float),
        (api.KernelInfoGetAttributeArray_int64, c_int64),
    ):
        size = SIZE(0)
        if not (status := function(info, key, None, byref(size))):
            values = (item * size.value)()
            api.check(function(info, key, values, byref(size)))
            return list(values)
        api.message(status)
    return None


@functools.lru_cache(maxsize=4096)
def described(dtype: str, shape: tuple[int, ...], aligned: bool, constant: bool) -> Tensor:
    """A contiguous tensor, as all of ONNX Runtime's are."""
    return Tensor(dtype, shape, contiguous_strides(shape), aligned, constant=constant)


class Run:
    """One run of a node: its tensors, its scratch memory and its stream."""

    __slots__ = ("api", "context", "node", "scratch")

    def __init__(self, api: Api, context: int, node: Node) -> None:
        self.api, self.context, self.node = api, context, node
        self.scratch: list[int] = []

    def input(self, index: int, dtype: str) -> tuple[Tensor | None, int]:
        """(metadata, address) of an input of this dtype; (None, 0) for an absent one."""
        api, out, rank = self.api, c_void_p(), SIZE()
        pointer = byref(out)
        api.check(api.KernelContext_GetInput(self.context, index, pointer))
        value = out.value
        if not value:
            return None, 0
        api.check(api.GetTensorTypeAndShape(value, pointer))
        info = out.value
        try:
            api.check(api.GetDimensionsCount(info, byref(rank)))
            dims = (c_int64 * rank.value)()
            api.check(api.GetDimensions(info, dims, rank))
        finally:
            api.ReleaseTensorTypeAndShapeInfo(info)
        api.check(api.GetTensorMutableData(value, pointer))
        address = out.value or 0
        constant = self.node.constant[index]
        return described(dtype, tuple(dims), address % ALIGNMENT == 0, constant), address

    def output(self, index: int, shape: tuple[int, ...]) -> int:
        """Allocate an output; its address. LookupError where the node has no such output."""
        api, out = self.api, c_void_p()
        pointer = byref(out)
        dims = (c_int64 * len(shape))(*shape)
        api.check(api.KernelContext_GetOutput(self.context, index, dims, len(shape), pointer))
        if not out.value:
            raise LookupError(f"output {index} is required, but the node has none")
        api.check(api.GetTensorMutableData(out.value, pointer))
        return out.value or 0

    def stream(self) -> int:
        """The CUstream that the session runs on; 0 on the CPU."""
        return self.api.pointer(self.api.KernelContext_GetGPUComputeStream, self.context)

    def allocate(self, count: int) -> int:
        """The address of `count` bytes that live until `release`."""
        api, node, out = self.api, self.node, c_void_p()
        if node.provider == CUDA:  # it knows the stream, in whose order the memory is used again
            api.check(api.KernelContext_GetScratchBuffer(self.context, node.memory, count, byref(out)))
        else:  # where the same call crashes releases up to 1.22, which have no stream
            api.check(api.AllocatorAlloc(node.allocator, count, byref(out)))
        address = out.value or 0
        if not address:
            raise MemoryError(f"no {count} bytes of scratch memory")
        self.scratch.append(address)
        return address

    def release(self) -> None:
        """Give the scratch memory back, which ORT does not do by itself."""
        while self.scratch:
            self.api.check(self.api.AllocatorFree(self.node.allocator, self.scratch.pop()))
