"""Elementwise arithmetic as polynomials: every way to write one formula becomes one.

`0.5 * (x * (1 + erf(x / 1.414)))`, `x * (0.5 + 0.5 * erf(0.707 * x))` and the other twenty spellings of GELU have the
same expansion. A polynomial is `{monomial: coefficient}`; a monomial is a sorted tuple of (atom, power). Atoms are
values, and functions of polynomials: the mean over the last axis, erf, tanh, sigmoid, the inverse square root.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import onnx_ir as ir

from trimaran.export.onnx_graph import RESHAPES, dtype_of, last_axis, made_by, scalar, source, uncast
from trimaran.export.shapes import STANDARD, attr, dims, given

Atom: TypeAlias = Any
Polynomial: TypeAlias = dict[tuple[tuple[Atom, int], ...], float]
MOST_TERMS = 24
FLOATS = ("float32", "float16", "bfloat16", "float64")
MEANS = ("ReduceMean", "ReduceSum", "ReduceSumSquare", "GlobalAveragePool")
CURVES = ("Erf", "Tanh", "Sigmoid", "Exp")
ARITHMETIC = ("Add", "Sub", "Mul", "Div", "Neg", "Pow", "Sqrt", "Reciprocal", "Cast", "Max", "Relu", *MEANS, *CURVES)


@dataclass(frozen=True)
class Function:
    """A function of a polynomial, as an atom: erf, tanh, sigmoid, exp, root (the inverse square root), mean."""

    name: str
    argument: frozenset[Any]

    def of(self) -> Polynomial:
        return dict(self.argument)


def key(atom: Atom) -> tuple[str, int]:
    return type(atom).__name__, id(atom) if not isinstance(atom, (Function, str)) else hash(atom)


def variable(atom: Atom, power: int = 1) -> Polynomial:
    return {((atom, power),): 1.0}


def number(value: float) -> Polynomial:
    return {(): value} if value else {}


def add(a: Polynomial, b: Polynomial, factor: float = 1.0) -> Polynomial:
    total = dict(a)
    for monomial, coefficient in b.items():
        total[monomial] = total.get(monomial, 0.0) + factor * coefficient
    largest = max((abs(c) for c in (*a.values(), *b.values())), default=0.0)
    return {m: c for m, c in total.items() if abs(c) > 1e-7 * largest}


def multiply(a: Polynomial, b: Polynomial) -> Polynomial:
    total: Polynomial = {}
    for left, one in a.items():
        for right, other in b.items():
            powers = dict(left)
            for atom, power in right:
                powers[atom] = powers.get(atom, 0) + power
            monomial = tuple(sorted(((x, n) for x, n in powers.items() if n), key=lambda pair: key(pair[0])))
            total[monomial] = total.get(monomial, 0.0) + one * other
    return {m: c for m, c in total.items() if c}


def close(a: Polynomial, b: Polynomial, tolerance: float = 2e-3) -> bool:
    """Equal, up to how constants are rounded in 16 bits."""
    return a.keys() == b.keys() and all(math.isclose(a[m], b[m], rel_tol=tolerance) for m in a)


def inverse(p: Polynomial) -> Polynomial | None:
    """1 / p: of one term, or of 1 + exp(a), a sigmoid."""
    if len(p) == 1:
        ((monomial, coefficient),) = p.items()
        return {tuple((atom, -power) for atom, power in monomial): 1.0 / coefficient} if coefficient else None
    for monomial in p:
        if len(p) == 2 and math.isclose(p.get((), 0.0), 1.0) and len(monomial) == 1 and p[monomial] == 1.0:
            ((atom, power),) = monomial
            if isinstance(atom, Function) and atom.name == "exp" and power in (1, -1):
                return variable(function("sigmoid", scaled(atom.of(), -float(power))))
    return None


def is_variance(p: Polynomial) -> bool:
    """Whether it is never negative but by rounding: the mean of squares, perhaps less the square of the mean."""
    square, mean = (("square", 1),), (("mean", 2),)
    return p.keys() <= {square, mean} and p.get(square, 0.0) > 0.0 and abs(p.get(mean, -p[square]) + p[square]) < 1e-6


def scaled(p: Polynomial, factor: float) -> Polynomial:
    return {m: c * factor for m, c in p.items() if c * factor}


def function(name: str, argument: Polynomial) -> Function:
    return Function(name, frozenset((m, float(f"{c:.4g}")) for m, c in argument.items()))


@dataclass
class Expansion:
    """Expands values down to atoms. x: a value that stays one, for which means over its last axis are known symbols,
    "mean" and "square" (of x, and of x^2). others: more values that stay atoms, however they are computed."""

    x: ir.Value | None = None
    others: Collection[ir.Value] = ()
    known: dict[ir.Value, Polynomial | None] = field(default_factory=dict)
    roots: dict[Function, Polynomial] = field(default_factory=dict)  # what is under each root, in full precision

    def of(self, value: ir.Value | None, depth: int = 16) -> Polynomial | None:
        """The polynomial, None where one would be too long."""
        value = source(value)
        if value is None:
            return None
        if value not in self.known:
            found = self._expanded(uncast(value), depth)
            self.known[value] = found if found is None or len(found) <= MOST_TERMS else None
        return self.known[value]

    def _expanded(self, value: ir.Value, depth: int) -> Polynomial | None:
        if value is self.x or value in self.others:
            return variable(value)
        if (known := scalar(value)) is not None:
            return number(known)
        node = value.producer()
        if node is not None and node.op_type == "Expand" and node.domain in STANDARD and depth:
            return self.of(node.inputs[0], depth - 1)  # as what it is added to or multiplied with does
        if node is not None and node.op_type in RESHAPES:
            node = kept_axis(node)
        if node is None or node.domain not in STANDARD or node.op_type not in ARITHMETIC or not depth:
            return variable(value)
        if dtype_of(value) not in FLOATS or (
            node.op_type in MEANS and len(dims(value) or ()) != len(dims(self.x) or ())
        ):
            return variable(value)
        return self._node(node, depth) or variable(value)

    def _node(self, node: ir.Node, depth: int) -> Polynomial | None:
        op = node.op_type
        parts = [
            self.of(part, depth - 1)
            for part in node.inputs[: 2 if op in ("Add", "Sub", "Mul", "Div", "Pow", "Max") else 1]
        ]
        if any(part is None for part in parts):
            return None
        a: Polynomial = parts[0] or {}
        b: Polynomial = (parts[1] or {}) if len(parts) > 1 else {}
        if op in ("Add", "Sub"):
            return add(a, b, 1.0 if op == "Add" else -1.0)
        if op == "Mul":
            return multiply(a, b) if len(a) * len(b) <= 2 * MOST_TERMS else None
        if op == "Div":
            below = inverse(b)
            return None if below is None else multiply(a, below)
        if op == "Neg":
            return scaled(a, -1.0)
        if op == "Reciprocal":
            return inverse(a)
        if op == "Pow":
            return self._power(a, b)
        if op == "Sqrt":
            return inverse(self._root(a))
        if op in CURVES:
            return variable(function(op.lower(), a))
        if op in ("Max", "Relu"):
            return a if is_variance(a) and not b else b if is_variance(b) and not a else None
        if op == "Cast":
            return a  # a narrowing one: rules ask for casts where they matter
        return self._mean(node, a) if op.startswith("Reduce") or op == "GlobalAveragePool" else None

    def _power(self, a: Polynomial, exponent: Polynomial) -> Polynomial | None:
        if {*exponent} > {()} or (exponent and () not in exponent):
            return None
        power = exponent.get((), 0.0)
        if power == -0.5:
            return self._root(a)
        if power == 0.5:
            return inverse(self._root(a))
        if power != int(power) or not 1 <= power <= 4 or len(a) > 4:
            return None
        total = a
        for _ in range(int(power) - 1):
            total = multiply(total, a)
        return total

    def _root(self, a: Polynomial) -> Polynomial:
        atom = function("root", a)
        self.roots[atom] = a
        return variable(atom)

    def _mean(self, node: ir.Node, a: Polynomial) -> Polynomial | None:
        """The mean over the last axis, kept with size 1."""
        shape = dims(node.inputs[0])
        axes = [-1] if node.op_type == "GlobalAveragePool" else given(node, "axes", 1)
        whole = shape is not None and (node.op_type != "GlobalAveragePool" or len(shape) == 3)
        if self.x is None or shape is None or not whole or axes is None or len(axes) != 1:
            return None
        if not last_axis(node, axes[0], len(shape)):
            return None
        width = shape[-1]
        if node.op_type == "ReduceSumSquare":
            a = multiply(a, a)
        elif node.op_type not in ("ReduceMean", "GlobalAveragePool", "ReduceSum"):
            return None
        mean = self._expectation(a)
        if mean is None or node.op_type in ("ReduceMean", "GlobalAveragePool"):
            return mean
        return scaled(mean, float(width)) if isinstance(width, int) else None

    def _expectation(self, a: Polynomial) -> Polynomial | None:
        total: Polynomial = {}
        for monomial, coefficient in a.items():
            powers = dict(monomial)
            degree = powers.pop(self.x, 0)
            if degree not in (0, 1, 2) or any(not isinstance(atom, (str, Function)) for atom in powers):
                return None  # a mean of a product with something else of the row
            rest = tuple(powers.items())
            term = number(1.0) if degree == 0 else variable("mean" if degree == 1 else "square")
            total = add(total, multiply({rest: coefficient}, term))
        return total


def kept_axis(view: ir.Node) -> ir.Node | None:
    """The mean that lost its axis, of which a view gives it back with size 1."""
    mean = made_by(view.inputs[0], *MEANS)
    if mean is None or attr(mean, "keepdims", 1) or mean.op_type == "GlobalAveragePool":
        return None
    lost = dims(mean.outputs[0])
    return mean if lost is not None and dims(view.outputs[0]) == (*lost, 1) else None
