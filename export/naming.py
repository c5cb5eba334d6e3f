"""Names that people can read, for what torch's exporter numbers: outputs, axes, nodes and weights."""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Mapping, Sequence

import onnx_ir as ir

from trimaran.export.call import CACHE

ENCODER = "encoder"
PREFIX = "model."  # of what lies in `Flat`
SCOPES, MADE_BY = "pkg.torch.onnx.name_scopes", "pkg."


def name_everything(model: ir.Model, inputs: Sequence[str], outputs: Sequence[str]) -> None:
    name_weights(model)
    name_values(model, inputs, outputs)
    name_axes(model)
    name_nodes(model)


def name_weights(model: ir.Model) -> None:
    """As in the model's state_dict."""
    for value in list(model.graph.initializers.values()):
        if str(value.name).startswith(PREFIX):
            value.name = str(value.name).removeprefix(PREFIX)


def name_values(model: ir.Model, inputs: Sequence[str], outputs: Sequence[str]) -> None:
    """Inputs and outputs, which nothing else is called after. What an encoder gave and comes out as it went in, its
    keys in a cache above all, is no output."""
    pairs = list(zip(model.graph.outputs, outputs, strict=True))
    kept = [(value, name) for value, name in pairs if ENCODER not in name or not _passed_through(value)]
    taken = {*inputs, *(name for _, name in kept)}
    for node in model.graph.all_nodes():
        for value in node.outputs:
            if value.name in taken:
                value.name = f"{value.name}_inner"
    for value, name in zip(model.graph.inputs, inputs, strict=True):
        value.name = name
    model.graph.outputs.clear()
    for value, name in kept:
        if value.is_graph_input() or value in model.graph.outputs or value.is_initializer():
            copy = ir.node("Identity", [value])
            model.graph.append(copy)
            copy.outputs[0].shape, copy.outputs[0].type = value.shape, value.type
            value = copy.outputs[0]
        value.name = name
        model.graph.outputs.append(value)


def _passed_through(value: ir.Value) -> bool:
    producer = value.producer()
    return value.is_graph_input() or (
        producer is not None and producer.op_type == "Identity" and _passed_through(producer.inputs[0])  # type: ignore[arg-type]
    )


def name_axes(model: ir.Model) -> None:
    """Dynamic axes after what they are: `batch`, `sequence`, `past_sequence`; sizes made of them as sums of these."""
    names: dict[str, str] = {}
    caches = any(str(value.name).startswith(f"{CACHE}.") for value in model.graph.inputs)
    for value in model.graph.inputs:
        for axis, dim in enumerate(value.shape or ()):
            symbol = None if isinstance(dim, int) else str(dim.value)
            if symbol is not None and symbol.isidentifier() and symbol not in names:
                names[symbol] = _axis_name(str(value.name), axis, caches)
    for value in [*model.graph.inputs, *(value for node in model.graph.all_nodes() for value in node.outputs)]:
        if value.shape is not None:
            value.shape = ir.Shape([dim if isinstance(dim, int) else _renamed(dim.value, names) for dim in value.shape])


def _axis_name(value: str, axis: int, caches: bool) -> str:
    """Two inputs may have one name for an axis that the model takes in two sizes: callers give both the same."""
    if axis == 0:
        return "batch"
    if value.startswith(f"{CACHE}."):
        return {2: "encoder_sequence" if ".encoder." in value else "past_sequence"}.get(axis, f"cache_axis{axis}")
    if axis == 1 and value == "attention_mask":
        return "past_sequence + sequence" if caches else "sequence"
    if axis == 1 and value in ("input_ids", "inputs_embeds", "token_type_ids", "position_ids"):
        return "sequence"
    if axis == 1 and value.startswith(("decoder_", "encoder_")):
        return f"{value.split('_')[0]}_sequence"
    return f"{value}_axis{axis}" if axis > 1 else f"{value}_sequence"


def _renamed(size: str | None, names: dict[str, str]) -> str | None:
    return None if size is None else re.sub(r"[A-Za-z_]\w*", lambda found: names.get(found[0], found[0]), size)


def name_nodes(model: ir.Model) -> None:
    """After the module that they come from: `encoder.layer.0.attention/MatMul`. What torch notes on them goes: it
    tells of folders of the machine that the file was made on."""
    seen: Counter[str] = Counter()
    for node in model.graph.all_nodes():
        name = "/".join(part for part in (_scope(node), node.op_type) if part)
        seen[name] += 1
        node.name = name if seen[name] == 1 else f"{name}_{seen[name]}"
        for notes in (node.metadata_props, *(value.metadata_props for value in node.outputs)):
            for key in [key for key in notes if key.startswith(MADE_BY)]:
                del notes[key]


def _scope(node: ir.Node) -> str:
    """The path of the module around a node; of a node that rules made of several, that of its first weight."""
    scopes = ast.literal_eval(node.metadata_props.get(SCOPES, "[]"))[:-1]
    path = next((path for path in reversed(scopes) if not path.startswith("_empty")), "")
    if path and path != PREFIX[:-1]:
        return path.removeprefix(PREFIX)
    weights = (str(value.name) for value in node.inputs if value is not None and value.is_initializer())
    return next((name.rpartition(".")[0] for name in weights), "")


def static_axes(model: ir.Model, free: Mapping[str, Sequence[int]]) -> list[str]:
    """A line for each axis that might vary and that the model fixed. free: those of each input."""
    return [
        f"{value.name}: axis {axis} is fixed at {dim}, the model allows no other"
        for value in model.graph.inputs
        for axis, dim in enumerate(value.shape or ())
        if isinstance(dim, int) and axis in free[str(value.name)]
    ]
