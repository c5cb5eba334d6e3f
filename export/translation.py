"""Our torch ops as ONNX nodes, for torch's exporter: a translation table made from the declarations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from onnxscript.values import Opset

from trimaran.export.schemas import DOMAIN, register_schemas
from trimaran.kernels.contract import Op
from trimaran.torch_path.ops import TORCH_OPS


def translation_table() -> dict[Any, Callable[..., Any]]:
    """For `torch.onnx.export(..., custom_translation_table=...)`."""
    register_schemas()
    return {bound.overload: translator(bound.op) for bound in TORCH_OPS.values()}


def translator(op: Op) -> Callable[..., Any]:
    """The function that torch's exporter calls with the inputs (as ONNX values) and attributes of one of our torch
    ops."""
    emit = getattr(Opset(DOMAIN, op.version), op.name)

    def translate(*inputs: Any, **keywords: Any) -> Any:
        wanted = [not port.optional or keywords.pop(f"return_{port.name}", False) for port in op.outputs]
        by_name = {port.name: keywords.pop(port.name, None) for port in op.inputs[len(inputs) :]}
        attributes = {name: int(value) if isinstance(value, bool) else value for name, value in keywords.items()}
        outputs = emit(*inputs, *by_name.values(), **attributes)
        return outputs if len(op.outputs) == 1 else [out for out, want in zip(outputs, wanted, strict=True) if want]

    return translate
