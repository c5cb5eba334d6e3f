"""The gated half of an MLP: two linear layers of one input, one of them activated, times each other.

    out = activation(x Wg^T + bg) * (x Wu^T + bu)           SwiGLU with silu, GEGLU with gelu, and so on

x: [.., K]; gate_weight, up_weight: [N, K], or [K, N] where `transpose_weight`; gate_bias, up_bias: [N]; out: [.., N].
fp32, fp16 or bf16, all alike; accumulated and multiplied in fp32 (never TF32), rounded once. On a GPU the plan declines
fp32.

Without up_weight, gate_weight is both, [2N, K] (or [K, 2N]), and gate_bias [2N]: what a model splits by chunk(2).
`gate` says which half is activated: "first" or "second".
Source: Shazeer, "GLU Variants Improve Transformer", 2020.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import triton
import triton.language as tl

from trimaran.kernels import bodies
from trimaran.kernels.activations import ACTIVATIONS, activated, activation_body, activation_reference
from trimaran.kernels.configs import Row, lookup
from trimaran.kernels.contract import (
    Attr,
    Device,
    Divisible,
    Input,
    Launch,
    Op,
    Output,
    Tensor,
    expect_shape,
    readable,
)
from trimaran.kernels.dependent import await_inputs, dependent
from trimaran.kernels.linear_few import gated_linear_few_kernel
from trimaran.kernels.linear_many import gated_linear_many_kernel, weight_blocks, x_blocks
from trimaran.kernels.matmul import (
    CONFIGS,
    check_device,
    check_vectors,
    grouped,
    left_to_vendor,
    load_weight,
    load_x,
    matrix_rows,
    weight_rows,
    weight_sizes,
    whole_vectors,
)
from trimaran.kernels.sizes import cdiv, differ, minimum, product


@triton.jit
def gated_linear_kernel(
    x_ptr,  # [rows, depth]
    gate_ptr,  # [columns, depth], or [depth, columns] where TRANSPOSE
    up_ptr,  # the same
    gate_bias_ptr,  # [columns] or None
    up_bias_ptr,  # [columns] or None
    out_ptr,  # [rows, columns], contiguous
    stride_x,
    stride_gate,
    stride_up,
    rows,
    columns,
    depth,
    ACTIVATION: tl.constexpr,
    TRANSPOSE: tl.constexpr,
    EVEN: tl.constexpr,  # depth is a multiple of BLOCK_K
    PDL: tl.constexpr,  # launched while the last kernel may still run
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # One program per tile of out: grid = (cdiv(rows, BLOCK_M) * cdiv(columns, BLOCK_N),).
    tile_m, tile_n = grouped(tl.program_id(0), tl.cdiv(rows, BLOCK_M), tl.cdiv(columns, BLOCK_N), GROUP)
    row = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    if PDL:
        await_inputs()

    gate = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    up = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for at in range(0, depth, BLOCK_K):
        k = at + tl.arange(0, BLOCK_K)
        x = load_x(x_ptr, stride_x, rows, depth, row, k, EVEN)
        gate = tl.dot(
            x, load_weight(gate_ptr, stride_gate, columns, depth, column, k, TRANSPOSE, EVEN), gate,
            input_precision="ieee",
        )  # fmt: skip
        up = tl.dot(
            x,
            load_weight(up_ptr, stride_up, columns, depth, column, k, TRANSPOSE, EVEN),
            up,
            input_precision="ieee",
        )

    if gate_bias_ptr is not None:
        gate += tl.load(gate_bias_ptr + column, mask=column < columns, other=0.0).to(tl.float32)[None, :]
    if up_bias_ptr is not None:
        up += tl.load(up_bias_ptr + column, mask=column < columns, other=0.0).to(tl.float32)[None, :]
    out = activated(gate, ACTIVATION, out_ptr.dtype.element_ty == tl.float32) * up
    at = row.to(tl.int64)[:, None] * columns + column[None, :]
    tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=(row < rows)[:, None] & (column < columns)[None, :])


# On Hopper, in half precision, measured on an H200 (Triton 3.6). A row with PINGPONG is of gated_linear_many_kernel,
# one without of gated_linear_few_kernel.
HOPPER: list[Row] = [
    ({"rows": 16}, {"BLOCK_M": 16, "BLOCK_N": 64, "BLOCK_K": 128, "STAGES": 4}),
    ({"rows": 256}, {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64, "STAGES": 4, "PINGPONG": 0, "GROUP": 16}),
    ({"rows": 2048}, {"BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_K": 64, "STAGES": 6, "PINGPONG": 1, "GROUP": 16}),
    ({}, {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64, "STAGES": 4, "PINGPONG": 0, "GROUP": 16}),
]


def infer(inputs: Any, attrs: Any) -> tuple[Tensor]:
    x, transpose = inputs.x, attrs.transpose_weight
    if x.rank == 0:
        raise ValueError("gated_linear: x is a scalar, expected [.., K]")
    columns = weight_sizes("gated_linear", "gate_weight", inputs.gate_weight, x.shape[-1], transpose)
    expect_shape("gated_linear", "gate_bias", inputs.gate_bias, (columns,), "[N] as gate_weight has")
    if inputs.up_weight is not None:
        weight_sizes("gated_linear", "up_weight", inputs.up_weight, x.shape[-1], transpose)
        wanted = inputs.gate_weight.shape
        expect_shape("gated_linear", "up_weight", inputs.up_weight, wanted, "the shape of gate_weight")
        expect_shape("gated_linear", "up_bias", inputs.up_bias, (columns,), "[N] as up_weight has")
        return (Tensor(x.dtype, (*x.shape[:-1], columns)),)
    if inputs.up_bias is not None:
        raise ValueError("gated_linear: up_bias is given without up_weight")
    if differ(columns % 2, 0):
        shape = readable(inputs.gate_weight.shape)
        raise ValueError(f"gated_linear: gate_weight has shape {shape}, expected an even N where up_weight is absent")
    return (Tensor(x.dtype, (*x.shape[:-1], columns // 2)),)


def halves(inputs: Any, attrs: Any) -> list[tuple[Tensor, Tensor | None]]:
    """(weight, bias) of the gate, then of what is gated: the two halves where there is one weight for both."""
    weight, bias = inputs.gate_weight, inputs.gate_bias
    if inputs.up_weight is not None:
        return [(weight, bias), (inputs.up_weight, inputs.up_bias)]
    axis = 1 if attrs.transpose_weight else 0
    size = weight.shape[axis] // 2
    shape = tuple(size if i == axis else n for i, n in enumerate(weight.shape))
    found: list[tuple[Tensor, Tensor | None]] = [
        (
            replace(weight, shape=shape, offset=half * size * weight.strides[axis]),
            None if bias is None else replace(bias, shape=(size,), offset=half * size * bias.strides[0]),
        )
        for half in (0, 1)
    ]
    return found if attrs.gate == "first" else found[::-1]


def plan(inputs: Any, outputs: Any, attrs: Any, device: Device) -> list[Launch]:
    x, out = inputs.x, outputs.out
    rows, depth, columns = product(x.shape[:-1]), x.shape[-1], out.shape[-1]
    check_device("gated_linear", device, rows)
    check_vectors(inputs, "gate_bias", "up_bias")
    (gate, gate_bias), (up, up_bias) = halves(inputs, attrs)
    hopper = device.capability == 90 and x.dtype != "float32" and whole_vectors(x, [gate, up])
    config = lookup(HOPPER if hopper else CONFIGS, rows=rows, columns=columns, depth=depth, products=2)
    left_to_vendor("gated_linear", device, x.dtype, config)
    args = {
        "x_ptr": x,
        "gate_ptr": gate,
        "up_ptr": up,
        "gate_bias_ptr": gate_bias,
        "up_bias_ptr": up_bias,
        "out_ptr": out,
        "stride_x": Divisible(matrix_rows("x", x)),
        "stride_gate": Divisible(weight_rows("gate_weight", gate)),
        "stride_up": Divisible(weight_rows("up_weight", up)),
        "rows": rows,
        "columns": Divisible(columns),
        "depth": Divisible(depth),
    }
    tiles = cdiv(rows, config["BLOCK_M"]) * cdiv(columns, config["BLOCK_N"])
    pdl = dependent(device)
    early = pdl and gate.constant and up.constant
    constexprs = {
        "ACTIVATION": attrs.activation,
        "TRANSPOSE": attrs.transpose_weight,
        "PDL": pdl,
        "GROUP": config.get("GROUP", 8),
        **{name: config[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K")},
    }
    options = {"num_warps": config.get("num_warps", 4), "num_stages": config.get("num_stages", 1), "launch_pdl": pdl}
    if "PINGPONG" in config:
        ring = {"PINGPONG": bool(config["PINGPONG"]), "STAGES": config["STAGES"], "EARLY": early}
        described: dict[str, Any] = {"x_desc": x_blocks(x, config)}
        for name, weight in (("gate", gate), ("up", up)):
            described[f"{name}_desc"] = weight_blocks(weight, config["BLOCK_N"], config, attrs.transpose_weight)
        args = {name: args[name] for name in gated_linear_many_kernel.arg_names if name in args}
        programs = minimum(tiles, device.sm_count)
        return [Launch(gated_linear_many_kernel, (programs,), args | described, constexprs | ring, options)]
    if "STAGES" in config:
        ring = {
            "STAGES": config["STAGES"],
            "WHOLE": bool(depth <= config["STAGES"] * config["BLOCK_K"]),
            "EARLY": early,
        }
        return [Launch(gated_linear_few_kernel, (tiles,), args, constexprs | ring, options)]
    constexprs["EVEN"] = bool(depth % config["BLOCK_K"] == 0)
    return [Launch(gated_linear_kernel, (tiles,), args, constexprs, options)]


def gated_linear_reference(
    x: Any,
    gate_weight: Any,
    up_weight: Any,
    gate_bias: Any,
    up_bias: Any,
    *,
    activation: str,
    transpose_weight: bool,
    gate: str,
) -> tuple[Any]:
    from torch.nn.functional import linear

    def layer(weight: Any, bias: Any) -> Any:
        return linear(x, weight.t() if transpose_weight else weight, bias)

    if up_weight is not None:
        activates, scales = layer(gate_weight, gate_bias), layer(up_weight, up_bias)
    else:
        first, second = layer(gate_weight, gate_bias).chunk(2, dim=-1)
        activates, scales = (first, second) if gate == "first" else (second, first)
    return (activation_reference(activates, activation) * scales,)


def body(g: Any, inputs: Any, attrs: Any) -> tuple[Any]:
    def layer(weight: Any, bias: Any) -> Any:
        out = g.MatMul(inputs.x, weight if attrs.transpose_weight else g.Transpose(weight, perm=[1, 0]))
        return out if bias is None else g.Add(out, bias)

    both = layer(inputs.gate_weight, inputs.gate_bias)
    if inputs.up_weight is not None:
        activates, scales = both, layer(inputs.up_weight, inputs.up_bias)
    else:
        first, second = bodies.halves(g, both)
        activates, scales = (first, second) if attrs.gate == "first" else (second, first)
    return (g.Mul(activation_body(g, activates, attrs.activation, g.types["T"]), scales),)


gated_linear = Op(
    name="gated_linear",
    version=1,
    inputs=(
        Input("x"),
        Input("gate_weight"),
        Input("up_weight", optional=True),
        Input("gate_bias", optional=True),
        Input("up_bias", optional=True),
    ),
    outputs=(Output("out"),),
    attrs=(
        Attr("activation", "string", choices=ACTIVATIONS),
        Attr("transpose_weight", "bool", False),
        Attr("gate", "string", "first", choices=("first", "second")),
    ),
    types={"T": ("float32", "float16", "bfloat16")},
    infer=infer,
    plan=plan,
    reference=gated_linear_reference,
    body=body,
)
