"""Traced sizes: the same code on ints and on Sizes, and guards that know when a trace no longer holds."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trimaran.kernels.sizes import (
    Size,
    Symbol,
    Trace,
    cdiv,
    contiguous_strides,
    differ,
    expression_of,
    maximum,
    minimum,
    power_of_2,
    product,
    python_source,
    value_of,
)

SIZES = st.lists(st.integers(0, 5000), min_size=3, max_size=3)


def formula(a, b, c):
    """Every operation that a plan may use."""
    blocks = cdiv(a + 3, 1 + b)
    return [
        blocks * c,
        (a * b + c) % 7,
        2 * a - b,
        minimum(a, b) + maximum(b, 17),
        (a * 6) // 4,
        100 - c,
        64 // (c + 1),
    ]


def decisions(a, b, c):
    """Every comparison that a plan may make."""
    return [power_of_2(a), power_of_2(b, least=16), a < b, a <= 7, c > b, c >= a, a == b, a != c, bool(c), b % 16 == 0]


def traced(values):
    trace = Trace()
    return trace, [trace.size(value) for value in values]


def evaluate(expression, values):
    return eval(python_source(expression), {"min": min, "max": max}, {"s": values})


@given(SIZES, SIZES)
def test_expressions_give_what_ints_give(today, tomorrow):
    trace, sizes = traced(today)
    results = formula(*sizes)
    assert [value_of(r) for r in results] == formula(*today)
    assert [evaluate(expression_of(r), tomorrow) for r in results] == formula(*tomorrow)
    assert not trace.guards, "arithmetic needs no guard"


def holds(trace, values):
    return all(evaluate(guard, values) is answer for guard, answer in trace.guards.items())


@given(SIZES, st.lists(st.integers(-2, 2), min_size=3, max_size=3))
def test_where_the_guards_hold_the_decisions_are_the_same(today, steps):
    trace, sizes = traced(today)
    assert decisions(*sizes) == decisions(*today)
    assert holds(trace, today)
    tomorrow = [max(0, size + step) for size, step in zip(today, steps, strict=True)]
    if holds(trace, tomorrow):
        assert decisions(*tomorrow) == decisions(*today)


def test_a_guard_breaks_where_its_decision_would_change():
    trace, (a,) = traced([60])
    assert power_of_2(a, least=16) == 64
    assert [holds(trace, [size]) for size in (32, 33, 64, 65)] == [False, True, True, False]


def test_int_pins_the_size():
    trace, (a,) = traced([40])
    assert int(a) == 40
    assert trace.guards == {("==", ("size", 0), 40): True}


def test_neutral_elements_leave_the_expression_as_it_is():
    _, (a,) = traced([5])
    assert expression_of((a * 1 + 0) // 1) == ("size", 0)
    assert isinstance(a * 0, int)


def test_a_size_is_no_key_of_a_dictionary():
    _, (a,) = traced([5])
    with pytest.raises(TypeError, match="unhashable"):
        hash(a)


def test_differ_is_false_unless_both_are_known():
    assert differ(2, 3)
    assert not differ(3, 3)
    assert not differ(Symbol("batch"), 3)
    assert not differ(Symbol("batch"), Symbol("sequence"))


def test_symbols_survive_only_what_keeps_them_equal():
    batch = Symbol("batch")
    assert (batch * 1 + 0) // 1 is batch
    assert repr(batch * 2) == "?"


def test_strides_and_product():
    assert contiguous_strides((2, 3, 4)) == (12, 4, 1)
    assert product(()) == 1
    _, (a, b) = traced([3, 4])
    strides = contiguous_strides((2, a, b))
    assert [value_of(s) for s in strides] == [12, 4, 1]
    assert isinstance(strides[0], Size)
