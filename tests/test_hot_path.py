"""The C hot path against the Python path, argument by argument, on a stand-in for ONNX Runtime and for the driver."""

from __future__ import annotations

import ctypes
import random
import threading
from collections.abc import Callable, Sequence
from ctypes import CFUNCTYPE, POINTER, c_int, c_int64, c_size_t, c_ubyte, c_uint64, c_void_p
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st

from trimaran.kernels.contract import Attr, Decline, Device, Divisible, Input, Launch, Op, Output, Scratch, Tensor
from trimaran.kernels.driver import Config, Functions
from trimaran.kernels.execute import execute
from trimaran.kernels.plans import PlanCache, PlannedLaunch
from trimaran.kernels.programs import Loaded
from trimaran.kernels.sizes import cdiv, maximum, minimum
from trimaran.ort_ops import hot_path, kernel
from trimaran.ort_ops.context import described
from trimaran.ort_ops.hot_path import HotKernel
from trimaran.ort_ops.kernel import Kernel
from trimaran.ort_ops.native import native

pytestmark = pytest.mark.skipif(native().library is None, reason=native().how)

HOPPER = Device("cuda", 0, 90, 132, 227 * 1024)
STREAM, MEMORY_INFO, ALLOCATOR = 0x5EA, 0x3E3, 0xA110C
P = c_void_p


# A stand-in for ONNX Runtime: values are numbers, the addresses of tensors made up


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


class FakeDriver:
    """Records what is launched, in words that the Python path gives as well."""

    def __init__(self) -> None:
        self.device = HOPPER
        self.calls: list[Any] = []
        self.launches: list[PlannedLaunch] = []
        self.code = 0
        launch = CFUNCTYPE(c_int, POINTER(Config), c_void_p, POINTER(c_void_p), c_void_p)(self._launch)
        zero = CFUNCTYPE(c_int, c_uint64, c_ubyte, c_size_t, c_void_p)(self._zero)
        self.kept = (launch, zero)
        self.functions = Functions(*(ctypes.cast(call, P).value for call in self.kept))

    def load(self, launch: PlannedLaunch) -> Loaded:
        self.launches.append(launch)
        return Loaded(len(self.launches), 128, 4096, num_ctas=2, attributes=((4, (2, 1, 1)), (6, (1,))))

    def failure(self, code: int) -> BaseException:
        return RuntimeError(f"the driver said {code}")

    def _launch(self, config: Any, function: int, parameters: Any, extra: int | None) -> int:
        config, launch = config.contents, self.launches[function - 1]
        assert extra is None
        assert (config.stream, config.shared, tuple(config.block)) == (STREAM, 4096, (128, 1, 1))
        found = [config.attributes[index] for index in range(config.attribute_count)]
        assert [(a.id, tuple(a.value[:3])) for a in found] == [(4, (2, 1, 1)), (6, (1, 0, 0))]
        types = {"i32": c_int, "i64": c_int64, "fp32": ctypes.c_float}
        kinds = [c_uint64 if param.place else types[param.type] for param in launch.params]
        values = [kind.from_address(parameters[index]).value for index, kind in enumerate(kinds)]
        hidden = [c_uint64.from_address(parameters[len(kinds) + index]).value for index in range(2)]
        assert hidden == [0, 0]
        self.calls.append(("launch", launch.kernel.__name__, tuple(config.grid), values))
        return self.code

    def _zero(self, address: int, value: int, count: int, stream: int) -> int:
        assert (value, stream) == (0, STREAM)
        self.calls.append(("zero", address, count))
        return 0


class Recorder:
    """The executor of the Python path, which records the same."""

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def launch(self, launch: PlannedLaunch, grid: Any, arguments: list[Any], stream: int, allocate: Any) -> None:
        types = {"i32": c_int, "i64": c_int64, "fp32": ctypes.c_float}
        kinds = [c_uint64 if param.place else types[param.type] for param in launch.params]
        values = [kind(value).value for kind, value in zip(kinds, arguments, strict=True)]
        self.calls.append(("launch", launch.kernel.__name__, (2 * grid[0], *grid[1:]), values))

    def zero(self, address: int, count: int, stream: int) -> None:
        self.calls.append(("zero", address, count))


# Ops whose plans are random


@triton.jit
def first_kernel(x_ptr, y_ptr, scratch_ptr, a, b, c, factor, BLOCK: tl.constexpr):
    pass


@triton.jit
def second_kernel(u_ptr, y_ptr, scratch_ptr, a):
    pass


