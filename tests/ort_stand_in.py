"""Stand-ins for ONNX Runtime and for the CUDA driver, over which one node is run by C and by Python."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from ctypes import CFUNCTYPE, POINTER, c_int, c_int64, c_size_t, c_ubyte, c_uint32, c_uint64, c_void_p
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

from trimaran.kernels.contract import Device, Op
from trimaran.kernels.cuda import Config, Functions
from trimaran.kernels.execute import execute
from trimaran.kernels.plans import PlanCache, PlannedLaunch
from trimaran.kernels.programs import Loaded
from trimaran.ort_ops import hot_path, kernel
from trimaran.ort_ops.context import described
from trimaran.ort_ops.hot_path import HotKernel
from trimaran.ort_ops.kernel import Kernel
from trimaran.ort_ops.native import native

HOPPER = Device("cuda", 0, 90, 132, 227 * 1024)
BOX = (3, (8, 64))  # of every descriptor: CUtensorMapSwizzle, and sizes
STREAM, MEMORY_INFO, ALLOCATOR = 0x5EA, 0x3E3, 0xA110C
P = c_void_p


@dataclass
class FakeRuntime:
    """inputs: (shape, address) or None for an absent one. `log` has what was asked for."""

    inputs: Sequence[tuple[tuple[int, ...], int] | None] = ()
    output_address: Callable[[int], int] = lambda index: 0x10_0000_0000 * (index + 1)
    scratch_address: int = 0x7000_0000_0000
    references: bool = True  # shapes without a copy, as from 1.24 on
    outputs: dict[int, tuple[int, ...]] = field(default_factory=dict)
    live: list[int] = field(default_factory=list)
    statuses: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.kept: list[Any] = []
        self.shapes = {}

        def function(*types: Any) -> Callable[[Any], None]:
            def keep(call: Any) -> None:
                self.kept.append((call.__name__, CFUNCTYPE(*types)(call)))

            return keep

        @function(P, P, c_size_t, POINTER(P))
        def KernelContext_GetInput(_: int, index: int, out: Any) -> None:
            out[0] = None if self.inputs[index] is None else index + 1

        @function(P, P, c_size_t, POINTER(c_int64), c_size_t, POINTER(P))
        def KernelContext_GetOutput(_: int, index: int, dims: Any, rank: int, out: Any) -> None:
            self.outputs[index] = tuple(dims[:rank])
            out[0] = 1000 + index if self.output_address(index) is not None else None

        @function(P, P, POINTER(P))
        def GetTensorMutableData(value: int, out: Any) -> None:
            out[0] = self.output_address(value - 1000) if value >= 1000 else self.inputs[value - 1][1]

        @function(P, P, POINTER(c_int), POINTER(POINTER(c_int64)), POINTER(c_size_t))
        def GetTensorElementTypeAndShapeDataReference(value: int, element: Any, dims: Any, rank: Any) -> None:
            shape = self.inputs[value - 1][0]
            self.shapes[value] = (c_int64 * len(shape))(*shape)
            dims[0], rank[0], element[0] = ctypes.cast(self.shapes[value], POINTER(c_int64)), len(shape), 1

        @function(P, P, POINTER(P))
        def GetTensorTypeAndShape(value: int, out: Any) -> None:
            self.live.append(value)
            out[0] = value

        @function(P, P, POINTER(c_size_t))
        def GetDimensionsCount(info: int, rank: Any) -> None:
            rank[0] = len(self.inputs[info - 1][0])

        @function(P, P, POINTER(c_int64), c_size_t)
        def GetDimensions(info: int, dims: Any, rank: int) -> None:
            for axis, size in enumerate(self.inputs[info - 1][0]):
                dims[axis] = size

        @function(None, P)
        def ReleaseTensorTypeAndShapeInfo(info: int) -> None:
            self.live.remove(info)

        @function(P, P, POINTER(P))
        def KernelContext_GetGPUComputeStream(_: int, out: Any) -> None:
            out[0] = STREAM

        @function(P, P, P, c_size_t, POINTER(P))
        def KernelContext_GetScratchBuffer(_: int, memory: int, count: int, out: Any) -> None:
            assert memory == MEMORY_INFO
            self.live.append(self.scratch_address)
            out[0] = self.scratch_address

        @function(P, P, c_size_t, POINTER(P))
        def AllocatorAlloc(allocator: int, count: int, out: Any) -> None:
            raise AssertionError("scratch on a GPU comes from the context")

        @function(P, P, P)
        def AllocatorFree(allocator: int, address: int) -> None:
            assert allocator == ALLOCATOR
            self.live.remove(address)

        @function(None, P)
        def ReleaseStatus(status: int) -> None:
            pass

        self.functions = dict(self.kept)

    def address(self, name: str) -> int:
        absent = name == "GetTensorElementTypeAndShapeDataReference" and not self.references
        return 0 if absent else ctypes.cast(self.functions[name], P).value or 0

    def status(self, code: int, text: str) -> int:
        self.statuses.append(text)
        return len(self.statuses)


def kinds_of(launch: PlannedLaunch) -> list[Any]:
    types = {"i32": c_int, "i64": c_int64, "fp32": ctypes.c_float}
    return [c_uint64 if param.place else types[param.type] for param in launch.params]


class FakeDriver:
    """Records what is launched, in words that the Python path gives as well."""

    def __init__(self) -> None:
        self.device = HOPPER
        self.calls: list[Any] = []
        self.launches: list[PlannedLaunch] = []
        self.code = 0
        self.maps: dict[int, Any] = {}
        launch = CFUNCTYPE(c_int, POINTER(Config), c_void_p, POINTER(c_void_p), c_void_p)(self._launch)
        zero = CFUNCTYPE(c_int, c_uint64, c_ubyte, c_size_t, c_void_p)(self._zero)
        sizes, parts = POINTER(c_uint64), POINTER(c_uint32)
        types = (c_int, c_uint32, c_uint64, sizes, sizes, parts, parts, c_int, c_int, c_int, c_int)
        encode = CFUNCTYPE(c_int, P, *types)(self._encode)
        self.kept = (launch, zero, encode)
        self.functions = Functions(*(ctypes.cast(call, P).value for call in self.kept))

    def load(self, launch: PlannedLaunch) -> Loaded:
        self.launches.append(launch)
        boxes = tuple(BOX for param in launch.params if param.rank)
        return Loaded(len(self.launches), 128, 4096, num_ctas=2, attributes=((4, (2, 1, 1)), (6, (1,))), boxes=boxes)

    def failure(self, code: int) -> BaseException:
        return RuntimeError(f"the driver said {code}")

    def _launch(self, config: Any, function: int, parameters: Any, extra: int | None) -> int:
        config, launch = config.contents, self.launches[function - 1]
        assert extra is None
        assert (config.stream, config.shared, tuple(config.block)) == (STREAM, 4096, (128, 1, 1))
        found = [config.attributes[index] for index in range(config.attribute_count)]
        assert [(a.id, tuple(a.value[:3])) for a in found] == [(4, (2, 1, 1)), (6, (1, 0, 0))]
        kinds = kinds_of(launch)
        values = [kind.from_address(parameters[index]).value for index, kind in enumerate(kinds)]
        for index, param in enumerate(launch.params):
            if param.rank:
                values[index] = self.maps.pop(parameters[index])
        hidden = [c_uint64.from_address(parameters[len(kinds) + index]).value for index in range(2)]
        assert hidden == [0, 0]
        self.calls.append(("launch", launch.kernel.__name__, tuple(config.grid), values))
        return self.code

    def _encode(
        self, to: int, type: int, rank: int, address: int, sizes: Any, strides: Any, box: Any, steps: Any, *rest: int
    ) -> int:
        """Keeps what the map says where it would be written."""
        assert to % 64 == 0
        assert (type, box[:rank], rest) == (6, list(BOX[1][::-1]), (0, BOX[0], 2, 0))
        assert steps[:rank] == [1] * rank
        self.maps[to] = (address, sizes[:rank], strides[: rank - 1])
        return 0

    def _zero(self, address: int, value: int, count: int, stream: int) -> int:
        assert (value, stream) == (0, STREAM)
        self.calls.append(("zero", address, count))
        return 0


class Recorder:
    """The executor of the Python path, which records the same."""

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def launch(self, launch: PlannedLaunch, grid: Any, arguments: list[Any], stream: int, allocate: Any) -> None:
        values = [kind(value).value for kind, value in zip(kinds_of(launch), arguments, strict=True)]
        for index, param in enumerate(launch.params):
            if param.rank:
                rest = arguments[index + 1 :]
                shape, strides = rest[: param.rank], rest[param.rank : 2 * param.rank - 1]
                values[index] = (values[index], shape[::-1], [2 * stride for stride in strides[::-1]])
        self.calls.append(("launch", launch.kernel.__name__, (2 * grid[0], *grid[1:]), values))

    def zero(self, address: int, count: int, stream: int) -> None:
        self.calls.append(("zero", address, count))


class Node:
    """One node run by C, and by Python, over the same stand-ins."""

    def __init__(self, op: Op, wanted: tuple[bool, ...] = (True,), runtime: Any = None, **attrs: Any) -> None:
        self.op, self.runtime, self.wanted, self.driver = op, runtime or FakeRuntime(), wanted, FakeDriver()
        self.attrs = op.attributes(attrs)
        node = SimpleNamespace(
            name="it", attrs=self.attrs, wanted=wanted, input_count=len(op.inputs), device_index=0,
            allocator=ALLOCATOR, memory=MEMORY_INFO, constant=(False,) * len(op.inputs),
        )  # fmt: skip
        self.types = tuple(op.types.get(port.type, (port.type,))[0] for port in op.inputs)
        self.plans = PlanCache(op)
        variant = SimpleNamespace(
            api=self.runtime, op=op, provider="CUDAExecutionProvider", plans=self.plans, label="test.random",
            input_types=self.types, address=id(self),
        )  # fmt: skip
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(hot_path, "driver", lambda index: self.driver)
            patch.setattr(kernel, "driver", lambda index: self.driver)
            self.hot = HotKernel(Kernel(variant, node))  # type: ignore[arg-type]
        kernel.KERNELS[self.hot.address] = self.hot
        self.library = native().library
        self.compute = CFUNCTYPE(c_void_p, c_void_p, c_void_p)(("trimaran_compute", self.library))

    def __enter__(self) -> Node:
        return self

    def __exit__(self, *_: object) -> None:
        del kernel.KERNELS[self.hot.address]

    def use(self, table: hot_path.Table) -> None:
        self.hot.table, self.hot._struct.table = table, table.address

    def run(self, *inputs: tuple[tuple[int, ...], int] | None) -> list[Any]:
        """What C launches, for other inputs than before where there are any."""
        status = self._run(inputs)
        assert self.runtime.live == [], "what was borrowed from ONNX Runtime was not given back"
        assert not status, self.runtime.statuses[-1]
        return list(self.driver.calls)

    def failure(self, *inputs: tuple[tuple[int, ...], int] | None) -> str:
        """The text of a run that fails, without the part that says where."""
        assert self._run(inputs)
        text = self.runtime.statuses[-1]
        assert text.startswith("test.random, node 'it': ")
        return text.removeprefix("test.random, node 'it': ")

    def _run(self, inputs: tuple[Any, ...]) -> int | None:
        self.runtime.inputs = inputs or self.runtime.inputs
        self.driver.calls.clear()
        return self.compute(self.hot.address, 1)

    def expected(self, aligned_outputs: bool = True) -> tuple[list[Any], tuple[Any, ...]]:
        """What Python launches, and the shapes of the outputs."""
        given = self.runtime.inputs
        inputs = [
            None if t is None else described(dtype, t[0], t[1] % 16 == 0, False)
            for dtype, t in zip(self.types, given, strict=True)
        ]
        made, sizes = self.plans.find(inputs, self.attrs, HOPPER, self.wanted, aligned_outputs)
        work, recorder, at = made.evaluate(sizes), Recorder(), self.runtime.scratch_address

        def allocate(count: int) -> int:
            nonlocal at
            at += -(-count // 256) * 256
            return at - -(-count // 256) * 256

        outputs = [
            0 if shape is None else self.runtime.output_address(index) for index, shape in enumerate(work.outputs)
        ]
        execute(made, work, [t[1] if t else 0 for t in given], outputs, recorder, allocate, STREAM)
        return recorder.calls, work.outputs
