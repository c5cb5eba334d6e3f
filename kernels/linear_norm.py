"""A linear layer, the residual, and the norm of their sum: how a transformer's blocks end.

    sum = x W^T + bias + residual           rounded once to the inputs' dtype
    y   = norm(sum)                         layer_norm or rms_norm, over the last dimension

x: [.., K]; weight: [N, K], or [K, N] where `transpose_weight`; bias, norm_weight, norm_bias: [N]; residual, y, sum:
[.., N]. fp32, fp16 or bf16, all alike; or, as under autocast, all but x, weight and bias in fp32. Accumulated in fp32
(never TF32); `norm` is "layer", or "rms" with rms_norm's `cast` and without norm_bias. `sum` is written only where it
is asked for.

For few rows the depth K is split over the GPU, and the kernel that adds the parts, in their order, does the rest: the
norm costs no kernel of its own. For many rows the linear layer and the norm run one after the other.
"""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from trimaran.kernels import layer_norm, rms_norm
from trimaran.kernels import linear as linear_layer
from trimaran.kernels.configs import Row, lookup
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
from trimaran.kernels.dependent import dependent
from trimaran.kernels.matmul import check_device, check_vectors, left_to_vendor, weight_sizes
from trimaran.kernels.rms_norm import scaled
from trimaran.kernels.sizes import contiguous_strides, power_of_2, product

FLOATS = ("float32", "float16", "bfloat16")
JOINED_COLUMNS = 4096  # a row, times the parts, is held in registers


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
    if PDL:
        gdc_launch_dependents()
        if not EARLY:
            gdc_wait()
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + column, mask=inside, other=0.0).to(tl.float32)
    if norm_weight_ptr is not None:
        norm_weight = tl.load(norm_weight_ptr + column, mask=inside, other=0.0)
    if norm_bias_ptr is not None:
        norm_bias = tl.load(norm_bias_ptr + column, mask=inside, other=0.0).to(tl.float32)
    if PDL and EARLY:
        gdc_wait()
    if residual_ptr is not None:
        residual = tl.load(residual_ptr + row * stride_residual + column, mask=inside, other=0.0).to(tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for part in tl.static_range(SPLIT):
        total += tl.load(parts_ptr + (part * rows.to(tl.int64) + row) * columns + column, mask=inside, other=0.0)
    if bias_ptr is not None:
        total += bias
    if residual_ptr is not None:
        total += residual
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


# Tiles of few rows, as linear's; SPLIT parts of the depth. Where it is 0 the two ops run one after the other.
CONFIGS: list[Row] = [
    (
        {"rows": 16, "depth": 1024},
        {"BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_K": 64, "num_warps": 4, "num_stages": 3, "SPLIT": 3},
    ),
    (
        {"rows": 16},
        {"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": 64, "num_warps": 4, "num_stages": 3, "SPLIT": 6},
    ),
    (
        {"rows": 256},
        {"BLOCK_M": 64, "BLOCK_N": 32, "BLOCK_K": 64, "num_warps": 4, "num_stages": 3, "SPLIT": 3},
    ),
    ({}, {"SPLIT": 0}),
]

# For compute capability 9.0 and half precision, measured on an H200 (Triton 3.6).
HOPPER: list[Row] = [
    (
        {"rows": 16, "depth": 768},
        {"BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_K": 256, "num_warps": 4, "num_stages": 1, "SPLIT": 3, "CHAINS": 4},
    ),
    (
        {"rows": 16, "depth": 3072},
        {"BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_K": 1024, "num_warps": 4, "num_stages": 1, "SPLIT": 3, "CHAINS": 4},
    ),
    (
        {"rows": 16},
        {"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": 256, "num_warps": 4, "num_stages": 3, "SPLIT": 6},
    ),
    (
        {"rows": 256, "depth": 1024},
        {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 128, "num_warps": 4, "num_stages": 3, "SPLIT": 3},
    ),
    (
        {"rows": 256},
        {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 128, "num_warps": 4, "num_stages": 4, "SPLIT": 4},
    ),
    ({}, {"SPLIT": 0}),
]


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
    rows, depth = product(x.shape[:-1]), x.shape[-1]
    check_device("linear_norm", device, rows)
    check_vectors(inputs, "bias", "norm_weight", "norm_bias")
    table = HOPPER if device.capability == 90 and x.dtype != "float32" else CONFIGS
    config = dict(lookup(table, rows=rows, depth=depth))
    left_to_vendor("linear_norm", device, x.dtype, config)
    split = config.pop("SPLIT")
    if not split or columns > JOINED_COLUMNS:
        return one_after_the_other(inputs, outputs, attrs, device)
    pdl = dependent(device)
    parts = Scratch("float32", rows * columns * split)
    own = SimpleNamespace(activation="none", transpose_weight=attrs.transpose_weight)
    multiply = linear_layer.tile_launch(linear_inputs(inputs), parts, None, own, config, device, split)
    finish = Launch(
        sum_norm_kernel,
        grid=(rows if columns > 0 else 0,),
        args={
            "parts_ptr": parts,
            "bias_ptr": inputs.bias,
            "residual_ptr": inputs.residual,
            "stride_residual": linear_layer.residual_rows(inputs.residual),
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
            "EARLY": pdl and all(map(linear_layer.constant, (inputs.bias, inputs.norm_weight, inputs.norm_bias))),
            "BLOCK": power_of_2(columns),
        },
        options={"num_warps": 4 if columns <= 1024 else 8, "launch_pdl": pdl},
    )
    return [multiply, finish]


def linear_inputs(inputs: Any) -> SimpleNamespace:
    """The inputs of the linear layer as its own op names them."""
    absent = dict.fromkeys(("weight_1", "bias_1", "weight_2", "bias_2"))
    return SimpleNamespace(x=inputs.x, weight=inputs.weight, bias=inputs.bias, residual=inputs.residual, **absent)


def one_after_the_other(inputs: Any, outputs: Any, attrs: Any, device: Device) -> list[Launch]:
    """linear with the residual into the sum, then the norm of the sum; or, where the layer is computed in another dtype
    than they have, linear, and then the norm, which adds."""
    shape, mixed = outputs.y.shape, outputs.y.dtype != inputs.x.dtype
    dtype, total = inputs.x.dtype, None if mixed else outputs.sum
    place = total or Scratch(dtype, product(shape))
    own = SimpleNamespace(activation="none", transpose_weight=attrs.transpose_weight)
    layer = linear_inputs(inputs)
    layer.residual = None if mixed else inputs.residual
    first = linear_layer.launches(layer, place, shape[-1], own, device)
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