OPERATIONS: list[Callable[[Any, Any], Any]] = [
    lambda a, b: a + b,
    lambda a, b: a - b,
    lambda a, b: a * (b % 7),
    lambda a, b: a // (b % 5 + 1),
    lambda a, b: (a - b) // (b % 5 + 1),
    lambda a, b: (a - b) % (b % 9 + 1),
    lambda a, b: minimum(a, b),
    lambda a, b: maximum(a, b),
    lambda a, b: cdiv(a, b % 64 + 1),
    lambda a, b: a if a < b else b + 1,
    lambda a, b: a if a >= 9 else b * 2,
    lambda a, b: a + 1 if a == b else b,
    lambda a, b: a if a % 16 != 0 else b,
]


def numbers(seed: int, sizes: list[Any]) -> list[Any]:
    """Random expressions over the sizes, each not negative."""
    source, found = random.Random(seed), list(sizes)
    for _ in range(12):
        a, b = source.choice(found), source.choice(found)
        found.append(maximum(minimum(source.choice(OPERATIONS)(a, b), 1 << 20), 0))
    return found[len(sizes) :]


def infer(inputs: Any, attrs: Any) -> tuple[Tensor, ...]:
    made = numbers(attrs.seed + 1, [*inputs.x.shape, 3])
    return Tensor("float16", (made[0], 5)), Tensor("float32", tuple(made[1:4]))


def plan(inputs: Any, outputs: Any, attrs: Any, device: Device) -> list[Launch]:
    sizes = [*inputs.x.shape, *inputs.x.strides] + ([] if inputs.u is None else [*inputs.u.shape])
    n = numbers(attrs.seed, [*sizes, 11])
    scratch = Scratch("float32", n[0], zero=True)
    x = inputs.x
    tail = Tensor(x.dtype, x.shape, x.strides, x.aligned, x.place, x.index, offset=n[1])
    args = {"x_ptr": tail, "y_ptr": outputs.y, "scratch_ptr": scratch, "a": n[2], "b": Divisible(n[3])}
    first = Launch(first_kernel, (n[4], cdiv(n[5], 4)), {**args, "c": n[6] * 4096, "factor": 0.5}, {"BLOCK": n[7] % 2})
    rest = {"u_ptr": inputs.u, "y_ptr": outputs.z, "scratch_ptr": Scratch("int8", n[8]), "a": n[9]}
    return [first, Launch(second_kernel, (n[10], 1, n[11]), rest)]


RANDOM = Op(
    "random",
    1,
    (Input("x"), Input("u", "int32", optional=True)),
    (Output("y"), Output("z", "float32", optional=True)),
    (Attr("seed", "int"),),
    {"T": ("float16",)},
    infer,
    plan,
    lambda *_, **__: (),
    lambda *_: (),
)


class Fixture:
    """One node run by C, and by Python, over the same stand-ins."""

    def __init__(self, op: Op, runtime: FakeRuntime, attrs: dict[str, Any], wanted: tuple[bool, ...]) -> None:
        self.op, self.runtime, self.wanted, self.driver = op, runtime, wanted, FakeDriver()
        self.attrs = op.attributes(attrs)
        node = SimpleNamespace(
            name="it", attrs=self.attrs, wanted=wanted, input_count=len(op.inputs), device_index=0,
            allocator=ALLOCATOR, memory=MEMORY_INFO, constant=(False,) * len(op.inputs),
        )  # fmt: skip
        self.types = tuple(op.types.get(port.type, (port.type,))[0] for port in op.inputs)
        self.plans = PlanCache(op)
        variant = SimpleNamespace(
            api=runtime, op=op, provider="CUDAExecutionProvider", plans=self.plans, label="test.random",
            input_types=self.types, address=id(self),
        )  # fmt: skip
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(hot_path, "driver", lambda index: self.driver)
            patch.setattr(kernel, "driver", lambda index: self.driver)
            self.hot = HotKernel(Kernel(variant, node))  # type: ignore[arg-type]
        kernel.KERNELS[self.hot.address] = self.hot
        self.library = native().library
        self.compute = CFUNCTYPE(c_void_p, c_void_p, c_void_p)(("trimaran_compute", self.library))

    def run(self) -> list[Any]:
        """What C launches; a failed run's text."""
        self.driver.calls.clear()
        status = self.compute(self.hot.address, 1)
        assert self.runtime.live == [], "what was borrowed from ONNX Runtime was not given back"
        return [self.runtime.statuses[status - 1]] if status else list(self.driver.calls)

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

    def close(self) -> None:
        del kernel.KERNELS[self.hot.address]


def sorted_calls(calls: list[Any]) -> list[Any]:
    """C zeroes all scratch first, Python each as it is allocated; both before the first launch."""
    return sorted(calls, key=lambda call: call[0] == "launch")


