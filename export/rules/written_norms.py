"""Norms that are written out: (x - mean) / sqrt(variance + eps) * weight + bias, and the same without a mean.

The anchor is the root. What is under it says what x is and which norm it may be; then every value that the root leads
to is expanded, and the last one that is the norm of x, times a weight, plus a bias, is what is replaced. The
expansion makes one of all spellings: E[x^2] - E[x]^2, x * scale + (bias - mean * scale), Pow, Reciprocal, sums
divided by their number.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import onnx_ir as ir

from trimaran.export.algebra import ARITHMETIC, MEANS, Expansion, Function, Polynomial
from trimaran.export.onnx_graph import RESHAPES, dims, dtype_of, made_by, same, source, standard, uncast, users
from trimaran.export.shapes import given

ROOTS = ("Sqrt", "Pow")
FAR = 8  # nodes from the root to the end of a norm, or from the mean to the root


@dataclass(frozen=True)
class Norm:
    """kind: layer or rms. end: what is replaced. weight, bias: [N], perhaps with leading ones. residual: added to x, in
    `total` where that value exists; shift: a vector that is added to x too."""

    kind: str
    end: ir.Value
    x: ir.Value
    weight: ir.Value | None
    bias: ir.Value | None
    eps: float
    cast: str = "torch"
    total: ir.Value | None = None
    residual: ir.Value | None = None
    shift: ir.Value | None = None


def read_root(node: ir.Node) -> Norm | str | None:
    """None where this is no root of a mean of squares, a str where it is and yet no norm."""
    under = node.inputs[0]
    if under is None or dtype_of(node.outputs[0]) not in ("float32", "float16", "bfloat16", "float64"):
        return None
    means = means_under(under)
    reason: str | None = None
    for x in [x for mean in means for x in normalized_by(mean)]:
        found = read_norm(node, x)
        if isinstance(found, Norm):
            return found
        reason = reason or found
    return reason or off_axis(means)


def means_under(value: ir.Value | None, depth: int = FAR) -> list[ir.Node]:
    node = made_by(value, *ARITHMETIC, *RESHAPES, "Expand")
    if node is None or not depth:
        return []
    if node.op_type in MEANS:
        return [node]
    parts = node.inputs if node.op_type in ARITHMETIC else node.inputs[:1]
    return [found for part in parts for found in means_under(part, depth - 1)]


def normalized_by(mean: ir.Node) -> list[ir.Value]:
    """What x may be: x of mean(x), mean(x^2) or mean((x - m)^2)."""
    value = mean.inputs[0]
    square = made_by(value, "Pow", "Mul")
    if square is not None and (square.op_type == "Pow" or source(square.inputs[0]) is source(square.inputs[1])):
        value = square.inputs[0]
    if value is None:
        return []
    centered = made_by(uncast(value), "Sub")
    whole = centered.inputs[0] if centered is not None else None
    return [uncast(x) for x in (whole, value) if x is not None]


def off_axis(means: list[ir.Node]) -> str | None:
    for mean in means:
        shape, axes = dims(mean.inputs[0]), given(mean, "axes", 1)
        if shape is not None and axes is not None and axes not in ([-1], [len(shape) - 1]):
            return f"it normalizes over axes {axes} of {len(shape)}, only the last one is supported"
    return None


def read_norm(root: ir.Node, x: ir.Value) -> Norm | str | None:
    expansion = Expansion(x)
    under = expansion.of(root.inputs[0])
    whole = expansion.of(root.outputs[0])
    if under is None or whole is None or len(whole) != 1:
        return None
    square, mean_square = (("square", 1),), (("mean", 2),)
    eps = under.get((), 0.0)
    kind = "layer" if abs(under.get(mean_square, 0.0) + 1.0) < 1e-3 else "rms"
    expected = {square, ()} | ({mean_square} if kind == "layer" else set())
    if abs(under.get(square, 0.0) - 1.0) > 1e-3:
        return None  # a sum of squares, a distance
    if {*under} - expected:
        return "eps is computed at run time"
    if eps < 0:
        return f"eps is {eps:g}"
    (((atom, _),),) = whole
    return last_match(root, x, atom, kind, eps, expansion)


def last_match(root: ir.Node, x: ir.Value, atom: Function, kind: str, eps: float, expansion: Expansion) -> Norm | str:
    """The norm that ends furthest from the root."""
    found: list[tuple[tuple[int, int], ir.Value, Any]] = []
    for depth, value in descendants(root):
        parts = weight_and_bias(expansion.of(value), x, atom, kind)
        if parts is not None and is_as_wide(value, x):
            found.append(((sum(part is not None for part in parts[:2]), depth), value, parts))
    found.sort(key=lambda entry: entry[0], reverse=True)
    plain = {source(value) for _, value, parts in found if parts[0] is None}
    for _, end, (weight, bias, gemma) in found:
        for start in (x, *wider(x)):
            if dtype_of(start) == dtype_of(end):
                rounded = any(a is not None and a in plain and dtype_of(a) == dtype_of(x) for a in operands(end))
                narrow = dtype_of(start) != "float32" and weight is not None
                cast = "gemma" if gemma else "llama" if narrow and rounded else "torch"
                return Norm(kind, end, start, weight, bias, eps, cast)
    if found:
        return f"its result is {dtype_of(found[0][1])} and x is {dtype_of(x)}"
    return "what is multiplied with the inverse root is not what was squared, or by no weight [N]"


def is_as_wide(end: ir.Value, x: ir.Value) -> bool:
    """What is made of x, means of it, and vectors has the shape of x, unless a vector has more dimensions."""
    one, other = dims(end) or (None,), dims(x) or (0,)
    known = all(a == b or not isinstance(a, int) for a, b in zip(one, other, strict=False))
    return len(one) == len(other) and known and same(one[-1], other[-1])


def operands(end: ir.Value) -> list[ir.Value | None]:
    node = made_by(end, "Mul", "Cast")
    if node is not None and node.op_type == "Cast":
        node = made_by(node.inputs[0], "Mul")
    return [source(part) for part in node.inputs] if node is not None else []


def wider(x: ir.Value) -> list[ir.Value]:
    return [use.node.outputs[0] for use in x.uses() if standard(use.node, "Cast")]


def descendants(root: ir.Node) -> list[tuple[int, ir.Value]]:
    """What elementwise arithmetic makes of the root, with how far it is from it."""
    found: dict[ir.Value, int] = {}
    front = [root.outputs[0]]
    for depth in range(1, FAR + 1):
        nodes = [user for value in front for user in users(value) if standard(user, *ARITHMETIC)]
        front = [node.outputs[0] for node in nodes if node.op_type not in MEANS]
        found |= dict.fromkeys(front, depth)
    return [(depth, value) for value, depth in found.items()]


def weight_and_bias(p: Polynomial | None, x: ir.Value, root: Function, kind: str) -> Any:
    """(weight, bias, whether 1 is added to the weight) where p is norm(x) * weight + bias, else None."""
    if p is None:
        return None
    terms: dict[str, dict[Any, float]] = {"x": {}, "mean": {}, "bias": {}}
    for monomial, coefficient in p.items():
        powers = dict(monomial)
        rooted = powers.pop(root, 0)
        place = "x" if powers.pop(x, 0) == 1 else "mean" if powers.pop("mean", 0) == 1 else "bias"
        if rooted != (place != "bias") or len(powers) > 1 or any(n != 1 for n in powers.values()):
            return None
        terms[place][next(iter(powers), None)] = coefficient
    if kind == "layer" and terms["mean"] != {weight: -c for weight, c in terms["x"].items()}:
        return None
    if (kind == "rms" and terms["mean"]) or any(
        abs(c - 1.0) > 1e-6 for c in (*terms["x"].values(), *terms["bias"].values())
    ):
        return None
    weights, biases = [w for w in terms["x"] if w is not None], [*terms["bias"]]
    gemma = None in terms["x"] and len(terms["x"]) == 2
    if len(terms["x"]) - gemma != 1 or (gemma and kind == "layer") or len(biases) > (kind == "layer"):
        return None
    if any(not is_vector(value, x) for value in (*weights, *biases)):
        return None
    return next(iter(weights), None), next(iter(biases), None), gemma


def is_vector(value: Any, x: ir.Value) -> bool:
    """[N], perhaps with leading ones, N as x has."""
    shape, rows = dims(value) if isinstance(value, ir.Value) else None, dims(x)
    if not shape or not rows:
        return False
    return same(shape[-1], rows[-1]) and all(size == 1 for size in shape[:-1])
