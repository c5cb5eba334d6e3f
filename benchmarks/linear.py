"""linear with what follows it in an encoder, gated_linear, and one whole encoder layer; against torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch.nn import functional

from trimaran.benchmarks.cases import Case, Inputs, Suite, generator, on_copies, only_on_gpu
from trimaran.benchmarks.measure import Contender, Run

EPS = 1e-12


@dataclass(frozen=True)
class Shape:
    """x [rows, depth] to [rows, columns]. after: bias, gelu (bias and GELU), residual (bias and residual), qkv (three
    weights with biases, side by side) or swiglu (two weights, no bias)."""

    rows: int
    depth: int
    columns: int
    after: str

    @property
    def name(self) -> str:
        return f"{self.rows} x {self.depth} -> {self.columns}, {self.after}"

    def flop(self) -> float:
        return 2.0 * self.rows * self.depth * self.columns * (2 if self.after == "swiglu" else 1)


ENCODER = [(768, 3072, "gelu"), (3072, 768, "residual"), (768, 768, "residual"), (768, 2304, "qkv")]
LARGE = [Shape(rows, *rest) for rows in (4096, 16384) for rest in ENCODER]
SMALL = [Shape(rows, *rest) for rows in (16, 128) for rest in ENCODER]
PLAIN = [Shape(rows, depth, columns, "bias") for rows in (16, 128) for depth, columns, _ in ENCODER]
OTHER = [  # rows and models for which no table was made: BERT-large, a ViT, small Llamas
    Shape(1, 768, 3072, "gelu"),
    Shape(7, 1024, 4096, "gelu"),
    Shape(33, 4096, 1024, "residual"),
    Shape(500, 768, 2304, "qkv"),
    Shape(1000, 1024, 4096, "gelu"),
    Shape(6304, 768, 3072, "gelu"),
    Shape(16, 2048, 8192, "bias"),
    Shape(100000, 768, 768, "residual"),
]
SHAPES = [*SMALL, *PLAIN, *LARGE, Shape(8192, 4096, 11008, "gelu"), *OTHER]
QUICK = [Shape(rows, *rest) for rows in (16, 16384) for rest in ENCODER[:2]]
TINY = [Shape(8, 32, 48, after) for after in ("bias", "gelu", "residual", "qkv")]
GATED = [Shape(16, 4096, 11008, "swiglu"), Shape(8192, 4096, 11008, "swiglu")]


def suite(device: torch.device, dtype: torch.dtype, quick: bool) -> Suite:
    shapes = TINY if device.type == "cpu" else QUICK if quick else SHAPES
    return Suite("linear", "matmul", [case(shape, device, dtype) for shape in shapes])


def gated_suite(device: torch.device, dtype: torch.dtype, quick: bool) -> Suite:
    shapes = [Shape(8, 32, 48, "swiglu")] if device.type == "cpu" else GATED[:1] if quick else GATED
    return Suite("gated_linear", "matmul", [case(shape, device, dtype) for shape in shapes])


def case(shape: Shape, device: torch.device, dtype: torch.dtype) -> Case:
    return Case(
        name=shape.name,
        shape=asdict(shape),
        work=shape.flop(),
        inputs=lambda copy: inputs(shape, device, dtype, copy),
        contenders=lambda copies: contenders(shape, copies, device),
        exact=lambda first: (torch_linear(shape, wide(first)),),
    )


def maker(device: torch.device, dtype: torch.dtype, copy: int) -> Callable[..., torch.Tensor]:
    source = generator(device, copy)

    def normal(*size: int, scale: float = 1.0) -> torch.Tensor:
        return torch.randn(size, device=device, dtype=dtype, generator=source) * scale

    return normal


def parameter(tensor: torch.Tensor) -> torch.nn.Parameter:
    return torch.nn.Parameter(tensor, requires_grad=False)


def inputs(shape: Shape, device: torch.device, dtype: torch.dtype, copy: int) -> Inputs:
    normal = maker(device, dtype, copy)
    count = 2 if shape.after == "swiglu" else 1
    found: Inputs = {
        "x": normal(shape.rows, shape.depth),
        "weight": parameter(normal(count * shape.columns, shape.depth, scale=shape.depth**-0.5)),
        "bias": None if shape.after == "swiglu" else parameter(normal(shape.columns)),
        "residual": normal(shape.rows, shape.columns) if shape.after == "residual" else None,
    }
    return found


def wide(first: Inputs) -> Inputs:
    return {name: None if tensor is None else tensor.double() for name, tensor in first.items()}


def torch_linear(shape: Shape, given: Inputs) -> torch.Tensor:
    """What torch does; q, k and v, and gate and up, as one product of the merged weights."""
    out = functional.linear(given["x"], given["weight"], given["bias"])
    if shape.after == "swiglu":
        gate, up = out.chunk(2, -1)
        return functional.silu(gate) * up
    if shape.after == "gelu":
        out = functional.gelu(out)
    return out if given["residual"] is None else out + given["residual"]


def ours(shape: Shape, given: Inputs) -> Run:
    """Our op; what it reads as apart, torch has merged."""
    ops = torch.ops.trimaran
    x, weight, bias, residual = given["x"], given["weight"], given["bias"], given["residual"]
    if shape.after == "swiglu":
        gate, up = (parameter(part) for part in weight.chunk(2))
        return lambda: ops.gated_linear(x, gate, up, activation="silu")
    if shape.after == "qkv":
        weights = [parameter(part) for part in weight.chunk(3)]
        biases = [parameter(part) for part in bias.chunk(3)]
        rest = [item for pair in zip(weights[1:], biases[1:], strict=True) for item in pair]
        return lambda: ops.linear(x, weights[0], biases[0], None, *rest)
    return lambda: ops.linear(x, weight, bias, residual, activation="gelu" if shape.after == "gelu" else "none")


def contenders(shape: Shape, copies: Callable[[int], Inputs], device: torch.device) -> list[Contender]:
    def eager(**given: Any) -> torch.Tensor:
        return torch_linear(shape, given)

    def three(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, **_: Any) -> tuple[torch.Tensor, ...]:
        parts = zip(weight.chunk(3), bias.chunk(3), strict=True)
        return tuple(functional.linear(x, *part) for part in parts)

    # A bias alone leaves nothing to fuse; a compilation takes seconds, so only where what is fused weighs most.
    found = [
        Contender("trimaran", lambda copy: ours(shape, copies(copy)), ours=True),
        Contender("torch, eager", on_copies(copies, eager)),
    ]
    if shape.after == "qkv":  # as a model has it
        split = Contender("torch, three products", on_copies(copies, three), view=lambda exact: exact[0].chunk(3, -1))
        found.append(split)
    if shape.after not in ("bias", "qkv") and shape.rows > 4096:
        found.append(compiled(eager, copies, device))
    return found


def compiled(eager: Callable[..., Any], copies: Callable[[int], Inputs], device: torch.device) -> Contender:
    function = torch.compile(eager, dynamic=False, fullgraph=True)  # compiles when it is called

    def prepare(copy: int) -> Run:
        only_on_gpu(device)
        return on_copies(copies, function)(copy)

    return Contender("torch, compiled", prepare)


# One encoder layer


@dataclass(frozen=True)
class Layer:
    """BERT's layer: batch sequences of `length` tokens, no padding."""

    batch: int
    length: int
    hidden: int = 768
    heads: int = 12
    wide: int = 3072

    @property
    def name(self) -> str:
        return f"{self.batch} x {self.length}, hidden {self.hidden}"

    def flop(self) -> float:
        tokens = self.batch * self.length
        products = 2.0 * tokens * self.hidden * (4 * self.hidden + 2 * self.wide)
        return products + 4.0 * tokens * self.length * self.hidden


