"""Activations, as one operator or written out: read backwards, from the last operation to what is activated."""

from __future__ import annotations

import math
from typing import Any

from torch.fx import Node

from trimaran.torch_path.graph import aten, called, is_tensor, literal

ACTIVATION_ANCHORS = (aten.relu.default, aten.gelu.default, aten.silu.default, aten.tanh.default, aten.mul.Tensor)
_WHOLE = {aten.relu.default: "relu", aten.silu.default: "silu", aten.tanh.default: "tanh"}


def activation_of(node: Any) -> tuple[str, Node] | None:
    """(name, what is activated) where the node is an activation, None where it is anything else."""
    if called(node, *_WHOLE):
        return _WHOLE[node.target], node.args[0]
    if called(node, aten.gelu.default):
        exact = node.kwargs.get("approximate", "none") == "none"
        return ("gelu" if exact else "gelu_tanh"), node.args[0]
    if not called(node, aten.mul.Tensor) or not all(map(is_tensor, node.args)):
        return None
    for one, other in (node.args, node.args[::-1]):
        found = _sigmoid(one, other) or _gelu(one, other)
        if found is not None:
            return found, (one if found in ("silu", "quick_gelu") else _times(one, 0.5) or one)
    return None


def _sigmoid(x: Node, gate: Node) -> str | None:
    """x * sigmoid(x), x * sigmoid(1.702 x)"""
    if not called(gate, aten.sigmoid.default):
        return None
    return "silu" if gate.args[0] is x else "quick_gelu" if _times(gate.args[0], 1.702) is x else None


def _gelu(half: Node, gate: Node) -> str | None:
    """(x / 2) * (1 + erf(x / sqrt 2)), or with the tanh that is near it"""
    x, inner = _times(half, 0.5), _plus(gate, 1.0)
    if x is None or inner is None:
        return None
    if called(inner, aten.erf.default):
        return "gelu" if _times(inner.args[0], math.sqrt(0.5)) is x else None
    cubic = _times(inner.args[0], math.sqrt(2 / math.pi)) if called(inner, aten.tanh.default) else None
    if not called(cubic, aten.add.Tensor):
        return None
    for one, other in (cubic.args, cubic.args[::-1]):  # type: ignore[union-attr]
        power = _times(other, 0.044715)
        if one is x and called(power, aten.pow.Tensor_Scalar) and power.args == (x, 3):  # type: ignore[union-attr]
            return "gelu_tanh"
    return None


def _times(node: Any, factor: float) -> Node | None:
    """x of x * factor or x / (1 / factor)"""
    if not called(node, aten.mul.Tensor, aten.div.Tensor):
        return None
    for x, by in (node.args, node.args[::-1]):
        known = literal(by) if is_tensor(x) else None
        if known and called(node, aten.div.Tensor):
            known = 1 / known if x is node.args[0] else None
        if known is not None and math.isclose(known, factor, rel_tol=1e-5):
            return x  # type: ignore[no-any-return]
    return None


def _plus(node: Any, number: float) -> Node | None:
    """x of x + number"""
    if not called(node, aten.add.Tensor) or node.kwargs:
        return None
    return next((x for x, by in (node.args, node.args[::-1]) if is_tensor(x) and literal(by) == number), None)
