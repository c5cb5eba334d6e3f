"""A layer scale, `gamma * linear(x)`, goes into the layer: gamma W and gamma b.

A file's weights are constants, so the product is made once; what is left is a layer like others, which takes its
residual and its norm in. Where it would not survive rounding (a small gamma in fp16) it stays outside.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from trimaran.export.onnx_graph import (
    Inserter,
    attribute,
    constant,
    dims,
    dtype_of,
    is_parameter,
    is_same,
    only_user,
    operand,
    same_dims,
    sides,
)
from trimaran.export.report import Fault
from trimaran.export.rules.linear import Layer, plain_layer, put, with_bias
from trimaran.export.rules.residual import vector
from trimaran.export.rules.written_norms import is_vector
from trimaran.kernels.linear import linear

Array = np.ndarray[Any, Any]
EPS = {"float16": 2.0**-10, "bfloat16": 2.0**-7, "float32": 2.0**-23}


@dataclass(frozen=True)
class Scaled:
    end: ir.Value
    weight: Array
    bias: Array | None


def check_scale(node: ir.Node) -> Scaled | str | None:
    out = node.outputs[0]
    product = only_user(out, "Mul")
    if product is None or plain_layer(out, product) is None or not same_dims(dims(product.outputs[0]), dims(out)):
        return None
    gamma = next((b for a, b in sides(product) if is_same(a, out) and is_vector(b, out) and is_parameter(b)), None)
    if gamma is None or dtype_of(gamma) != dtype_of(out):
        return None
    factor, weight, bias = (as_float(constant(value)) for value in (gamma, node.inputs[1], operand(node, 2)))
    if factor is None or weight is None or (bias is None) != (operand(node, 2) is None):
        return None
    columns = bool(attribute(node, "transpose_weight", 0))
    assert out.dtype is not None
    dtype, factor = out.dtype.numpy(), factor.reshape(-1)
    scaled = weight * (factor if columns else factor[:, None])
    if not survives(scaled if columns else scaled.T, dtype):
        return Fault.of("in its weight, the layer scale would be lost to rounding", gamma)
    return Scaled(product.outputs[0], scaled.astype(dtype), None if bias is None else (bias * factor).astype(dtype))


def as_float(array: Array | None) -> Array | None:
    return None if array is None else array.astype(np.float32)


def survives(columns: Array, dtype: Any) -> bool:
    """Whether each column is, rounded, as near as the type lets normal numbers be."""
    lost = columns - columns.astype(dtype).astype(np.float32)
    size, error = (np.sqrt(np.mean(np.square(x, dtype=np.float64), 0)) for x in (columns, lost))
    return bool((error <= EPS[str(dtype)] * size).all())


def rewrite_scale(node: ir.Node, match: Scaled) -> None:
    anchor = match.end.producer()
    assert anchor is not None
    add = Inserter(anchor)
    weight = parameter(node.inputs[1], match.weight)
    bias = None if match.bias is None else parameter(node.inputs[2], match.bias)
    x = node.inputs[0]
    assert x is not None
    layer = with_bias(Layer(match.end, x, weight, bias, bool(attribute(node, "transpose_weight", 0))))
    inputs = [x, weight, vector(add, layer.bias, x)]
    put(add, linear, inputs, {"transpose_weight": int(layer.transposed)}, layer.end, node.name)


def parameter(old: ir.Value | None, array: Array) -> ir.Value:
    """A new weight of the model, named after the old one."""
    assert old is not None
    user = next(use.node for use in old.uses())
    graph = user.graph
    assert isinstance(graph, ir.Graph)
    name, number = f"{old.name}_scaled", 1
    while name in graph.initializers:
        number += 1
        name = f"{old.name}_scaled_{number}"
    tensor = ir.tensor(array, name=name)
    value = ir.val(name, tensor.dtype, array.shape, const_value=tensor)
    graph.register_initializer(value)
    return value
