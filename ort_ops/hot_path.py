"""The Python side of `hot_path.c`: its structs, its tables of plans, and what it asks Python for.

Each node has a `HotKernel`, whose address is what ONNX Runtime keeps. Nodes of one kind (op, dtypes, attributes,
initializers, outputs, device) share one `Table`: what the first of them needed, the others find.
"""

from __future__ import annotations

import ctypes
import functools
import weakref
from ctypes import CFUNCTYPE, c_int, c_int64, c_size_t, c_uint8, c_uint32, c_uint64, c_void_p
from typing import Any

from trimaran.kernels.contract import Op, Tensor
from trimaran.kernels.driver import driver
from trimaran.kernels.programs import serialize
from trimaran.ort_ops.abi import CPU, CUDA, immortalize
from trimaran.ort_ops.context import described
from trimaran.ort_ops.interpreted import Interpreted
from trimaran.ort_ops.kernel import KERNELS, Kernel
from trimaran.ort_ops.native import native

# As in hot_path.c
MAX_INPUTS, MAX_OUTPUTS = 31, 16
PRESENT, ALIGNED, RANK = 128, 64, 63  # of a byte of Facts.inputs
TABLE_LIMIT = 128  # plans
NO_MEMORY, NO_OUTPUT, TOO_MANY_SIZES, NO_VALUE, NOT_LAUNCHED, WRONG_PLAN = range(1, 7)

# The functions of OrtApi in the order of the struct Api
API_FUNCTIONS = (
    "KernelContext_GetInput",
    "KernelContext_GetOutput",
    "GetTensorMutableData",
    "GetTensorElementTypeAndShapeDataReference",
    "GetTensorTypeAndShape",
    "GetDimensionsCount",
    "GetDimensions",
    "ReleaseTensorTypeAndShapeInfo",
    "KernelContext_GetGPUComputeStream",
    "KernelContext_GetScratchBuffer",
    "AllocatorAlloc",
    "AllocatorFree",
    "ReleaseStatus",
)


class Facts(ctypes.Structure):
    """What no guard can say of a run."""

    _fields_ = [("inputs", c_uint8 * MAX_INPUTS), ("aligned", c_uint8)]


class _Kernel(ctypes.Structure):
    _fields_ = [
        ("api", c_void_p),
        ("driver", c_void_p),
        ("table", c_void_p),
        ("miss", c_void_p),
        ("fail", c_void_p),
        ("id", c_uint64),
        ("allocator", c_void_p),
        ("memory", c_void_p),
        ("inputs", c_uint32),
        ("declared", c_uint32),
    ]


MISS = CFUNCTYPE(c_void_p, c_uint64, ctypes.POINTER(Facts), ctypes.POINTER(c_int64), c_size_t, ctypes.POINTER(c_void_p))
FAIL = CFUNCTYPE(c_void_p, c_uint64, c_int, c_int64)


def compute_address(op: Op) -> int:
    """The address of KernelComputeV2 in C; 0 where there is none, or the op has more inputs than it takes."""
    library = native().library
    if library is None or len(op.inputs) > MAX_INPUTS or len(op.outputs) > MAX_OUTPUTS:
        return 0
    return ctypes.cast(library.trimaran_compute, c_void_p).value or 0


class Table:
    """A bounded table of plans, in C. misses: how often Python was asked for one."""

    def __init__(self, limit: int = TABLE_LIMIT) -> None:
        self.misses = 0
        self._library = native().library
        self.address: int = self._library.trimaran_table(limit)
        if not self.address:
            raise MemoryError("no memory for a table of plans")
        weakref.finalize(self, self._library.trimaran_table_free, self.address).atexit = False

    def add(self, facts: Facts, content: bytes) -> int:
        """Add a plan (see `kernels.programs`), with a reference to it that is the caller's. MemoryError where it has
        more outputs, scratch or arguments than there is room for."""
        plan: int = self._library.trimaran_table_add(self.address, ctypes.byref(facts), content, len(content))
        if not plan:
            raise MemoryError("no room for the plan: too many outputs, launches' arguments or scratch buffers")
        return plan


