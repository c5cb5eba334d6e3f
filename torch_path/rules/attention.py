"""Attention, as scaled_dot_product_attention or written out around a softmax, as one op.

q, k and v are taken from where they came: heads that were repeated for grouped queries are not, copies are not made, a
scale is folded in, and where a head is a slice of a row [B, S, H*D] in memory the op reads those rows and writes rows,
so that the transposes on both sides disappear; otherwise it works on [B, H, S, D] of any strides.
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
    call,
    called,
    dtype_of,
    is_tensor,
    replace,
    same,
    same_shape,
    value,
)
from trimaran.torch_path.ops import TORCH_OPS
from trimaran.torch_path.rules.masks import Mask, MaskReader, Term, bias_input, imitated, key_inputs
from trimaran.torch_path.rules.scores import Scores, is_last_axis, read_scores, scaled_by, weighted_values

ATTENTION_ANCHORS = (aten.scaled_dot_product_attention.default, aten.softmax.int)
_COPIES = (aten.contiguous.default, aten.clone.default)
_CASTS = (aten.to.dtype, aten.type_as.default)
_VIEWS = (*RESHAPES, aten.transpose.int, aten.unflatten.int, *_COPIES)


@dataclass
class Attention:
    """What an attention is made of. q, k and v are terms [B, H or Hkv, S, D], or [B*H, S, D]."""

    end: Node  # what is replaced
    q: Term
    k: Term
    v: Term
    scale: float
    softcap: float
    mask: Mask


def check_attention(node: Node) -> Attention | str | None:
    return from_softmax(node) if node.target is aten.softmax.int else from_sdpa(node)


def from_sdpa(node: Node) -> Attention | str:
    q, k, v = node.args[:3]
    dropout, is_causal = argument(node, 4, "dropout_p", 0.0), argument(node, 5, "is_causal", False)
    if dropout != 0.0:
        return f"it drops out attention weights with probability {dropout}"
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not is_tensor(x, rank=4):
            return f"{name} has {value(x).dim()} dimensions, expected [B, H, S, D]"
    scale = node.kwargs.get("scale")
    if scale is None:
        scale = value(q).shape[3] ** -0.5
    if not isinstance(scale, (int, float)):
        return "the scale is computed at run time"
    reader = MaskReader(value(q).shape[:3], value(k).shape[2], value(q).dtype)
    problem = read_argument(reader, argument(node, 3, "attn_mask"), q)  # type: ignore[arg-type]
    if problem is not None:
        return problem
    if is_causal:
        if not same(value(q).shape[2], value(k).shape[2]):
            return "is_causal with different numbers of queries and keys counts both from 0, the op from the end"
        reader.mask.right = 0
    grouped = node.kwargs.get("enable_gqa", False) or value(k).shape[1] == value(v).shape[1] == 1
    if not grouped and not same(value(q).shape[1], value(k).shape[1]):
        return f"q has {value(q).shape[1]} heads and k {value(k).shape[1]}, without enable_gqa"
    return with_operands(node, (q, k, v), float(scale), 0.0, reader.mask)


def read_argument(reader: MaskReader, mask: Any, q: Node) -> str | None:
    """Read sdpa's attn_mask."""
    if mask is None:
        return None
    if value(mask).dtype == torch.bool:
        return reader.seen(Term(mask))
    return reader.added(Term(mask), dtype_of(q))


def from_softmax(node: Node) -> Attention | str | None:
    product = weighted_values(node)
    if product is None or isinstance(product, str):
        return product
    end, v = product
    scores = read_scores(node.args[0])
    if not isinstance(scores, Scores):
        return scores or "its scores are no product of queries and keys"
    if not is_last_axis(node):
        return "the softmax is not over the keys"
    shape = value(node).shape
    if len(shape) not in (3, 4):
        return f"its scores have {len(shape)} dimensions, expected [B, H, Sq, Sk] or [B*H, Sq, Sk]"
    rows = shape[:3] if len(shape) == 4 else (1, *shape[:2])  # heads of a batch of one
    mask = read_terms(MaskReader(rows, shape[-1], value(scores.product).dtype), scores, v)
    if mask is None:
        mask = read_terms(MaskReader(rows, shape[-1], value(scores.product).dtype, splits=False), scores, v)
    if not isinstance(mask, Mask):
        return mask or "its scores are masked with different numbers"
    sources = [split_heads(x, len(shape)) for x in (scores.q, scores.k, v)]
    return with_operands(end, sources, scores.scale, scores.softcap, mask)


