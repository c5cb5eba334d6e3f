"""layer_norm and rms_norm, with and without a residual (then with the sum written too); against eager and compiled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional

from trimaran.benchmarks.cases import Case, Inputs, Suite, generator, on_copies, only_on_gpu
from trimaran.benchmarks.measure import Contender, Run

EPS = 1e-5
SIZES = [(16384, 768), (16384, 1024), (16384, 4096), (4096, 16384), (128, 768)]  # rows, columns
QUICK = [(16384, 768), (128, 768)]
TINY = [(8, 64)]
# op -> its parameters, in the order in which torch's function takes them
PARAMETERS = {"layer_norm": ("weight", "bias"), "rms_norm": ("weight",)}


def suite(op: str, device: torch.device, dtype: torch.dtype, quick: bool) -> Suite:
    sizes = TINY if device.type == "cpu" else QUICK if quick else SIZES
    found = [case(op, *size, residual, device, dtype) for residual in (False, True) for size in sizes]
    return Suite(op, "copy", found)


def case(op: str, rows: int, columns: int, residual: bool, device: torch.device, dtype: torch.dtype) -> Case:
    def inputs(copy: int) -> Inputs:
        source = generator(device, copy)

        def normal(*size: int) -> torch.Tensor:
            return torch.randn(size, device=device, dtype=dtype, generator=source)

        parameters = {name: normal(columns) for name in PARAMETERS[op]}
        return {"x": normal(rows, columns), **parameters, "residual": normal(rows, columns) if residual else None}

    return Case(
        name=f"{rows} x {columns}{' + residual' if residual else ''}",
        shape={"rows": rows, "columns": columns, "residual": residual},
        work=moved(op, rows, columns, residual, dtype),
        inputs=inputs,
        contenders=lambda copies: contenders(op, copies, residual, device),
        exact=lambda first: eager(op)(**{k: None if t is None else t.double() for k, t in first.items()}),
    )


def moved(op: str, rows: int, columns: int, residual: bool, dtype: torch.dtype) -> float:
    """Bytes that must move: x in and y out, with a residual also that in and the sum out, and the parameters once."""
    return float(dtype.itemsize * columns * (rows * (4 if residual else 2) + len(PARAMETERS[op])))


def eager(op: str) -> Callable[..., tuple[torch.Tensor, ...]]:
    """torch's own: add, then norm; the sum is a second result, as a pre-norm model needs it."""
    norm: Callable[..., torch.Tensor] = getattr(functional, op)

    def run(x: Any, residual: Any, **parameters: Any) -> tuple[torch.Tensor, ...]:
        total = x if residual is None else x + residual
        y = norm(total, x.shape[-1:], *parameters.values(), EPS)
        return (y,) if residual is None else (y, total)

    return run


def contenders(op: str, inputs: Callable[[int], Inputs], residual: bool, device: torch.device) -> list[Contender]:
    call = getattr(torch.ops.trimaran, op)

    def ours(**given: Any) -> Any:
        return call(**given, eps=EPS, return_sum=residual)

    compiled = torch.compile(eager(op), dynamic=False, fullgraph=True)  # compiles when it is called

    def compile_first(copy: int) -> Run:
        only_on_gpu(device)
        return on_copies(inputs, compiled)(copy)

    return [
        Contender("trimaran", on_copies(inputs, ours), ours=True),
        Contender("torch, eager", on_copies(inputs, eager(op))),
        Contender("torch, compiled", compile_first),
    ]
