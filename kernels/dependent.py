"""Programmatic dependent launch: a kernel that starts while the last one on its stream still runs.

What the last kernel wrote is there only after the wait, so nothing but constant inputs (`Tensor.constant`) is read
before it, and every program waits. A plan sets the option `launch_pdl` and the constexpr PDL together, by
`dependent(device)`; neither the interpreter nor GPUs before compute capability 9.0 have it.
"""

from __future__ import annotations

import triton
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from trimaran.kernels.contract import Device


@triton.jit
def await_inputs():
    """Let the next kernel start, and wait until what the last one wrote can be read."""
    gdc_launch_dependents()
    gdc_wait()


def dependent(device: Device) -> bool:
    return device.capability >= 90
