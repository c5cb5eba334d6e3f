"""Symbolic sizes: the shape of every value of a graph, and the contents of the small integer tensors shapes are made
of.

onnx's own inference loses a size as soon as it is computed (`Shape -> Gather -> Mul -> Concat -> Reshape`, as exporters
write it). Here a size is an int or a polynomial of symbols; a size of which nothing is known gets a symbol of its own,
so that whatever is computed from it stays comparable. Rules ask `dims`; equal polynomials are equal sizes.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import sympy

from trimaran.export.dtypes import output_dtype
from trimaran.torch_path.lines import plain

ENDLESS = 10**9  # exporters' ends of slices, more than any size
MOST_NUMBERS = 64  # of which an integer tensor's contents are followed
STANDARD = ("", "ai.onnx")
_BROADCAST = {
    *("Add", "Sub", "Mul", "Div", "Pow", "Mod", "Min", "Max", "Sum", "Mean", "Where", "PRelu", "BitwiseAnd", "And"),
    *("Or", "Xor", "Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual"),
}
_ALIKE = {
    *("Identity", "Cast", "Softmax", "LogSoftmax", "Relu", "Gelu", "Erf", "Tanh", "Sigmoid", "Sqrt", "Reciprocal"),
    *("Neg", "Abs", "Exp", "Log", "Not", "IsNaN", "Clip", "Dropout", "CumSum", "Trilu", "LayerNormalization", "Swish"),
    *("RMSNormalization", "Cos", "Sin", "CastLike", "HardSwish", "LeakyRelu", "Elu", "QuantizeLinear", "ScatterND"),
    *("DequantizeLinear", "Floor", "Ceil", "Round", "Sign", "BatchNormalization", "IsInf", "RotaryEmbedding"),
    *("SimplifiedLayerNormalization", "ScatterElements"),
}
_ALIKE_FOREIGN = {  # com.microsoft's
    *("BiasGelu", "FastGelu", "QuickGelu", "Gelu", "RotaryEmbedding"),
    *("SkipLayerNormalization", "SkipSimplifiedLayerNormalization"),
}
_NUMBERS: dict[str, Callable[[Any, Any], Any]] = {
    "Add": lambda a, b: a + b,
    "Sub": lambda a, b: a - b,
    "Mul": lambda a, b: a * b,
    "Div": lambda a, b: quotient(a, b),
    "Mod": lambda a, b: a % b if b else None,
    "And": lambda a, b: a * b,
    "Or": lambda a, b: max(a, b) if isinstance(a, int) and isinstance(b, int) else None,
}


def symbol(name: str) -> Any:
    return sympy.Symbol(name, integer=True, positive=True)


def parsed(name: str) -> Any:
    """A dimension's name: sums and products of names and numbers, as torch's exporter writes them, are such."""
    total: Any = 0
    for term in name.split("+"):
        factors = [factor.strip() for factor in term.split("*")]
        if not all(factors):
            return symbol(name)
        total += math.prod(int(f) if f.isdigit() else symbol(f) for f in factors)
    return plain(total)


def quotient(a: Any, b: Any) -> Any:
    """a / b where that is a polynomial, else a symbol that stands for it rounded down; None where b is 0 or unknown."""
    if a is None or b is None or b == 0:
        return None
    if isinstance(a, int) and isinstance(b, int):
        return int(a / b) if a % b else a // b
    exact = sympy.cancel(sympy.sympify(a) / b)
    return plain(exact) if exact.is_polynomial() and sympy.denom(sympy.together(exact)) == 1 else sympy.floor(exact)


def product(sizes: Iterable[Any]) -> Any:
    total: Any = 1
    for size in sizes:
        if size is None:
            return None
        total = total * size
    return plain(total)


def broadcast(a: Any, b: Any) -> Any:
    """What two sizes broadcast to, None where that is not known."""
    if a == b or b == 1:
        return a
    if a == 1:
        return b
    for one, other in ((a, b), (b, a)):  # a slice that ends before its bound, or else the model fails
        if isinstance(one, sympy.Min) and other in one.args:
            return other
    return next((size for size in (a, b) if isinstance(size, int)), None)


def declared(value: ir.Value) -> tuple[Any, ...] | None:
    """The shape that the file, or onnx's inference, gives."""
    if value.shape is None:
        return None
    return tuple(dim if isinstance(dim, int) else parsed(dim.value) if dim.value else None for dim in value.shape)


