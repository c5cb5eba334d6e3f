"""A linear layer with what follows it: bias, activation and residual; or up to three layers of one input.

    out = activation(x W^T + bias) + residual

x: [.., K]; weight: [N, K], or [K, N] where `transpose_weight`; bias: [N]; residual, out: [.., N]. fp32, fp16 or bf16,
all alike. Accumulated, and all of the above computed, in fp32 (never TF32), and rounded once, at the end. fp32 inputs
only run where kernels are interpreted: a GPU's plan declines them, since the vendor's library is faster there.

With weight_1 [N1, K], and weight_2 [N2, K], each with its bias or without, `out` is [.., N + N1 + N2]: the results side
by side, as if the weights were one. They stay where they are: a model's q, k and v layers need no merged copy.
`activation` and residual [.., N + N1 + N2] apply to all of it.
"""

from __future__ import annotations

from typing import Any

from trimaran.kernels.activations import ACTIVATIONS, activation_body, activation_reference
from trimaran.kernels.contract import Attr, Device, Input, Launch, Op, Output, Tensor, expect_shape
from trimaran.kernels.linear_configs import config_of, weights_of
from trimaran.kernels.linear_plan import launches
from trimaran.kernels.matmul import left_to_vendor, weight_sizes


def infer(inputs: Any, attrs: Any) -> tuple[Tensor]:
    x = inputs.x
    if x.rank == 0:
        raise ValueError("linear: x is a scalar, expected [.., K]")
    if inputs.weight_2 is not None and inputs.weight_1 is None:
        raise ValueError("linear: weight_2 is given without weight_1, expected both or only weight_1")
    width: Any = 0
    for part, weight, bias in weights_of(inputs):
        if weight is None:
            if bias is not None:
                raise ValueError(f"linear: bias{part} is given without weight{part}")
            continue
        columns = weight_sizes("linear", f"weight{part}", weight, x.shape[-1], attrs.transpose_weight)
        expect_shape("linear", f"bias{part}", bias, (columns,), f"[N] as weight{part} has")
        width = columns + width
    shape = (*x.shape[:-1], width)
    expect_shape("linear", "residual", inputs.residual, shape, "the shape of out")
    return (Tensor(x.dtype, shape),)


def plan(inputs: Any, outputs: Any, attrs: Any, device: Device) -> list[Launch]:
    width = outputs.out.shape[-1]
    found = launches(inputs, outputs.out, width, attrs, device)  # or Decline for what no kernel takes
    config = config_of(inputs, width, attrs.activation, attrs.transpose_weight, device)
    left_to_vendor("linear", device, inputs.x.dtype, config)
    return found


def linear_reference(
    x: Any,
    weight: Any,
    bias: Any,
    residual: Any,
    weight_1: Any,
    bias_1: Any,
    weight_2: Any,
    bias_2: Any,
    *,
    activation: str,
    transpose_weight: bool,
) -> tuple[Any]:
    import torch

    outs = [
        torch.nn.functional.linear(x, w.t() if transpose_weight else w, b)
        for w, b in ((weight, bias), (weight_1, bias_1), (weight_2, bias_2))
        if w is not None
    ]
    out = activation_reference(outs[0] if len(outs) == 1 else torch.cat(outs, dim=-1), activation)
    return (out if residual is None else out + residual,)


def body(g: Any, inputs: Any, attrs: Any) -> tuple[Any]:
    outs = []
    for _, weight, bias in weights_of(inputs):
        if weight is not None:
            out = g.MatMul(inputs.x, weight if attrs.transpose_weight else g.Transpose(weight, perm=[1, 0]))
            outs.append(out if bias is None else g.Add(out, bias))
    out = outs[0] if len(outs) == 1 else g.Concat(*outs, axis=-1)
    out = activation_body(g, out, attrs.activation, g.types["T"])
    return (out if inputs.residual is None else g.Add(out, inputs.residual),)


linear = Op(
    name="linear",
    version=1,
    inputs=(
        Input("x"),
        Input("weight"),
        Input("bias", optional=True),
        Input("residual", optional=True),
        Input("weight_1", optional=True),
        Input("bias_1", optional=True),
        Input("weight_2", optional=True),
        Input("bias_2", optional=True),
    ),
    outputs=(Output("out"),),
    attrs=(
        Attr("activation", "string", "none", choices=ACTIVATIONS),
        Attr("transpose_weight", "bool", False),
    ),
    types={"T": ("float32", "float16", "bfloat16")},
    infer=infer,
    plan=plan,
    reference=linear_reference,
    body=body,
)
