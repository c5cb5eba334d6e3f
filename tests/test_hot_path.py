"""The C hot path against the Python path, argument by argument, on a stand-in for ONNX Runtime and for the driver."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import pytest
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st
from ort import hammered
from ort_stand_in import FakeRuntime, Node

from trimaran.kernels.contract import (
    Attr,
    Decline,
    Descriptor,
    Device,
    Divisible,
    Input,
    Launch,
    Op,
    Output,
    Scratch,
    Tensor,
)
from trimaran.kernels.sizes import cdiv, maximum, minimum
from trimaran.ort_ops import hot_path
from trimaran.ort_ops.native import native

pytestmark = pytest.mark.skipif(native().library is None, reason=native().how)


# Ops whose plans are random


@triton.jit
def first_kernel(x_ptr, x_desc, y_ptr, scratch_ptr, a, b, c, factor, BLOCK: tl.constexpr):
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
    described = Descriptor(x, (x.shape[0] + 1, n[0] + 1), (n[1] * 8, 1), (16, 64)) if x.aligned else None
    args = {
        "x_ptr": tail,
        "x_desc": described,
        "y_ptr": outputs.y,
        "scratch_ptr": scratch,
        "a": n[2],
        "b": Divisible(n[3]),
    }
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
)


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
    with Node(RANDOM, (True, second), runtime, seed=seed) as node:
        for shape in shapes:
            runtime.inputs = [(shape, 0x5000_0000 + offset), None if other is None else (other, 0x6000_0000)]
            runtime.outputs.clear()
            expected, outputs = node.expected(aligned_outputs=output_offset == 0)
            assert node.run() == sorted_calls(expected)
            assert runtime.outputs == {index: made for index, made in enumerate(outputs) if made is not None}


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
)


@pytest.fixture
def growing():
    with Node(GROWING) as node:
        yield node


def test_a_growing_size_misses_only_where_a_guard_breaks(growing: Node) -> None:
    misses = []
    for n in [*range(1, 301), 50, 250]:
        (call,) = growing.run(((n, 8), 0x5000))
        assert call == ("launch", "second_kernel", (2 * cdiv(n, 64 if n > 100 else 16), 1, 1), [0x10_0000_0000, n])
        misses.append(growing.hot.table.misses)
    assert [n for n in range(1, 301) if misses[n - 1] != (misses[n - 2] if n > 1 else 0)] == [1, 101]
    assert misses[-1] == 2


def test_what_no_guard_says_is_told_apart(growing: Node) -> None:
    for address, rank, misses in ((0x5000, 2, 1), (0x5001, 2, 2), (0x5000, 3, 3), (0x5010, 2, 3)):
        assert len(growing.run(((7,) * rank, address))) == 1
        assert growing.hot.table.misses == misses


def test_a_table_is_bounded_and_forgets_the_least_recently_used(growing: Node) -> None:
    table = hot_path.Table(limit=3)
    growing.use(table)

    def misses(rank: int) -> int:
        before = table.misses
        assert len(growing.run(((5,) * rank, 0x5000))) == 1
        return table.misses - before

    assert [misses(rank) for rank in (1, 2, 3, 1, 2, 3)] == [1, 1, 1, 0, 0, 0]
    assert misses(1) == 0
    assert [misses(rank) for rank in (4, 1, 3)] == [1, 0, 0]
    assert misses(2) == 1, "the least recently used was forgotten"


def test_a_plan_may_be_forgotten_while_it_runs() -> None:
    """Four threads wait for each other while each has found its plan, in a table that has room for one."""
    table, together = hot_path.Table(limit=1), threading.Barrier(4, timeout=60)

    def output_address(index: int) -> int:
        together.wait()
        return 0x10_0000_0000

    with ExitStack() as stack:
        nodes = [
            stack.enter_context(Node(GROWING, runtime=FakeRuntime(output_address=output_address))) for _ in range(4)
        ]
        for node in nodes:
            node.use(table)

        def right(turn: int) -> bool:
            thread, n = turn // 100, turn % 100 + 1
            launched = nodes[thread].run(((n,) * (1 + thread), 0x5000))
            return launched == [("launch", "second_kernel", (2 * cdiv(n, 16), 1, 1), [0x10_0000_0000, n])]

        assert hammered(right, threads=4, times=49) == []
    assert table.misses > 100


def test_nodes_of_one_kind_share_a_table() -> None:
    with Node(GROWING) as first, Node(GROWING) as second, Node(GROWING, by=2) as other:
        tables = []
        for node in (first, second, other):
            node.hot.kernel.variant.address = 5
            tables.append(hot_path._table(node.hot.kernel))
    assert tables[0] is tables[1]
    assert tables[0] is not tables[2]


# What goes wrong


def test_errors_are_put_into_words_and_the_node_works_on(growing: Node) -> None:
    runtime, good = growing.runtime, ((5, 5), 0x5000)
    reason = "Decline: growing has no kernel for these inputs: more than 1000 rows"
    assert growing.failure(((2000, 2), 0x5000)) == reason
    reason = "ValueError: an input of rank 33, expected at most 32, and 128 for all inputs together"
    assert growing.failure(((1,) * 33, 0x5000)) == reason
    growing.driver.code = 701
    assert growing.failure(good) == "RuntimeError: the driver said 701"
    growing.driver.code = 0
    assert len(growing.run(good)) == 1
    address, runtime.output_address = runtime.output_address, lambda index: None
    assert growing.failure() == "LookupError: output 0 is required, but the node has none"
    runtime.output_address = address
    assert len(growing.run()) == 1


def test_no_scratch_memory() -> None:
    with Node(RANDOM, (True, True), seed=3) as node:
        assert len(node.run(((40, 40), 0x5000), None)) > 1
        node.runtime.scratch_address = 0
        assert node.failure().startswith("MemoryError: no ")


def dividing_plan(inputs: Any, outputs: Any, attrs: Any, device: Device) -> list[Launch]:
    a = 64 // inputs.x.shape[0]
    return [Launch(second_kernel, (1,), {"u_ptr": None, "y_ptr": outputs.y, "scratch_ptr": None, "a": a})]


def test_a_division_by_zero_is_an_error_and_no_crash() -> None:
    with Node(replace(GROWING, name="dividing", plan=dividing_plan)) as node:
        assert len(node.run(((4,), 0x5000))) == 1
        text = node.failure(((0,), 0x5000))
        assert "ZeroDivisionError" in text or "divides by zero" in text


def test_plans_of_more_than_there_is_room_for_are_refused() -> None:
    def many(inputs: Any, outputs: Any, attrs: Any, device: Device) -> list[Launch]:
        args = {"u_ptr": None, "y_ptr": outputs.y, "a": 1}
        return [Launch(second_kernel, (1,), {**args, "scratch_ptr": Scratch("int8", 16)}) for _ in range(17)]

    with Node(replace(GROWING, name="many", plan=many)) as node:
        assert node.failure(((4,), 0x5000)).startswith("MemoryError: no room for the plan")


def test_an_op_of_more_inputs_than_c_takes_runs_through_ctypes() -> None:
    assert hot_path.compute_address(replace(GROWING, inputs=tuple(Input(f"x{index}") for index in range(32)))) == 0
    assert hot_path.compute_address(GROWING) != 0
