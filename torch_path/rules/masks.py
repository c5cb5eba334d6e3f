"""Reading an attention mask back: which part hides keys, which part is causal, and what is neither.

transformers builds one bool mask [B, 1, Sq, Sk] from conditions on positions: `True & (q >= 0) & padding[b, k]`, with
`k <= q` for a decoder. Its conjunction is walked; terms that always hold are dropped; a term that does not vary with
the query is a key mask. What is left over stays what it is: an additive bias.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Graph, Node

from trimaran.torch_path.graph import argument, aten, call, called, dtype_of, is_tensor, same, value

_AND = (aten.__and__.Tensor, aten.bitwise_and.Tensor, aten.logical_and.default)
_RESHAPING = (aten.unsqueeze.default, aten.expand.default, aten.view.default, aten.reshape.default)


@dataclass
class Mask:
    """What an attention mask says: bool terms [B, 1, 1, Sk] that hide keys, causality, and a bias [.., .., .., Sk] to
    be added (a float mask, or a bool one that says something else, where True lets a key be seen)."""

    keys: list[Node] = field(default_factory=list)
    causal: bool = False
    bias: Node | None = None


def read_mask(mask: Any, q: Node, k: Node) -> Mask | str:
    """The meaning of sdpa's `attn_mask` for q [B, H, Sq, D] and k [B, H, Sk, D]; a str is the reason why it has none
    here."""
    if mask is None:
        return Mask()
    (batch, heads, queries, _), keys = value(q).shape, value(k).shape[2]
    if not is_tensor(mask) or not 2 <= value(mask).dim() <= 4:
        return "the mask is not a tensor of 2 to 4 dimensions"
    shape = (1,) * (4 - value(mask).dim()) + tuple(value(mask).shape)
    broadcast = all(
        same(size, 1) or same(size, full) for size, full in zip(shape, (batch, heads, queries), strict=False)
    )
    if not broadcast or not same(shape[3], keys):
        return f"the mask's shape {list(shape)} is not provably [1|B, 1|H, 1|Sq, Sk]"
    if value(mask).dtype != torch.bool:
        dtypes = dtype_of(mask), dtype_of(q)
        return Mask(bias=mask) if dtypes[0] == dtypes[1] else f"the mask is {dtypes[0]} and q is {dtypes[1]}"
    found = Mask()
    for term in conjunction(mask):
        size = (1,) * (4 - value(term).dim()) + tuple(value(term).shape)
        if same(size[1], 1) and same(size[2], 1) and same(size[3], keys) and same(size[0], batch):
            found.keys.append(term)
        elif is_causal(term) and same(queries, keys):
            found.causal = True
        else:
            return Mask(bias=mask)
    return found


def conjunction(node: Node) -> list[Node]:
    """The terms whose conjunction the mask is, broadcasts looked through, those that always hold left out."""
    if called(node, aten.expand.default) or adds_leading_axis(node):
        return conjunction(node.args[0])  # type: ignore[arg-type]
    if called(node, *_AND):
        return [term for side in node.args for term in conjunction(side)]  # type: ignore[arg-type]
    return [] if always_true(node) else [node]


def adds_leading_axis(node: Node) -> bool:
    """An unsqueeze that does what broadcasting would do."""
    if not called(node, aten.unsqueeze.default) or not isinstance(node.args[1], int) or node.args[1] < 0:
        return False
    return all(same(size, 1) for size in value(node).shape[: node.args[1]])


def always_true(node: Node) -> bool:
    if called(node, aten.ones.default, aten.new_ones.default, aten.ones_like.default):
        return True
    if called(node, aten.full.default, aten.new_full.default, aten.full_like.default):
        return argument(node, 2 if called(node, aten.new_full.default) else 1, "fill_value") is True
    if called(node, aten.ge.Scalar) and node.args[1] == 0:
        return (offset := position_of(node.args[0])) is not None and offset >= 0
    return False


def position_of(node: Any) -> int | None:
    """The offset where the node is `arange(n) + offset` along one axis, None where it is anything else."""
    offset = 0
    while is_tensor(node):
        if called(node, aten.arange.default):
            return offset
        if called(node, aten.arange.start) and isinstance(node.args[0], int):
            return offset + node.args[0]
        if called(node, aten.add.Tensor) and isinstance(node.args[1], int):
            offset += node.args[1]
        elif not called(node, *_RESHAPING):
            return None
        node = node.args[0]
    return None


def axis_of(node: Any) -> int | None:
    """The one axis (from the end) along which the tensor has more than one element, None where that is not known."""
    long = [axis for axis, size in enumerate(reversed(value(node).shape), 1) if not same(size, 1)]
    return long[0] if len(long) == 1 else None


def is_causal(term: Node) -> bool:
    """key position <= query position, both counted from 0."""
    if called(term, aten.le.Tensor):
        key, query = term.args
    elif called(term, aten.ge.Tensor):
        query, key = term.args
    else:
        return False
    if position_of(key) != 0 or position_of(query) != 0:
        return False
    return axis_of(key) == 1 and axis_of(query) == 2


def key_inputs(graph: Graph, mask: Mask) -> tuple[Node | None, Node | None]:
    """(key_lengths [B] int32, key_mask [B, Sk] bool) of the mask's key terms, inserted after them, once for all layers.

    A key mask need not be a prefix; the length is one past its last True, which bounds the keys that are visited.
    """
    if not mask.keys:
        return None, None
    last = max(mask.keys)
    known = last.meta.setdefault("trimaran_key_inputs", {})
    if tuple(mask.keys) not in known:
        with graph.inserting_before(last.next):
            both = _rows(graph, mask.keys[0])
            for term in mask.keys[1:]:
                both = call(graph, aten.logical_and.default, both, _rows(graph, term))
            ones = call(graph, aten.ones_like.default, both, dtype=torch.int32)
            positions = call(graph, aten.cumsum.default, ones, 1, dtype=torch.int32)
            lengths = call(graph, aten.amax.default, call(graph, aten.mul.Tensor, positions, both), [1])
        known[tuple(mask.keys)] = (lengths, both)
    return known[tuple(mask.keys)]  # type: ignore[no-any-return]


def _rows(graph: Graph, term: Node) -> Node:
    """[B, 1, 1, Sk], leading axes of size 1 perhaps missing -> [B, Sk]"""
    while value(term).dim() > 2:
        term = call(graph, aten.select.int, term, 1, 0)
    return term if value(term).dim() == 2 else call(graph, aten.unsqueeze.default, term, 0)
