"""onnxruntime's GroupQueryAttention, as transformers' exporter, onnxscript and model builders write it.

    query [B, S, H*D], key and value [B, S, Hkv*D], or all side by side in query; past keys and values [B, Hkv, P, D];
    seqlens_k [B], the index of each row's last key; total_sequence_length; cos and sin [max, R/2]; positions; a bias

It is causal. Its present may be one buffer with its past, written in place at each row's length: no op here does that.
So with a past it is rewritten only where the file itself says that every row is as long as past and new keys together:
then the present is the one behind the other.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from trimaran.export.onnx_graph import Inserter, attribute, dims, dtype_of, operand, readable, same, used
from trimaran.export.report import Fault
from trimaran.export.rules.attention import Attention
from trimaran.export.rules.attention_operator import (
    Prepared,
    checked_shapes,
    operator_mask,
    operator_operands,
    split_shape,
)
from trimaran.export.rules.masks import MaskReader, tighter
from trimaran.export.rules.positions import line_of
from trimaran.export.schemas import DOMAIN
from trimaran.export.shapes import numbers, typed
from trimaran.kernels.rotary_embedding import rotary_embedding
from trimaran.torch_path.lines import plain

PORTS = 11  # inputs that are read; later ones are sinks, scales of a quantized cache, norms of q and k
KNOWN = {"num_heads", "kv_num_heads", "scale", "softcap", "local_window_size", "do_rotary", "rotary_interleaved"}


def from_group(node: ir.Node, opset: int) -> Prepared | str:
    q, k, v, past_k, past_v, last, total, cos, sin, positions, bias = (operand(node, i) for i in range(PORTS))
    heads, kv_heads = attribute(node, "num_heads", 0), attribute(node, "kv_num_heads", 0)
    shape = dims(q)
    if q is None or last is None or shape is None or len(shape) != 3 or not heads or not kv_heads:
        return f"q has shape {readable(shape)}, expected [B, S, H*D], and lengths"
    if (problem := unknown(node)) is not None:
        return problem
    sizes = split_sizes(node, q, k, v, heads, kv_heads)
    if isinstance(sizes, str):
        return sizes
    queries, keys = sizes
    past = None if past_k is None else dims(past_k)
    if past_k is not None and (past is None or len(past) != 4 or past != dims(past_v)):
        return "the shapes of past keys and values are not known, or differ"
    if past is not None and len(node.outputs) < 3:
        return "it has a past and no present, which onnxruntime reads in its own way"
    whole = keys[2] if past is None else plain(past[2] + keys[2])
    if (problem := not_appended(past, whole, last, total)) is not None:
        return problem
    problem = checked_shapes((queries, keys, keys), whole, *(value for value in (q, k, v) if value is not None))
    if problem is not None:
        return problem
    if attribute(node, "do_rotary", 0) and (problem := bad_tables(q, cos, sin, positions, queries, past)) is not None:
        return problem
    reader = MaskReader((queries[0], heads, queries[2], whole))
    if (problem := operator_mask(reader, bias, q)) is not None:
        return problem
    if reader.mask.fills:
        reader.mask.fills = {-np.inf}  # rows without any key are zero, by whatever they are masked
    reader.mask.right = 0
    window = attribute(node, "local_window_size", -1)
    reader.mask.left = tighter(reader.mask.left, window - 1 if window > 0 else None)
    scale = float(attribute(node, "scale", 0.0)) or queries[3] ** -0.5

    def make(add: Inserter) -> Attention:
        rows = [q, k, v] if k is not None else apart(add, q, heads, kv_heads, queries[3], opset)
        if attribute(node, "do_rotary", 0):
            rows[:2] = turned(add, node, rows, queries, past)
        lengths = None if says_all(last, whole) else add("Add", last, add.constant(np.array(1, np.int32)),
                                                         dtype=ir.DataType.INT32, shape=dims(last))  # fmt: skip
        past_pair = (past_k, past_v)
        return operator_operands(node, rows, (heads, kv_heads), past_pair, lengths, scale, reader.mask, add)

    return Prepared(make)


def unknown(node: ir.Node) -> str | None:
    """What the operator has that no op here does."""
    more = [i for i in range(PORTS, len(node.inputs)) if node.inputs[i] is not None]
    if more or (len(node.outputs) > 3 and used(node.outputs[3])):
        return "it has sinks, a quantized cache, norms of q and k, or gives its scores"
    others = {name: attr.value for name, attr in node.attributes.items() if name not in KNOWN}
    given = [name for name, value in others.items() if value not in (0, 0.0, -1, "NONE", b"NONE")]
    return f"it has an attribute {given[0]!r}" if [n for n in given if n != "qk_norm_epsilon"] else None


def split_sizes(node: ir.Node, q: ir.Value, k: ir.Value | None, v: ir.Value | None, heads: int, kv_heads: int) -> Any:
    """[B, H, S, D] of q and [B, Hkv, S, D] of k and v."""
    shape = dims(q) or ()
    if k is None:
        width = shape[2] // (heads + 2 * kv_heads) if isinstance(shape[2], int) else None
        if width is None or width * (heads + 2 * kv_heads) != shape[2]:
            return f"q has shape {readable(shape)}, expected [B, S, (H + 2 Hkv)*D]"
        return (shape[0], heads, shape[1], width), (shape[0], kv_heads, shape[1], width)
    queries = split_shape(q, heads, True)
    keys, values = (split_shape(x, kv_heads, True) if len(dims(x) or ()) == 3 else None for x in (k, v))  # type: ignore[arg-type]
    if queries is None or keys is None or keys != values or not same(keys[2], queries[2]):
        found = f"q {readable(shape)}, k {readable(dims(k))} and v {readable(dims(v))}"
        return f"the heads of {found} are not known, or differ"
    return queries, keys


def not_appended(past: Any, whole: Any, last: ir.Value, total: ir.Value | None) -> str | None:
    """Why the present is not known to be the new keys behind the past ones."""
    said = (numbers(total) or [None])[0] if total is not None else None
    if past is None:
        known = isinstance(said, int) and isinstance(whole, int) and said != whole
        return f"it has {whole} keys and a total length of {said}" if known else None
    if not same(said, whole):
        found = "unknown" if said is None else said
        sizes = f"of {past[2]} keys, the total length is {found}"
        return Fault.of(f"its present may be one buffer with its past ({sizes}), written in place", total)
    return (
        None if says_all(last, whole) else Fault.of("its rows are not known to be as long as past and new keys", last)
    )


def says_all(last: ir.Value, whole: Any) -> bool:
    """Whether the last key of every row is the last one there is."""
    line = line_of(last)
    return line is not None and not line.steps and same(plain(line.offset + 1), whole)


def bad_tables(q: ir.Value, cos: Any, sin: Any, positions: Any, queries: Any, past: Any) -> str | None:
    shapes = dims(cos), dims(sin)
    width = shapes[0][1] if shapes[0] is not None and len(shapes[0]) == 2 else None
    if shapes[0] != shapes[1] or not isinstance(width, int) or 2 * width > queries[3]:
        return f"cos and sin have shapes {readable(shapes[0])} and {readable(shapes[1])}, expected [max, R/2]"
    if dtype_of(cos) not in rotary_embedding.types["C"] or dtype_of(q) not in rotary_embedding.types["T"]:
        return f"q is {dtype_of(q)} and cos {dtype_of(cos)}"
    if positions is None:
        return None
    if past is None:
        return Fault.of("of the positions of a prompt it reads the first alone", positions)
    right = dtype_of(positions) == "int64" and len(dims(positions) or ()) == 2
    return None if right else Fault.of(f"its positions are {dtype_of(positions)}{readable(dims(positions))}", positions)


def turned(add: Inserter, node: ir.Node, rows: Any, queries: Any, past: Any) -> list[ir.Value]:
    """q and k, turned by the rows of cos and sin at their positions, which by themselves go on from the past."""
    cos, sin, positions = (operand(node, index) for index in (7, 8, 9))
    width = (dims(cos) or (0, 0))[1]
    if positions is None:
        cos, sin = (between_keys(add, table, rows[0], operand(node, 3), queries, past) for table in (cos, sin))
    attrs = {"num_heads": queries[1], "kv_num_heads": attribute(node, "kv_num_heads", 0)}
    attrs |= {"interleaved": 1} if attribute(node, "rotary_interleaved", 0) else {}
    attrs |= {"rotary_dim": 2 * width} if 2 * width != queries[3] else {}
    made = add.node(
        rotary_embedding.name, [rows[0], cos, sin, rows[1], positions], attrs, domain=DOMAIN, num_outputs=2,
        version=rotary_embedding.version, name=f"{node.name}_rotary" if node.name else None,
    ).outputs  # fmt: skip
    for value, like in zip(made, rows, strict=False):
        typed(value, like.dtype)
        value.meta["dims"] = dims(like)
    return list(made)


def between_keys(add: Inserter, table: Any, q: ir.Value, past_k: ir.Value | None, queries: Any, past: Any) -> ir.Value:
    """The rows of a table from the first new key to the last."""
    length = size_of(add, q, 1, queries[2])
    start = add.constant(np.array([0], np.int64)) if past_k is None else size_of(add, past_k, 2, past[2])
    end = length if past_k is None else add("Add", start, length, dtype=ir.DataType.INT64, shape=[1])
    axis = add.constant(np.array([0], np.int64))
    return add("Slice", table, start, end, axis, dtype=table.dtype, shape=[queries[2], (dims(table) or (0, 0))[1]])


def size_of(add: Inserter, value: ir.Value, axis: int, size: Any) -> ir.Value:
    """[1], the size of an axis"""
    if isinstance(size, int):
        return add.constant(np.array([size], np.int64))
    sizes = add("Shape", value, dtype=ir.DataType.INT64, shape=[len(dims(value) or ())])
    place = add.constant(np.array([axis], np.int64))
    return add("Gather", sizes, place, axis=0, dtype=ir.DataType.INT64, shape=[1])


def apart(add: Inserter, packed: ir.Value, heads: int, kv_heads: int, width: int, opset: int) -> list[ir.Value]:
    """q, k and v of what has them side by side, by a Split, so that attention can take it whole."""
    widths = [heads * width, kv_heads * width, kv_heads * width]
    shape = dims(packed) or ()
    later = opset >= 13
    split = add.node(
        "Split",
        [packed, add.constant(np.array(widths, np.int64))] if later else [packed],
        {"axis": 2} if later else {"axis": 2, "split": widths},
        num_outputs=3,
    )
    for value, size in zip(split.outputs, widths, strict=True):
        typed(value, packed.dtype)
        value.meta["dims"] = (*shape[:2], size)
    return list(split.outputs)
