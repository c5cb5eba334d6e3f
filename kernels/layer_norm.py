"""Layer normalization of the last dimension, with an optional residual added first.

    sum = x + residual                                  rounded to the inputs' dtype, as a model without fusion does
    y   = (sum - mean) / sqrt(variance + eps) * weight + bias

x, residual, y, sum: [..., N]; weight, bias: [N]. fp32, fp16 or bf16, all alike; statistics in fp32, the variance in a
second pass over the row. `sum` is written only where it is asked for (pre-norm models use it again).
Source: Ba, Kiros, Hinton, "Layer Normalization", 2016; torch.nn.functional.layer_norm.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from trimaran.kernels.contract import Attr, Device, Input, Launch, Op, Output, Tensor
from trimaran.kernels.dependent import await_inputs
from trimaran.kernels.norms import infer_norm, load_total, norm_launch, row_starts


@triton.jit
def layer_norm_kernel(
    x_ptr,  # [.., size1, size2, columns], any strides but the last, which is 1
    weight_ptr,  # [columns] or None
    bias_ptr,  # [columns] or None
    residual_ptr,  # as x, or None
    y_ptr,  # [rows, columns]
    sum_ptr,  # [rows, columns] or None
    stride_x0,
    stride_x1,
    stride_x2,
    stride_residual0,
    stride_residual1,
    stride_residual2,
    size1,
    size2,
    rows,
    columns,
    eps,
    DIMENSIONS: tl.constexpr,  # of the three leading ones, how many are more than one element long; at least 1
    WHOLE: tl.constexpr,  # a row fits in BLOCK
    EARLY: tl.constexpr,  # the weight is read before the reduction, which would otherwise be waited for
    PDL: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,  # power of two, at least columns where WHOLE
):
    # One program per ROWS rows: grid = (cdiv(rows, ROWS),).
    if PDL:
        await_inputs()
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = (row < rows)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    dtype: tl.constexpr = y_ptr.dtype.element_ty
    x_ptr += row_starts(row, size1, size2, stride_x0, stride_x1, stride_x2, DIMENSIONS)[:, None] + column
    if residual_ptr is not None:
        start = row_starts(row, size1, size2, stride_residual0, stride_residual1, stride_residual2, DIMENSIONS)
        residual_ptr += start[:, None] + column
    y_ptr += row.to(tl.int64)[:, None] * columns + column
    if sum_ptr is not None:
        sum_ptr += row.to(tl.int64)[:, None] * columns + column
    inverse = 1.0 / columns

    if WHOLE:
        known = column < columns
        mask = inside & known
        if weight_ptr is not None and EARLY:
            weight = tl.load(weight_ptr + column, mask=known, other=0.0)
        if bias_ptr is not None and EARLY:
            bias = tl.load(bias_ptr + column, mask=known, other=0.0)
        x = load_total(x_ptr, residual_ptr, mask)
        if sum_ptr is not None:
            tl.store(sum_ptr, x.to(dtype), mask=mask)
        mean = tl.sum(x, axis=1) * inverse
        centered = tl.where(known, x - mean[:, None], 0.0)
        y = centered * tl.rsqrt(tl.sum(centered * centered, axis=1) * inverse + eps)[:, None]
        if weight_ptr is not None:
            if not EARLY:
                weight = tl.load(weight_ptr + column, mask=known, other=0.0)
            y = y * weight.to(tl.float32)
        if bias_ptr is not None:
            if not EARLY:
                bias = tl.load(bias_ptr + column, mask=known, other=0.0)
            y = y + bias.to(tl.float32)
        tl.store(y_ptr, y.to(dtype), mask=mask)
    else:
        totals = tl.zeros([ROWS, BLOCK], tl.float32)
        for first in range(0, columns, BLOCK):
            mask = inside & (first + column < columns)
            x = load_total(x_ptr + first, None if residual_ptr is None else residual_ptr + first, mask)
            if sum_ptr is not None:
                tl.store(sum_ptr + first, x.to(dtype), mask=mask)
            totals += x
        mean = (tl.sum(totals, axis=1) * inverse)[:, None]
        squares = tl.zeros([ROWS, BLOCK], tl.float32)
        for first in range(0, columns, BLOCK):
            mask = inside & (first + column < columns)
            x = load_total(x_ptr + first, None if residual_ptr is None else residual_ptr + first, mask)
            centered = tl.where(mask, x - mean, 0.0)
            squares += centered * centered
        scale = tl.rsqrt(tl.sum(squares, axis=1) * inverse + eps)[:, None]
        for first in range(0, columns, BLOCK):
            known = first + column < columns
            mask = inside & known
            x = load_total(x_ptr + first, None if residual_ptr is None else residual_ptr + first, mask)
            y = (x - mean) * scale
            if weight_ptr is not None:
                y = y * tl.load(weight_ptr + first + column, mask=known, other=0.0).to(tl.float32)
            if bias_ptr is not None:
                y = y + tl.load(bias_ptr + first + column, mask=known, other=0.0).to(tl.float32)
            tl.store(y_ptr + first, y.to(dtype), mask=mask)


def infer(inputs: Any, attrs: Any) -> tuple[Tensor, Tensor | None]:
    return infer_norm("layer_norm", inputs)


def plan(inputs: Any, outputs: Any, attrs: Any, device: Device) -> list[Launch]:
    launch = norm_launch("layer_norm", inputs, outputs, attrs.eps, device)
    launch["args"]["bias_ptr"] = inputs.bias
    return [Launch(layer_norm_kernel, **launch)]


def layer_norm_reference(x: Any, weight: Any, bias: Any, residual: Any, *, eps: float) -> tuple[Any, Any]:
    import torch

    total = x if residual is None else x + residual
    y = torch.nn.functional.layer_norm(total, x.shape[-1:], weight, bias, eps)
    return y, (None if residual is None else total)


def body(g: Any, inputs: Any, attrs: Any) -> tuple[Any, Any]:
    total = inputs.x if inputs.residual is None else g.Add(inputs.x, inputs.residual)
    summed = None if inputs.residual is None else total
    if g.opset >= 17 and inputs.weight is not None:
        return g.LayerNormalization(total, inputs.weight, inputs.bias, axis=-1, epsilon=attrs.eps), summed
    x = g.cast(total, "float32")
    centered = g.Sub(x, g.reduce_mean(x, axis=-1))
    variance = g.reduce_mean(g.Mul(centered, centered), axis=-1)
    y = g.Div(centered, g.Sqrt(g.Add(variance, g.constant(attrs.eps, "float32"))))
    if inputs.weight is not None:
        y = g.Mul(y, g.cast(inputs.weight, "float32"))
    if inputs.bias is not None:
        y = g.Add(y, g.cast(inputs.bias, "float32"))
    return g.cast(y, g.types["T"]), summed


layer_norm = Op(
    name="layer_norm",
    version=1,
    inputs=(Input("x"), Input("weight", optional=True), Input("bias", optional=True), Input("residual", optional=True)),
    outputs=(Output("y"), Output("sum", optional=True)),
    attrs=(Attr("eps", "float"),),
    types={"T": ("float32", "float16", "bfloat16")},
    infer=infer,
    plan=plan,
    reference=layer_norm_reference,
    body=body,
)
