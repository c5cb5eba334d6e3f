"""Means, squares and the casts around them: what norms are written out with."""

from __future__ import annotations

from typing import Any

from torch.fx import Node

from trimaran.torch_path.graph import argument, aten, called, is_tensor, same, value

CASTS = (aten.to.dtype, aten.type_as.default)


def mean_of(node: Any) -> Any:
    """x of its mean over the last dimension, which is kept; None for anything else"""
    if not called(node, aten.mean.dim) or argument(node, 2, "keepdim", False) is not True or "dtype" in node.kwargs:
        return None
    x, axes = node.args[:2]
    return x if [axis % value(x).dim() for axis in axes] == [value(x).dim() - 1] else None


def square_of(node: Any) -> Any:
    """x of x^2, None for anything else"""
    if called(node, aten.pow.Tensor_Scalar):
        return node.args[0] if node.args[1] == 2 else None
    square = called(node, aten.square.default) or (called(node, aten.mul.Tensor) and node.args[0] is node.args[1])
    return node.args[0] if square else None


def uncast(node: Any) -> Any:
    """A tensor before its cast to another floating dtype."""
    wider = called(node, *CASTS) and is_tensor(node.args[0]) and value(node.args[0]).dtype.is_floating_point
    return node.args[0] if wider else node


def vector_of(node: Any, x: Node) -> Node | None:
    """A weight or bias [N] for rows of x [.., N], in x's dtype where there are casts to choose from; None for anything
    else."""
    while called(node, *CASTS) and value(node).dtype != value(x).dtype:
        node = node.args[0]
    return node if is_tensor(node, rank=1) and same(value(node).shape[0], value(x).shape[-1]) else None
