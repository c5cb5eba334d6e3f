"""Every op, by name. A new kernel file is listed here and nowhere else."""

from __future__ import annotations

from trimaran.kernels.attention import attention
from trimaran.kernels.contract import Op
from trimaran.kernels.gated_linear import gated_linear
from trimaran.kernels.layer_norm import layer_norm
from trimaran.kernels.linear import linear
from trimaran.kernels.linear_norm import linear_norm
from trimaran.kernels.rms_norm import rms_norm
from trimaran.kernels.rotary_embedding import rotary_embedding

OPS: dict[str, Op] = {
    op.name: op for op in (attention, layer_norm, rms_norm, linear, gated_linear, linear_norm, rotary_embedding)
}