def dims(value: ir.Value | None) -> tuple[Any, ...] | None:
    """The shape, of ints and polynomials; None where not even the rank is known."""
    if value is None:
        return None
    if "dims" not in value.meta:
        note(value, None)
    return value.meta["dims"]  # type: ignore[no-any-return]


def numbers(value: ir.Value | None) -> list[Any] | None:
    """The elements of a small integer tensor, of ints, polynomials and None where unknown; None where it is none."""
    if value is None:
        return None
    if "numbers" not in value.meta:
        tensor = fixed(value)
        small = tensor is not None and counts(tensor.dtype) and tensor.size <= MOST_NUMBERS
        value.meta["numbers"] = [int(n) for n in tensor.numpy().reshape(-1)] if small and tensor is not None else None
    return value.meta["numbers"]  # type: ignore[no-any-return]


def counts(dtype: ir.DataType) -> bool:
    """Whether contents of this type are followed: integers, and bool as 0 and 1."""
    return dtype.is_integer() or dtype == ir.DataType.BOOL


def fixed(value: ir.Value) -> ir.TensorProtocol | None:
    """The tensor of an initializer that no input overrides."""
    return None if value.is_graph_input() else value.const_value


def note(value: ir.Value, found: Sequence[Any] | None, content: Sequence[Any] | None = None) -> None:
    """Keep what is known of a value: `found` where it says something, else what the file says, else new symbols."""
    known = declared(value)
    if found is not None and known is not None and len(found) == len(known):
        found = [b if a is None else a for a, b in zip(found, known, strict=True)]
    elif found is None:
        found = known
    if found is not None:
        free = (f"?{value.name or id(value)}.{axis}" for axis in itertools.count())
        found = tuple(symbol(name) if size is None else plain(size) for size, name in zip(found, free, strict=False))
    value.meta["dims"] = found
    if content is not None and len(content) <= MOST_NUMBERS:
        value.meta["numbers"] = [plain(number) for number in content]


def infer(graph: ir.Graph | ir.Function, opset: int) -> None:
    """Note types, sizes and contents of every value, in order; subgraphs see what is outside of them."""
    for node in graph:
        for attr in node.attributes.values():
            if attr.type == ir.AttributeType.GRAPH:
                infer(attr.value, opset)
            elif attr.type == ir.AttributeType.GRAPHS:
                for inner in attr.value:
                    infer(inner, opset)
        infer_node(node, opset)


def infer_node(node: ir.Node, opset: int) -> None:
    try:
        found = shapes_of(node)
    except (IndexError, ZeroDivisionError):  # ranks or axes that the operator does not allow: nothing is known of it
        found = None
    shapes = found if isinstance(found, list) else [found]
    for index, value in enumerate(node.outputs):
        typed(value, output_dtype(node, index, opset))
        note(value, shapes[index] if index < len(shapes) else None, contents(node) if index == 0 else None)


def shapes_of(node: ir.Node) -> Any:
    """Of its first output, or as a list of all of them; None where nothing is known."""
    op, found = node.op_type, None
    standard = node.domain in STANDARD
    if not standard and node.domain != "com.microsoft":
        return None  # whatever it is called
    reader = (_READERS if standard else _FOREIGN).get(op)
    if op in (_ALIKE if standard else _ALIKE_FOREIGN):
        found = dims(node.inputs[0])
    elif op in _BROADCAST and standard:
        found = broadcast_all([dims(value) for value in node.inputs])
    elif reader is not None:
        found = reader(node)
    return [found, None, None, found] if op.startswith("Skip") else found


