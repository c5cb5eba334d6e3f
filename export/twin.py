"""A half-precision model as float32, for runtimes that have no kernels for it."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path

import numpy as np
import onnx_ir as ir

BF16, F32 = ir.DataType.BFLOAT16, ir.DataType.FLOAT


def graphs(model: ir.Model) -> Iterator[ir.Graph]:
    """The model's graph, its functions' graphs and, within these, those of control flow."""
    for top in (model.graph, *(function.graph for function in model.functions.values())):
        yield top
        yield from top.subgraphs()


def has_bfloat16(model: ir.Model) -> bool:
    for graph in graphs(model):
        if any(value.dtype == BF16 for value in [*graph.inputs, *graph.initializers.values()]):
            return True
        for node in graph:
            if any(value.dtype == BF16 for value in node.outputs) or _casts_to(node, (BF16,)):
                return True
    return False


def to_float32(model: ir.Model, halves: Collection[ir.DataType] = (BF16,)) -> None:
    """Make every tensor of these types, in place, a float32 one. Casts to them round no more."""
    for graph in graphs(model):
        for value in [*graph.inputs, *graph.initializers.values(), *graph.outputs]:
            _retype(value, halves)
        for node in graph:
            for value in node.outputs:
                _retype(value, halves)
            for name, attribute in list(node.attributes.items()):
                if not attribute.is_ref() and attribute.type == ir.AttributeType.TENSOR:
                    node.attributes[name] = ir.AttrTensor(name, _tensor(attribute.as_tensor(), halves))
            for name in _casts_to(node, halves):
                node.attributes[name] = ir.AttrInt64(name, int(F32))


def write_twin(path: Path, folder: Path) -> Path:
    """A copy of the file in `folder`, with float32 for bfloat16."""
    model = ir.load(path)
    to_float32(model)
    ir.save(model, folder / path.name, external_data=f"{path.name}.data")
    return folder / path.name


def _casts_to(node: ir.Node, halves: Collection[ir.DataType]) -> list[str]:
    """The attributes that name one of these types."""
    return [
        name
        for name, attribute in node.attributes.items()
        if name in ("to", "dtype", "stash_type", "output_dtype", "softmax_precision")
        and attribute.type == ir.AttributeType.INT
        and not attribute.is_ref()
        and attribute.value in halves
    ]


def _retype(value: ir.Value, halves: Collection[ir.DataType]) -> None:
    if value.const_value is not None:
        value.const_value = _tensor(value.const_value, halves)
    if value.dtype in halves:
        value.dtype = F32


def _tensor(tensor: ir.TensorProtocol, halves: Collection[ir.DataType]) -> ir.TensorProtocol:
    if tensor.dtype not in halves:
        return tensor
    return ir.tensor(tensor.numpy().astype(np.float32), name=tensor.name)
