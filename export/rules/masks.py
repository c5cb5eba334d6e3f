"""Reading an attention mask back from its ONNX graph, as `torch_path/rules/masks.py` does in FX: the terms that hide
keys, causality, or else a bias."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir

from trimaran.export.onnx_graph import Inserter, constant, dims, made_by, operand, same, scalar


@dataclass
class Mask:
    """keys: bool values [B, 1, 1, Sk], False where a key is hidden. causal: a query sees the keys up to its own
    position. bias: a float value of rank 4 to be added. masked_row: what a query without any key gives."""

    keys: list[ir.Value] = field(default_factory=list)
    causal: bool = False
    bias: ir.Value | None = None
    masked_row: str = "zero"


def read_condition(condition: ir.Value, batch: Any, queries: Any, keys: Any) -> Mask | None:
    """The meaning of a bool mask (True where a key is seen); None where it is neither key terms nor causality."""
    found = Mask()
    for term in conjunction(condition):
        shape = dims(term)
        if shape is None or len(shape) > 4:
            return None
        full = (1,) * (4 - len(shape)) + shape
        if full[1:3] == (1, 1) and same(full[0], batch) and same(full[3], keys) and len(shape) == 4:
            found.keys.append(term)
        elif is_causal(term) and same(queries, keys):
            found.causal = True
        else:
            return None
    return found


def conjunction(value: ir.Value) -> list[ir.Value]:
    """The terms whose conjunction the value is, broadcasts looked through, those that always hold left out."""
    if (node := made_by(value, "Expand", "Identity")) is not None and node.inputs[0] is not None:
        return conjunction(node.inputs[0])
    if (node := made_by(value, "And")) is not None:
        return [term for side in node.inputs if side is not None for term in conjunction(side)]
    return [] if always_true(value) else [value]


def always_true(value: ir.Value) -> bool:
    array = constant(value)
    if array is not None:
        return array.dtype == np.bool_ and bool(array.all())
    node = made_by(value, "GreaterOrEqual")
    if node is None or scalar(operand(node, 1)) != 0:
        return False
    offset = position_of(node.inputs[0])
    return offset is not None and offset >= 0


def position_of(value: ir.Value | None) -> int | None:
    """The offset where the value is `Range(start, n, 1) + constant` along one axis, None where it is anything else."""
    offset = 0
    while value is not None:
        if (node := made_by(value, "Range")) is not None:
            start, step = scalar(node.inputs[0]), scalar(node.inputs[2])
            return None if start is None or step != 1 else offset + int(start)
        if (node := made_by(value, "Unsqueeze", "Identity")) is not None:
            value = node.inputs[0]
        elif (node := made_by(value, "Add")) is not None:
            sides = [(scalar(side), other) for side, other in zip(node.inputs, reversed(node.inputs), strict=True)]
            known = [(number, other) for number, other in sides if number is not None and number == int(number)]
            if not known:
                return None
            offset, value = offset + int(known[0][0] or 0), known[0][1]
        else:
            return None
    return None


def is_causal(term: ir.Value) -> bool:
    """key position <= query position, both counted from 0."""
    if (node := made_by(term, "LessOrEqual")) is not None:
        key, query = node.inputs
    elif (node := made_by(term, "GreaterOrEqual")) is not None:
        query, key = node.inputs
    else:
        return False
    axes = [long_axis(side) for side in (key, query)]
    return position_of(key) == 0 and position_of(query) == 0 and axes == [1, 2]


def long_axis(value: ir.Value | None) -> int | None:
    """The one axis, counted from the end from 1, that is not of size 1."""
    long = [axis for axis, size in enumerate(reversed(dims(value) or ()), 1) if size != 1]
    return long[0] if len(long) == 1 else None


def key_inputs(mask: Mask, cache: dict[Any, Any], opset: int) -> tuple[ir.Value | None, ir.Value | None]:
    """(key_lengths [B] int32, key_mask [B, Sk] bool), inserted where the last term is known, once for all layers.

    A key mask need not be a prefix; the length is one past its last True, which bounds the keys that are visited.
    """
    if not mask.keys:
        return None, None
    key = tuple(mask.keys)
    if key not in cache:
        add = Inserter(first_user(mask.keys[-1]))
        rows = [squeeze(add, term, opset) for term in mask.keys]
        both = rows[0]
        for row in rows[1:]:
            both = add("And", both, row, dtype=ir.DataType.BOOL, shape=both.shape)
        ones = add("Cast", both, to=ir.DataType.INT32.value, dtype=ir.DataType.INT32, shape=both.shape)
        one = ir.tensor(np.array([1], np.int32))
        every = add("ConstantOfShape", add("Shape", both, dtype=ir.DataType.INT64), value=one, dtype=ir.DataType.INT32)
        positions = add("CumSum", every, add.constant(np.array(1, np.int64)), dtype=ir.DataType.INT32)  # 1, 2, 3, ...
        seen = add("Mul", positions, ones, dtype=ir.DataType.INT32, shape=both.shape)
        batch = None if both.shape is None else both.shape[:1]
        if opset >= 18:
            axis = add.constant(np.array([1], np.int64))
            lengths = add("ReduceMax", seen, axis, keepdims=0, dtype=ir.DataType.INT32, shape=batch)
        else:
            lengths = add("ReduceMax", seen, axes=[1], keepdims=0, dtype=ir.DataType.INT32, shape=batch)
        cache[key] = (lengths, both)
    return cache[key]  # type: ignore[no-any-return]


def squeeze(add: Inserter, term: ir.Value, opset: int) -> ir.Value:
    """[B, 1, 1, Sk] -> [B, Sk]"""
    shape = dims(term)
    assert shape is not None
    options: dict[str, Any] = {"dtype": ir.DataType.BOOL, "shape": [shape[0], shape[3]]}
    if opset >= 13:
        return add("Squeeze", term, add.constant(np.array([1, 2], np.int64)), **options)
    return add("Squeeze", term, axes=[1, 2], **options)


def first_user(value: ir.Value) -> ir.Node:
    """The node before which something that reads the value may be inserted; the graph is sorted afterwards."""
    return next(iter(value.uses())).node