def typed(value: ir.Value, dtype: ir.DataType | None) -> None:
    """Give a value a dtype where it has none."""
    if value.dtype is None and dtype is not None:
        value.dtype = dtype


def broadcast_all(shapes: Sequence[Any]) -> tuple[Any, ...] | None:
    if any(shape is None for shape in shapes):
        return None
    rank = max(map(len, shapes))
    total: tuple[Any, ...] = (1,) * rank
    for shape in shapes:
        full = (1,) * (rank - len(shape)) + tuple(shape)
        total = tuple(None if a is None else broadcast(a, b) for a, b in zip(total, full, strict=True))
    return total


# ---- contents of integer tensors


def contents(node: ir.Node) -> list[Any] | None:
    op, inputs = node.op_type, node.inputs
    if node.domain not in STANDARD:
        return None
    if op == "Shape":
        shape = dims(inputs[0])
        return None if shape is None else list(shape[attr(node, "start", 0) : attr(node, "end", None)])
    if op == "Constant" or (op == "Size" and dims(inputs[0]) is not None):
        return constant_numbers(node) if op == "Constant" else [product(dims(inputs[0]) or ())]
    if not inputs or (whole := numbers(inputs[1 if op == "Where" else 0])) is None:
        return None
    if op == "ConstantOfShape":
        tensor, length = attr(node, "value", None), math.prod(whole) if None not in whole else None
        known = isinstance(length, int) and length <= MOST_NUMBERS and tensor is not None and tensor.dtype.is_integer()
        return [int(tensor.numpy().reshape(-1)[0])] * length if known and length is not None else None
    if op in ("Cast", "CastLike", "Identity", "Unsqueeze", "Squeeze", "Reshape"):
        dtype = node.outputs[0].dtype
        return whole if dtype is None or dtype.is_integer() else None
    if op == "Concat":
        parts = [numbers(value) for value in inputs]
        return None if any(p is None for p in parts) else [n for p in parts for n in p or ()]
    if op == "Gather" and len(dims(inputs[0]) or ()) == 1:
        return gathered(whole, numbers(inputs[1]))
    if op == "Slice":
        return sliced_numbers(node, whole)
    if op == "Not":
        return [None if n is None else 1 - n for n in whole]
    if op == "ReduceProd":
        return [product(whole)] if given(node, "axes", 1) in (None, [0]) else None
    if op in ("Max", "Min") and len(inputs) == 2:
        return computed(extreme(op), whole, numbers(inputs[1]))
    if op in _NUMBERS or op == "Equal":
        return computed(_NUMBERS.get(op, equal), whole, numbers(inputs[1]))
    if op == "Where":
        return chosen(node, whole)
    return None


def constant_numbers(node: ir.Node) -> list[Any] | None:
    for name in ("value_int", "value_ints"):
        if name in node.attributes:
            return list(np.atleast_1d(node.attributes[name].value))
    tensor = attr(node, "value", None)
    small = tensor is not None and counts(tensor.dtype) and tensor.size <= MOST_NUMBERS
    return [int(n) for n in tensor.numpy().reshape(-1)] if small else None


def gathered(whole: list[Any], places: list[Any] | None) -> list[Any] | None:
    valid = places is not None and all(isinstance(p, int) and -len(whole) <= p < len(whole) for p in places)
    return [whole[p] for p in places] if valid and places is not None else None


def sliced_numbers(node: ir.Node, whole: list[Any]) -> list[Any] | None:
    bounds = slice_arguments(node)
    if bounds is None or len(bounds) != 1 or 0 not in bounds:
        return None
    return whole[slice(*bounds[0])] if all(isinstance(n, int) for n in bounds[0]) else None


