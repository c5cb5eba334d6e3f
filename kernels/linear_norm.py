"""A linear layer, the residual, and the norm of their sum: how a transformer's blocks end.

    sum = x W^T + bias + residual           rounded once to the inputs' dtype
    y   = norm(sum)                         layer_norm or rms_norm, over the last dimension

x: [.., K]; weight: [N, K], or [K, N] where `transpose_weight`; bias, norm_weight, norm_bias: [N]; residual, y, sum:
[.., N]. fp32, fp16 or bf16, all alike; or, as under autocast, all but x, weight and bias in fp32. Accumulated in fp32
(never TF32); a GPU's plan declines x in fp32. `norm` is "layer", or "rms" with rms_norm's `cast` and without norm_bias.
`sum` is written only where it is asked for.

For few rows the product is left in fp32, in parts of the depth K where that is large, and the kernel that adds the
parts, in their order, does the rest. For many rows the linear layer and the norm run one after the other.
"""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import triton
import triton.language as tl

from trimaran.kernels import layer_norm, linear_plan, rms_norm
from trimaran.kernels.contract import (
    Attr,
    Device,
    Divisible,
    Input,
    Launch,
    Op,
    Output,
    Scratch,
    Tensor,
    expect_shape,
)
from trimaran.kernels.dependent import begin, dependent
from trimaran.kernels.linear_configs import config_of
from trimaran.kernels.linear_tiles import sum_parts
from trimaran.kernels.matmul import check_device, check_vectors, left_to_vendor, weight_sizes
from trimaran.kernels.rms_norm import scaled
from trimaran.kernels.sizes import contiguous_strides, power_of_2, product

FLOATS = ("float32", "float16", "bfloat16")
JOINED_ROWS = 256
JOINED_COLUMNS = 4096  # a row, times the parts, is held in registers
PARTS = 3  # of the depth, where linear's table does not say


@triton.jit
def sum_norm_kernel(
    parts_ptr,  # [SPLIT, rows, columns] fp32
    bias_ptr,  # [columns] or None; so are norm_weight and norm_bias
    residual_ptr,  # [rows, columns] or None
    norm_weight_ptr,
    norm_bias_ptr,
    y_ptr,  # [rows, columns]
    sum_ptr,  # [rows, columns] or None
    stride_residual,
    rows,
    columns,
    eps,
    NORM: tl.constexpr,
    CAST: tl.constexpr,
    SPLIT: tl.constexpr,
    PDL: tl.constexpr,
    EARLY: tl.constexpr,  # bias, norm_weight and norm_bias are constant
    BLOCK: tl.constexpr,  # power of two, at least columns
):
    # One program per row: grid = (rows,).
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < columns
    dtype: tl.constexpr = y_ptr.dtype.element_ty
    # All that is read is asked for at once, and what is constant before the linear layer has ended.
    begin(PDL, EARLY)
    if norm_weight_ptr is not None:
        norm_weight = tl.load(norm_weight_ptr + column, mask=inside, other=0.0)
    if norm_bias_ptr is not None:
        norm_bias = tl.load(norm_bias_ptr + column, mask=inside, other=0.0).to(tl.float32)
    total = sum_parts(parts_ptr, bias_ptr, row, column, rows, columns, SPLIT, PDL, EARLY, BLOCK)
    if residual_ptr is not None:
        total += tl.load(residual_ptr + row * stride_residual + column, mask=inside, other=0.0).to(tl.float32)
    total = total.to(dtype)
    if sum_ptr is not None:
        tl.store(sum_ptr + row * columns + column, total, mask=inside)
    y = total.to(tl.float32)
    if NORM == "layer":
        y = tl.where(inside, y - tl.sum(y, axis=0) / columns, 0.0)
    y = y * tl.rsqrt(tl.sum(y * y, axis=0) / columns + eps)
    if norm_weight_ptr is not None:
        y = scaled(y, norm_weight, CAST, dtype)
    if norm_bias_ptr is not None:
        y += norm_bias
    tl.store(y_ptr + row * columns + column, y.to(dtype), mask=inside)


def infer(inputs: Any, attrs: Any) -> tuple[Tensor, Tensor]:
    x = inputs.x
    if x.rank == 0:
        raise ValueError("linear_norm: x is a scalar, expected [.., K]")
    columns = weight_sizes("linear_norm", "weight", inputs.weight, x.shape[-1], attrs.transpose_weight)
    for name in ("bias", "norm_weight", "norm_bias"):
        expect_shape("linear_norm", name, getattr(inputs, name), (columns,), "[N] as weight has")
    if attrs.norm == "rms" and inputs.norm_bias is not None:
        raise ValueError("linear_norm: norm_bias is given, expected none for norm='rms'")
    if attrs.norm == "layer" and attrs.cast != "torch":
        raise ValueError(f"linear_norm: cast is {attrs.cast!r}, expected 'torch' for norm='layer'")
    shape = (*x.shape[:-1], columns)
    expect_shape("linear_norm", "residual", inputs.residual, shape, "the shape of y")
    given = next((t for t in (inputs.residual, inputs.norm_weight, inputs.norm_bias) if t is not None), x)
    if given.dtype not in (x.dtype, "float32"):
        raise TypeError(f"linear_norm: residual and norm are {given.dtype}, expected {x.dtype} as x is, or float32")
    return Tensor(given.dtype, shape), Tensor(given.dtype, shape)


