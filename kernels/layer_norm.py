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

from trimaran.kernels.configs import Row, lookup
from trimaran.kernels.contract import Attr, Decline, Device, Divisible, Input, Launch, Op, Output, Tensor, expect_shape
from trimaran.kernels.sizes import power_of_2, product

MAX_COLUMNS = 65536  # one program holds a whole row in registers


@triton.jit
def layer_norm_kernel(
    x_ptr,  # [rows, columns]
    weight_ptr,  # [columns] or None
    bias_ptr,  # [columns] or None
    residual_ptr,  # [rows, columns] or None
    y_ptr,  # [rows, columns]
    sum_ptr,  # [rows, columns] or None
    stride_x,  # elements from one row of x to the next
    stride_residual,
    stride_y,  # also of sum
    columns,
    eps,
    BLOCK: tl.constexpr,  # power of two, at least columns
):
    # One program per row: grid = (rows,).
    row = tl.program_id(0).to(tl.int64)
    offsets = tl.arange(0, BLOCK)
    inside = offsets < columns
    x = tl.load(x_ptr + row * stride_x + offsets, mask=inside, other=0.0)
    if residual_ptr is not None:
        residual = tl.load(residual_ptr + row * stride_residual + offsets, mask=inside, other=0.0)
        x = (x.to(tl.float32) + residual.to(tl.float32)).to(x_ptr.dtype.element_ty)
        if sum_ptr is not None:
            tl.store(sum_ptr + row * stride_y + offsets, x, mask=inside)
    x = x.to(tl.float32)
    mean = tl.sum(x, axis=0) / columns
    centered = tl.where(inside, x - mean, 0.0)
    variance = tl.sum(centered * centered, axis=0) / columns
    y = centered * tl.rsqrt(variance + eps)
    if weight_ptr is not None:
        y = y * tl.load(weight_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        y = y + tl.load(bias_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + row * stride_y + offsets, y.to(y_ptr.dtype.element_ty), mask=inside)


CONFIGS: list[Row] = [
    ({"columns": 1024}, {"num_warps": 2}),
    ({"columns": 4096}, {"num_warps": 4}),
    ({"columns": 16384}, {"num_warps": 8}),
    ({}, {"num_warps": 16}),
]


def infer(inputs: Any, attrs: Any) -> tuple[Tensor, Tensor | None]:
    x: Tensor = inputs.x
    if x.rank == 0:
        raise ValueError("layer_norm: x is a scalar, expected [..., N]")
    expect_shape("layer_norm", "weight", inputs.weight, x.shape[-1:], "[N]")
    expect_shape("layer_norm", "bias", inputs.bias, x.shape[-1:], "[N]")
    expect_shape("layer_norm", "residual", inputs.residual, x.shape, "the shape of x")
    y = Tensor(x.dtype, x.shape)
    return y, (y if inputs.residual is not None else None)


def plan(inputs: Any, outputs: Any, attrs: Any, device: Device) -> list[Launch]:
    x, residual = inputs.x, inputs.residual
    columns = x.shape[-1]
    if device.type == "cuda" and device.capability < 80:
        raise Decline(f"layer_norm needs a GPU of compute capability 8.0, this one has {device.capability / 10}")
    if columns > MAX_COLUMNS:
        raise Decline(f"rows of more than {MAX_COLUMNS} elements")
    for name, tensor in (("weight", inputs.weight), ("bias", inputs.bias)):
        if tensor is not None and columns > 1 and tensor.strides[0] != 1:
            raise Decline(f"{name} is not contiguous")
    return [
        Launch(
            layer_norm_kernel,
            grid=(product(x.shape[:-1]) if columns > 0 else 0,),
            args={
                "x_ptr": x,
                "weight_ptr": inputs.weight,
                "bias_ptr": inputs.bias,
                "residual_ptr": residual,
                "y_ptr": outputs.y,
                "sum_ptr": outputs.sum,
                "stride_x": Divisible(row_stride("x", x)),
                "stride_residual": Divisible(row_stride("residual", residual)) if residual is not None else 0,
                "stride_y": Divisible(columns),
                "columns": Divisible(columns),
                "eps": attrs.eps,
            },
            constexprs={"BLOCK": power_of_2(columns)},
            options=lookup(CONFIGS, columns=columns),
        )
    ]


def row_stride(name: str, tensor: Tensor) -> Any:
    """The distance between rows of the last dimension, where the leading dimensions step evenly; Decline where not."""
    *shape, columns = tensor.shape
    *strides, last = tensor.strides
    if columns > 1 and last != 1:
        raise Decline(f"the rows of {name} are not contiguous")
    step: Any = None  # of the innermost leading dimension of more than one element
    span: Any = None  # the stride that the next dimension outwards must have
    if any(size == 0 for size in shape):
        return columns
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        if size == 1:
            continue
        if step is None:
            step = stride
        elif stride != span:
            raise Decline(f"the rows of {name} are not evenly spaced")
        span = stride * size
    return columns if step is None else step


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
