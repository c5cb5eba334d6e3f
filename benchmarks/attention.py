"""Attention: full, with key lengths, with an additive bias, causal, grouped; against SDPA, flex and packed rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from trimaran.benchmarks.cases import Case, Inputs, Suite, generator, on_copies, only_on_gpu
from trimaran.benchmarks.measure import Contender, Run
from trimaran.kernels.attention import attention_reference
from trimaran.kernels.catalog import OPS

BACKENDS = {
    "SDPA flash": SDPBackend.FLASH_ATTENTION,
    "SDPA cuDNN": SDPBackend.CUDNN_ATTENTION,
    "SDPA efficient": SDPBackend.EFFICIENT_ATTENTION,
    "SDPA math": SDPBackend.MATH,
}
MATH_BYTES = 2**33  # of fp32 scores, of which the math backend holds several
SLICE = 2**27  # scores that the exact computation holds at once


@dataclass(frozen=True)
class Shape:
    """q [batch, heads, length, head_dim], k and v with kv_heads. masking: full, lengths, bias or causal."""

    masking: str
    batch: int
    heads: int
    length: int
    head_dim: int
    kv_heads: int = 0

    @property
    def name(self) -> str:
        heads = f"{self.heads}/{self.kv_heads}" if self.kv_heads else f"{self.heads}"
        return f"{self.masking} b{self.batch} h{heads} s{self.length} d{self.head_dim}"

    def lengths(self) -> list[int]:
        """Uniform in [S/2, S], the first row full, from seed 0: the same for every copy."""
        if self.masking != "lengths":
            return [self.length] * self.batch
        found = torch.randint(self.length // 2, self.length + 1, (self.batch,), generator=generator_cpu())
        return [self.length, *(int(value) for value in found[1:])]

    def flop(self) -> float:
        """Two products over the pairs of a query and a key that it sees; neither may be padding."""
        if self.masking == "causal":
            pairs = self.batch * self.length * (self.length + 1) // 2
        else:
            pairs = sum(length * length for length in self.lengths())
        return 4.0 * pairs * self.heads * self.head_dim


def generator_cpu() -> torch.Generator:
    return generator(torch.device("cpu"), 0)


LONG = [(4, 16, 4096, 64), (4, 16, 4096, 128)]
SHORT = (32, 12, 512, 64)
SHAPES = [
    *(Shape("full", *size) for size in (*LONG, (1, 16, 16384, 64), (1, 16, 16384, 128), (32, 12, 128, 64), SHORT)),
    *(Shape("lengths", *size) for size in (SHORT, *LONG)),
    *(Shape("bias", *size) for size in (*LONG, SHORT)),
    *(Shape("causal", *size) for size in (*LONG, SHORT)),
    Shape("causal", 4, 32, 4096, 128, kv_heads=8),
]
QUICK = [Shape("full", 32, 12, 128, 64), *(Shape(masking, *SHORT) for masking in ("lengths", "bias", "causal"))]
TINY = [
    *(Shape(masking, 2, 4, 32, 16) for masking in ("full", "lengths", "bias", "causal")),
    Shape("causal", 2, 4, 32, 16, kv_heads=2),
]


def suite(device: torch.device, dtype: torch.dtype, quick: bool) -> Suite:
    shapes = TINY if device.type == "cpu" else QUICK if quick else SHAPES
    return Suite("attention", "matmul", [case(shape, device, dtype) for shape in shapes])


def case(shape: Shape, device: torch.device, dtype: torch.dtype) -> Case:
    sizes = asdict(shape) | {"kv_heads": shape.kv_heads or shape.heads, "key_lengths": shape.lengths()}

    def inputs(copy: int) -> Inputs:
        source = generator(device, copy)

        def normal(*size: int) -> torch.Tensor:
            return torch.randn(size, device=device, dtype=dtype, generator=source)

        b, h, s, d = shape.batch, shape.heads, shape.length, shape.head_dim
        kv = shape.kv_heads or h
        lengths = torch.tensor(shape.lengths(), dtype=torch.int32, device=device)
        return {
            "q": normal(b, h, s, d),
            "k": normal(b, kv, s, d),
            "v": normal(b, kv, s, d),
            "bias": normal(1, h, s, s) if shape.masking == "bias" else None,
            "key_lengths": lengths if shape.masking == "lengths" else None,
        }

    return Case(
        name=shape.name,
        shape=sizes,
        work=shape.flop(),
        inputs=inputs,
        contenders=lambda copies: contenders(shape, copies, device),
        exact=lambda first: (exact(shape, first),),
    )


def contenders(shape: Shape, inputs: Callable[[int], Inputs], device: torch.device) -> list[Contender]:
    options: dict[str, Any] = {"scale": shape.head_dim**-0.5, "causal": shape.masking == "causal"}

    def ours(**given: Any) -> Any:
        return torch.ops.trimaran.attention(**given, **options)

    found = [Contender("trimaran", on_copies(inputs, ours), ours=True)]
    found += [Contender(name, sdpa(shape, inputs, backend)) for name, backend in BACKENDS.items()]
    found.append(Contender("flex, compiled", flex(shape, inputs, device)))
    if shape.masking == "lengths":
        packed = rows_of(shape).to(device)
        found.append(Contender("varlen, packed", varlen(shape, inputs), view=lambda full: pack(full[0], packed)))
    return found


def sdpa(shape: Shape, inputs: Callable[[int], Inputs], backend: SDPBackend) -> Callable[[int], Run]:
    """SDPA by one backend; lengths are given as a bool mask [B, 1, 1, S], made before."""

    def prepare(copy: int) -> Run:
        scores = 4 * shape.batch * shape.heads * shape.length**2
        if backend == SDPBackend.MATH and scores > MATH_BYTES:
            raise RuntimeError(f"fp32 scores of {scores / 2**30:.0f} GiB, several times: too much memory")
        mine = inputs(copy)
        mask, lengths = mine["bias"], mine["key_lengths"]
        if lengths is not None:
            mask = torch.arange(shape.length, device=lengths.device) < lengths[:, None, None, None]

        def run() -> Any:
            with sdpa_kernel(backend):
                return torch.nn.functional.scaled_dot_product_attention(
                    mine["q"],
                    mine["k"],
                    mine["v"],
                    attn_mask=mask,
                    is_causal=shape.masking == "causal",
                    enable_gqa=shape.kv_heads > 0,
                )

        return run

    return prepare


def flex(shape: Shape, inputs: Callable[[int], Inputs], device: torch.device) -> Callable[[int], Run]:
    """Compiled flex_attention; the block mask is made once, before."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    lengths = torch.tensor(shape.lengths(), dtype=torch.int32, device=device)
    masks: dict[str, Callable[..., Any]] = {
        "causal": lambda b, h, query, key: query >= key,
        "lengths": lambda b, h, query, key: key < lengths[b],
    }
    made: dict[str, Any] = {}

    def attend(q: Any, k: Any, v: Any, bias: Any, blocks: Any) -> Any:
        def biased(score: Any, b: Any, h: Any, query: Any, key: Any) -> Any:
            return score + bias[0, h, query, key]

        change = None if bias is None else biased
        return flex_attention(q, k, v, score_mod=change, block_mask=blocks, enable_gqa=shape.kv_heads > 0)

    def prepare(copy: int) -> Run:
        only_on_gpu(device)
        if not made:
            batch = shape.batch if shape.masking == "lengths" else None
            size = shape.length
            made["attend"] = torch.compile(attend, dynamic=False, fullgraph=True)
            if mask := masks.get(shape.masking):
                made["blocks"] = create_block_mask(mask, batch, None, size, size, device=str(device))
        mine = inputs(copy)
        return lambda: made["attend"](mine["q"], mine["k"], mine["v"], mine["bias"], made.get("blocks"))

    return prepare


