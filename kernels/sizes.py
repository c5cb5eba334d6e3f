"""Sizes that remember how they were computed.

A plan is traced once and used for many shapes. While it is traced, each dimension and stride is a `Size`: an `int` of
today together with the expression it came from. Arithmetic extends the expression; a comparison is answered for today's
value and recorded as a guard; `int(size)` pins the size to its value. The expressions and guards of one trace therefore
tell, for any other sizes, whether the same plan holds and what its numbers are then. With plain ints the same code runs
unchanged and records nothing.

An expression is an int, `("size", i)` (the i-th traced size) or `(operator, left, right)`; `python_source` writes it as
Python, other readers (a C stack program, a bundle) walk the same tuples.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

Expression = Any  # int | ("size", int) | (str, Expression, Expression)

_ARITHMETIC: dict[str, Callable[[int, int], int]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "//": operator.floordiv,
    "%": operator.mod,
    "min": min,
    "max": max,
}
_COMPARISON: dict[str, Callable[[int, int], bool]] = {
    "==": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}


class Trace:
    """The sizes and guards of one trace.

    `guards` maps `(comparison, left, right)` to the answer that was given; a plan holds for other sizes as long as
    every guard still gets the same answer.
    """

    def __init__(self) -> None:
        self.values: list[int] = []
        self.guards: dict[tuple[str, Expression, Expression], bool] = {}

    def size(self, value: int) -> Size:
        """A new traced size that is `value` today."""
        self.values.append(int(value))
        return Size(("size", len(self.values) - 1), int(value), self)

    def ask(self, comparison: str, left: Size, right: Size | int) -> bool:
        answer = _COMPARISON[comparison](left.value, value_of(right))
        self.guards[comparison, left.expression, expression_of(right)] = answer
        return answer


class Size:
    """A non-negative int that records what is done with it. Made by `Trace.size`."""

    __slots__ = ("expression", "trace", "value")
    __hash__ = None  # type: ignore[assignment]  # as a key it would compare without a guard

    def __init__(self, expression: Expression, value: int, trace: Trace) -> None:
        self.expression, self.value, self.trace = expression, value, trace

    def combine(self, name: str, left: Any, right: Any) -> Any:
        if not all(isinstance(side, (int, Size)) for side in (left, right)):
            return NotImplemented
        expression = simplified(name, expression_of(left), expression_of(right))
        value = _ARITHMETIC[name](value_of(left), value_of(right))
        return Size(expression, value, self.trace) if isinstance(expression, tuple) else value

    def __add__(self, other: Any) -> Any:
        return self.combine("+", self, other)

    def __radd__(self, other: Any) -> Any:
        return self.combine("+", other, self)

    def __sub__(self, other: Any) -> Any:
        return self.combine("-", self, other)

    def __rsub__(self, other: Any) -> Any:
        return self.combine("-", other, self)

    def __mul__(self, other: Any) -> Any:
        return self.combine("*", self, other)

    def __rmul__(self, other: Any) -> Any:
        return self.combine("*", other, self)

    def __floordiv__(self, other: Any) -> Any:
        return self.combine("//", self, other)

    def __rfloordiv__(self, other: Any) -> Any:
        return self.combine("//", other, self)

    def __mod__(self, other: Any) -> Any:
        return self.combine("%", self, other)

    def __rmod__(self, other: Any) -> Any:
        return self.combine("%", other, self)

    def __eq__(self, other: object) -> bool:
        return self.trace.ask("==", self, other) if isinstance(other, (int, Size)) else NotImplemented

    def __ne__(self, other: object) -> bool:
        return self.trace.ask("!=", self, other) if isinstance(other, (int, Size)) else NotImplemented

    def __lt__(self, other: Size | int) -> bool:
        return self.trace.ask("<", self, other)

    def __le__(self, other: Size | int) -> bool:
        return self.trace.ask("<=", self, other)

    def __gt__(self, other: Size | int) -> bool:
        return self.trace.ask(">", self, other)

    def __ge__(self, other: Size | int) -> bool:
        return self.trace.ask(">=", self, other)

    def __bool__(self) -> bool:
        return self.trace.ask("!=", self, 0)

    def __index__(self) -> int:
        self.trace.ask("==", self, self.value)
        return self.value

    __int__ = __index__

    def __repr__(self) -> str:
        return f"Size({python_source(self.expression)} = {self.value})"


class Symbol:
    """A dimension known only by name, as ONNX has them; `name=None` is a dimension of which nothing is known."""

    def __init__(self, name: str | None = None) -> None:
        self.name = name

    def _computed(self, neutral: int, other: Any) -> Symbol:
        return self if isinstance(other, int) and other == neutral else Symbol()

    def __add__(self, other: Any) -> Symbol:
        return self._computed(0, other)

    def __mul__(self, other: Any) -> Symbol:
        return self._computed(1, other)

    def __floordiv__(self, other: Any) -> Symbol:
        return self._computed(1, other)

    def __mod__(self, other: Any) -> Symbol:
        return Symbol()

    __radd__, __rmul__, __sub__ = __add__, __mul__, __add__

    def __repr__(self) -> str:
        return self.name or "?"


def value_of(size: Size | int) -> int:
    """Today's value, without a guard: for messages."""
    return size.value if isinstance(size, Size) else size