class HotKernel:
    """One node of one session that C runs. `address` is for ONNX Runtime to keep."""

    def __init__(self, kernel: Kernel) -> None:
        variant, node = kernel.variant, kernel.node
        self.kernel = kernel
        self.executor = _interpreted() if variant.provider == CPU else driver(node.device_index)
        self.table = _table(kernel)
        self._functions = (c_void_p * len(API_FUNCTIONS))(*map(variant.api.address, API_FUNCTIONS))
        self._struct = _Kernel(
            api=ctypes.addressof(self._functions),
            driver=ctypes.addressof(self.executor.functions),
            table=self.table.address,
            miss=ctypes.cast(_MISS, c_void_p),
            fail=ctypes.cast(_FAIL, c_void_p),
            allocator=node.allocator,
            # which knows the stream, in whose order the memory is used again; on the CPU, where there is none, asking
            # for it crashes releases up to 1.22
            memory=node.memory if variant.provider == CUDA else None,
            inputs=node.input_count,
            declared=len(variant.op.inputs),
        )
        self.address: int = ctypes.addressof(self._struct)
        self._struct.id = self.address

    def close(self) -> None:
        self.kernel.close()

    def make_plan(self, facts: Facts, sizes: list[int]) -> int:
        """Add the plan for these inputs; a reference to it. Raises as `Kernel.plan` does."""
        self.table.misses += 1
        types, at = self.kernel.variant.input_types, 0
        inputs: list[Tensor | None] = [None] * len(types)
        for index, constant in enumerate(self.kernel.node.constant):
            fact = facts.inputs[index]
            rank = fact & RANK
            if fact & PRESENT:
                shape = tuple(sizes[at : at + rank])
                inputs[index] = described(types[index], shape, bool(fact & ALIGNED), constant)
            at += 2 * rank  # strides, which C has computed as `described` does
        plan, _ = self.kernel.plan(inputs, bool(facts.aligned))
        return self.table.add(facts, serialize(plan, len(types), self.executor.load))

    def failure(self, what: int, detail: int) -> BaseException:
        """What C could not do, as the exception that `Kernel.compute` would raise."""
        if what == NO_OUTPUT:
            return LookupError(f"output {detail} is required, but the node has none")
        if what == NO_MEMORY:
            return MemoryError(f"no {detail} bytes of scratch memory")
        if what == TOO_MANY_SIZES:
            return ValueError(f"an input of rank {detail}, expected at most 32, and 128 for all inputs together")
        if what == NOT_LAUNCHED:
            return self.executor.failure(detail)
        reason = "divides by zero" if what == NO_VALUE else "does not hold"
        return RuntimeError(f"the plan that was made for these inputs {reason} for them")


@functools.cache
def _interpreted() -> Interpreted:
    return Interpreted()


_TABLES: weakref.WeakValueDictionary[Any, Table] = weakref.WeakValueDictionary()


def _table(kernel: Kernel) -> Table:
    """The table of nodes of this kind."""
    node = kernel.node
    key = (kernel.variant.address, tuple(vars(node.attrs).values()), node.constant, node.wanted, kernel.device)
    table = _TABLES.get(key)
    if table is None:
        table = _TABLES[key] = Table()
    return table


# Callbacks. None of them may raise: ctypes would print the exception and return garbage.


def _miss(address: int, facts: Any, sizes: Any, count: int, out: Any) -> int | None:
    hot: HotKernel = KERNELS[address]
    try:
        out[0] = hot.make_plan(facts.contents, sizes[:count])
    except BaseException as error:
        return hot.kernel.status(error)
    return None


def _fail(address: int, what: int, detail: int) -> int:
    hot: HotKernel = KERNELS[address]
    try:
        error = hot.failure(what, detail)
    except BaseException as raised:
        error = raised
    return hot.kernel.status(error)


_MISS, _FAIL = MISS(_miss), FAIL(_fail)
for _callback in (_MISS, _FAIL):
    immortalize(_callback)
