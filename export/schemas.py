"""The declarations of `kernels/` as ONNX schemas, so that onnx's checker, shape inference and onnxscript know our
nodes."""

from __future__ import annotations

import onnx
from onnx.defs import OpSchema

from trimaran.kernels.catalog import OPS
from trimaran.kernels.contract import Op

DOMAIN = "trimaran"
ONNX_TYPE: dict[str, int] = {
    "float32": onnx.TensorProto.FLOAT,
    "float16": onnx.TensorProto.FLOAT16,
    "bfloat16": onnx.TensorProto.BFLOAT16,
    "int32": onnx.TensorProto.INT32,
    "int64": onnx.TensorProto.INT64,
    "bool": onnx.TensorProto.BOOL,
}
_TYPE_TEXT = {"float32": "float"}
_ATTR_TYPE = {
    "float": OpSchema.AttrType.FLOAT,
    "int": OpSchema.AttrType.INT,
    "bool": OpSchema.AttrType.INT,
    "string": OpSchema.AttrType.STRING,
}


_registered: set[str] = set()


def register_schemas() -> None:
    """Register every op's schema with onnx, once per process."""
    for name in OPS.keys() - _registered:
        onnx.defs.register_schema(schema(OPS[name]))
        _registered.add(name)


def schema(op: Op) -> OpSchema:
    """The op's ONNX schema: its op type is the op's name, in domain `trimaran`."""
    ports = [
        [
            OpSchema.FormalParameter(port.name, _type_text(op, port.type), param_option=_option(port.optional))
            for port in side
        ]
        for side in (op.inputs, op.outputs)
    ]
    return OpSchema(
        op.name,
        DOMAIN,
        op.version,
        doc=(__import__(op.plan.__module__, fromlist=["__doc__"]).__doc__ or "").strip(),
        inputs=ports[0],
        outputs=ports[1],
        type_constraints=[(name, [_tensor_type(dtype) for dtype in dtypes], "") for name, dtypes in op.types.items()],
        attributes=[_attribute(attr.name, attr.kind, attr.default) for attr in op.attrs],
    )


def _option(optional: bool) -> OpSchema.FormalParameterOption:
    return OpSchema.FormalParameterOption.Optional if optional else OpSchema.FormalParameterOption.Single


def _type_text(op: Op, name: str) -> str:
    return name if name in op.types else _tensor_type(name)


def _tensor_type(dtype: str) -> str:
    return f"tensor({_TYPE_TEXT.get(dtype, dtype)})"


def _attribute(name: str, kind: str, default: object) -> OpSchema.Attribute:
    if default is None:
        return OpSchema.Attribute(name, _ATTR_TYPE[kind], required=True)
    value = int(default) if kind == "bool" else default  # type: ignore[call-overload]
    return OpSchema.Attribute(name, onnx.helper.make_attribute(name, value))