def expression_of(size: Size | int) -> Expression:
    return size.expression if isinstance(size, Size) else int(size)


def differ(a: Any, b: Any) -> bool:
    """True where both dimensions are known and are not equal.

    The only comparison that `infer` may make: a torch SymInt or an ONNX symbol is not known, and asking it would
    specialize the graph. Everything is compared again when a plan is made from real sizes.
    """
    return known(a) and known(b) and a != b


def known(size: Any) -> bool:
    """True for an int or a traced size, False for a SymInt or a symbol."""
    return isinstance(size, (int, Size))


def cdiv(a: Any, b: Any) -> Any:
    """a / b, rounded up."""
    return (a + (b - 1)) // b


def minimum(a: Any, b: Any) -> Any:
    """The smaller of two sizes as an expression, without a guard."""
    return _traced("min", a, b)


def maximum(a: Any, b: Any) -> Any:
    """The larger of two sizes as an expression, without a guard."""
    return _traced("max", a, b)


def power_of_2(size: Size | int, least: int = 1) -> int:
    """The smallest power of two that is not less than `size` nor `least`, made of comparisons."""
    power = least
    while power < size:
        power *= 2
    return power


def product(sizes: Sequence[Any]) -> Any:
    result: Any = 1
    for size in sizes:
        result = result * size
    return result


def contiguous_strides(shape: Sequence[Any]) -> tuple[Any, ...]:
    """Strides in elements of a contiguous tensor of this shape."""
    return tuple(product(shape[axis + 1 :]) for axis in range(len(shape)))


def python_source(expression: Expression) -> str:
    """The expression as Python source over a sequence `s` of the traced sizes."""
    if isinstance(expression, int):
        return str(expression)
    if expression[0] == "size":
        return f"s[{expression[1]}]"
    name, left, right = expression[0], python_source(expression[1]), python_source(expression[2])
    return f"{name}({left}, {right})" if name in ("min", "max") else f"({left} {name} {right})"


def _traced(name: str, a: Any, b: Any) -> Any:
    traced = a if isinstance(a, Size) else b
    return traced.combine(name, a, b) if isinstance(traced, Size) else _ARITHMETIC[name](a, b)


def simplified(name: str, left: Expression, right: Expression) -> Expression:
    """Folds constants and neutral elements, so that equal sizes often have equal expressions."""
    if isinstance(left, int) and isinstance(right, int):
        return _ARITHMETIC[name](left, right)
    if right == {"+": 0, "-": 0, "*": 1, "//": 1}.get(name, ()):
        return left
    if left == {"+": 0, "*": 1}.get(name, ()):
        return right
    if name == "*" and 0 in (left, right):
        return 0
    return name, left, right
