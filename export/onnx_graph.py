"""Reading ONNX graphs in onnx_ir: what the file rules are written with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

_NAMES = {
    ir.DataType.FLOAT: "float32",
    ir.DataType.FLOAT16: "float16",
    ir.DataType.BFLOAT16: "bfloat16",
    ir.DataType.DOUBLE: "float64",
    ir.DataType.BOOL: "bool",
    ir.DataType.INT32: "int32",
    ir.DataType.INT64: "int64",
}


def made_by(value: ir.Value | None, *op_types: str) -> ir.Node | None:
    """The standard-domain node of one of these types that produces the value, else None."""
    node = value.producer() if value is not None else None
    standard = node is not None and node.domain in ("", "ai.onnx") and node.op_type in op_types
    return node if standard else None


def operand(node: ir.Node, index: int) -> ir.Value | None:
    """An input, None where it is absent."""
    return node.inputs[index] if index < len(node.inputs) else None


def attribute(node: ir.Node, name: str, default: Any) -> Any:
    found = node.attributes.get(name)
    return default if found is None else found.value


def constant(value: ir.Value | None) -> np.ndarray[Any, Any] | None:
    """The value where it is known without running the model: an initializer that no input overrides, or a Constant."""
    if value is None or value.is_graph_input():
        return None
    tensor = value.const_value
    if tensor is None:
        node = made_by(value, "Constant")
        attr = node.attributes.get("value") if node is not None else None
        tensor = attr.value if attr is not None else None
    return None if tensor is None else tensor.numpy()


def scalar(value: ir.Value | None) -> float | None:
    """A constant of one element, of any rank, as a float."""
    array = constant(value)
    return float(array.reshape(())) if array is not None and array.size == 1 and array.dtype.kind in "fiu" else None


def dtype_of(value: ir.Value) -> str:
    return _NAMES.get(value.dtype, str(value.dtype)) if value.dtype is not None else "unknown"


def dims(value: ir.Value | None) -> tuple[Any, ...] | None:
    """The shape: ints, names, or None for a dimension of which nothing is known; None where not even the rank is."""
    if value is None or value.shape is None:
        return None
    return tuple(dim if isinstance(dim, int) else dim.value for dim in value.shape)


def same(a: Any, b: Any) -> bool:
    """Provably equal dimensions: two unknown ones are not."""
    return a is not None and a == b


def same_dims(a: Sequence[Any] | None, b: Sequence[Any] | None) -> bool:
    return a is not None and b is not None and len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))


def readable(shape: Sequence[Any] | None) -> str:
    return "unknown" if shape is None else "[" + ", ".join("?" if d is None else str(d) for d in shape) + "]"


def permutation(node: ir.Node | None) -> list[int] | None:
    return list(attribute(node, "perm", [])) if node is not None else None


def replace_value(old: ir.Value, new: ir.Value) -> None:
    """Let everybody use `new`, which also takes the name of a graph output."""
    if old.is_graph_output():
        name, old.name = old.name, f"{old.name}_replaced"
        new.name = name
    if new.shape is None:
        new.shape = old.shape
    if new.dtype is None and old.dtype is not None:
        new.dtype = old.dtype
    ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)


class Inserter:
    """Adds nodes before a given one: `add = Inserter(before); y = add("Mul", a, b, dtype=..., shape=...)`."""

    def __init__(self, before: ir.Node) -> None:
        assert before.graph is not None
        self.graph, self.before = before.graph, before

    def node(self, op_type: str, inputs: Sequence[ir.Value | None], attributes: Any = (), **options: Any) -> ir.Node:
        node = ir.node(op_type, inputs, dict(attributes), **options)
        self.graph.insert_before(self.before, node)
        return node

    def __call__(
        self, op_type: str, *inputs: ir.Value | None, dtype: Any = None, shape: Any = None, **attributes: Any
    ) -> ir.Value:
        value = self.node(op_type, inputs, attributes).outputs[0]
        value.dtype = dtype
        value.shape = None if shape is None else ir.Shape(shape)
        return value

    def constant(self, array: np.ndarray[Any, Any]) -> ir.Value:
        tensor = ir.tensor(array)
        return self("Constant", dtype=tensor.dtype, shape=array.shape, value=tensor)
