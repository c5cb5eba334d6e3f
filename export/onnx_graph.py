"""Reading and editing ONNX graphs in onnx_ir: what the file rules are written with.

Rules see a canonical view: what changes nothing (Identity, a Dropout that is off, a Cast or Reshape to what the value
is already) is looked through in both directions, and a constant is one whether it is an initializer, a Constant node,
or computed from such and from known sizes. The graph itself stays as it is until a rule replaces something.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from trimaran.export.shapes import STANDARD, attr, fixed, note, numbers, slice_arguments, typed
from trimaran.export.shapes import dims as dims

_NAMES = {
    ir.DataType.FLOAT: "float32",
    ir.DataType.FLOAT16: "float16",
    ir.DataType.BFLOAT16: "bfloat16",
    ir.DataType.DOUBLE: "float64",
    ir.DataType.BOOL: "bool",
    ir.DataType.INT32: "int32",
    ir.DataType.INT64: "int64",
}
WIDTH = {"float16": 1, "bfloat16": 1, "float32": 2, "float64": 3}
MOST_FOLDED = 4096  # elements of a constant that is computed while reading
_FOLDED: dict[str, Callable[..., Any]] = {
    "Add": np.add,
    "Sub": np.subtract,
    "Mul": np.multiply,
    "Div": np.divide,
    "Pow": np.power,
    "Sqrt": np.sqrt,
    "Neg": np.negative,
    "Reciprocal": np.reciprocal,
    "Identity": lambda x: x,
    "Not": np.logical_not,
    "Greater": np.greater,
    "GreaterOrEqual": np.greater_equal,
    "Less": np.less,
    "LessOrEqual": np.less_equal,
    "Equal": np.equal,
}
RESHAPES = ("Reshape", "Squeeze", "Unsqueeze", "Flatten")
MOST_VIEWS = 8  # one after the other
attribute = attr


def source(value: ir.Value | None) -> ir.Value | None:
    """The value before nodes that change nothing."""
    while value is not None and (node := value.producer()) is not None:
        if changes_nothing(node):
            value = node.inputs[0]
        elif (before := back_and_forth(node) or decided(node)) is not None:
            value = before
        else:
            break
    return value


def back_and_forth(node: ir.Node) -> ir.Value | None:
    """What a view gives the shape back that it had before others."""
    if not is_view(node):
        return None
    shape, before = dims(node.outputs[0]), node.inputs[0]
    for _ in range(MOST_VIEWS):
        maker = before.producer() if before is not None else None
        if shape is None or maker is None or not (is_view(maker) or changes_nothing(maker)):
            return None
        before = maker.inputs[0]
        if dims(before) == shape:
            return before
    return None


def decided(node: ir.Node) -> ir.Value | None:
    """What a Where takes whose condition is known."""
    if node.op_type != "Where" or node.domain not in STANDARD or len(node.inputs) != 3:
        return None
    condition = constant(node.inputs[0], 3)
    if condition is None or condition.size == 0 or condition.dtype != bool or condition.min() != condition.max():
        return None
    taken = node.inputs[1 if condition.flat[0] else 2]
    shape = dims(taken)
    return taken if shape is not None and shape == dims(node.outputs[0]) else None


def is_view(node: ir.Node) -> bool:
    """Whether it gives its elements another shape and leaves them in their order."""
    if node.domain not in STANDARD or not node.inputs or node.inputs[0] is None:
        return False
    if node.op_type == "Transpose":
        shape, order = dims(node.inputs[0]), attr(node, "perm", None)
        long = [axis for axis in order or () if shape is None or axis >= len(shape) or shape[axis] != 1]
        return order is not None and long == sorted(long)
    return node.op_type in RESHAPES


def views_back(value: ir.Value | None) -> Iterator[ir.Value]:
    """The value, and what it is a view of, one after the other."""
    for _ in range(MOST_VIEWS):
        value = source(value)
        if value is None:
            return
        yield value
        node = value.producer()
        if node is None or not is_view(node):
            return
        value = node.inputs[0]


def changes_nothing(node: ir.Node) -> bool:
    if node.domain not in STANDARD or not node.inputs or node.inputs[0] is None:
        return False
    if node.op_type in ("Identity", "Dropout"):
        training = node.inputs[2] if len(node.inputs) > 2 else None
        used = any(out.uses() or out.is_graph_output() for out in node.outputs[1:])
        off = constant(training)
        return not used and (training is None or (off is not None and not off.any()))
    if node.op_type in ("Cast", "CastLike"):
        return node.inputs[0].dtype is not None and node.inputs[0].dtype == node.outputs[0].dtype
    if node.op_type in (*RESHAPES, "Expand"):
        before = dims(node.inputs[0])
        return before is not None and before == dims(node.outputs[0])
    if node.op_type == "Slice":
        bounds, before = slice_arguments(node), dims(node.inputs[0])
        whole = bounds is not None and all(step == 1 for _, _, step in bounds.values())
        return whole and before is not None and before == dims(node.outputs[0])
    if node.op_type == "Transpose":
        order = attr(node, "perm", None)
        return order is not None and list(order) == list(range(len(order)))
    return False


def made_by(value: ir.Value | None, *op_types: str, domain: str = "") -> ir.Node | None:
    """The node of one of these types that produces the value, else None."""
    value = source(value)
    node = value.producer() if value is not None else None
    if node is None or node.op_type not in op_types:
        return None
    return node if node.domain == domain or (domain == "" and node.domain in STANDARD) else None


def standard(node: ir.Node, *op_types: str) -> bool:
    return node.domain in STANDARD and node.op_type in op_types


def users(value: ir.Value) -> list[ir.Node]:
    """The nodes that use the value, those that change nothing looked through; each as often as it does. Who asks for
    the shape alone is none: exporters do, to write a Reshape that goes with what is replaced."""
    found = []
    for use in value.uses():
        if standard(use.node, "Shape"):
            continue
        if changes_nothing(use.node) and not use.node.outputs[0].is_graph_output():
            found += users(use.node.outputs[0])
        else:
            found.append(use.node)
    return found


def only_user(value: ir.Value, *op_types: str, domain: str = "") -> ir.Node | None:
    """The node that alone uses the value, where it is of one of these types, in the graph that makes the value (not in
    a body within it, which may run often or never), and nothing else sees the value."""
    found = users(value)
    if len({*found}) != 1 or value.is_graph_output():
        return None
    node, maker = found[0], value.producer()
    if maker is not None and maker.graph is not node.graph:
        return None
    return node if node.op_type in op_types and (node.domain or "ai.onnx") == (domain or "ai.onnx") else None


def used(value: ir.Value) -> bool:
    return bool(value.uses()) or value.is_graph_output()


def operand(node: ir.Node, index: int) -> ir.Value | None:
    """An input, None where it is absent."""
    return node.inputs[index] if index < len(node.inputs) else None


def sides(node: ir.Node | None) -> Iterator[tuple[ir.Value, ir.Value]]:
    """The two operands of a commutative node, in both orders."""
    if node is not None and len(node.inputs) == 2 and node.inputs[0] is not None and node.inputs[1] is not None:
        yield node.inputs[0], node.inputs[1]
        yield node.inputs[1], node.inputs[0]


def is_same(a: ir.Value | None, b: ir.Value | None) -> bool:
    return a is not None and source(a) is source(b)


def alike(a: ir.Value | None, b: ir.Value | None, depth: int = 8) -> bool:
    """The same value, or computed in the same way from the same values."""
    a, b = source(a), source(b)
    if a is b:
        return True
    one, other = (value.producer() if value is not None else None for value in (a, b))
    if one is None or other is None or not depth or len(one.inputs) != len(other.inputs):
        first, second = constant(a), constant(b)
        known = first is not None and second is not None and first.dtype == second.dtype
        return known and np.array_equal(first, second)  # type: ignore[arg-type]
    same_kind = (one.op_identifier(), one.attributes) == (other.op_identifier(), other.attributes)
    same_place = [*one.outputs].index(a) == [*other.outputs].index(b)  # type: ignore[arg-type]
    pairs = zip(one.inputs, other.inputs, strict=True)
    return same_kind and same_place and all(alike(x, y, depth - 1) for x, y in pairs)


def constant(value: ir.Value | None, depth: int = 8) -> np.ndarray[Any, Any] | None:
    """The value where it is known without running the model, as far as it is small where it has to be computed."""
    value = source(value)
    if value is None or value.is_graph_input():
        return None
    if (tensor := fixed(value)) is not None:
        return tensor.numpy()
    node = value.producer()
    if node is None or node.domain not in STANDARD or not depth:
        return None
    if node.op_type == "Constant":
        return _constant_node(node)
    known = numbers(value)
    if known is not None and all(isinstance(n, int) for n in known):
        whole = dims(value) or ()
        return np.array(known, np.int64).reshape(whole if all(isinstance(n, int) for n in whole) else -1)
    shape = dims(value)
    if shape is None or not all(isinstance(n, int) for n in shape) or np.prod(shape, dtype=np.int64) > MOST_FOLDED:
        return None
    if node.op_type in ("Reshape", "Unsqueeze", "Squeeze"):
        array = constant(node.inputs[0], depth - 1)
        return None if array is None else array.reshape(shape)
    if node.op_type not in (*_FOLDED, "Cast", "CastLike"):
        return None
    parts = [constant(part, depth - 1) for part in node.inputs[: 1 if node.op_type == "CastLike" else None]]
    return None if any(part is None for part in parts) else _computed(node, parts)


def _constant_node(node: ir.Node) -> np.ndarray[Any, Any] | None:
    if "value" in node.attributes:
        return node.attributes["value"].value.numpy()  # type: ignore[no-any-return]
    kinds = {"value_float": np.float32, "value_floats": np.float32, "value_int": np.int64, "value_ints": np.int64}
    found = next((name for name in kinds if name in node.attributes), None)
    return None if found is None else np.array(node.attributes[found].value, kinds[found])


def _computed(node: ir.Node, parts: Sequence[Any]) -> np.ndarray[Any, Any] | None:
    with np.errstate(all="ignore"):
        if node.op_type in ("Cast", "CastLike"):
            dtype = ir.DataType(attr(node, "to", 1)) if node.op_type == "Cast" else node.outputs[0].dtype
            return None if dtype is None else np.asarray(parts[0]).astype(dtype.numpy())
        if node.op_type == "Div" and np.asarray(parts[0]).dtype.kind in "iu":
            return None
        return np.asarray(_FOLDED[node.op_type](*parts))


def scalar(value: ir.Value | None) -> float | None:
    """A constant of one element, of any rank, as a float."""
    shape = dims(value)
    if shape is not None and any(size != 1 for size in shape):
        return None
    array = constant(value)
    number = array is not None and array.size == 1 and array.dtype.kind not in "bSUO"
    return float(array.reshape(())) if number and array is not None else None


def is_parameter(value: ir.Value | None) -> bool:
    """An initializer, a Constant, or such a one behind nodes that change nothing."""
    value = source(value)
    if value is None or value.is_graph_input():
        return False
    node = value.producer()
    return fixed(value) is not None or (node is not None and standard(node, "Constant"))


def uncast(value: ir.Value) -> ir.Value:
    """The value before casts to a wider floating-point type, which lose nothing."""
    while (node := made_by(value, "Cast")) is not None and node.inputs[0] is not None:
        before, after = WIDTH.get(dtype_of(node.inputs[0])), WIDTH.get(dtype_of(node.outputs[0]))
        if before is None or after is None or before >= after:
            break
        value = node.inputs[0]
    found = source(value)
    assert found is not None
    return found


def dtype_of(value: ir.Value | None) -> str:
    if value is None or value.dtype is None:
        return "unknown"
    return _NAMES.get(value.dtype, str(value.dtype))


def same(a: Any, b: Any) -> bool:
    """Provably equal sizes."""
    return a is not None and bool(a == b)


def same_dims(a: Sequence[Any] | None, b: Sequence[Any] | None) -> bool:
    return a is not None and b is not None and len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))


def readable(shape: Sequence[Any] | None) -> str:
    return (
        "unknown" if shape is None else "[" + ", ".join("?" if str(d).startswith("?") else str(d) for d in shape) + "]"
    )


def permutation(node: ir.Node | None) -> list[int] | None:
    if node is None:
        return None
    order = attr(node, "perm", None)
    rank = len(dims(node.inputs[0]) or ())
    order = list(order) if order is not None else list(range(rank - 1, -1, -1))
    return order if sorted(order) == [*range(len(order))] else None


def last_axis(node: ir.Node, axis: int, rank: int | None) -> bool:
    return rank is not None and rank > 0 and axis in (-1, rank - 1)


def replace_value(old: ir.Value, new: ir.Value) -> None:
    """Let everybody use `new`, which also takes the name of a graph output."""
    if old.is_graph_output():
        name, old.name = old.name, f"{old.name}_replaced"
        new.name = name
        new.shape = old.shape
    note_like(new, old)
    ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)


def note_like(new: ir.Value, old: ir.Value) -> None:
    """What is known of `old` is known of `new`."""
    typed(new, old.dtype)
    shape = dims(old)
    if new.shape is None and shape is not None:
        new.shape = written(shape)
    new.meta["dims"] = shape


def written(shape: Sequence[Any]) -> ir.Shape:
    """As a file may say it: a size that has no name there is left open."""
    return ir.Shape([n if isinstance(n, int) else None if "?" in str(n) else str(n) for n in shape])


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
        if shape is not None:
            value.shape = written(shape)
        note(value, shape)
        return value

    def constant(self, array: np.ndarray[Any, Any]) -> ir.Value:
        tensor = ir.tensor(array)
        return self("Constant", dtype=tensor.dtype, shape=array.shape, value=tensor)

    def reshape(self, x: ir.Value, target: Sequence[int], shape: Sequence[Any]) -> ir.Value:
        return self("Reshape", x, self.constant(np.array(target, np.int64)), dtype=x.dtype, shape=shape)

    def transpose(self, x: ir.Value, order: Sequence[int]) -> ir.Value:
        shape = dims(x)
        assert shape is not None
        return self("Transpose", x, perm=list(order), dtype=x.dtype, shape=[shape[axis] for axis in order])

    def cast(self, x: ir.Value, dtype: ir.DataType) -> ir.Value:
        return self("Cast", x, to=int(dtype), dtype=dtype, shape=dims(x))

    def widened(self, x: ir.Value, rank: int) -> ir.Value:
        """x with leading axes of size 1, as broadcasting would add them."""
        shape = dims(x)
        assert shape is not None
        ones = self.constant(np.ones(rank, np.int64))
        return self("Expand", x, ones, dtype=x.dtype, shape=[*[1] * (rank - len(shape)), *shape])
