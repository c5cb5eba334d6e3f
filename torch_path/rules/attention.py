"""aten.scaled_dot_product_attention, with the head split before it and the head merge after it.

Where q, k and v are each `[B, S, H*D] -> view [B, S, H, D] -> transpose(1, 2)`, the op reads those rows and writes
rows, and the transposes on both sides disappear; otherwise it works on [B, H, S, D].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, Node

from trimaran.kernels.attention import MAX_HEAD_DIM, attention
from trimaran.torch_path.graph import (
    RESHAPES,
    argument,
    aten,
    axes_of,
    call,
    called,
    dtype_of,
    is_tensor,
    mutation_between,
    replace,
    same,
    same_shape,
    value,
)
from trimaran.torch_path.ops import TORCH_OPS
from trimaran.torch_path.rules.masks import Mask, key_inputs, read_mask

ATTENTION_ANCHORS = (aten.scaled_dot_product_attention.default, aten.softmax.int)


@dataclass(frozen=True)
class Attention:
    q: Node  # [B, H, Sq, D], as sdpa has it
    k: Node
    v: Node
    rows: tuple[Node, Node, Node] | None  # the same as [B, S, heads * D], where they come from there
    scale: float
    mask: Mask


def check_attention(node: Node) -> Attention | str:
    if called(node, aten.softmax.int):
        return "attention written out around a softmax is not recognized yet, only scaled_dot_product_attention is"
    q, k, v = node.args[:3]
    dropout, is_causal = argument(node, 4, "dropout_p", 0.0), argument(node, 5, "is_causal", False)
    if dropout != 0.0:
        return f"it drops out attention weights with probability {dropout}"
    problem = check_operands(node, q, k, v)
    if problem is not None:
        return problem
    assert isinstance(q, Node)
    assert isinstance(k, Node)
    assert isinstance(v, Node)
    scale = node.kwargs.get("scale")
    if scale is None:
        scale = value(q).shape[3] ** -0.5
    if not isinstance(scale, (int, float)):
        return "the scale is computed at run time"
    mask = read_mask(argument(node, 3, "attn_mask"), q, k)
    if isinstance(mask, str):
        return mask
    if is_causal:
        if not same(value(q).shape[2], value(k).shape[2]):
            return "is_causal with different numbers of queries and keys counts both from 0, the op from the end"
        mask.causal = True
    rows = row_sources(node, q, k, v)
    return Attention(q, k, v, rows, float(scale), mask)


def check_operands(node: Node, q: Any, k: Any, v: Any) -> str | None:
    """The reason why these are not operands of the op, None where they are."""
    for name, operand in (("q", q), ("k", k), ("v", v)):
        if not is_tensor(operand, rank=4):
            return f"{name} has {value(operand).dim()} dimensions, expected [B, H, S, D]"
        if dtype_of(operand) not in attention.types["T"] or dtype_of(operand) != dtype_of(q):
            return f"{name} is {dtype_of(operand)}, supported are {', '.join(attention.types['T'])}, all alike"
    head_dim, heads, kv_heads = value(q).shape[3], value(q).shape[1], value(k).shape[1]
    if not all(isinstance(size, int) for size in (head_dim, heads, kv_heads)):
        return "the number of heads or the head dimension is not known before run time"
    if head_dim > MAX_HEAD_DIM:
        return f"the head dimension is {head_dim}, supported are up to {MAX_HEAD_DIM}"
    if not same(value(v).shape[3], head_dim):
        return f"v has a head dimension of {value(v).shape[3]}, q and k of {head_dim}"
    if heads != kv_heads and not node.kwargs.get("enable_gqa", False):
        return f"q has {heads} heads and k {kv_heads}, without enable_gqa"
    return None


def row_sources(node: Node, q: Node, k: Node, v: Node) -> tuple[Node, Node, Node] | None:
    sources = [row_source(operand) for operand in (q, k, v)]
    if any(source is None or mutation_between(source, node) for source in sources):
        return None
    return tuple(sources)  # type: ignore[return-value]


def row_source(operand: Node) -> Node | None:
    """x [B, S, H*D] where the operand is `x.view(B, S, H, D).transpose(1, 2)`, else None."""
    if not called(operand, aten.transpose.int) or axes_of(operand) != {1, 2}:
        return None
    split = operand.args[0]
    if not called(split, *RESHAPES) or not is_tensor(split.args[0], rank=3):  # type: ignore[union-attr]
        return None
    rows: Node = split.args[0]  # type: ignore[union-attr, assignment]
    (_, _, heads, head_dim), shape = value(split).shape, value(rows).shape
    merged = isinstance(shape[2], int) and shape[2] == heads * head_dim
    return rows if merged and same_shape(shape[:2], value(split).shape[:2]) else None


def rewrite_attention(graph: Graph, node: Node, match: Attention) -> None:
    target = TORCH_OPS["attention"].overload
    lengths, keys = key_inputs(graph, match.mask)
    bias = match.mask.bias
    if bias is not None:
        bias = additive(graph, bias, value(match.q).dtype)
    attrs: dict[str, Any] = {"scale": match.scale, "causal": match.mask.causal}
    if match.rows is None:
        out = call(graph, target, match.q, match.k, match.v, bias, lengths, keys, **attrs)
    else:
        heads, kv_heads, head_dim = value(match.q).shape[1], value(match.k).shape[1], value(match.q).shape[3]
        attrs |= {"num_heads": heads, "kv_num_heads": kv_heads}
        rows = call(graph, target, *match.rows, bias, lengths, keys, **attrs)
        split = call(graph, aten.unflatten.int, rows, 2, [heads, head_dim])
        out = call(graph, aten.transpose.int, split, 1, 2)
    replace(node, out)
    graph.erase_node(node)


def additive(graph: Graph, mask: Node, dtype: torch.dtype) -> Node:
    """The mask as a bias of rank 4: a bool one becomes 0 where True and -inf where False."""
    if value(mask).dtype == torch.bool:
        hidden = call(graph, aten.logical_not.default, mask)
        zeros = call(graph, aten.zeros_like.default, mask, dtype=dtype)
        mask = call(graph, aten.masked_fill.Scalar, zeros, hidden, float("-inf"))
    while value(mask).dim() < 4:
        mask = call(graph, aten.unsqueeze.default, mask, 0)
    return mask