LAYERS = [Layer(1, 16), Layer(1, 128), Layer(8, 128), Layer(32, 512)]
TINY_LAYER = Layer(2, 8, hidden=32, heads=2, wide=64)


def layer_suite(device: torch.device, dtype: torch.dtype, quick: bool) -> Suite:
    layers = [TINY_LAYER] if device.type == "cpu" else LAYERS[:2] if quick else LAYERS
    return Suite("layer", "matmul", [layer_case(layer, device, dtype) for layer in layers])


def layer_case(layer: Layer, device: torch.device, dtype: torch.dtype) -> Case:
    def eager(**given: Any) -> torch.Tensor:
        return torch_layer(layer, given)

    return Case(
        name=layer.name,
        shape=asdict(layer),
        work=layer.flop(),
        inputs=lambda copy: layer_inputs(layer, device, dtype, copy),
        contenders=lambda copies: [
            Contender("trimaran", lambda copy: our_layer(layer, copies(copy)), ours=True),
            Contender("torch, eager", on_copies(copies, eager)),
            compiled(eager, copies, device),
        ],
        exact=lambda first: (torch_layer(layer, wide(first)),),
    )


def layer_inputs(layer: Layer, device: torch.device, dtype: torch.dtype, copy: int) -> Inputs:
    normal = maker(device, dtype, copy)
    h, w = layer.hidden, layer.wide
    found: Inputs = {"x": normal(layer.batch, layer.length, h)}
    for name, columns, depth in (("qkv", 3 * h, h), ("out", h, h), ("up", w, h), ("down", h, w)):
        found[f"{name}_weight"] = parameter(normal(columns, depth, scale=depth**-0.5))
        found[f"{name}_bias"] = parameter(normal(columns, scale=0.1))
    for name in ("norm_1", "norm_2"):
        found[f"{name}_weight"] = parameter(1 + normal(h, scale=0.1))
        found[f"{name}_bias"] = parameter(normal(h, scale=0.1))
    return found