DIMENSION = st.integers(0, 300)
TENSORS = st.lists(DIMENSION, min_size=2, max_size=2).map(tuple)


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    shapes=st.lists(TENSORS, min_size=1, max_size=4),
    other=st.none() | st.lists(DIMENSION, max_size=3).map(tuple),
    offset=st.sampled_from([0, 16, 2]),
    second=st.booleans(),
    output_offset=st.sampled_from([0, 4]),
    references=st.booleans(),
)
def test_c_launches_what_python_launches(seed, shapes, other, offset, second, output_offset, references) -> None:
    """Random expressions, guards, scratch, offsets, absent inputs and outputs, aligned or not; a kernel that has seen
    other shapes before."""
    runtime = FakeRuntime(references=references)
    runtime.output_address = lambda index: 0x10_0000_0000 * (index + 1) + output_offset
    fixture = Fixture(RANDOM, runtime, {"seed": seed}, (True, second))
    try:
        for shape in shapes:
            runtime.inputs = [(shape, 0x5000_0000 + offset), None if other is None else (other, 0x6000_0000)]
            runtime.outputs.clear()
            expected, outputs = fixture.expected(aligned_outputs=output_offset == 0)
            assert fixture.run() == sorted_calls(expected)
            assert runtime.outputs == {index: made for index, made in enumerate(outputs) if made is not None}
    finally:
        fixture.close()


# What a table holds


