"""Activations, as one operator or written out in any way: read backwards, from the last operation to what is
activated."""

from __future__ import annotations

import math
from typing import Any

import onnx_ir as ir

from trimaran.export.algebra import ARITHMETIC, CURVES, Expansion, Function, Polynomial, add, close, scaled, variable
from trimaran.export.onnx_graph import attribute, dtype_of, made_by, operand, source, standard, uncast
from trimaran.export.shapes import STANDARD

ACTIVATION_ANCHORS = ("Relu", "Gelu", "Tanh", "Mul", "Div", "Cast", "FastGelu", "QuickGelu", "BiasGelu", "Swish")
NEAR = 8  # nodes between an activation's end and what it activates


def activation_of(value: ir.Value | None) -> tuple[str, ir.Value, ir.Value | None] | None:
    """(name, what is activated, a bias that is added to that first), None where the value is no activation."""
    value = source(value)
    node = value.producer() if value is not None else None
    if node is None or value is None or not node.inputs or node.inputs[0] is None:
        return None
    whole = _whole(node)
    if whole is not None:
        return whole, source(node.inputs[0]), operand(node, 1)  # type: ignore[return-value]
    if not standard(node, "Mul", "Div", "Cast") or dtype_of(value) not in ("float32", "float16", "bfloat16"):
        return None
    for x in candidates(node, NEAR):
        name = curve_of(Expansion(others=(x,)).of(value), x)
        if name is not None and dtype_of(x) == dtype_of(value):
            return name, x, None
    return None


def _whole(node: ir.Node) -> str | None:
    if node.domain == "com.microsoft":
        if node.op_type == "QuickGelu":
            alpha = attribute(node, "alpha", 1.702)
            return "quick_gelu" if math.isclose(alpha, 1.702, rel_tol=1e-4) else "silu" if alpha == 1.0 else None
        return {"FastGelu": "gelu_tanh", "BiasGelu": "gelu", "Gelu": "gelu"}.get(node.op_type)
    if node.domain not in STANDARD:
        return None
    if node.op_type == "Gelu":
        exact = attribute(node, "approximate", "none") in ("none", b"none")
        return "gelu" if exact else "gelu_tanh"
    if node.op_type == "Swish":
        return "silu" if attribute(node, "alpha", 1.0) == 1.0 else None
    return {"Relu": "relu", "Tanh": "tanh"}.get(node.op_type)


def candidates(node: ir.Node, depth: int) -> list[ir.Value]:
    """What may be activated: what erf, tanh, sigmoid or exp are taken of, or what that is computed from."""
    found: dict[ir.Value, None] = {}
    curve = node.op_type in CURVES
    for part in node.inputs:
        inner = made_by(part, *ARITHMETIC)
        if part is None:
            continue
        if curve:
            found |= dict.fromkeys(arguments(part))
        elif inner is not None and depth:
            found |= dict.fromkeys(candidates(inner, depth - 1))
    return list(found)


def arguments(value: ir.Value, depth: int = 5) -> list[ir.Value]:
    """The value and what it is computed from, nearest last: (x, 0.044715 x^3, ...)"""
    plain = uncast(value)
    node = made_by(plain, "Mul", "Div", "Add", "Pow", "Neg", "Cast")
    inner = (
        [x for part in node.inputs if part is not None for x in arguments(part, depth - 1)] if node and depth else []
    )
    return [*inner, plain]


def curve_of(p: Polynomial | None, x: ir.Value) -> str | None:
    """The activation of x that a polynomial is."""
    if not p or len(p) > 2:
        return None
    gates = [(m, c) for m, c in p.items() if any(isinstance(atom, Function) for atom, _ in m)]
    if len(gates) != 1:
        return None
    monomial, coefficient = gates[0]
    powers: dict[Any, int] = dict(monomial)
    if powers.pop(x, 0) != 1 or len(powers) != 1 or [*powers.values()] != [1]:
        return None
    gate: Function = next(iter(powers))
    inner, alone = gate.of(), p.get(((x, 1),), 0.0)
    if gate.name == "sigmoid" and len(p) == 1 and math.isclose(coefficient, 1.0, rel_tol=1e-3):
        return (
            "silu" if close(inner, variable(x)) else "quick_gelu" if close(inner, scaled(variable(x), 1.702)) else None
        )
    if not (math.isclose(alone, 0.5, rel_tol=2e-3) and math.isclose(coefficient, 0.5, rel_tol=2e-3)):
        return None
    if gate.name == "erf":
        return "gelu" if close(inner, scaled(variable(x), math.sqrt(0.5))) else None
    cubic = scaled(add(variable(x), variable(x, 3), 0.044715), math.sqrt(2 / math.pi))
    return "gelu_tanh" if gate.name == "tanh" and close(inner, cubic) else None
