"""Attention's layouts: heads as views of [B, S, heads * head_dim], and the strides that kernels take."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from trimaran.kernels.contract import Divisible, Tensor, readable
from trimaran.kernels.sizes import differ


def heads_of(inputs: Any, attrs: Any) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v as views [B, heads, S, D], whatever the layout. ValueError where they are not of one layout."""
    q, k, v = inputs.q, inputs.k, inputs.v
    heads, kv_heads = attrs.num_heads, attrs.kv_num_heads or attrs.num_heads
    if min(heads, kv_heads) < 0 or (kv_heads and heads % kv_heads):
        raise ValueError(f"attention: kv_num_heads is {kv_heads}, expected a divisor of num_heads = {heads}")
    if (k is None) != (v is None) or (k is None and not heads):
        raise ValueError("attention: k and v are expected together, and may be absent only where num_heads > 0")
    layout = "3 dimensions [B, S, H*D] for num_heads > 0" if heads else "4 dimensions [B, H, S, D] for num_heads = 0"
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor is not None and tensor.rank != (3 if heads else 4):
            raise ValueError(f"attention: {name} has shape {readable(tensor.shape)}, expected {layout}")
    if not heads:
        return q, k, v
    packed = heads + 2 * kv_heads
    parts = [(q, packed if k is None else heads, 0, heads)]
    if k is None:
        parts += [(q, packed, heads, kv_heads), (q, packed, heads + kv_heads, kv_heads)]
    else:
        parts += [(k, kv_heads, 0, kv_heads), (v, kv_heads, 0, kv_heads)]
    views = []
    for name, (tensor, count, first, taken) in zip("qkv", parts, strict=True):
        if differ(tensor.shape[2] % count, 0):
            raise ValueError(
                f"attention: {name} has rows of {readable(tensor.shape)[2]}, expected a multiple of {count} heads"
            )
        views.append(head_view(tensor, tensor.shape[2] // count, first, taken))
    return views[0], views[1], views[2]


def head_view(tensor: Tensor, head_dim: Any, first: int, count: int) -> Tensor:
    """Heads `first` to `first + count` of [B, S, all heads * head_dim], as a view [B, count, S, head_dim]."""
    batch, length, _ = tensor.shape
    if not tensor.strides:  # shape inference
        return replace(tensor, shape=(batch, count, length, head_dim))
    stride_batch, stride_length, step = tensor.strides
    strides = (stride_batch, head_dim * step, stride_length, step)
    return replace(tensor, shape=(batch, count, length, head_dim), strides=strides, offset=first * head_dim * step)


def named_strides(name: str, tensor: Tensor | None, axes: str) -> dict[str, Any]:
    """Kernel arguments `stride_<name><axis>` for the leading axes; 0 where the tensor is absent or has but one of them
    (which is said to be divisible as well: an address of unknown alignment costs wide loads)."""
    if tensor is None:
        return {f"stride_{name}{axis}": Divisible(0) for axis in axes}
    sizes = zip(axes, tensor.shape, tensor.strides, strict=False)
    return {f"stride_{name}{axis}": Divisible(0 if size == 1 else stride) for axis, size, stride in sizes}
