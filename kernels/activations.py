"""The activations that a linear layer may end in: in a kernel, in plain PyTorch, and in standard ONNX ops.

    relu        max(x, 0)
    gelu        x (1 + erf(x / sqrt 2)) / 2
    gelu_tanh   x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) / 2
    silu        x sigmoid(x)
    tanh        tanh(x)
    quick_gelu  x sigmoid(1.702 x)
Source: Hendrycks, Gimpel, "Gaussian Error Linear Units", 2016; torch.nn.functional; CLIP's quick_gelu.
"""

from __future__ import annotations

import math
from typing import Any

import triton
import triton.language as tl

ACTIVATIONS = ("none", "relu", "gelu", "gelu_tanh", "silu", "tanh", "quick_gelu")

CUBIC = tl.constexpr(0.044715)
SQRT_2_OVER_PI = tl.constexpr(math.sqrt(2 / math.pi))
SQRT_HALF = tl.constexpr(math.sqrt(0.5))
QUICK = tl.constexpr(1.702)
LOG2_E = tl.constexpr(math.log2(math.e))
# 1 + erf(x / sqrt 2) = 2 / (1 + 2^(x (A + B x^2 + C x^4))), fitted to where x is up to 6
GELU_A = tl.constexpr(-1.59501517 * math.log2(math.e))
GELU_B = tl.constexpr(-7.40119920e-2 * math.log2(math.e))
GELU_C = tl.constexpr(7.03185695e-4 * math.log2(math.e))


@triton.jit
def sigmoid(x, EXACT: tl.constexpr):
    if EXACT:
        return 1.0 / (1.0 + tl.exp(-x))
    else:
        return 1.0 / (1.0 + tl.exp2(x * -LOG2_E))


@triton.jit
def tanh(x):
    """Within two units in the last place of fp32, near zero too, where the quotient would cancel."""
    square = x * x
    series = 2.0 / 15.0 + square * (-17.0 / 315.0 + square * (62.0 / 2835.0))
    series = x * (1.0 + square * (-1.0 / 3.0 + square * series))
    return tl.where(tl.abs(x) < 0.2, series, 1.0 - 2.0 / (tl.exp(2.0 * x) + 1.0))


@triton.jit
def gelu(x, EXACT: tl.constexpr):
    """Where it is rounded to 16 bits, without erf, which costs as much as a product of small depth: within 3e-5."""
    if EXACT:
        return 0.5 * x * (1.0 + tl.erf(x * SQRT_HALF))
    else:
        square = tl.minimum(x * x, 36.0)
        return x / (1.0 + tl.exp2(x * (square * (square * GELU_C + GELU_B) + GELU_A)))


@triton.jit
def activated(x, ACTIVATION: tl.constexpr, EXACT: tl.constexpr):
    """x in fp32, any shape. EXACT: as exact as the functions of the language, not only what is rounded to 16 bits; that
    is fp32's accuracy where kernels are interpreted, which is where fp32 runs."""
    if ACTIVATION == "relu":
        x = tl.where(x > 0.0, x, tl.where(x != x, x, 0.0))  # NaN stays
    if ACTIVATION == "gelu":
        x = gelu(x, EXACT)
    if ACTIVATION == "gelu_tanh":  # (1 + tanh(u)) / 2 is sigmoid(2 u)
        x = x * sigmoid((x + x * x * x * CUBIC) * (2.0 * SQRT_2_OVER_PI), EXACT)
    if ACTIVATION == "silu":
        x = x * sigmoid(x, EXACT)
    if ACTIVATION == "tanh":
        x = tanh(x)
    if ACTIVATION == "quick_gelu":
        x = x * sigmoid(x * QUICK, EXACT)
    return x


def activation_reference(x: Any, name: str) -> Any:
    """In plain PyTorch, in x's dtype."""
    import torch
    from torch.nn import functional

    found = {
        "none": lambda: x,
        "relu": lambda: functional.relu(x),
        "gelu": lambda: functional.gelu(x),
        "gelu_tanh": lambda: functional.gelu(x, approximate="tanh"),
        "silu": lambda: functional.silu(x),
        "tanh": lambda: torch.tanh(x),
        "quick_gelu": lambda: x * torch.sigmoid(1.702 * x),
    }
    return found[name]()


def activation_body(g: Any, x: Any, name: str, dtype: str) -> Any:
    """In ONNX ops; in fp32, as the kernel does it."""
    if name in ("none", "relu"):
        return x if name == "none" else g.Relu(x)
    wide = g.cast(x, "float32")

    def number(value: float) -> Any:
        return g.constant(value, "float32")

    def times(a: Any, value: float) -> Any:
        return g.Mul(a, number(value))

    if name == "gelu":
        y = g.Mul(times(wide, 0.5), g.Add(g.Erf(times(wide, math.sqrt(0.5))), number(1.0)))
    elif name == "gelu_tanh":
        cubed = g.Mul(g.Mul(wide, wide), wide)
        inner = times(g.Add(wide, times(cubed, 0.044715)), math.sqrt(2 / math.pi))
        y = g.Mul(times(wide, 0.5), g.Add(g.Tanh(inner), number(1.0)))
    elif name == "tanh":
        y = g.Tanh(wide)
    else:
        y = g.Mul(wide, g.Sigmoid(wide if name == "silu" else times(wide, 1.702)))
    return g.cast(y, dtype)
