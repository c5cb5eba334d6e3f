"""Where attention's operands come from: transposes composed, scales taken out, repeated heads found.

An `Operand` is a view: logically [B, H, S, D], it is the transposition of a value that there is. Where that value is
[B, S, H, D], a row of heads, the op reads rows and the transposition disappears.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import Any

import onnx_ir as ir

from trimaran.export.onnx_graph import (
    MOST_VIEWS,
    RESHAPES,
    Inserter,
    dims,
    is_view,
    made_by,
    only_user,
    permutation,
    same_dims,
    scalar,
    source,
    standard,
    views_back,
)
from trimaran.export.shapes import product, typed

PLAIN, ROWS = (0, 1, 2, 3), (0, 2, 1, 3)
MOST_AXES = 6


@dataclass(frozen=True)
class Operand:
    """Transpose(value, order), [B, H, S, D]"""

    value: ir.Value
    order: tuple[int, ...] = PLAIN

    @property
    def shape(self) -> tuple[Any, ...] | None:
        shape = dims(self.value)
        return None if shape is None or len(shape) != 4 else tuple(shape[axis] for axis in self.order)


def unscaled(value: ir.Value | None) -> tuple[ir.Value | None, float]:
    """(x, factor) where the value is x times constants, however they were multiplied."""
    factor = 1.0
    value = source(value)
    while value is not None and (node := made_by(value, "Mul", "Div")) is not None:
        right, left = scalar(node.inputs[1]), scalar(node.inputs[0])
        if right is not None and (node.op_type == "Mul" or right):
            value, factor = source(node.inputs[0]), factor * right if node.op_type == "Mul" else factor / right
        elif left is not None and node.op_type == "Mul":
            value, factor = source(node.inputs[1]), factor * left
        else:
            break
    return value, factor


def followed(value: ir.Value | None, order: tuple[int, ...]) -> tuple[Operand | None, float]:
    """The operand behind scales, transposes and reshapes that only serve one, and the product of the scales."""
    factor = 1.0
    while value is not None:
        value, times = unscaled(value)
        factor *= times
        node = made_by(value, "Transpose")
        if node is not None and len(permutation(node) or ()) == len(order):
            inner = permutation(node) or []
            value, order = node.inputs[0], tuple(inner[axis] for axis in order)
            continue
        lifted = around_bmm(value, order)
        if lifted is None:
            break
        value, order = lifted
    return (None if value is None else Operand(value, order)), factor


def around_bmm(value: ir.Value | None, order: tuple[int, ...]) -> tuple[ir.Value, tuple[int, ...]] | None:
    """[B, H, S, D] or its rows behind [B*H, S, D] -> Transpose -> [B*H, D, S] -> [B, H, D, S]"""
    outer = made_by(value, "Reshape")
    flat = made_by(outer.inputs[0], "Transpose") if outer is not None else None
    inner = made_by(flat.inputs[0], "Reshape") if flat is not None else None
    if flat is None or inner is None or permutation(flat) != [0, 2, 1] or len(order) != 4:
        return None
    heads, merged, split = dims(inner.inputs[0]), dims(inner.outputs[0]), dims(value)
    if heads is None or merged is None or split is None or (len(heads), len(merged), len(split)) != (4, 3, 4):
        return None
    if not same_dims(merged[1:], heads[2:]) or not same_dims(split, (heads[0], heads[1], heads[3], heads[2])):
        return None
    source_value = inner.inputs[0]
    return None if source_value is None else (source_value, tuple((0, 1, 3, 2)[axis] for axis in order))


def lifted(value: ir.Value, shape: tuple[Any, ...]) -> Operand | None:
    """The operand of four dimensions, of that shape, of which the value ([B*H, .., ..]) is a view."""
    for before in views_back(value):
        if same_dims(dims(before), shape):
            return Operand(before)
        turned = turned_heads(before.producer(), shape)
        if turned is not None:
            return turned
    return None


def turned_heads(node: ir.Node | None, shape: tuple[Any, ...]) -> Operand | None:
    """What a Transpose among more axes, the others of size 1, turns into that shape of four."""
    order, wide = (
        (permutation(node), dims(node.outputs[0])) if node is not None and is_transpose(node) else (None, None)
    )
    if node is None or order is None or wide is None or not 4 <= len(wide) <= MOST_AXES:
        return None
    for kept in itertools.combinations(range(len(wide)), 4):
        rest = [size for axis, size in enumerate(wide) if axis not in kept]
        if all(size == 1 for size in rest) and same_dims([wide[axis] for axis in kept], shape):
            sources = [order[axis] for axis in kept]
            places = sorted(sources)
            before = [(dims(node.inputs[0]) or ())[axis] for axis in places]
            inner = next((v for v in views_back(node.inputs[0]) if same_dims(dims(v), before)), None)
            return None if inner is None else Operand(inner, tuple(places.index(axis) for axis in sources))
    return None


def is_transpose(node: ir.Node) -> bool:
    return standard(node, "Transpose") and node.inputs[0] is not None


def unrepeated(operand: Operand) -> Operand:
    """Without a repetition of each head for a group of queries."""
    merge = made_by(operand.value, "Reshape")
    wide = made_by(merge.inputs[0], "Expand", "Tile") if merge is not None else None
    narrow = made_by(wide.inputs[0], "Unsqueeze", "Reshape") if wide is not None else None
    if merge is None or wide is None or narrow is None or narrow.inputs[0] is None:
        return operand
    few, many, groups = dims(narrow.inputs[0]), dims(operand.value), dims(wide.outputs[0])
    if few is None or many is None or groups is None or (len(few), len(many), len(groups)) != (4, 4, 5):
        return operand
    axis = operand.order[1]
    lonely = dims(narrow.outputs[0])
    placed = same_dims(lonely, (*few[: axis + 1], 1, *few[axis + 1 :]))
    whole = (*few[: axis + 1], groups[axis + 1], *few[axis + 1 :])
    merged = (*few[:axis], product((few[axis], groups[axis + 1])), *few[axis + 1 :])
    if not placed or not same_dims(groups, whole) or not same_dims(many, merged):
        return operand
    found, factor = followed(narrow.inputs[0], operand.order)
    return found if found is not None and factor == 1.0 else replace(operand, value=narrow.inputs[0])


def rows_source(operand: Operand) -> ir.Value | None:
    """x [B, S, H*D] of which the operand's rows are a Reshape, None where there is no such."""
    split = made_by(operand.value, "Reshape")
    rows, shape = (dims(split.inputs[0]), dims(operand.value)) if split is not None else (None, None)
    if split is None or rows is None or shape is None or len(rows) != 3:
        return None
    return split.inputs[0] if same_dims(rows, (*shape[:2], product(shape[2:]))) else None


