"""Graphs written by hand in onnx's text form, in half precision too, and what `rewrite_onnx` makes of them."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir

import trimaran

SIZES = {"b": 2, "s": 5, "t": 7, "h": 3}


def model(body: str, inputs: str, outputs: str, constants: str = "", opset: int = 17) -> onnx.ModelProto:
    """A graph in onnx's own text form."""
    imports = f'"" : {opset}, "com.microsoft" : 1'
    text = f"<ir_version: 8, opset_import: [{imports}]> g ({inputs}) => ({outputs}) <{constants}> {{ {body} }}"
    return onnx.parser.parse_model(text)


def halved(proto: onnx.ModelProto) -> onnx.ModelProto:
    """The model in half precision, which the text form has no numbers for."""
    half, single = onnx.TensorProto.FLOAT16, onnx.TensorProto.FLOAT

    def narrow(tensor: onnx.TensorProto) -> None:
        if tensor.data_type == single:
            array = onnx.numpy_helper.to_array(tensor).astype(np.float16)
            tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))

    for value in (*proto.graph.input, *proto.graph.output):
        if value.type.tensor_type.elem_type == single:
            value.type.tensor_type.elem_type = half
    for tensor in proto.graph.initializer:
        narrow(tensor)
    for node in proto.graph.node:
        for attribute in node.attribute:
            if node.op_type == "Constant":
                narrow(attribute.t)
    return proto


def random_inputs(proto: onnx.ModelProto, sizes: dict[str, int] = SIZES) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    found = {}
    for value in proto.graph.input:
        kind = value.type.tensor_type
        shape = [dim.dim_value or sizes.get(dim.dim_param, 4) for dim in kind.shape.dim]
        array = np.asarray(generator.standard_normal(shape))
        dtype = onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type)
        found[value.name] = np.asarray(array > -0.5 if dtype.kind in "bi" else array).astype(dtype)
    return found


def rewritten(proto, tmp_path, inputs=None):
    """(report, the rewritten file's nodes); the two files were run and agree."""
    source, target = tmp_path / "in.onnx", tmp_path / "out.onnx"
    onnx.save(proto, source)
    report = trimaran.rewrite_onnx(source, target, inputs=random_inputs(proto) if inputs is None else inputs)
    assert report.verified.startswith(("verified against", "a copy")), report
    if not report.replaced:
        assert source.read_bytes() == target.read_bytes()
        return report, []
    onnx.checker.check_model(target)
    again = trimaran.rewrite_onnx(target, tmp_path / "again.onnx", verify=False)
    assert again.replaced == report.replaced, "rewriting twice changes nothing"
    (tmp_path / "again.onnx").unlink()
    nodes = ir.traversal.RecursiveGraphIterator(ir.load(target).graph)
    return report, [node for node in nodes if node.domain == "trimaran"]
