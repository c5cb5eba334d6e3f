"""A model and an example call as torch's exported program, its sizes free, its graph in the dialect of the FX rules."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import Node

from trimaran.export.call import CACHE, Call, Flat
from trimaran.torch_path.graph import aten, called, is_tensor, replace, value

IDS = ("input_ids", "inputs_embeds")
_SCALAR_OPERANDS = (aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor)


def exported_program(model: torch.nn.Module, call: Call, dynamic: bool) -> torch.export.ExportedProgram:
    """dynamic: every axis of every input may vary, as far as the model lets it."""
    example = widened(call) if dynamic else call
    free = {name: free_axes(name, tensor) if dynamic else () for name, tensor in example.tensors.items()}
    axes = tuple(dict.fromkeys(numbers, torch.export.Dim.AUTO) for numbers in free.values())
    program = torch.export.export(Flat(model, example), tuple(example.tensors.values()), dynamic_shapes=(axes,))
    clean(program)
    return program


def free_axes(name: str, tensor: torch.Tensor) -> Sequence[int]:
    """The axes of an input that may vary: all but the heads and features of a cache and of hidden states."""
    if name.startswith(f"{CACHE}."):
        return (0, 2)
    return range(2 if tensor.is_floating_point() and tensor.dim() == 3 else tensor.dim())


def widened(call: Call) -> Call:
    """The call with every batch, sequence and cache of one doubled: the exporter takes a size of 1 for a constant."""
    tensors = call.tensors
    growth = {name: _growth(name, tensor) for name, tensor in tensors.items()}
    mask = tensors.get("attention_mask")
    if call.has_cache and mask is not None and mask.shape[-1] > 1:  # of the cache's keys and the new ones
        new = next((growth[name] for name in IDS if name in tensors), 0)
        growth["attention_mask"] = new + growth.get(f"{CACHE}.0.key", 0)
    one_row = {tensor.shape[0] for tensor in tensors.values() if tensor.dim()} == {1}

    def wide(name: str, tensor: torch.Tensor) -> torch.Tensor:
        axis = 2 if name.startswith(f"{CACHE}.") else tensor.dim() - 1 if name == "attention_mask" else 1
        tensor = _longer(tensor, axis, growth[name])
        return tensor.repeat(2, *[1] * (tensor.dim() - 1)) if one_row and tensor.dim() else tensor

    return call.with_tensors(wide)


def _growth(name: str, tensor: torch.Tensor) -> int:
    """By how much a sequence of one, or a cache of one or none, grows."""
    if name.startswith(f"{CACHE}."):
        return 0 if ".encoder." in name else max(0, 2 - tensor.shape[2])
    positions = tensor.dim() == 2 and not tensor.is_floating_point()
    return int(tensor.dim() >= 2 and tensor.shape[1] == 1 and (positions or name in IDS))


def _longer(tensor: torch.Tensor, axis: int, by: int) -> torch.Tensor:
    """Its last slice again, `by` times; zeros where it has none."""
    if not by:
        return tensor
    shape = [by if i == axis else size for i, size in enumerate(tensor.shape)]
    length = tensor.shape[axis]
    last = tensor.narrow(axis, length - 1, 1).expand(shape) if length else tensor.new_zeros(shape)
    return torch.cat([tensor, last], axis)


def clean(program: torch.export.ExportedProgram) -> None:
    """Take out what torch.export adds to what Dynamo captures: checks of dtypes, which count as users of what they look
    at; numbers lifted into inputs; and the empty tensor that a cache starts with."""
    module = program.graph_module
    for node in list(module.graph.nodes):
        if called(node, aten._assert_tensor_metadata.default):
            module.graph.erase_node(node)
        elif called(node, *_SCALAR_OPERANDS):
            node.args = tuple(_number(program, node, arg) for arg in node.args)
        elif called(node, aten.cat.default):
            _drop_empty(node)
    module.graph.eliminate_dead_code()
    program._guards_code.clear()  # the example fits; torch's own check of it fails on Whisper


def _number(program: torch.export.ExportedProgram, node: Node, arg: Any) -> Any:
    """A number where the operand is one, made of constants alone, and the result's dtype does not depend on it."""
    if not isinstance(arg, Node) or not is_tensor(arg) or value(arg).dim() or arg.all_input_nodes == []:
        return arg
    others = [other for other in node.args if other is not arg]
    if len(others) != 1 or not is_tensor(others[0]) or value(others[0]).dim() == 0:
        return arg
    alike = value(others[0]).dtype == value(node).dtype == value(arg).dtype
    found = _evaluated(program, arg) if alike else None
    return found.item() if found is not None else arg


def _evaluated(program: torch.export.ExportedProgram, node: Any) -> torch.Tensor | None:
    """The tensor that a node computes from lifted constants and numbers; None where it depends on anything else."""
    if node.op == "placeholder":
        name = program.graph_signature.inputs_to_lifted_tensor_constants.get(node.name)
        held = program.constants.get(name) if name is not None else None
        return held.clone() if isinstance(held, torch.Tensor) and held.dim() == 0 else None
    if not isinstance(node.target, torch._ops.OpOverload) or not is_tensor(node) or value(node).dim():
        return None
    args = [_evaluated(program, arg) if isinstance(arg, Node) else arg for arg in node.args]
    missing = any(arg is None for arg, given in zip(args, node.args, strict=True) if isinstance(given, Node))
    nodes_in_keywords = any(isinstance(arg, Node) for arg in node.kwargs.values())
    if missing or nodes_in_keywords or not any(isinstance(arg, torch.Tensor) for arg in args):
        return None
    found = node.target(*args, **node.kwargs)
    return found if isinstance(found, torch.Tensor) else None


def _drop_empty(node: Node) -> None:
    parts: Any = node.args[0]
    full = [part for part in parts if not (is_tensor(part, rank=1) and value(part).shape[0] == 0)]
    if len(full) == 1 and len(parts) > 1 and value(full[0]).dim() > 1:
        replace(node, full[0])
        node.graph.erase_node(node)
    elif len(full) < len(parts) and len(full) > 1:
        node.args = (full, *node.args[1:])


def rename_outputs(program: torch.export.ExportedProgram) -> None:
    """An output node that a rule replaced has another name, which the program's signature must know."""
    output = next(node for node in reversed(program.graph.nodes) if node.op == "output")
    for spec, node in zip(program.graph_signature.output_specs, output.args[0], strict=True):
        if isinstance(node, Node):
            spec.arg.name = node.name