def torch_layer(layer: Layer, given: Inputs) -> torch.Tensor:
    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        return functional.linear(x, given[f"{name}_weight"], given[f"{name}_bias"])

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return functional.layer_norm(x, (layer.hidden,), given[f"{name}_weight"], given[f"{name}_bias"], EPS)

    x = given["x"]
    q, k, v = (t.unflatten(-1, (layer.heads, -1)).transpose(1, 2) for t in linear(x, "qkv").chunk(3, -1))
    context = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    middle = norm(linear(context, "out") + x, "norm_1")
    return norm(linear(functional.gelu(linear(middle, "up")), "down") + middle, "norm_2")


def our_layer(layer: Layer, given: Inputs) -> Run:
    """q, k and v from their own weights; five calls."""
    ops = torch.ops.trimaran
    weights, biases = ([parameter(part) for part in given[f"qkv_{name}"].chunk(3)] for name in ("weight", "bias"))
    rest = [item for pair in zip(weights[1:], biases[1:], strict=True) for item in pair]
    scale = (layer.hidden // layer.heads) ** -0.5

    def end(x: torch.Tensor, name: str, residual: torch.Tensor, norm: str) -> torch.Tensor:
        layers = (given[f"{name}_weight"], given[f"{name}_bias"], residual)
        norms = (given[f"{norm}_weight"], given[f"{norm}_bias"])
        y: torch.Tensor = ops.linear_norm(x, *layers, *norms, eps=EPS, norm="layer")[0]
        return y

    def run() -> torch.Tensor:
        packed = ops.linear(given["x"], weights[0], biases[0], None, *rest)
        context = ops.attention(packed, scale=scale, num_heads=layer.heads)
        middle = end(context, "out", given["x"], "norm_1")
        return end(
            ops.linear(middle, given["up_weight"], given["up_bias"], activation="gelu"), "down", middle, "norm_2"
        )

    return run
