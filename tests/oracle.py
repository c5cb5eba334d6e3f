"""How wrong may a kernel be? No more than PyTorch's own kernel at the same dtype, measured against fp64.

And how it is run: interpreted on the CPU, compiled on a GPU, into outputs that are NaN until it writes them.
"""

from __future__ import annotations

from unittest import mock

import pytest
import torch

from trimaran.kernels.interpreter import interpret
from trimaran.torch_path import ops

ULP = {torch.float32: 2.0**-23, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}
ON_GPU = pytest.mark.gpu
# Where, and of what dtype, linear layers are tested: on a GPU their plans decline fp32.
LINEAR_PLACES = [
    *(("cpu", dtype) for dtype in (torch.float32, torch.float16, torch.bfloat16)),
    *(pytest.param("cuda", dtype, marks=ON_GPU) for dtype in (torch.float16, torch.bfloat16)),
]
EXACT_PLACES = [("cpu", torch.float32), pytest.param("cuda", torch.float16, marks=ON_GPU)]  # the most exact of each
LARGE = 100_000  # elements from which error statistics are stable


def widened(value):
    """fp32, fp16 and bf16 tensors as fp64, everything else as it is: the inputs of the oracle."""
    return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def assert_close(got: torch.Tensor, exact: torch.Tensor, peer: torch.Tensor) -> None:
    """`got` is compared with `exact` (fp64), in units of the error of `peer` (PyTorch, in got's dtype).

    On 1e5 elements or more the RMS error may be 1.1 times and the largest error 1.5 times the peer's, plus one unit in
    the last place at the output's scale; on fewer elements, where the statistics are noisy, the RMS error may be twice
    and the largest error three times the peer's, plus half a unit and one unit.
    """
    assert got.dtype == peer.dtype, f"dtype {got.dtype}, expected {peer.dtype}"
    assert got.shape == exact.shape, f"shape {tuple(got.shape)}, expected {tuple(exact.shape)}"
    if exact.numel() == 0:
        return
    assert torch.equal(got.isnan(), exact.isnan()), f"{got.isnan().sum()} NaN, expected {exact.isnan().sum()}"
    error, reference = (torch.nan_to_num(t.double() - exact).abs() for t in (got, peer))
    scale = torch.nan_to_num(exact).abs()
    ulp = ULP[got.dtype]
    rms_factor, max_factor = (1.1, 1.5) if exact.numel() >= LARGE else (2.0, 3.0)
    rms, rms_peer = (t.square().mean().sqrt().item() for t in (error, reference))
    rms_scale = scale.square().mean().sqrt().item()
    slack = 0.01 if exact.numel() >= LARGE else 0.5  # of a unit in the last place
    assert rms <= rms_factor * rms_peer + slack * ulp * rms_scale, f"RMS error {rms:.3g}, PyTorch's {rms_peer:.3g}"
    worst, worst_peer = error.max().item(), reference.max().item()
    assert worst <= max_factor * worst_peer + ulp * scale.max().item(), f"error {worst:.3g}, PyTorch's {worst_peer:.3g}"


def run_kernel(op, *inputs, **attrs):
    """The outputs of an op's kernel, and a failure where it was the reference that answered."""
    declined = []
    empty = torch.empty

    def poisoned(*args, **kwargs):
        made = empty(*args, **kwargs)
        return made.fill_(float("nan")) if made.is_floating_point() else made

    token = ops.on_decline.set(lambda name, reason: declined.append(reason))
    try:
        with interpret(), mock.patch.object(ops.torch, "empty", poisoned):
            result = ops.TORCH_OPS[op].overload(*inputs, **attrs)
    finally:
        ops.on_decline.reset(token)
    assert not declined, declined
    return result
