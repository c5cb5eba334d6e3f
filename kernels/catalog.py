"""Every op, by name. A new kernel file is listed here and nowhere else."""

from __future__ import annotations

from trimaran.kernels.attention import attention
from trimaran.kernels.contract import Op
from trimaran.kernels.layer_norm import layer_norm
from trimaran.kernels.rms_norm import rms_norm

OPS: dict[str, Op] = {op.name: op for op in (attention, layer_norm, rms_norm)}
