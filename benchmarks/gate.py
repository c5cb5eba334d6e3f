"""The accuracy gate: how far from the exact result a contender may be, so that its time counts."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch

PEER_FACTOR = 1.5  # how much larger than the most accurate peer's an error may be
# The relative RMS error that always passes: half a unit in the last place for the short formats (rounding the output
# alone comes to about 0.4 of that), eight units for fp32, whose sums have thousands of terms.
ENOUGH = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8, torch.float32: 2.0**-20}
# The largest error that passes, in units of the largest exact value: an RMS error does not see one wrong element.
WORST = {torch.float16: 2.0**-8, torch.bfloat16: 2.0**-5, torch.float32: 2.0**-17}


def tensors_of(outputs: Any) -> list[torch.Tensor]:
    outputs = outputs if isinstance(outputs, (tuple, list)) else (outputs,)
    return [output for output in outputs if output is not None]


def error_of(outputs: Any, exact: Any) -> float:
    """The largest relative RMS error of the outputs. ValueError where one has another shape, is NaN, or is far off in a
    single place."""
    got, wanted = tensors_of(outputs), tensors_of(exact)
    if [tuple(tensor.shape) for tensor in got] != [tuple(tensor.shape) for tensor in wanted]:
        raise ValueError(f"shapes {[tuple(t.shape) for t in got]}, expected {[tuple(t.shape) for t in wanted]}")
    errors = []
    for mine, true in zip(got, wanted, strict=True):
        difference = mine.double() - true
        error = (difference.square().mean().sqrt() / true.square().mean().sqrt()).item()
        worst = (difference.abs().max() / true.abs().max()).item()
        if not math.isfinite(error):
            raise ValueError("the result is not finite")
        if not worst <= WORST[mine.dtype]:
            limit = f"allowed {WORST[mine.dtype]:.2e} (RMS {error:.2e})"
            raise ValueError(f"the largest error is {worst:.2e} of the largest value, {limit}")
        errors.append(error)
    return max(errors)


def allowed(errors: Iterable[float], dtype: torch.dtype) -> float:
    """The largest relative RMS error that passes, from the errors of the peers."""
    return max(ENOUGH[dtype], PEER_FACTOR * min(errors, default=0.0))
