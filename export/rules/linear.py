"""Linear layers, and what follows them or stands beside them: one op each.

As `torch_path/rules/linear.py` does in FX, in its order: every linear layer becomes the op; a product of an activated
one with another of the same input becomes `gated_linear`; activations go into the layer before them; q, k and v of
one input become one layer, of whose rows attention (and the rotary embedding before it) reads its parts; the norm of
a layer's sum with a residual becomes `linear_norm`; what residuals are left go into their layer.

Only in 16 bits: products in fp32 are the vendor's on a GPU, where no tensor core computes them and our plans decline.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import onnx_ir as ir

from trimaran.export.onnx_graph import (
    Inserter,
    attribute,
    dims,
    dtype_of,
    is_parameter,
    is_same,
    made_by,
    only_user,
    operand,
    permutation,
    replace_value,
    same,
    same_dims,
    sides,
    source,
    used,
)
from trimaran.export.report import Fault
from trimaran.export.rules.activations import activation_of
from trimaran.export.rules.residual import known_early, vector
from trimaran.export.rules.written_norms import is_vector
from trimaran.export.schemas import DOMAIN
from trimaran.export.shapes import slice_arguments, typed
from trimaran.kernels.gated_linear import gated_linear
from trimaran.kernels.linear import linear
from trimaran.kernels.linear_norm import linear_norm

QUANTIZING = ("MatMulNBits", "MatMulInteger", "QLinearMatMul", "DynamicQuantizeMatMul", "MatMulIntegerToFloat")
LINEAR_ANCHORS = ("MatMul", "Gemm", "FusedMatMul", *QUANTIZING)
NARROW = ("float16", "bfloat16")
QUANTIZED = ("int8", "uint8", "int4", "uint4", "INT8", "UINT8", "INT4", "UINT4")


@dataclass(frozen=True)
class Layer:
    """x W^T + bias, or x W + bias where transposed; `end` is what is replaced."""

    end: ir.Value
    x: ir.Value
    weight: ir.Value
    bias: ir.Value | None
    transposed: bool


def check_linear(node: ir.Node) -> Layer | str | None:
    if node.op_type in QUANTIZING:
        return "its weight is quantized, which no op here multiplies yet"
    x, weight = node.inputs[:2]
    if x is None or weight is None:
        return None
    if (dtype := quantized(weight)) is not None:
        return Fault.of(f"its weight is dequantized from {dtype}, which no op here multiplies yet", weight)
    transposed, weight = stored(node, weight)
    if weight is None or dtype_of(x) not in NARROW:
        return None
    if dtype_of(weight) != dtype_of(x) or len(dims(x) or ()) < 2:
        return None
    layer = (
        from_gemm(node, x, weight, transposed)
        if node.op_type == "Gemm"
        else Layer(node.outputs[0], x, weight, None, transposed)
    )
    return with_bias(layer) if isinstance(layer, Layer) else layer


def quantized(weight: ir.Value) -> str | None:
    """The type that a weight is computed from, where that is an integer."""
    node = made_by(weight, "DequantizeLinear", "Mul", "Transpose", "Sub", "Cast")
    if node is None:
        return None
    for part in node.inputs[:1] if node.op_type == "DequantizeLinear" else [p for p in node.inputs if p is not None]:
        if part is not None and dtype_of(part) in QUANTIZED:
            return dtype_of(part).lower()
        if node.op_type != "DequantizeLinear" and part is not None and (inner := quantized(part)) is not None:
            return inner
    return None


def stored(node: ir.Node, weight: ir.Value) -> tuple[bool, ir.Value | None]:
    """(whether it is kept as [K, N], the weight as it is kept), None where it is no parameter of two dimensions."""
    twisted = any(attribute(node, name, 0) for name in ("transA", "transBatchA", "transBatchB"))
    if node.op_type == "FusedMatMul" and (twisted or attribute(node, "alpha", 1.0) != 1.0):
        return True, None
    flips = bool(attribute(node, "transB", 0)) if node.op_type in ("Gemm", "FusedMatMul") else False
    turned = made_by(weight, "Transpose")
    if turned is not None and permutation(turned) == [1, 0] and turned.inputs[0] is not None:
        weight, flips = turned.inputs[0], not flips
    found = source(weight)
    return not flips, found if found is not None and is_parameter(found) and len(dims(found) or ()) == 2 else None


def from_gemm(node: ir.Node, x: ir.Value, weight: ir.Value, transposed: bool) -> Layer | str | None:
    """With the reshapes that make rows of x and undo that, as exporters write GPT-2's Conv1D."""
    bias = operand(node, 2)
    if (
        attribute(node, "transA", 0)
        or attribute(node, "alpha", 1.0) != 1.0
        or (bias is not None and attribute(node, "beta", 1.0) != 1.0)
    ):
        return "it scales its product, or transposes x"
    if bias is not None and not is_vector(bias, node.outputs[0]):
        return Fault.of("what it adds is no bias [N]", bias)
    end, flat = only_user(node.outputs[0], "Reshape"), made_by(x, "Reshape")
    columns, depth = (dims(node.outputs[0]) or ())[-1:], (dims(x) or (None,))[-1]
    while end is not None and flat is not None and flat.inputs[0] is not None:
        before = dims(flat.inputs[0]) or ()
        if len(before) > 2 and same(before[-1], depth) and same_dims(dims(end.outputs[0]), (*before[:-1], *columns)):
            return Layer(end.outputs[0], flat.inputs[0], weight, bias, transposed)
        flat = made_by(flat.inputs[0], "Reshape")
    return Layer(node.outputs[0], x, weight, bias, transposed)


