"""One case and more of every op: what it is fed, and what its reference makes of it."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Any

import torch
from oracle import widened

from trimaran.kernels.attention import attention
from trimaran.kernels.contract import Op
from trimaran.kernels.gated_linear import gated_linear
from trimaran.kernels.layer_norm import layer_norm
from trimaran.kernels.linear import linear
from trimaran.kernels.linear_norm import linear_norm
from trimaran.kernels.rms_norm import rms_norm
from trimaran.kernels.rotary_embedding import rotary_embedding


@dataclass
class Case:
    """One use of an op. inputs: shapes by name, the floating ones random; other inputs as tensors."""

    op: Op
    inputs: dict[str, tuple[int, ...]]
    attrs: dict[str, Any] = field(default_factory=dict)
    others: dict[str, torch.Tensor] = field(default_factory=dict)
    outputs: tuple[str, ...] = ("out",)


LENGTHS = {"key_lengths": torch.tensor([5, 11], dtype=torch.int32)}
MASK = {"key_mask": torch.tensor([[True] * 9 + [False] * 4, [False] * 13])}
HEADS = {"q": (2, 4, 7, 8), "k": (2, 2, 13, 8), "v": (2, 2, 13, 8)}
ROWS = {"q": (2, 7, 32), "k": (2, 13, 16), "v": (2, 13, 16)}
GROUPED = {"scale": 0.3, "num_heads": 4, "kv_num_heads": 2}
PACKED = {"q": (2, 13, 64)}
BIAS = {"bias": (1, 4, 1, 13)}
NORM = {"x": (3, 5, 33)}
ALL = {"weight": (33,), "bias": (33,), "residual": (3, 5, 33)}
LAYER = {"x": (2, 3, 24), "weight": (20, 24)}
MORE = {"weight_1": (12, 24), "bias_1": (12,), "weight_2": (7, 24)}
GATED = {"x": (5, 24), "gate_weight": (20, 24), "up_weight": (20, 24)}
JOINED = {**LAYER, "bias": (20,), "residual": (2, 3, 20), "norm_weight": (20,)}
TURNED = {"q": (2, 4, 7, 8), "k": (2, 2, 7, 8)}
TABLES = {"cos": torch.linspace(-1, 1, 7 * 8).view(7, 8), "sin": torch.linspace(1, -1, 7 * 8).view(7, 8)}
BOTH = ("y", "sum")

CASES = {
    "heads": Case(attention, HEADS, {"scale": 0.3}),
    "heads_causal": Case(attention, HEADS, {"scale": 0.3, "causal": True}),
    "heads_bias": Case(attention, {**HEADS, "bias": (2, 1, 7, 13)}, {"scale": 0.3}),
    "heads_lengths": Case(attention, HEADS, {"scale": 0.3}, LENGTHS),
    "heads_mask": Case(attention, HEADS, {"scale": 0.3}, MASK),
    "heads_mask_mean": Case(attention, HEADS, {"scale": 0.3, "masked_row": "mean"}, MASK),
    "heads_bias_mask": Case(attention, {**HEADS, **BIAS}, {"scale": 0.3}, MASK),
    "heads_everything": Case(attention, {**HEADS, **BIAS}, {"scale": 0.3, "causal": True}, {**LENGTHS, **MASK}),
    "rows": Case(attention, ROWS, GROUPED),
    "rows_lengths": Case(attention, ROWS, GROUPED, LENGTHS),
    "rows_everything": Case(attention, {**ROWS, **BIAS}, {**GROUPED, "causal": True}, {**LENGTHS, **MASK}),
    "packed": Case(attention, PACKED, GROUPED),
    "packed_mask": Case(attention, PACKED, GROUPED, MASK),
    "packed_everything": Case(attention, {**PACKED, **BIAS}, {**GROUPED, "causal": True}, {**LENGTHS, **MASK}),
    "batch_0": Case(attention, {"q": (0, 4, 7, 8), "k": (0, 2, 13, 8), "v": (0, 2, 13, 8)}, {"scale": 0.3}),
    "no_keys": Case(attention, {"q": (2, 4, 7, 8), "k": (2, 2, 0, 8), "v": (2, 2, 0, 8)}, {"scale": 0.3}),
    "no_queries": Case(attention, {"q": (2, 0, 32), "k": (2, 13, 16), "v": (2, 13, 16)}, GROUPED),
    "norm_no_rows": Case(layer_norm, {"x": (0, 33), "weight": (33,)}, {"eps": 1e-5}, outputs=("y",)),
    "norm_no_columns": Case(layer_norm, {"x": (3, 0)}, {"eps": 1e-5}, outputs=("y",)),
    "norm_vector": Case(layer_norm, {"x": (33,), "bias": (33,)}, {"eps": 1e-5}, outputs=("y",)),
    "norm_sum": Case(layer_norm, {**NORM, **ALL}, {"eps": 1e-5}, outputs=("y", "sum")),
    "norm_large_eps": Case(layer_norm, NORM, {"eps": 2.0}, outputs=("y",)),
    "rms": Case(rms_norm, NORM, {"eps": 1e-5}, outputs=("y",)),
    "rms_sum": Case(rms_norm, {**NORM, "residual": (3, 5, 33)}, {"eps": 1e-5, "cast": "gemma"}, outputs=BOTH),
    "rms_llama": Case(rms_norm, {**NORM, "weight": (33,)}, {"eps": 1e-5, "cast": "llama"}, outputs=("y",)),
    "rms_weight_in_fp32": Case(rms_norm, NORM, {"eps": 1e-5}, {"weight": torch.linspace(-2, 2, 33)}, ("y",)),
    "linear": Case(linear, LAYER),
    "linear_activation": Case(linear, {**LAYER, "bias": (20,), "residual": (2, 3, 20)}, {"activation": "gelu"}),
    "linear_transposed": Case(linear, {"x": (5, 24), "weight": (24, 20)}, {"transpose_weight": True}),
    "linear_of_three": Case(linear, {**LAYER, "bias": (20,), **MORE}, {"activation": "silu"}),
    "linear_no_rows": Case(linear, {"x": (0, 24), "weight": (20, 24)}),
    "gated": Case(gated_linear, GATED, {"activation": "silu"}),
    "gated_biases": Case(gated_linear, {**GATED, "gate_bias": (20,), "up_bias": (20,)}, {"activation": "gelu_tanh"}),
    "gated_second": Case(
        gated_linear, {"x": (5, 24), "gate_weight": (40, 24)}, {"activation": "relu", "gate": "second"}
    ),
    "joined": Case(linear_norm, LAYER, {"eps": 1e-5, "norm": "rms"}, outputs=("y",)),
    "joined_sum": Case(linear_norm, {**JOINED, "norm_bias": (20,)}, {"eps": 1e-5, "norm": "layer"}, outputs=BOTH),
    "joined_llama": Case(linear_norm, JOINED, {"eps": 1e-5, "norm": "rms", "cast": "llama"}, outputs=BOTH),
    "turned": Case(rotary_embedding, {**TURNED, "cos": (7, 8), "sin": (7, 8)}, outputs=("q_out", "k_out")),
    "turned_alone": Case(rotary_embedding, {"q": (2, 4, 7, 8)}, {"interleaved": True}, TABLES, ("q_out",)),
    "turned_packed": Case(
        rotary_embedding, {"q": (2, 7, 64)}, {"num_heads": 4, "kv_num_heads": 2, "packed": True}, TABLES, ("q_out",)
    ),
    "turned_positions": Case(
        rotary_embedding,
        TURNED,
        {"rotary_dim": 4},
        {name: table[:, :4] for name, table in TABLES.items()} | {"positions": torch.tensor([[6, 5, 4, 3, 2, 1, 0]])},
        ("q_out", "k_out"),
    ),
}
for chosen in itertools.chain.from_iterable(itertools.combinations(ALL, count) for count in range(4)):
    name = "_".join(["norm", *chosen])
    CASES[name] = Case(layer_norm, {**NORM, **{key: ALL[key] for key in chosen}}, {"eps": 1e-5}, outputs=("y",))


def tensors(case: Case, dtype: torch.dtype, device: str = "cpu") -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    floating = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in case.inputs.items()}
    return {name: tensor.to(device) for name, tensor in {**floating, **case.others}.items()}


def expected(case: Case, inputs: dict[str, torch.Tensor], wide: bool) -> dict[str, torch.Tensor]:
    attrs = vars(case.op.attributes(case.attrs))
    values = [inputs.get(port.name) for port in case.op.inputs]
    outputs = case.op.reference(*(map(widened, values) if wide else values), **attrs)
    return {port.name: out for port, out in zip(case.op.outputs, outputs, strict=True) if port.name in case.outputs}