def as_rows(add: Inserter, operand: Operand) -> ir.Value:
    """[B, S, H*D] of an operand of rows."""
    shape = dims(operand.value) or ()
    known = rows_source(operand)
    return add.reshape(operand.value, [0, 0, -1], [*shape[:2], product(shape[2:])]) if known is None else known


def as_heads(add: Inserter, operand: Operand) -> ir.Value:
    """[B, H, S, D]"""
    return operand.value if operand.order == PLAIN else add.transpose(operand.value, operand.order)


def put_back(
    add: Inserter, rows: ir.Value, out: ir.Value, order: tuple[int, ...], shape: tuple[Any, ...]
) -> list[tuple[ir.Value, ir.Value]]:
    """(old, new) values: rows [B, S, H*D] in the place of `out`, which is Transpose([B, H, S, D] shape, order)."""
    batch, heads, length, width = (dims(out) or shape)[order.index(0)], *shape[1:]
    shape = (batch, heads, length, width)
    typed(rows, out.dtype)
    rows.meta["dims"] = (batch, length, product((heads, width)))
    transpose = only_user(out, "Transpose")
    if transpose is not None and tuple(order[axis] for axis in permutation(transpose) or ()) == ROWS:
        out, order = transpose.outputs[0], ROWS
    elif order == PLAIN and (wide := turned_back(out, shape)) is not None:
        sizes = dims(wide) or ()
        return [(wide, add.reshape(rows, [0, 0, *sizes[2:]], sizes))]
    if order == ROWS:
        merge = only_user(out, "Reshape")
        if merge is not None and same_dims(dims(merge.outputs[0]), (batch, length, product((heads, width)))):
            return [(merge.outputs[0], rows)]
    split = add.reshape(rows, [0, 0, heads, width], [batch, length, heads, width])
    if order != ROWS:
        split = add.transpose(split, [ROWS[axis] for axis in order])
    return [(out, split)]


def turned_back(out: ir.Value, shape: tuple[Any, ...]) -> ir.Value | None:
    """[B, S, .., H, .., D], with axes of size 1 in between, that views and a Transpose make of [B, H, S, D]."""
    batch, heads, length, width = shape
    for _ in range(MOST_VIEWS):
        node = only_user(out, "Transpose", *RESHAPES)
        if node is None:
            return None
        if not is_view(node):
            found = turned_heads(node, (batch, length, heads, width))
            sizes = dims(node.outputs[0]) or ()
            inner = found is not None and found.order == ROWS
            whole = inner and same_dims(sizes[:2], (batch, length)) and all(isinstance(n, int) for n in sizes[2:])
            return node.outputs[0] if whole else None
        out = node.outputs[0]
    return None
