"""Every op, by name. A new kernel file is listed here and nowhere else."""

from __future__ import annotations

from collections.abc import Callable

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
_readers: list[Callable[[Op], object]] = []


def add_op(op: Op) -> None:
    """Make an op of your own one of the catalog's, in every runtime: `torch.ops.trimaran.<name>`, a node that
    `export_onnx` writes with a function body, and a kernel in the sessions of `ort_session` that are made from now on.

    TypeError for what is no Op, ValueError where an op has that name already, or no reference or body.
    """
    if not isinstance(op, Op):
        raise TypeError(f"op is a {type(op).__name__}, expected an Op")
    if op.name in OPS:
        raise ValueError(f"op is named {op.name}, as one in the catalog already is")
    for part in ("reference", "body"):
        if getattr(op, part) is None:
            raise ValueError(f"op {op.name} has no {part}, expected one; a Domain takes it for ONNX Runtime alone")
    OPS[op.name] = op
    for reader in _readers:
        reader(op)


def read(reader: Callable[[Op], object]) -> None:
    """Call `reader` with every op: those that there are, and those that are added later."""
    for op in OPS.values():
        reader(op)
    _readers.append(reader)