def plan(inputs: Any, outputs: Any, attrs: Any, device: Device) -> list[Launch]:
    x, columns = inputs.x, outputs.y.shape[-1]
    rows = product(x.shape[:-1])
    check_device("linear_norm", device, rows)
    check_vectors(inputs, "bias", "norm_weight", "norm_bias")
    left_to_vendor("linear_norm", device, x.dtype)
    product_inputs = linear_plan.bare(inputs)
    config = config_of(product_inputs, columns, "none", attrs.transpose_weight, device)
    if rows > JOINED_ROWS or columns > JOINED_COLUMNS or "PINGPONG" in config:
        return one_after_the_other(inputs, outputs, attrs, device)
    split = config.get("SPLIT", PARTS)
    pdl = dependent(device)
    parts = Scratch("float32", rows * columns * split)
    multiply = linear_plan.tile_launch(product_inputs, parts, "none", attrs.transpose_weight, config, device, split)
    finish = Launch(
        sum_norm_kernel,
        grid=(rows if columns > 0 else 0,),
        args={
            "parts_ptr": parts,
            "bias_ptr": inputs.bias,
            "residual_ptr": inputs.residual,
            "stride_residual": linear_plan.residual_rows(inputs.residual),
            "norm_weight_ptr": inputs.norm_weight,
            "norm_bias_ptr": inputs.norm_bias,
            "y_ptr": outputs.y,
            "sum_ptr": outputs.sum,
            "rows": rows,
            "columns": Divisible(columns),
            "eps": attrs.eps,
        },
        constexprs={
            "NORM": attrs.norm,
            "CAST": attrs.cast,
            "SPLIT": split,
            "PDL": pdl,
            "EARLY": pdl and all(map(linear_plan.constant, (inputs.bias, inputs.norm_weight, inputs.norm_bias))),
            "BLOCK": power_of_2(columns),
        },
        options={"num_warps": 4 if columns <= 1024 else 8, "launch_pdl": pdl},
    )
    return [multiply, finish]


def one_after_the_other(inputs: Any, outputs: Any, attrs: Any, device: Device) -> list[Launch]:
    """linear with the residual into the sum, then the norm of the sum; or, where the layer is computed in another dtype
    than they have, linear, and then the norm, which adds."""
    shape, mixed = outputs.y.shape, outputs.y.dtype != inputs.x.dtype
    dtype, total = inputs.x.dtype, None if mixed else outputs.sum
    place = total or Scratch(dtype, product(shape))
    own = SimpleNamespace(activation="none", transpose_weight=attrs.transpose_weight)
    layer = linear_plan.bare(inputs)
    layer.bias, layer.residual = inputs.bias, None if mixed else inputs.residual
    first = linear_plan.launches(layer, place, shape[-1], own, device)
    x = total or Tensor(dtype, shape, contiguous_strides(shape))
    residual = inputs.residual if mixed else None
    norm_inputs = SimpleNamespace(x=x, weight=inputs.norm_weight, bias=inputs.norm_bias, residual=residual)
    norm_outputs = SimpleNamespace(y=outputs.y, sum=outputs.sum if mixed else None)
    norm = layer_norm if attrs.norm == "layer" else rms_norm
    second = norm.plan(norm_inputs, norm_outputs, SimpleNamespace(eps=attrs.eps, cast=attrs.cast), device)
    return [*first, *(replace(launch, args={**launch.args, "x_ptr": place}) for launch in second)]


def linear_norm_reference(
    x: Any,
    weight: Any,
    bias: Any,
    residual: Any,
    norm_weight: Any,
    norm_bias: Any,
    *,
    eps: float,
    norm: str,
    cast: str,
    transpose_weight: bool,
) -> tuple[Any, Any]:
    import torch

    total = torch.nn.functional.linear(x, weight.t() if transpose_weight else weight, bias)
    total = total if residual is None else total + residual
    total = total if norm_weight is None else total.to(norm_weight.dtype)
    if norm == "rms":
        return rms_norm.rms_norm_reference(total, norm_weight, None, eps=eps, cast=cast)[0], total
    return layer_norm.layer_norm_reference(total, norm_weight, norm_bias, None, eps=eps)[0], total


def body(g: Any, inputs: Any, attrs: Any) -> tuple[Any, Any]:
    total = g.MatMul(inputs.x, inputs.weight if attrs.transpose_weight else g.Transpose(inputs.weight, perm=[1, 0]))
    total = total if inputs.bias is None else g.Add(total, inputs.bias)
    if g.types.get("R", g.types["T"]) != g.types["T"]:
        total = g.cast(total, g.types["R"])
        g.types = {**g.types, "T": g.types["R"]}  # what follows is all of that dtype
    total = total if inputs.residual is None else g.Add(total, inputs.residual)
    norm = layer_norm if attrs.norm == "layer" else rms_norm
    given = SimpleNamespace(x=total, weight=inputs.norm_weight, bias=inputs.norm_bias, residual=None)
    return norm.body(g, given, SimpleNamespace(eps=attrs.eps, cast=attrs.cast))[0], total


linear_norm = Op(
    name="linear_norm",
    version=1,
    inputs=(
        Input("x"),
        Input("weight"),
        Input("bias", optional=True),
        Input("residual", "R", optional=True),
        Input("norm_weight", "R", optional=True),
        Input("norm_bias", "R", optional=True),
    ),
    outputs=(Output("y", "R"), Output("sum", "R", optional=True)),
    attrs=(
        Attr("eps", "float"),
        Attr("norm", "string", choices=("layer", "rms")),
        Attr("cast", "string", "torch", choices=("torch", "llama", "gemma")),
        Attr("transpose_weight", "bool", False),
    ),
    types={"T": FLOATS, "R": FLOATS},
    infer=infer,
    plan=plan,
    reference=linear_norm_reference,
    body=body,
)