def read_terms(reader: MaskReader, scores: Scores, v: Any) -> Mask | str | None:
    """Read what is added to scores, or filled in; None where a row without keys would be no mean of all."""
    for term in scores.terms:
        problem = reader.added(term, dtype_of(v))
        if problem is not None:
            return problem
    for term, fill in scores.seen:
        reader.filled(fill)
        problem = reader.seen(term)
        if problem is not None:
            return problem
    return reader.mask if reader.consistent() else None


def split_heads(node: Any, rank: int) -> Any:
    """[B, H, S, D] where the node is [B*H, S, D], a view of that, and the scores have four dimensions."""
    source = node
    while rank == 4 and is_tensor(source, rank=3) and called(source, *RESHAPES, *_COPIES):
        source = source.args[0]
    split = is_tensor(source, rank=4) and same_shape(value(source).shape[2:], value(node).shape[1:])
    return source if split else node


def with_operands(end: Node, sources: Any, scale: float, softcap: float, mask: Mask) -> Attention | str:
    """The match, or the reason why these are not operands of the op."""
    q, k, v = sources
    rank = value(q).dim() if is_tensor(q) else 0
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not is_tensor(x, rank=rank):
            return f"{name} has {value(x).dim()} dimensions and q {rank}"
    wide = dtype_of(q) == dtype_of(k) == "float32" and dtype_of(v) in ("float16", "bfloat16")
    for name, x in (("q", q), ("k", k), ("v", v)):
        if dtype_of(x) not in attention.types["T"] or (dtype_of(x) != dtype_of(q) and not wide):
            return f"{name} is {dtype_of(x)}, supported are {', '.join(attention.types['T'])}, all alike"
    problem = broadcast_of(value(q).shape, value(k).shape, value(v).shape)
    if problem is not None:
        return problem
    head_dim = value(q).shape[-1]
    if not isinstance(head_dim, int) or head_dim > MAX_HEAD_DIM:
        return f"the head dimension is {head_dim}, supported are up to {MAX_HEAD_DIM}"
    if not same(value(v).shape[-1], head_dim):
        return f"v has a head dimension of {value(v).shape[-1]}, q and k of {head_dim}"
    (k, k_cast), (v, v_cast) = uncast(k), uncast(v)
    narrow = unrepeated(k), unrepeated(v)
    if rank == 4 and same(value(narrow[0]).shape[1], value(narrow[1]).shape[1]):
        k, v = narrow
    (q, q_scale), (k, k_scale) = scaled_below(q, ()), scaled_below(k, k_cast)
    if wide:
        q, k = (before_fp32(term, dtype_of(v)) for term in (q, k))
        if q is None or k is None:
            return "q and k are float32 and v is not"
    return Attention(end, q, k, Term(v, v_cast), scale * q_scale * k_scale, softcap, mask)


def before_fp32(term: Term, dtype: str) -> Term | None:
    """A tensor of this dtype before it was cast to fp32, in which the op multiplies queries and keys anyway (GPT-J);
    None where it was not."""
    casts = [view for view in term.views if called(view, *_CASTS)]
    source, views = term.node, tuple(view for view in term.views if view not in casts)
    while dtype_of(source) == "float32" and called(source, *_VIEWS, *_CASTS):
        casts, views = ([*casts, source], views) if called(source, *_CASTS) else (casts, (source, *views))
        source = source.args[0]  # type: ignore[assignment]
    return Term(source, views) if dtype_of(source) == dtype and {*map(dtype_of, casts)} == {"float32"} else None


def broadcast_of(q: Any, k: Any, v: Any) -> str | None:
    """The reason why these shapes [.., S, D] need more of broadcasting than grouped heads do."""
    for name, other in (("k", k), ("v", v)):
        if not same(q[0], other[0]):
            return f"q has a batch of {q[0]} and {name} of {other[0]}"
    heads, kv_heads = (shape[1] if len(shape) == 4 else 1 for shape in (q, k))
    if len(v) == 4 and not same(kv_heads, v[1]):
        return f"k has {kv_heads} heads and v {v[1]}"
    whole = same(heads, kv_heads) or (isinstance(heads, int) and isinstance(kv_heads, int) and heads % kv_heads == 0)
    return None if whole else f"q has {heads} heads and k {kv_heads}, which do not share them evenly"


