"""What norms have in common: the addition before the norm, a residual connection, that the op takes in."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

from trimaran.export.onnx_graph import Inserter, dims, made_by, replace_value, same_dims, source, used
from trimaran.export.rules.written_norms import Norm
from trimaran.export.schemas import DOMAIN
from trimaran.kernels.contract import Op


def added(x: ir.Value, within: Any) -> tuple[ir.Value, ir.Value] | None:
    """The two tensors of x's own shape and dtype whose sum it is, None where it is none, or one of another graph: what
    the norm gives in a body would be no value there."""
    node = made_by(x, "Add")
    if (
        node is None
        or node.graph is not within
        or any(v is None or v.dtype != x.dtype or not same_dims(dims(v), dims(x)) for v in node.inputs)
    ):
        return None
    return node.inputs[0], node.inputs[1]  # type: ignore[return-value]


def known_early(value: ir.Value | None, depth: int = 6) -> bool:
    """Made of initializers and inputs alone, so that it waits for nothing that a norm adds up."""
    node = value.producer() if value is not None else None
    return node is None or (depth > 0 and all(known_early(part, depth - 1) for part in node.inputs))


def rewrite_norm(op: Op, match: Norm, attrs: dict[str, Any]) -> None:
    """Replace the norm by the op; an addition before it goes in, and its sum, where others want it, comes out."""
    anchor = match.end.producer()
    assert anchor is not None
    add = Inserter(anchor)
    x, residual, total = match.x, match.residual, match.total
    if match.shift is not None:
        x = add("Add", x, match.shift, dtype=x.dtype, shape=dims(x))
    parts = added(x, anchor.graph) if residual is None and all(map(known_early, (match.weight, match.bias))) else None
    interior = between(x, match.end) if parts is not None else set()
    if parts is not None:
        total = source(x)
        x, residual = parts
        assert total is not None
        if not total.is_graph_output() and all(use.node in interior for use in total.uses()):
            total = None
    if total is not None and not used(total):
        total = None
    vectors = [
        vector(add, value, x) for value in ((match.weight, match.bias) if match.kind == "layer" else (match.weight,))
    ]
    new = add.node(
        op.name, [x, *vectors, residual], attrs, domain=DOMAIN, num_outputs=1 if total is None else 2,
        version=op.version, name=anchor.name,
    )  # fmt: skip
    replace_value(match.end, new.outputs[0])
    if total is not None:
        replace_value(total, new.outputs[1])


def vector(add: Inserter, value: ir.Value | None, x: ir.Value) -> ir.Value | None:
    """The parameter as [N]"""
    shape = dims(value)
    return value if value is None or shape is None or len(shape) == 1 else add.reshape(value, [-1], shape[-1:])


def between(x: ir.Value, end: ir.Value) -> set[ir.Node]:
    """The nodes that lead from x to the end and nowhere else: they go with the norm."""
    last = end.producer()
    assert last is not None
    start = source(x)
    inside, todo = {last}, [last]
    while todo:
        for part in todo.pop().inputs:
            node = part.producer() if part is not None else None
            if node is None or node in inside or part is start:
                continue
            if all(use.node in inside for out in node.outputs for use in out.uses()) and not any(
                out.is_graph_output() for out in node.outputs
            ):
                inside.add(node)
                todo.append(node)
    return inside
