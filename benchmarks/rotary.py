"""rotary_embedding of q and k, as Llama has it and as the rows of a linear layer; against eager and compiled."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from trimaran.benchmarks.cases import Case, Inputs, Suite, generator, on_copies, only_on_gpu
from trimaran.benchmarks.measure import Contender, Run
from trimaran.kernels.catalog import OPS
from trimaran.kernels.rotary_embedding import rotary_embedding_reference


@dataclass(frozen=True)
class Shape:
    """q [batch, heads, length, head_dim] and k with kv_heads; rows: as [batch, length, heads * head_dim]."""

    batch: int
    heads: int
    kv_heads: int
    length: int
    head_dim: int
    rows: bool = False

    @property
    def name(self) -> str:
        layout = ", rows" if self.rows else ""
        return f"b{self.batch} h{self.heads}/{self.kv_heads} s{self.length} d{self.head_dim}{layout}"

    def moved(self, dtype: torch.dtype) -> float:
        """q and k in and out; cos and sin once."""
        heads = 2 * self.batch * (self.heads + self.kv_heads) + 2
        return float(dtype.itemsize * heads * self.length * self.head_dim)


SHAPES = [Shape(4, 32, 8, 4096, 128), Shape(4, 32, 8, 4096, 128, rows=True), Shape(1, 32, 8, 1, 128)]
TINY = [Shape(2, 4, 2, 8, 16), Shape(2, 4, 2, 8, 16, rows=True)]


def suite(device: torch.device, dtype: torch.dtype, quick: bool) -> Suite:
    shapes = TINY if device.type == "cpu" else SHAPES[1:] if quick else SHAPES
    return Suite("rotary_embedding", "copy", [case(shape, device, dtype) for shape in shapes])


def case(shape: Shape, device: torch.device, dtype: torch.dtype) -> Case:
    attrs: dict[str, Any] = {"num_heads": shape.heads, "kv_num_heads": shape.kv_heads} if shape.rows else {}

    def exact(first: Inputs) -> tuple[torch.Tensor, ...]:
        op = OPS["rotary_embedding"]
        given = op.input_namespace([first[port.name].double() for port in op.inputs if port.name in first])
        found: tuple[torch.Tensor, ...] = rotary_embedding_reference(
            *vars(given).values(), **vars(op.attributes(attrs))
        )
        return found

    return Case(
        name=shape.name,
        shape=asdict(shape),
        work=shape.moved(dtype),
        inputs=lambda copy: inputs(shape, device, dtype, copy),
        contenders=lambda copies: contenders(shape, attrs, copies, device),
        exact=exact,
    )


def inputs(shape: Shape, device: torch.device, dtype: torch.dtype, copy: int) -> Inputs:
    source = generator(device, copy)

    def heads(count: int) -> torch.Tensor:
        size: tuple[int, ...] = (shape.batch, count, shape.length, shape.head_dim)
        if shape.rows:
            size = (shape.batch, shape.length, count * shape.head_dim)
        return torch.randn(size, device=device, dtype=dtype, generator=source)

    half = shape.head_dim // 2
    place = torch.arange(shape.length, device=device).double()
    angle = place[:, None] * 10000.0 ** (-torch.arange(half, device=device).double() / half)
    angle = torch.cat([angle, angle], -1)[None]
    return {
        "q": heads(shape.heads),
        "cos": angle.cos().to(dtype),
        "sin": angle.sin().to(dtype),
        "k": heads(shape.kv_heads),
    }


def contenders(
    shape: Shape, attrs: dict[str, Any], copies: Callable[[int], Inputs], device: torch.device
) -> list[Contender]:
    def ours(**given: Any) -> Any:
        return torch.ops.trimaran.rotary_embedding(**given, **attrs, return_k_out=True)

    def eager(q: Any, cos: Any, sin: Any, k: Any) -> tuple[torch.Tensor, ...]:
        """As transformers writes it."""
        axis = 2 if shape.rows else 1
        cos, sin = cos.unsqueeze(axis), sin.unsqueeze(axis)

        def turned(x: Any) -> Any:
            first, second = x.chunk(2, -1)
            return x * cos + torch.cat([-second, first], -1) * sin

        if not shape.rows:
            return turned(q), turned(k)
        return tuple(turned(x.unflatten(-1, (-1, shape.head_dim))).flatten(2) for x in (q, k))

    compiled = torch.compile(eager, dynamic=False, fullgraph=True)  # compiles when it is called

    def compile_first(copy: int) -> Run:
        only_on_gpu(device)
        return on_copies(copies, compiled)(copy)

    return [
        Contender("trimaran", on_copies(copies, ours), ours=True),
        Contender("torch, eager", on_copies(copies, eager)),
        Contender("torch, compiled", compile_first),
    ]