def rows_of(shape: Shape) -> torch.Tensor:
    """[B, S] bool: which rows are not padding."""
    return torch.arange(shape.length) < torch.tensor(shape.lengths())[:, None]


def pack(tensor: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """[B, H, S, D] without the padding, as [tokens, H, D]."""
    return tensor.transpose(1, 2)[rows].contiguous()


def varlen(shape: Shape, inputs: Callable[[int], Inputs]) -> Callable[[int], Run]:
    """varlen_attn on rows that were packed before: it has no padding to compute."""

    def prepare(copy: int) -> Run:
        from torch.nn.attention.varlen import varlen_attn

        mine = inputs(copy)
        device = mine["q"].device
        rows = rows_of(shape).to(device)
        q, k, v = (pack(mine[name], rows) for name in "qkv")
        starts = torch.tensor([0, *shape.lengths()], device=device).cumsum(0).to(torch.int32)
        return lambda: varlen_attn(q, k, v, starts, starts, shape.length, shape.length)

    return prepare


def exact(shape: Shape, first: Inputs) -> torch.Tensor:
    """The result in fp64, [B, H, S, D], some heads of one row of the batch at a time."""
    q, k, v, bias, lengths = (first[name] for name in ("q", "k", "v", "bias", "key_lengths"))
    group = q.shape[1] // k.shape[1]
    step = max(1, SLICE // shape.length**2 // group)  # key heads at once
    out = torch.empty(q.shape, dtype=torch.float64, device=q.device)
    op = OPS["attention"]
    options = vars(op.attributes({"scale": shape.head_dim**-0.5, "causal": shape.masking == "causal"}))
    for b in range(shape.batch):
        for head in range(0, k.shape[1], step):
            some, theirs = slice(head, head + step), slice(head * group, (head + step) * group)
            given = {
                "q": q[b : b + 1, theirs].double(),
                "k": k[b : b + 1, some].double(),
                "v": v[b : b + 1, some].double(),
                "bias": None if bias is None else bias[:, theirs].double(),
                "key_lengths": None if lengths is None else lengths[b : b + 1],
            }
            (out[b : b + 1, theirs],) = attention_reference(*(given.get(port.name) for port in op.inputs), **options)
    return out
