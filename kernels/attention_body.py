"""Attention in standard ONNX operators: the function body of its nodes."""

from __future__ import annotations

import itertools
from typing import Any


def attention_body(g: Any, inputs: Any, attrs: Any) -> tuple[Any]:
    q, k, v, group = body_heads(g, inputs, attrs)
    dtype = g.types["T"]
    if group != 1:
        k, v = (repeat_heads(g, q, x) for x in (k, v))
    visible = None  # [B, 1, 1, Sk]
    if inputs.key_lengths is not None:
        keys = g.Gather(g.Shape(k), g.constant(2, "int64"), axis=0)
        position = g.Range(g.constant(0, "int64"), keys, g.constant(1, "int64"))
        visible = g.Less(position, g.unsqueeze(g.cast(inputs.key_lengths, "int64"), [1, 2, 3]))
    if inputs.key_mask is not None:
        mask = g.unsqueeze(inputs.key_mask, [1, 2])
        visible = mask if visible is None else g.And(visible, mask)
    zero, minus_infinity = g.constant(0.0, dtype), g.constant(float("-inf"), dtype)
    values = v if visible is None else g.Where(g.Transpose(visible, perm=[0, 1, 3, 2]), v, zero)
    scores = g.Mul(g.MatMul(q, g.Transpose(k, perm=[0, 1, 3, 2])), g.constant(attrs.scale, dtype))
    if attrs.softcap > 0:
        cap = g.constant(attrs.softcap, dtype)
        scores = g.Mul(g.Tanh(g.Div(scores, cap)), cap)
    if inputs.bias is not None:
        scores = g.Add(scores, inputs.bias)
    if visible is not None:
        scores = g.Where(visible, scores, minus_infinity)
    window = body_window(g, q, k, attrs)
    if window is not None:
        scores = g.Where(window, scores, minus_infinity)
    if visible is None and inputs.bias is None and window is None:
        out = g.MatMul(g.softmax(scores), values)
    else:  # softmax of a row of -inf is NaN
        masked = g.Equal(g.cast(g.reduce_max(scores, axis=-1), "float32"), g.constant(float("-inf"), "float32"))
        out = g.MatMul(g.softmax(g.Where(masked, zero, scores)), values)
        out = g.Where(masked, g.reduce_mean(v, axis=2) if attrs.masked_row == "mean" else zero, out)
    if attrs.num_heads:
        out = g.Reshape(g.Transpose(out, perm=[0, 2, 1, 3]), g.constant([0, 0, -1], "int64"))
    return (out,)


def body_heads(g: Any, inputs: Any, attrs: Any) -> tuple[Any, Any, Any, int | None]:
    """q, k and v as [B, heads, S, D] in the function body, and how many query heads share a key head (None: not
    known)."""
    heads, kv_heads = attrs.num_heads, attrs.kv_num_heads or attrs.num_heads
    if not heads:
        q_heads, k_heads = (x.shape[1] if x.shape is not None else None for x in (inputs.q, inputs.k))
        group = q_heads // k_heads if isinstance(q_heads, int) and isinstance(k_heads, int) else None
        return inputs.q, inputs.k, inputs.v, group

    def split(x: Any, count: int) -> Any:
        return g.Transpose(g.Reshape(x, g.constant([0, 0, count, -1], "int64")), perm=[0, 2, 1, 3])

    if inputs.k is not None:
        return split(inputs.q, heads), split(inputs.k, kv_heads), split(inputs.v, kv_heads), heads // kv_heads
    packed = split(inputs.q, heads + 2 * kv_heads)
    bounds = [0, heads, heads + kv_heads, heads + 2 * kv_heads]
    q, k, v = (
        g.Slice(packed, *(g.constant([number], "int64") for number in (first, last, 1)))
        for first, last in itertools.pairwise(bounds)
    )
    return q, k, v, heads // kv_heads


def repeat_heads(g: Any, q: Any, x: Any) -> Any:
    """x [B, Hkv, S, D], each head repeated until there are as many as q has."""

    def size(of: Any, axis: int) -> Any:
        return g.Slice(g.Shape(of), g.constant([axis], "int64"), g.constant([axis + 1], "int64"))

    group = g.Div(size(q, 1), size(x, 1))
    wide = g.Concat(size(x, 0), size(x, 1), group, size(x, 2), size(x, 3), axis=0)
    flat = g.Concat(size(x, 0), size(q, 1), size(x, 2), size(x, 3), axis=0)
    return g.Reshape(g.Expand(g.unsqueeze(x, [2]), wide), flat)


def body_window(g: Any, q: Any, k: Any, attrs: Any) -> Any:
    """[Sq, Sk] bool: the keys that each query's window shows; None where it shows all."""
    left, right = attrs.window_left, 0 if attrs.causal else attrs.window_right
    if left < 0 and right < 0:
        return None
    zero, one = g.constant(0, "int64"), g.constant(1, "int64")
    queries, keys = (g.Gather(g.Shape(x), g.constant(2, "int64"), axis=0) for x in (q, k))
    stands = g.unsqueeze(g.Add(g.Range(zero, queries, one), g.Sub(keys, queries)), [1])
    position = g.Range(zero, keys, one)
    shown = []
    if right >= 0:
        shown.append(g.Not(g.Less(g.Add(stands, g.constant(right, "int64")), position)))
    if left >= 0:
        shown.append(g.Not(g.Less(position, g.Sub(stands, g.constant(left, "int64")))))
    return shown[0] if len(shown) == 1 else g.And(*shown)