def with_bias(layer: Layer) -> Layer:
    """With an addition of a vector that follows."""
    if layer.bias is not None:
        return layer
    total = only_user(layer.end, "Add")
    for one, other in sides(total):
        is_bias = is_vector(other, layer.end) and known_early(other) and dtype_of(other) == dtype_of(layer.x)
        if total is None or not is_bias or not is_same(one, layer.end):
            continue
        if same_dims(dims(total.outputs[0]), dims(layer.end)):
            return Layer(total.outputs[0], layer.x, layer.weight, other, layer.transposed)
    return layer


def rewrite_linear(node: ir.Node, match: Layer) -> None:
    anchor = match.end.producer()
    assert anchor is not None
    add = Inserter(anchor)
    inputs = [match.x, match.weight, vector(add, match.bias, match.x)]
    put(add, linear, inputs, {"transpose_weight": int(match.transposed)}, match.end, node.name)


def put(add: Inserter, op: Any, inputs: Any, attrs: dict[str, Any], end: ir.Value, name: Any) -> ir.Node:
    """The op's node, whose first output takes the place of `end`."""
    given = {key: value for key, value in attrs.items() if value not in (0, "none")}
    node = add.node(op.name, inputs, given, domain=DOMAIN, version=op.version, name=name)
    replace_value(end, node.outputs[0])
    return node


def plain_layer(value: ir.Value | None, *seen_by: ir.Node) -> ir.Node | None:
    """The linear op without activation or residual that makes the value, of use to these nodes of its graph only."""
    node = made_by(value, linear.name, domain=DOMAIN)
    if node is None or attribute(node, "activation", "none") != "none" or len(node.inputs) > 3:
        return None
    if any(user.graph is not node.graph for user in seen_by):
        return None
    out = node.outputs[0]
    return node if not out.is_graph_output() and {use.node for use in out.uses()} <= {*seen_by} else None


def inside(end: ir.Value, start: ir.Value) -> set[ir.Node]:
    """The nodes from `start` to the one that makes `end`."""
    found: set[ir.Node] = set()
    todo = [end.producer()]
    while todo:
        node = todo.pop()
        if node is None or node in found or len(found) > 32:
            continue
        found.add(node)
        todo += [part.producer() for part in node.inputs if part is not None and part is not start]
    return found


# ---- gated_linear


@dataclass(frozen=True)
class Gated:
    gate: ir.Node
    up: ir.Node | None  # None: the gate's layer is both, one half after the other
    activation: str
    half: str = "first"


def check_gated(node: ir.Node) -> Gated | None:
    for one, other in sides(node):
        found = activation_of(one)
        if found is None or found[2] is not None:
            continue
        name, x, _ = found
        path = inside(one, x)
        gate, up = plain_layer(x, *path), plain_layer(other, node)
        if gate is not None and up is not None and same_form(gate, up):
            return Gated(gate, up, name)
        halves = halves_of(x, source(other))
        second = source(other)
        if halves is None or second is None or {use.node for use in second.uses()} != {node}:
            continue
        if {use.node for use in x.uses()} <= path:
            return Gated(halves[0], None, name, halves[1])
    return None


def same_form(one: ir.Node, other: ir.Node) -> bool:
    layout = [attribute(node, "transpose_weight", 0) for node in (one, other)]
    return (
        is_same(one.inputs[0], other.inputs[0])
        and layout[0] == layout[1]
        and same_dims(dims(one.inputs[1]), dims(other.inputs[1]))
    )