def computed(function: Callable[[Any, Any], Any], left: list[Any], right: list[Any] | None) -> list[Any] | None:
    if right is None or (len(left) != len(right) and 1 not in (len(left), len(right))):
        return None
    length = max(len(left), len(right))
    pairs = zip(left * (length // len(left)), right * (length // len(right)), strict=True) if left and right else ()
    return [None if a is None or b is None else plain(function(a, b)) for a, b in pairs]


def extreme(op: str) -> Callable[[Any, Any], Any]:
    """Max or Min of two sizes: they are at least 1 where they are symbols."""

    def chosen(a: Any, b: Any) -> Any:
        if a == b or (isinstance(a, int) and isinstance(b, int)):
            return (
                max(a, b) if op == "Max" and isinstance(a, int) and isinstance(b, int) else min(a, b) if a != b else a
            )
        size, other = (a, b) if b == 1 else (b, a)
        return None if other != 1 else size if op == "Max" else 1

    return chosen


def equal(a: Any, b: Any) -> int | None:
    """1 or 0 where that is known: a size is never negative."""
    if a is None or b is None or (a != b and any(isinstance(n, sympy.Expr) for n in (a, b)) and -1 not in (a, b)):
        return None
    return int(a == b)


def chosen(node: ir.Node, whole: list[Any]) -> list[Any] | None:
    """Where(Equal(shape, -1), other, shape), as exporters write the sizes of an Expand."""
    test, other = numbers(node.inputs[0]), numbers(node.inputs[2])
    if not test or not other or not whole:
        return None
    length = max(len(test), len(whole), len(other))
    columns = (part * (length // len(part)) for part in (test, whole, other))
    return [None if c is None else a if c else b for c, a, b in zip(*columns, strict=True)]


# ---- shapes


def attr(node: ir.Node, name: str, default: Any) -> Any:
    found = node.attributes.get(name)
    return default if found is None else found.value


def given(node: ir.Node, name: str, index: int) -> list[Any] | None:
    """Integers given as an attribute, or as an input since a later opset."""
    if name in node.attributes:
        return list(node.attributes[name].value)
    return numbers(node.inputs[index]) if index < len(node.inputs) else None


def matmul(node: ir.Node) -> Any:
    a, b = dims(node.inputs[0]), dims(node.inputs[1])
    if a is None or b is None or len(a) < 2 or len(b) < 2:
        return None
    batch = broadcast_all([a[:-2], b[:-2]])
    return None if batch is None else (*batch, a[-2], b[-1])


def gemm(node: ir.Node) -> Any:
    a, b = dims(node.inputs[0]), dims(node.inputs[1])
    if a is None or b is None:
        return None
    return a[1 if attr(node, "transA", 0) else 0], b[0 if attr(node, "transB", 0) else 1]


def transpose(node: ir.Node) -> Any:
    shape = dims(node.inputs[0])
    order = attr(node, "perm", None)
    return None if shape is None else tuple(shape[axis] for axis in (order or range(len(shape) - 1, -1, -1)))


def reshape(node: ir.Node) -> Any:
    shape, target = dims(node.inputs[0]), given(node, "shape", 1)
    if target is None:
        known = dims(node.inputs[1])
        return (None,) * known[0] if known is not None and len(known) == 1 and isinstance(known[0], int) else None
    target = list(target)
    if not attr(node, "allowzero", 0) and shape is not None:
        target = [shape[i] if n == 0 and i < len(shape) else n for i, n in enumerate(target)]
    open_places = [i for i, n in enumerate(target) if n is None or n == -1]
    rest = product(n for i, n in enumerate(target) if i not in open_places)
    if len(open_places) == 1 and shape is not None:
        whole = product(shape)
        missing = quotient(whole, rest)
        exact = missing is not None and plain(missing * rest) == whole
        target[open_places[0]] = missing if exact else None
    return tuple(None if n == -1 else n for n in target)


def unsqueeze(node: ir.Node) -> Any:
    shape, axes = dims(node.inputs[0]), given(node, "axes", 1)
    if shape is None or axes is None or None in axes:
        return None
    rank = len(shape) + len(axes)
    places, rest = {axis % rank for axis in axes}, iter(shape)
    return tuple(1 if axis in places else next(rest) for axis in range(rank))


def squeeze(node: ir.Node) -> Any:
    shape, axes = dims(node.inputs[0]), given(node, "axes", 1)
    if shape is None or (axes is None and not all(isinstance(size, int) for size in shape)):
        return None
    gone = [i for i, n in enumerate(shape) if n == 1] if axes is None else [axis % len(shape) for axis in axes]
    return tuple(size for axis, size in enumerate(shape) if axis not in gone)


def concat(node: ir.Node) -> Any:
    shapes = [dims(value) for value in node.inputs]
    if any(shape is None or len(shape) != len(shapes[0] or ()) for shape in shapes):
        return None
    rank = len(shapes[0] or ())
    axis = attr(node, "axis", 0) % rank
    columns = [[shape[i] for shape in shapes if shape is not None] for i in range(rank)]
    known = [next((n for n in column if isinstance(n, int)), column[0]) for column in columns]
    return tuple(plain(sum(columns[axis])) if i == axis else size for i, size in enumerate(known))


def slice_arguments(node: ir.Node) -> dict[int, tuple[Any, Any, Any]] | None:
    """(start, end, step) by axis."""
    starts, ends = given(node, "starts", 1), given(node, "ends", 2)
    if starts is None or ends is None:
        return None
    axes = given(node, "axes", 3) or list(range(len(starts)))
    steps = given(node, "steps", 4) or [1] * len(starts)
    shape = dims(node.inputs[0])
    if shape is None or None in axes:
        return None
    return {a % len(shape): bounds for a, *bounds in zip(axes, starts, ends, steps, strict=True)}  # type: ignore[misc]


def slices(node: ir.Node) -> Any:
    shape, bounds = dims(node.inputs[0]), slice_arguments(node)
    if shape is None:
        return None
    if bounds is None:
        return (None,) * len(shape)
    return tuple(part_of(size, *bounds[axis]) if axis in bounds else size for axis, size in enumerate(shape))


def part_of(size: Any, start: Any, end: Any, step: Any) -> Any:
    """How many elements `[start:end:step]` takes."""
    if None in (start, end, step) or not isinstance(step, int):
        return None
    if all(isinstance(n, int) for n in (size, start, end)):
        return len(range(*slice(start, end, step).indices(size)))
    if step != 1:
        return None
    to_end = isinstance(end, int) and end >= ENDLESS
    end = size if to_end or end == size else plain(size + end) if isinstance(end, int) and end < 0 else end
    if isinstance(start, int) and start < 0:
        return -start if to_end and not isinstance(size, int) else None
    if end == size or start == 0:  # whether a size is within the bounds is not known of symbols
        return plain(size - start) if end == size else end if inside(end, size) else sympy.Min(end, size)
    return None


def inside(end: Any, size: Any) -> bool:
    """Provably end <= size: sizes are not negative, so a polynomial with no negative coefficient is not."""
    rest = sympy.expand(sympy.sympify(size) - end)
    return all(coefficient >= 0 for coefficient in rest.as_coefficients_dict().values())


def gather(node: ir.Node) -> Any:
    shape, places = dims(node.inputs[0]), dims(node.inputs[1])
    if shape is None or places is None:
        return None
    axis = attr(node, "axis", 0) % len(shape)
    return (*shape[:axis], *places, *shape[axis + 1 :])


def expand(node: ir.Node) -> Any:
    shape, target = dims(node.inputs[0]), numbers(node.inputs[1])
    if shape is None or target is None:
        return None
    return broadcast_all([shape, [1 if n == 1 else n for n in target]])


def reduced(node: ir.Node) -> Any:
    shape, axes = dims(node.inputs[0]), given(node, "axes", 1)
    if shape is None:
        return None
    keep = attr(node, "keepdims", 1)
    if axes is None and len(node.inputs) > 1 and node.inputs[1] is not None:
        return (None,) * len(shape) if keep else None
    if axes is None:
        axes = [] if attr(node, "noop_with_empty_axes", 0) else list(range(len(shape)))
    gone = {axis % len(shape) for axis in axes}
    return tuple(1 if i in gone else n for i, n in enumerate(shape) if keep or i not in gone)


def split(node: ir.Node) -> Any:
    shape = dims(node.inputs[0])
    if shape is None:
        return None
    axis, sizes = attr(node, "axis", 0) % len(shape), given(node, "split", 1)
    if sizes is None:
        count = attr(node, "num_outputs", len(node.outputs))
        whole = shape[axis]
        even = isinstance(whole, int) and whole % count == 0
        sizes = [whole // count if even else None] * len(node.outputs)
    return [tuple(size if i == axis else n for i, n in enumerate(shape)) for size in sizes]


def ranged(node: ir.Node) -> Any:
    start, limit, step = (numbers(value) for value in node.inputs)
    if not (start and limit and step == [1]) or None in (start[0], limit[0]):
        return None
    return (plain(limit[0] - start[0]),)


def filled(node: ir.Node) -> Any:
    sizes = numbers(node.inputs[0])
    return None if sizes is None else tuple(sizes)


def gathered_elements(node: ir.Node) -> Any:
    return dims(node.inputs[1])


def gather_nd(node: ir.Node) -> Any:
    shape, places = dims(node.inputs[0]), dims(node.inputs[1])
    if shape is None or not places or not isinstance(places[-1], int):
        return None
    return (*places[:-1], *shape[attr(node, "batch_dims", 0) + places[-1] :])


def flatten(node: ir.Node) -> Any:
    shape = dims(node.inputs[0])
    if shape is None:
        return None
    axis = attr(node, "axis", 1)
    axis = axis + len(shape) if axis < 0 else axis
    return product(shape[:axis]), product(shape[axis:])


def fused_matmul(node: ir.Node) -> Any:
    """com.microsoft's, with factors that it transposes."""
    a, b = dims(node.inputs[0]), dims(node.inputs[1])
    if a is None or b is None or len(a) < 2 or len(b) < 2:
        return None
    rows = a[-1] if attr(node, "transA", 0) else a[-2]
    columns = b[-2] if attr(node, "transB", 0) else b[-1]
    batch = broadcast_all([a[:-2], b[:-2]])
    return None if batch is None else (*batch, rows, columns)


def multi_head(node: ir.Node) -> Any:
    """com.microsoft's attention over rows: those of q, as wide as v where that is rows too."""
    q = dims(node.inputs[0])
    v = dims(node.inputs[2]) if len(node.inputs) > 2 and node.inputs[2] is not None else None
    if q is None or len(q) != 3:
        return None
    return (*q[:2], v[-1]) if v is not None and len(v) == 3 else q


_READERS: dict[str, Callable[[ir.Node], Any]] = {
    "MatMul": matmul,
    "Gemm": gemm,
    "Transpose": transpose,
    "Reshape": reshape,
    "Unsqueeze": unsqueeze,
    "Squeeze": squeeze,
    "Concat": concat,
    "Slice": slices,
    "Gather": gather,
    "Expand": expand,
    **dict.fromkeys(("ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin", "ReduceL2", "ReduceProd"), reduced),
    "Split": split,
    "Range": ranged,
    "ConstantOfShape": filled,
    "Flatten": flatten,
    "GatherElements": gathered_elements,
    "GatherND": gather_nd,
}
_FOREIGN: dict[str, Callable[[ir.Node], Any]] = {  # com.microsoft's
    "FusedMatMul": fused_matmul,
    "MultiHeadAttention": multi_head,
}
