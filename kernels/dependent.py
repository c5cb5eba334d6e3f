"""Programmatic dependent launch: a kernel that starts while the last one on its stream still runs.

What the last kernel wrote is there only after the wait, so nothing but constant inputs (`Tensor.constant`) is read
before it, and every program waits. A plan sets the option `launch_pdl` and the constexpr PDL together, by
`dependent(device)`; neither the interpreter nor GPUs before compute capability 9.0 have it.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from trimaran.kernels.contract import Device


@triton.jit
def await_inputs():
    """Let the next kernel start, and wait until what the last one wrote can be read."""
    gdc_launch_dependents()
    gdc_wait()


@triton.jit
def begin(PDL: tl.constexpr, EARLY: tl.constexpr):
    """Let the next kernel start. EARLY: all that is read before `await_rest` is constant; else wait."""
    if PDL:
        gdc_launch_dependents()
        if not EARLY:
            gdc_wait()


@triton.jit
def await_rest(PDL: tl.constexpr, EARLY: tl.constexpr):
    """Wait until what the last kernel wrote can be read, unless `begin` has."""
    if PDL and EARLY:
        gdc_wait()


def dependent(device: Device) -> bool:
    return device.capability >= 90