def halves_of(gate: ir.Value, up: ir.Value | None) -> tuple[ir.Node, str] | None:
    """(layer, which half is the gate) where both are the halves of one layer's output, by a Split or two Slices."""
    if up is None or not same_dims(dims(gate), dims(up)):
        return None
    splits = [value.producer() for value in (gate, up)]
    whole = splits[0].inputs[0] if splits[0] is not None and splits[0].inputs else None
    layer = plain_layer(whole, *(n for n in splits if n is not None))
    if layer is None or None in splits or not is_same(whole, splits[1].inputs[0]):  # type: ignore[union-attr]
        return None
    starts = [start_of(value) for value in (gate, up)]
    half, full = (dims(gate) or (None,))[-1], (dims(whole) or (None,))[-1]
    if not isinstance(half, int) or full != 2 * half or sorted(starts, key=str) != sorted([0, half], key=str):
        return None
    return layer, "second" if starts[0] else "first"


def start_of(value: ir.Value) -> Any:
    """Where in the last dimension a part of a tensor starts, None where it is no such part."""
    node = value.producer()
    rank = len(dims(value) or ())
    if node is not None and made_by(value, "Split") is node and attribute(node, "axis", 0) in (-1, rank - 1):
        before = node.outputs[: list(node.outputs).index(value)]
        widths = [(dims(out) or (None,))[-1] for out in before]
        return sum(widths) if all(isinstance(width, int) for width in widths) else None
    if node is not None and made_by(value, "Slice") is node:
        bounds = slice_arguments(node)
        return (
            bounds[rank - 1][0] if bounds is not None and [*bounds] == [rank - 1] and bounds[rank - 1][2] == 1 else None
        )
    return None


def rewrite_gated(node: ir.Node, match: Gated) -> None:
    x, weight, bias = (operand(match.gate, index) for index in range(3))
    up = (None, None) if match.up is None else (operand(match.up, 1), operand(match.up, 2))
    attrs = {"activation": match.activation, "transpose_weight": attribute(match.gate, "transpose_weight", 0)}
    attrs |= {"gate": match.half} if match.half != "first" else {}
    put(Inserter(node), gated_linear, [x, weight, up[0], bias, up[1]], attrs, node.outputs[0], node.name)


# ---- activations and residuals


@dataclass(frozen=True)
class Activated:
    layer: ir.Node
    activation: str
    bias: ir.Value | None


def check_activation(node: ir.Node) -> Activated | None:
    end = node.outputs[0]
    found = activation_of(end)
    if found is None:
        return None
    name, x, bias = found
    layer = plain_layer(x, *inside(end, x))
    if layer is None or (bias is not None and operand(layer, 2) is not None):
        return None
    return Activated(layer, name, bias)


def rewrite_activation(node: ir.Node, match: Activated) -> None:
    x, weight, bias = (operand(match.layer, index) for index in range(3))
    attrs = {"activation": match.activation, "transpose_weight": attribute(match.layer, "transpose_weight", 0)}
    put(Inserter(node), linear, [x, weight, bias or match.bias], attrs, node.outputs[0], match.layer.name)


def check_residual(node: ir.Node) -> tuple[ir.Node, ir.Value] | None:
    """(the sum, the residual)"""
    out = node.outputs[0]
    total = only_user(out, "Add")
    if total is None or len(node.inputs) > 3:
        return None
    for one, other in sides(total):
        if (
            is_same(one, out)
            and not is_same(other, out)
            and same_dims(dims(other), dims(out))
            and other.dtype == out.dtype
        ):
            return total, other
    return None


def rewrite_residual(node: ir.Node, match: tuple[ir.Node, ir.Value]) -> None:
    total, residual = match
    attrs = {name: attribute(node, name, 0) for name in ("activation", "transpose_weight")}
    inputs = [*(operand(node, index) for index in range(3)), residual]
    put(Inserter(total), linear, inputs, attrs, total.outputs[0], node.name)


# ---- layers that share an input


@dataclass(frozen=True)
class Shared:
    layers: tuple[ir.Node, ir.Node, ir.Node]
    rotary: ir.Node | None