def growing_plan(inputs: Any, outputs: Any, attrs: Any, device: Device) -> list[Launch]:
    n = inputs.x.shape[0]
    if n > 1000:
        raise Decline("more than 1000 rows")
    blocks = cdiv(n, 64 if n > 100 else 16)
    return [
        Launch(second_kernel, (blocks,), {"u_ptr": None, "y_ptr": outputs.y, "scratch_ptr": None, "a": n // attrs.by})
    ]


GROWING = Op(
    "growing",
    1,
    (Input("x"),),
    (Output("y"),),
    (Attr("by", "int", 1),),
    {"T": ("float16",)},
    lambda inputs, attrs: (Tensor("float16", inputs.x.shape),),
    growing_plan,
    lambda *_, **__: (),
    lambda *_: (),
)


@pytest.fixture
def growing():
    made = Fixture(GROWING, FakeRuntime(), {}, (True,))
    yield made
    made.close()


def test_a_growing_size_misses_only_where_a_guard_breaks(growing: Fixture) -> None:
    misses = []
    for n in [*range(1, 301), 50, 250]:
        growing.runtime.inputs = [((n, 8), 0x5000)]
        (call,) = growing.run()
        assert call == ("launch", "second_kernel", (2 * cdiv(n, 64 if n > 100 else 16), 1, 1), [0x10_0000_0000, n])
        misses.append(growing.hot.table.misses)
    assert [n for n in range(1, 301) if misses[n - 1] != (misses[n - 2] if n > 1 else 0)] == [1, 101]
    assert misses[-1] == 2


def test_what_no_guard_says_is_told_apart(growing: Fixture) -> None:
    for address, rank, misses in ((0x5000, 2, 1), (0x5001, 2, 2), (0x5000, 3, 3), (0x5010, 2, 3)):
        growing.runtime.inputs = [((7,) * rank, address)]
        assert len(growing.run()) == 1
        assert growing.hot.table.misses == misses


def test_a_table_is_bounded_and_forgets_the_least_recently_used() -> None:
    table = hot_path.Table(limit=3)
    growing = Fixture(GROWING, FakeRuntime(), {}, (True,))
    growing.hot.table, growing.hot._struct.table = table, table.address

    def misses(rank: int) -> int:
        growing.runtime.inputs = [((5,) * rank, 0x5000)]
        before = table.misses
        assert len(growing.run()) == 1
        return table.misses - before

    assert [misses(rank) for rank in (1, 2, 3, 1, 2, 3)] == [1, 1, 1, 0, 0, 0]
    assert misses(1) == 0
    assert [misses(rank) for rank in (4, 1, 3)] == [1, 0, 0]
    assert misses(2) == 1, "the least recently used was forgotten"
    growing.close()


def test_a_plan_may_be_forgotten_while_it_runs() -> None:
    """Four threads wait for each other while each has found its plan, in a table that has room for one."""
    table, together = hot_path.Table(limit=1), threading.Barrier(4, timeout=60)

    def output_address(index: int) -> int:
        together.wait()
        return 0x10_0000_0000

    fixtures = [Fixture(GROWING, FakeRuntime(output_address=output_address), {}, (True,)) for _ in range(4)]
    wrong: list[Any] = []

    def work(rank: int, fixture: Fixture) -> None:
        fixture.hot.table, fixture.hot._struct.table = table, table.address
        for n in range(1, 50):
            fixture.runtime.inputs = [((n,) * rank, 0x5000)]
            if fixture.run() != [("launch", "second_kernel", (2 * cdiv(n, 16), 1, 1), [0x10_0000_0000, n])]:
                wrong.append((rank, n))

    threads = [threading.Thread(target=work, args=(1 + index, fixtures[index])) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for fixture in fixtures:
        fixture.close()
    assert wrong == []
    assert table.misses > 100


def test_nodes_of_one_kind_share_a_table() -> None:
    kinds = [({}, (True,)), ({}, (True,)), ({"by": 2}, (True,))]
    first, second, other = (Fixture(GROWING, FakeRuntime(), *kind) for kind in kinds)
    tables = []
    for fixture in (first, second, other):
        fixture.hot.kernel.variant.address = 5
        tables.append(hot_path._table(fixture.hot.kernel))
        fixture.close()
    assert tables[0] is tables[1]
    assert tables[0] is not tables[2]


# What goes wrong


def test_errors_are_put_into_words_and_the_node_works_on(growing: Fixture) -> None:
    runtime, good = growing.runtime, [((5, 5), 0x5000)]

    def failed() -> str:
        (text,) = growing.run()
        assert text.startswith("test.random, node 'it': ")
        return text.removeprefix("test.random, node 'it': ")

    runtime.inputs = [((2000, 2), 0x5000)]
    assert failed() == "Decline: growing has no kernel for these inputs: more than 1000 rows"
    runtime.inputs = [((1,) * 33, 0x5000)]
    assert failed() == "ValueError: an input of rank 33, expected at most 32, and 128 for all inputs together"
    runtime.inputs = good
    growing.driver.code = 701
    assert failed() == "RuntimeError: the driver said 701"
    growing.driver.code = 0
    assert len(growing.run()) == 1
    address, runtime.output_address = runtime.output_address, lambda index: None
    assert failed() == "LookupError: output 0 is required, but the node has none"
    runtime.output_address = address
    assert len(growing.run()) == 1


def test_no_scratch_memory() -> None:
    fixture = Fixture(RANDOM, FakeRuntime(), {"seed": 3}, (True, True))
    fixture.runtime.inputs = [((40, 40), 0x5000), None]
    assert len(fixture.run()) > 1
    fixture.runtime.scratch_address = 0
    (text,) = run_without_check(fixture)
    assert "MemoryError: no " in text
    fixture.close()


def run_without_check(fixture: Fixture) -> list[str]:
    fixture.driver.calls.clear()
    status = fixture.compute(fixture.hot.address, 1)
    assert status
    return [fixture.runtime.statuses[status - 1]]


def dividing_plan(inputs: Any, outputs: Any, attrs: Any, device: Device) -> list[Launch]:
    a = 64 // inputs.x.shape[0]
    return [Launch(second_kernel, (1,), {"u_ptr": None, "y_ptr": outputs.y, "scratch_ptr": None, "a": a})]


def test_a_division_by_zero_is_an_error_and_no_crash() -> None:
    op = Op(
        "dividing", 1, GROWING.inputs, GROWING.outputs, GROWING.attrs, GROWING.types, GROWING.infer, dividing_plan,
        GROWING.reference, GROWING.body,
    )  # fmt: skip
    fixture = Fixture(op, FakeRuntime(), {}, (True,))
    fixture.runtime.inputs = [((4,), 0x5000)]
    assert len(fixture.run()) == 1
    fixture.runtime.inputs = [((0,), 0x5000)]
    (text,) = fixture.run()
    assert "ZeroDivisionError" in text or "divides by zero" in text
    fixture.close()


def test_plans_of_more_than_there_is_room_for_are_refused() -> None:
    def many(inputs: Any, outputs: Any, attrs: Any, device: Device) -> list[Launch]:
        args = {"u_ptr": None, "y_ptr": outputs.y, "a": 1}
        return [Launch(second_kernel, (1,), {**args, "scratch_ptr": Scratch("int8", 16)}) for _ in range(17)]

    op = Op(
        "many", 1, GROWING.inputs, GROWING.outputs, GROWING.attrs, GROWING.types, GROWING.infer, many,
        GROWING.reference, GROWING.body,
    )  # fmt: skip
    fixture = Fixture(op, FakeRuntime(), {}, (True,))
    fixture.runtime.inputs = [((4,), 0x5000)]
    (text,) = fixture.run()
    assert "MemoryError: no room for the plan" in text
    fixture.close()


def test_an_op_of_more_inputs_than_c_takes_runs_through_ctypes() -> None:
    inputs = tuple(Input(f"x{index}") for index in range(32))
    wide = Op(
        "wide", 1, inputs, GROWING.outputs, (), GROWING.types, infer, growing_plan, GROWING.reference, GROWING.body
    )
    assert hot_path.compute_address(wide) == 0
    assert hot_path.compute_address(GROWING) != 0