def uncast(node: Node) -> tuple[Node, tuple[Node, ...]]:
    """A tensor before copies and casts to another dtype, and the casts."""
    casts: tuple[Node, ...] = ()
    while called(node, *_COPIES, *_CASTS):
        casts = (node, *casts) if called(node, *_CASTS) else casts
        node = node.args[0]  # type: ignore[assignment]
    return node, casts


def unrepeated(node: Node) -> Node:
    """x [B, Hkv, S, D] where each of its heads was repeated for a group of queries."""
    if called(node, aten.repeat_interleave.self_int) and argument(node, 2, "dim") == 1:
        return node.args[0]  # type: ignore[return-value]
    wide = node.args[0] if called(node, *RESHAPES) else None
    narrow = wide.args[0] if called(wide, aten.expand.default) else None  # type: ignore[union-attr]
    if not called(narrow, aten.unsqueeze.default) or narrow.args[1] != 2 or not is_tensor(wide, rank=5):  # type: ignore[union-attr]
        return node
    source: Node = narrow.args[0]  # type: ignore[union-attr, assignment]
    merged = all(same(value(node).shape[axis], value(source).shape[axis]) for axis in (0, 2, 3))
    return source if merged and is_tensor(source, rank=4) else node


def scaled_below(node: Node, casts: tuple[Node, ...]) -> tuple[Term, float]:
    """The operand, with casts yet to be made, without a factor that stands above or below its views, and the factor."""
    while called(node, *_COPIES):
        node = node.args[0]  # type: ignore[assignment]
    source, views = node, casts
    while called(source, *_VIEWS):
        source, views = source.args[0], (source, *views)  # type: ignore[assignment]
    plain, factor = scaled_by(source)
    return (Term(plain, views), factor) if factor != 1.0 else (Term(node, casts), 1.0)


def operand(graph: Graph, term: Term) -> Node:
    node = term.node
    for view in term.views:
        node = imitated(graph, node, view)
    return node


def rewrite_attention(graph: Graph, node: Node, match: Attention) -> None:
    with graph.inserting_before(match.end):
        out = attend(graph, match)
        if value(match.end).dim() == 3:
            three = value(match.q.views[-1] if match.q.views else match.q.node).dim() == 3
            out = call(graph, aten.squeeze.dim, out, 0) if three else call(graph, aten.flatten.using_ints, out, 0, 1)
    replace(match.end, out)
    graph.erase_node(match.end)


def attend(graph: Graph, match: Attention) -> Node:
    """The op's call; its output as [B, H, Sq, D]."""
    target, mask = TORCH_OPS["attention"].overload, match.mask
    q, k, v = (operand(graph, term) for term in (match.q, match.k, match.v))
    if value(q).dim() == 3:
        q, k, v = (call(graph, aten.unsqueeze.default, x, 0) for x in (q, k, v))
    masks = (bias_input(graph, mask, q, k), *key_inputs(graph, mask, q))
    attrs: dict[str, Any] = {
        "scale": match.scale,
        "causal": mask.right == 0,
        "masked_row": "mean" if mask.finite else "zero",
    }
    attrs |= {
        "window_left": mask.left,
        "window_right": max(mask.right, -1) if mask.right else -1,
        "softcap": match.softcap,
    }
    if not all(map(in_rows, (q, k, v))):
        return call(graph, target, q, k, v, *masks, **attrs)
    heads, kv_heads, head_dim = value(q).shape[1], value(k).shape[1], value(q).shape[3]
    rows = [call(graph, aten.flatten.using_ints, call(graph, aten.transpose.int, x, 1, 2), 2) for x in (q, k, v)]
    out = call(graph, target, *rows, *masks, num_heads=heads, kv_num_heads=kv_heads, **attrs)
    return call(graph, aten.transpose.int, call(graph, aten.unflatten.int, out, 2, [heads, head_dim]), 1, 2)


def in_rows(x: Node) -> bool:
    """The heads of a position [B, H, S, D] stand side by side in memory."""
    heads, head_dim, strides = value(x).shape[1], value(x).shape[3], value(x).stride()
    return isinstance(heads, int) and same(strides[3], 1) and (heads == 1 or same(strides[1], head_dim))
