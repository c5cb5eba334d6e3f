"""The contract between kernel files and runtimes: plans, their cache, launches, and what is refused."""

from types import SimpleNamespace

import numpy as np
import pytest
import triton
import triton.language as tl

from trimaran.kernels.contract import (
    INTERPRETER,
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
from trimaran.kernels.execute import execute
from trimaran.kernels.interpreter import Interpreter
from trimaran.kernels.plans import OPTIONS, PlanCache, make_plan, sizes_of
from trimaran.kernels.sizes import cdiv, contiguous_strides

HOPPER = Device("cuda", 0, 90, 132, 227 * 1024)


@triton.jit
def count_kernel(x_ptr, counter_ptr, n, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    positive = tl.load(x_ptr + offsets, mask=offsets < n, other=0.0) > 0
    tl.atomic_add(counter_ptr, tl.sum(positive.to(tl.int32), axis=0))


@triton.jit
def scale_kernel(x_ptr, counter_ptr, y_ptr, n, stride, factor, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offsets * stride, mask=offsets < n, other=0.0)
    tl.store(y_ptr + offsets, x * factor + tl.load(counter_ptr).to(tl.float32), mask=offsets < n)


def infer(inputs, attrs):
    return (Tensor(inputs.x.dtype, (inputs.x.shape[0] // 2,)),)


def plan(inputs, outputs, attrs, device):
    """y = the second half of x * factor + how many of x are positive: two launches, zeroed scratch, an offset."""
    x = inputs.x
    n = x.shape[0]
    if n > 1000:
        raise Decline("more than 1000 elements")
    half = n // 2
    counter = Scratch("int32", 1, zero=True)
    tail = Tensor(x.dtype, (half,), x.strides, x.aligned, x.place, x.index, offset=half * x.strides[0])
    return [
        Launch(count_kernel, (cdiv(n, 64),), {"x_ptr": x, "counter_ptr": counter, "n": n}, {"BLOCK": 64}),
        Launch(
            scale_kernel,
            (cdiv(half, 64), 1),
            {
                "x_ptr": tail,
                "counter_ptr": counter,
                "y_ptr": outputs.y,
                "n": half,
                "stride": Divisible(x.strides[0]),
                "factor": attrs.factor,
            },
            {"BLOCK": 64},
            {"num_warps": 2},
        ),
    ]


OP = Op(
    "tail",
    1,
    (Input("x"), Input("unused", "int32", optional=True)),
    (Output("y"),),
    (Attr("factor", "float"), Attr("mode", "string", "a", choices=("a", "b"))),
    {"T": ("float32",)},
    infer,
    plan,
    lambda x, unused, **attrs: (x,),
    lambda g, inputs, attrs: (inputs.x,),
)
ATTRS = OP.attributes({"factor": 3})


def vector(n, **kwargs):
    return Tensor("float32", (n,), (1,), **kwargs)


def run(array, cache=None):
    tensor = Tensor("float32", array.shape, tuple(s // 4 for s in array.strides))
    found, values = (cache or PlanCache(OP)).find([tensor], ATTRS, INTERPRETER, (True,))
    work = found.evaluate(values)
    out = np.full(work.outputs[0], np.nan, np.float32)
    buffers = []

    def allocate(count):
        buffers.append(np.full(count, 255, np.uint8))
        return buffers[-1].ctypes.data

    execute(found, work, [array.ctypes.data], [out.ctypes.data], Interpreter(), allocate)
    return out


@pytest.mark.parametrize("n", [2, 7, 64, 200])
def test_launches_scratch_and_offsets(n):
    x = np.random.default_rng(n).standard_normal(n).astype(np.float32)
    expected = x[n // 2 :][: n // 2] * 3 + (x > 0).sum()
    np.testing.assert_allclose(run(x), expected, rtol=1e-6)


def test_a_launch_with_an_empty_grid_is_left_out():
    assert run(np.zeros(1, np.float32)).shape == (0,)


def test_one_plan_serves_every_size_its_guards_allow():
    cache = PlanCache(OP)
    for n in range(2, 400, 7):
        run(np.ones(n, np.float32), cache)
    assert cache.misses <= 2  # half * 4 bytes is a multiple of 16 or not
    cache.find([vector(2000)], ATTRS, INTERPRETER, (True,))
    assert cache.misses == 3


def test_a_declined_plan_says_why_and_is_kept():
    cache = PlanCache(OP)
    first, _ = cache.find([vector(2000)], ATTRS, HOPPER, (True,))
    second, _ = cache.find([vector(3000)], ATTRS, HOPPER, (True,))
    assert first.declined == "more than 1000 elements"
    assert second is first
    assert cache.find([vector(10)], ATTRS, HOPPER, (True,))[0].declined is None


@pytest.mark.parametrize(
    "change",
    [
        {"inputs": [vector(40), Tensor("int32", (1,), (1,))]},
        {"inputs": [vector(40, aligned=False)]},
        {"inputs": [vector(40, constant=True)]},
        {"attrs": OP.attributes({"factor": 4})},
        {"device": INTERPRETER},
        {"aligned": False},
    ],
)
def test_what_no_guard_can_say_is_part_of_the_key(change):
    cache = PlanCache(OP)

    forty = (vector(40),)

    def find(inputs=forty, attrs=ATTRS, device=HOPPER, aligned=True):
        return cache.find(list(inputs), attrs, device, (True,), aligned)[0]

    assert find() is find()
    assert find(**change) is not find()
    assert cache.misses == 2


def test_the_cache_is_bounded():
    cache = PlanCache(OP, limit=4)
    for factor in range(20):
        cache.find([vector(8)], OP.attributes({"factor": factor}), HOPPER, (True,))
    assert sum(len(plans) for plans in cache._plans.values()) == 4
    cache.find([vector(8)], OP.attributes({"factor": 19}), HOPPER, (True,))
    assert cache.misses == 20, "the newest are kept"


def test_parameters_say_type_and_divisibility():
    made = make_plan(OP, [Tensor("float32", (64,), (16,))], ATTRS, HOPPER, (True,))
    params = {param.name: param for param in made.launches[1].params}
    assert (params["x_ptr"].type, params["x_ptr"].divisible) == ("*fp32", True)
    assert params["x_ptr"].expression == ("*", ("//", ("size", 0), 2), ("size", 1))
    assert (params["stride"].type, params["stride"].divisible) == ("i32", True)
    assert (params["n"].type, params["n"].divisible) == ("i32", False), "only what the plan says is divisible is"
    assert (params["factor"].type, params["factor"].expression) == ("fp32", 3.0)
    assert made.launches[1].options == {**OPTIONS, "num_warps": 2}
    assert not make_plan(OP, [Tensor("float32", (64,), (3,))], ATTRS, HOPPER, (True,)).launches[1].params[4].divisible


def test_a_large_stride_is_passed_in_64_bits():
    small, large = (make_plan(OP, [Tensor("float32", (8,), (s,))], ATTRS, HOPPER, (True,)) for s in (1 << 30, 1 << 31))
    assert [p.launches[1].params[4].type for p in (small, large)] == ["i32", "i64"]
    assert not small.holds(sizes_of([Tensor("float32", (8,), (1 << 31,))]))


def test_an_unaligned_pointer_is_not_divisible():
    made = make_plan(OP, [vector(64, aligned=False)], ATTRS, HOPPER, (True,), aligned_outputs=False)
    pointers = {p.name: p.divisible for launch in made.launches for p in launch.params if p.place}
    assert pointers == {"x_ptr": False, "counter_ptr": True, "y_ptr": False}


def test_plans_evaluate_for_other_sizes():
    made = make_plan(OP, [vector(64)], ATTRS, HOPPER, (True,))
    work = made.evaluate(sizes_of([vector(512)]))
    assert work.outputs == ((256,),)
    assert work.scratch == (4,)
    assert [grid for grid, _ in work.launches] == [(8, 1, 1), (4, 1, 1)]
    assert contiguous_strides((256,)) == (1,)


@pytest.mark.parametrize(
    ("args", "constexprs", "message"),
    [
        ({"x_ptr": None, "counter_ptr": None}, {"BLOCK": 64}, r"missing arguments \['n'\]"),
        ({"x_ptr": None, "counter_ptr": None, "n": 1, "m": 2}, {"BLOCK": 64}, r"unknown arguments \['m'\]"),
    ],
)
def test_a_launch_knows_its_kernels_arguments(args, constexprs, message):
    with pytest.raises(ValueError, match=message):
        Launch(count_kernel, (1,), args, constexprs)


@pytest.mark.parametrize("value", [True, "text", np.float32(1.0)])
def test_a_launch_refuses_what_is_no_argument(value):
    def bad(inputs, outputs, attrs, device):
        return [Launch(count_kernel, (1,), {"x_ptr": inputs.x, "counter_ptr": None, "n": value}, {"BLOCK": 64})]

    op = Op("bad", 1, OP.inputs, OP.outputs, OP.attrs, OP.types, infer, bad, OP.reference, OP.body)
    with pytest.raises(TypeError, match="count_kernel: n is"):
        make_plan(op, [vector(8)], ATTRS, HOPPER, (True,))


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({}, ValueError, "tail: attribute factor is missing, expected a float"),
        ({"factor": "x"}, TypeError, "tail: factor is 'x', expected a float"),
        ({"factor": 1, "scale": 2}, ValueError, "tail: unknown attribute scale, expected factor, mode"),
        ({"factor": 1, "mode": "c"}, ValueError, "tail: mode is 'c', expected one of a, b"),
    ],
)
def test_attributes_are_checked(given, error, message):
    with pytest.raises(error, match=message):
        OP.attributes(given)


@pytest.mark.parametrize(
    ("inputs", "error", "message"),
    [
        ([None], ValueError, "tail: x is missing"),
        ([Tensor("float16", (4,), (1,))], TypeError, "tail: x is float16, expected float32"),
        ([vector(4), vector(4)], TypeError, "tail: unused is float32, expected int32"),
    ],
)
def test_inputs_are_checked(inputs, error, message):
    with pytest.raises(error, match=message):
        OP.infer_outputs(inputs, ATTRS)


def test_an_output_without_its_inputs_is_refused():
    def infer_nothing(inputs, attrs):
        return (None,)

    op = Op("none", 1, OP.inputs, OP.outputs, OP.attrs, OP.types, infer_nothing, plan, OP.reference, OP.body)
    with pytest.raises(ValueError, match="none: output y is asked for"):
        make_plan(op, [vector(8)], ATTRS, HOPPER, (True,))


def test_namespaces_fill_missing_inputs():
    assert OP.input_namespace([1]) == SimpleNamespace(x=1, unused=None)


# Descriptors


def described_plan(offset=0, shape=(32, 64), **facts):
    def plan(inputs, outputs, attrs, device):
        x = inputs.x
        start = Tensor(x.dtype, x.shape, x.strides, x.aligned, x.place, x.index, offset=offset * x.shape[0])
        rows = Descriptor(start, (x.shape[0] - 1, x.shape[1]), x.strides, (16, 64))
        return [Launch(described_kernel, (1,), {"x_desc": rows, "none_desc": None, "n": x.shape[0]})]

    op = Op("described", 1, (Input("x"),), (Output("y"),), (), {"T": ("float16",)}, infer, plan)
    return make_plan(op, [Tensor("float16", shape, (64, 1), **facts)], SimpleNamespace(), HOPPER, (True,))


@triton.jit
def described_kernel(x_desc, none_desc, n):
    pass


def test_a_descriptor_is_followed_by_its_shape_and_strides():
    plan = described_plan(offset=4)
    (launch,) = plan.launches
    assert [param.type for param in launch.params] == ["tensordesc<fp16[16, 64]>", "i32", "i32", "i64", "i64", "i32"]
    assert [param.rank for param in launch.params] == [2, 0, 0, 0, 0, 0]
    assert launch.constexprs["none_desc"] is None
    assert plan.evaluate((32, 64, 64, 1)).launches == (((1, 1, 1), (128, 31, 64, 64, 1, 32)),)
    assert plan.evaluate((40, 64, 64, 1)).launches == (((1, 1, 1), (160, 39, 64, 64, 1, 40)),)
    assert not plan.holds((33, 64, 64, 1)), "its offset would be no multiple of 16 bytes"


def test_a_descriptor_of_what_starts_anywhere_is_refused():
    with pytest.raises(ValueError, match="described_kernel: x_desc describes a tensor that may start anywhere"):
        described_plan(aligned=False)
    with pytest.raises(ValueError, match="expected a multiple of 16 bytes"):
        described_plan(offset=1, shape=(33, 64))
