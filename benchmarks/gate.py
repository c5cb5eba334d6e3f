"""The accuracy gate: how far from the exact result a contender may be, so that its time counts."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

PEER_FACTOR = 1.5  # how much larger than the most accurate peer's an error may be
# The relative RMS error that always passes: half a unit in the last place for the short formats (rounding the output
# alone comes to about 0.4 of that), eight units for fp32, whose sums have thousands of terms.
ENOUGH = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8, torch.float32: 2.0**-20}
MOST_RMS, MOST_WORST = 0.05, 0.5  # of a whole model, however wrong its own forward is
# The largest error that passes, in units of the largest exact value: an RMS error does not see one wrong element.
WORST = {torch.float16: 2.0**-8, torch.bfloat16: 2.0**-5, torch.float32: 2.0**-17}


def tensors_of(outputs: Any) -> list[torch.Tensor]:
    outputs = outputs if isinstance(outputs, (tuple, list)) else (outputs,)
    return [output for output in outputs if output is not None]


def errors_of(outputs: Any, exact: Any) -> tuple[float, float]:
    """(the largest relative RMS error of the outputs, the largest error in units of the largest exact value).
    ValueError where one has another shape or is not finite."""
    got, wanted = tensors_of(outputs), tensors_of(exact)
    if [tuple(tensor.shape) for tensor in got] != [tuple(tensor.shape) for tensor in wanted]:
        raise ValueError(f"shapes {[tuple(t.shape) for t in got]}, expected {[tuple(t.shape) for t in wanted]}")
    found = []
    for mine, true in zip(got, wanted, strict=True):
        difference = mine.double() - true
        error = (difference.square().mean().sqrt() / true.square().mean().sqrt()).item()
        if not math.isfinite(error):
            raise ValueError("the result is not finite")
        found.append((error, (difference.abs().max() / true.abs().max()).item()))
    return max(rms for rms, _ in found), max(worst for _, worst in found)


def error_of(outputs: Any, exact: Any) -> float:
    """The largest relative RMS error of the outputs. ValueError where one has another shape, is NaN, or is far off in a
    single place."""
    error, worst = errors_of(outputs, exact)
    limit = WORST[tensors_of(outputs)[0].dtype]
    if not worst <= limit:
        raise ValueError(
            f"the largest error is {worst:.2e} of the largest value, allowed {limit:.2e} (RMS {error:.2e})"
        )
    return error


@dataclass(frozen=True)
class Gate:
    """For whole models, whose depth adds errors up: what the model's own eager forward is off by sets the limits."""

    rms: float
    worst: float

    @classmethod
    def of(cls, dtype: torch.dtype, errors: Iterable[tuple[float, float]] = ()) -> Gate:
        """errors: of the reference, one for each set of inputs."""
        rms, worst = (max(column) for column in zip((0.0, 0.0), *errors, strict=True))
        return cls(
            min(max(ENOUGH[dtype], PEER_FACTOR * rms), MOST_RMS),
            min(max(WORST[dtype], PEER_FACTOR * worst), MOST_WORST),
        )

    def check(self, outputs: Any, exact: Any) -> float:
        """The relative RMS error; ValueError where it is too large."""
        rms, worst = errors_of(outputs, exact)
        if not rms <= self.rms:
            raise ValueError(f"RMS error {rms:.2e} of the exact result's RMS, allowed {self.rms:.2e}")
        if not worst <= self.worst:
            raise ValueError(f"the largest error is {worst:.2e} of the largest value, allowed {self.worst:.2e}")
        return rms


def allowed(errors: Iterable[float], dtype: torch.dtype) -> float:
    """The largest relative RMS error that passes, from the errors of the peers."""
    return max(ENOUGH[dtype], PEER_FACTOR * min(errors, default=0.0))