def check_shared(node: ir.Node) -> Shared | None:
    """q, k and v of an attention that reads rows, each a plain layer of one input."""
    if node.domain != DOMAIN or not attribute(node, "num_heads", 0) or operand(node, 2) is None:
        return None
    rotary = made_by(node.inputs[0], "rotary_embedding", domain=DOMAIN)
    sources = [node.inputs[0], node.inputs[1]]
    if rotary is not None:
        outs = rotary.outputs
        if (
            len(outs) < 2
            or not attribute(rotary, "num_heads", 0)
            or not all(is_same(a, b) for a, b in zip(sources, outs, strict=False))
        ):
            return None
        if any({use.node for use in out.uses()} - {node} or out.is_graph_output() for out in outs[:2]):
            return None
        sources = [rotary.inputs[0], operand(rotary, 3)]
    layers = [plain_layer(value, rotary or node) for value in sources] + [plain_layer(node.inputs[2], node)]
    if any(layer is None for layer in layers):
        return None
    first = layers[0]
    alike = all(is_same(layer.inputs[0], first.inputs[0]) for layer in layers[1:])  # type: ignore[union-attr]
    layout = {attribute(layer, "transpose_weight", 0) for layer in layers}  # type: ignore[arg-type]
    return Shared(tuple(layers), rotary) if alike and len(layout) == 1 else None  # type: ignore[arg-type]


def rewrite_shared(node: ir.Node, match: Shared) -> None:
    first, *rest = match.layers
    add = Inserter(match.rotary or node)
    parts = [part for layer in rest for part in (operand(layer, 1), operand(layer, 2))]
    inputs = [*(operand(first, index) for index in range(3)), None, *parts]
    attrs = {"transpose_weight": attribute(first, "transpose_weight", 0)}
    rows = dims(first.outputs[0]) or ()
    widths = [(dims(layer.outputs[0]) or (None,))[-1] for layer in match.layers]
    wide = add.node(
        linear.name,
        inputs,
        {k: v for k, v in attrs.items() if v},
        domain=DOMAIN,
        version=linear.version,
        name=first.name,
    )
    packed = described(wide.outputs[0], first.outputs[0], (*rows[:-1], *(() if None in widths else (sum(widths),))))
    if match.rotary is not None:
        given = {key: value.value for key, value in match.rotary.attributes.items()}
        operands = [packed, *match.rotary.inputs[1:3], None, operand(match.rotary, 4)]
        options: dict[str, Any] = {"version": match.rotary.version, "name": match.rotary.name}
        turned = add.node(match.rotary.op_type, operands, {**given, "packed": 1}, domain=DOMAIN, **options)
        packed = described(turned.outputs[0], packed, dims(packed) or ())
    node.replace_input_with(0, packed)
    for index in (1, 2):
        node.replace_input_with(index, None)


def described(value: ir.Value, like: ir.Value, shape: tuple[Any, ...]) -> ir.Value:
    typed(value, like.dtype)
    value.meta["dims"] = shape
    return value


# ---- linear_norm


@dataclass(frozen=True)
class Normed:
    layer: ir.Node
    residual: ir.Value | None


def check_linear_norm(node: ir.Node) -> Normed | None:
    params = 2 if node.op_type == "layer_norm" else 1
    x, residual = operand(node, 0), operand(node, 1 + params)
    alike = all(p is None or dtype_of(p) == dtype_of(x) for p in node.inputs[1 : 1 + params])
    if node.domain != DOMAIN or not alike:
        return None
    for value, other in ((x, residual), (residual, x)):
        layer = plain_layer(value, node) if value is not None else None
        if layer is not None and not is_same(value, other):
            return Normed(layer, other)
    return None


def rewrite_linear_norm(node: ir.Node, match: Normed) -> None:
    x, weight, bias = (operand(match.layer, index) for index in range(3))
    layered = node.op_type == "layer_norm"
    norm_bias = operand(node, 2) if layered else None
    attrs = {"eps": attribute(node, "eps", 0.0), "norm": "layer" if layered else "rms"}
    attrs |= {} if layered else {"cast": attribute(node, "cast", "torch")}
    attrs |= {"transpose_weight": 1} if attribute(match.layer, "transpose_weight", 0) else {}
    summed = len(node.outputs) > 1 and used(node.outputs[1])
    new = Inserter(node).node(
        linear_norm.name, [x, weight, bias, match.residual, operand(node, 1), norm_bias], attrs, domain=DOMAIN,
        num_outputs=2 if summed else 1, version=linear_norm.version, name=node.name,
    )  # fmt: skip
    replace_value(node.outputs[0], new.outputs[0])
    if summed:
        replace_value(node.outputs[1], new.outputs[1])
