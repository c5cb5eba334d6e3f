"""Root mean square normalization of the last dimension, with an optional residual added first.

    sum = x + residual                                  rounded to the inputs' dtype, as a model without fusion does
    y   = sum / sqrt(mean(sum^2) + eps) * weight

x, residual, y, sum: [..., N], fp32, fp16 or bf16, all alike; weight: [N]. Statistics in fp32. `sum` is written only
where it is asked for. What is rounded to x's dtype, and when, is the model's own, by `cast`:

    torch   in fp32 up to y                                 torch.nn.RMSNorm, OLMo 2 and 3, gpt-oss
    llama   normalized, rounded, then times the weight      Llama, Mistral, Qwen, T5, ONNX RMSNormalization
    gemma   times (1 + weight), in fp32 up to y             Gemma, Gemma 2 and 3

For torch and gemma the weight may have a dtype of its own (an exporter may have folded Gemma's fp32 weight).
Source: Zhang, Sennrich, "Root Mean Square Layer Normalization", 2019; torch.nn.functional.rms_norm; the modeling files
of transformers.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from trimaran.kernels.contract import Attr, Device, Input, Launch, Op, Output, Tensor
from trimaran.kernels.dependent import await_inputs
from trimaran.kernels.norms import infer_norm, load_total, norm_launch, row_starts

FLOATS = ("float32", "float16", "bfloat16")


@triton.jit
def scaled(y, weight, CAST: tl.constexpr, dtype: tl.constexpr):
    """y [ROWS, BLOCK], normalized, in fp32, times weight [1, BLOCK]."""
    weight = weight.to(tl.float32)
    if CAST == "llama":
        y = y.to(dtype).to(tl.float32)  # a product of two halves is exact in fp32, so it is still rounded once
    if CAST == "gemma":
        weight += 1.0
    return y * weight


@triton.jit
def rms_norm_kernel(
    x_ptr,  # [.., size1, size2, columns], any strides but the last, which is 1
    weight_ptr,  # [columns] or None
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
    CAST: tl.constexpr,  # of the op
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
        mask = inside & (column < columns)
        if weight_ptr is not None and EARLY:
            weight = tl.load(weight_ptr + column, mask=column < columns, other=0.0)
        x = load_total(x_ptr, residual_ptr, mask)
        if sum_ptr is not None:
            tl.store(sum_ptr, x.to(dtype), mask=mask)
        y = x * tl.rsqrt(tl.sum(x * x, axis=1) * inverse + eps)[:, None]
        if weight_ptr is not None:
            if not EARLY:
                weight = tl.load(weight_ptr + column, mask=column < columns, other=0.0)
            y = scaled(y, weight, CAST, dtype)
        tl.store(y_ptr, y.to(dtype), mask=mask)
    else:
        squares = tl.zeros([ROWS, BLOCK], tl.float32)
        for first in range(0, columns, BLOCK):
            mask = inside & (first + column < columns)
            x = load_total(x_ptr + first, None if residual_ptr is None else residual_ptr + first, mask)
            if sum_ptr is not None:
                tl.store(sum_ptr + first, x.to(dtype), mask=mask)
            squares += x * x
        scale = tl.rsqrt(tl.sum(squares, axis=1) * inverse + eps)[:, None]
        for first in range(0, columns, BLOCK):
            mask = inside & (first + column < columns)
            x = load_total(x_ptr + first, None if residual_ptr is None else residual_ptr + first, mask)
            y = x * scale
            if weight_ptr is not None:
                weight = tl.load(weight_ptr + first + column, mask=first + column < columns, other=0.0)
                y = scaled(y, weight, CAST, dtype)
            tl.store(y_ptr + first, y.to(dtype), mask=mask)


def infer(inputs: Any, attrs: Any) -> tuple[Tensor, Tensor | None]:
    x, weight = inputs.x, inputs.weight
    if attrs.cast == "llama" and weight is not None and weight.dtype != x.dtype:
        raise TypeError(f"rms_norm: weight is {weight.dtype}, expected {x.dtype} as x is, for cast='llama'")
    return infer_norm("rms_norm", inputs)


def plan(inputs: Any, outputs: Any, attrs: Any, device: Device) -> list[Launch]:
    launch = norm_launch("rms_norm", inputs, outputs, attrs.eps, device)
    launch["constexprs"]["CAST"] = attrs.cast if inputs.weight is not None else "torch"
    return [Launch(rms_norm_kernel, **launch)]


def rms_norm_reference(x: Any, weight: Any, residual: Any, *, eps: float, cast: str) -> tuple[Any, Any]:
    import torch

    total = x if residual is None else x + residual
    wide = total if total.dtype == torch.float64 else total.float()
    y = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    if weight is not None:
        if cast == "llama":
            y = y.to(x.dtype) * weight
        else:
            weight = weight.to(wide.dtype)
            y = y * (1.0 + weight if cast == "gemma" else weight)
    return y.to(x.dtype), (None if residual is None else total)


def body(g: Any, inputs: Any, attrs: Any) -> tuple[Any, Any]:
    total = inputs.x if inputs.residual is None else g.Add(inputs.x, inputs.residual)
    x, dtype = g.cast(total, "float32"), g.types["T"]
    mean = g.reduce_mean(g.Mul(x, x), axis=-1)
    y = g.Div(x, g.Sqrt(g.Add(mean, g.constant(attrs.eps, "float32"))))
    if inputs.weight is not None and attrs.cast != "llama":
        weight = g.cast(inputs.weight, "float32")
        y = g.Mul(y, g.Add(weight, g.constant(1.0, "float32")) if attrs.cast == "gemma" else weight)
    y = g.cast(y, dtype)
    if inputs.weight is not None and attrs.cast == "llama":
        y = g.Mul(y, inputs.weight)
    return y, (None if inputs.residual is None else total)


rms_norm = Op(
    name="rms_norm",
    version=1,
    inputs=(Input("x"), Input("weight", "W", optional=True), Input("residual", optional=True)),
    outputs=(Output("y"), Output("sum", optional=True)),
    attrs=(Attr("eps", "float"), Attr("cast", "string", "torch", choices=("torch", "llama", "gemma"))),
    types={"T": FLOATS, "W": FLOATS},
    infer=infer,
    plan=plan,
    reference=rms_norm_reference,
    body=body,
)
