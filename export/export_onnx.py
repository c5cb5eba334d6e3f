"""PyTorch -> ONNX: the FX rules on the exported program, then torch's own exporter with our ops in its translation
table."""

from __future__ import annotations

import contextlib
import inspect
import logging
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from torch.utils import _pytree as pytree

from trimaran.export import files
from trimaran.export.functions import attach_functions, count_nodes
from trimaran.export.report import OnnxReport
from trimaran.export.translation import translation_table
from trimaran.export.verify import CannotVerify, VerificationError, compare, run
from trimaran.torch_path.optimize import untouched
from trimaran.torch_path.rewrite import RULES, Rule, rewrite

OPSETS = range(18, 24)
EXPORT_RULES = tuple(rule for rule in RULES if rule.name in ("attention", "layer_norm", "rms_norm"))
AXES = {0: "batch", 1: "sequence"}


def export_onnx(
    model: torch.nn.Module,
    inputs: Any,
    path: files.Paths,
    *,
    dynamic: bool = True,
    opset: int = 20,
    verify: bool = True,
    overwrite: bool = False,
    rules: Sequence[Rule] = EXPORT_RULES,
) -> OnnxReport:
    """Write the model as ONNX with trimaran nodes, each with a function body in standard ops.

    model: in eval mode, optimized or not; it is left as it is. inputs: an example call, keyword arguments as a mapping
    (what a tokenizer returns), or positional ones as a tuple. dynamic: every axis that the model allows to vary does.
    opset: 18 to 23. verify: compare the file, run on the CPU, with the model on the same inputs. rules: which fusions;
    attention and norms unless given, linear layers stay with onnxruntime.

    Raises TypeError and ValueError for wrong arguments, FileExistsError for an existing file (unless overwrite=True),
    VerificationError where the file disagrees with the model; nothing is left behind then.
    """
    call = checked(model, inputs, opset)
    target = files.target_path("path", path, overwrite)
    with untouched(model), torch.no_grad():
        expected = model(**call)
        examples = {name: widened(value, call) for name, value in call.items()} if dynamic else call
        program = torch.export.export(model, (), examples, dynamic_shapes=all_axes(examples) if dynamic else None)
    graph_report = rewrite(program.graph_module, rules)
    rename_outputs(program)
    with quiet():
        exported = torch.onnx.export(
            program, dynamo=True, opset_version=opset, custom_translation_table=translation_table(), verbose=False
        )
    assert exported is not None
    onnx_model: ir.Model = exported.model
    outputs = named_outputs(expected)
    name_outputs(onnx_model, list(outputs))
    name_axes(onnx_model)
    attach_functions(onnx_model)
    report = OnnxReport(str(target), Counter(count_nodes(onnx_model)), graph_report.near_misses)
    report.notes += static_axes(onnx_model) if dynamic else []
    with files.beside(target) as folder:
        written = files.save(onnx_model, folder, target.name)
        if verify:
            report.verified = verified(written, call, outputs)
        files.publish(folder, target)
    return report


def checked(model: Any, inputs: Any, opset: int) -> dict[str, Any]:
    """The example call as keyword arguments."""
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model is a {type(model).__name__}, expected a torch.nn.Module")
    if model.training:
        raise ValueError("model is in training mode, call model.eval() first")
    if opset not in OPSETS:
        raise ValueError(f"opset is {opset}, expected {OPSETS.start} to {OPSETS.stop - 1}")
    if isinstance(inputs, Mapping):
        call = {str(name): value for name, value in inputs.items()}
    else:
        positional = inputs if isinstance(inputs, (tuple, list)) else (inputs,)
        call = dict(inspect.signature(model.forward).bind(*positional).arguments)
    if not any(isinstance(leaf, torch.Tensor) for leaf in pytree.tree_leaves(call)):
        raise TypeError(f"inputs is a {type(inputs).__name__} without a tensor, expected a mapping or tuple of tensors")
    return call


def widened(value: Any, call: Mapping[str, Any]) -> Any:
    """A batch of one, doubled: the exporter takes a size of 1 for a constant."""
    tensors = [leaf for leaf in pytree.tree_leaves(dict(call)) if isinstance(leaf, torch.Tensor) and leaf.dim()]
    if not all(tensor.shape[0] == 1 for tensor in tensors):
        return value
    return pytree.tree_map(
        lambda t: t.repeat(2, *[1] * (t.dim() - 1)) if isinstance(t, torch.Tensor) and t.dim() else t, value
    )


def all_axes(call: Mapping[str, Any]) -> Any:
    """Every axis of every tensor may vary, as far as the model lets it."""
    auto = torch.export.Dim.AUTO
    return pytree.tree_map(
        lambda t: dict.fromkeys(range(t.dim()), auto) if isinstance(t, torch.Tensor) else None, dict(call)
    )


def rename_outputs(program: torch.export.ExportedProgram) -> None:
    """An output node that a rule replaced has another name, which the program's signature must know."""
    output = next(node for node in reversed(program.graph.nodes) if node.op == "output")
    for spec, node in zip(program.graph_signature.output_specs, output.args[0], strict=True):
        if isinstance(node, torch.fx.Node):
            spec.arg.name = node.name


def named_outputs(expected: Any) -> dict[str, torch.Tensor]:
    """The model's output tensors by the names of its output class, `output_<i>` where it has none."""
    leaves, _ = pytree.tree_flatten_with_path(expected)
    found: dict[str, torch.Tensor] = {}
    for index, (path, leaf) in enumerate((path, leaf) for path, leaf in leaves if isinstance(leaf, torch.Tensor)):
        keys = [str(key.key) for key in path if isinstance(key, pytree.MappingKey) and str(key.key).isidentifier()]
        found["_".join(keys) if keys and "_".join(keys) not in found else f"output_{index}"] = leaf
    return found


def name_outputs(model: ir.Model, names: list[str]) -> None:
    outputs = model.graph.outputs
    if len(outputs) != len(names):
        raise VerificationError(
            f"the exported graph has {len(outputs)} outputs, the model has {len(names)}: {', '.join(names)}"
        )
    for node in model.graph:
        for value in node.outputs:
            if value.name in names:
                value.name = f"{value.name}_inner"
    for value, name in zip(outputs, names, strict=True):
        if not value.is_graph_input():
            value.name = name


def name_axes(model: ir.Model) -> None:
    """Call dynamic axes `batch` and `sequence`, after the first input that has them, instead of s18 and s41."""
    names: dict[str, str] = {}
    for value in model.graph.inputs:
        for axis, dim in enumerate(value.shape or ()):
            symbol = None if isinstance(dim, int) else dim.value
            if symbol is not None and symbol not in names:
                name = AXES.get(axis, f"{value.name}_axis{axis}")
                names[symbol] = name if name not in names.values() else f"{value.name}_{name}"
    for value in [*model.graph.inputs, *(value for node in model.graph for value in node.outputs)]:
        if value.shape is not None:
            value.shape = ir.Shape(
                [dim if isinstance(dim, int) else names.get(str(dim.value), dim.value) for dim in value.shape]
            )


def static_axes(model: ir.Model) -> list[str]:
    """A line for each axis of an input that the model fixed."""
    return [
        f"{value.name}: axis {axis} is fixed at {dim}, the model allows no other"
        for value in model.graph.inputs
        for axis, dim in enumerate(value.shape or ())
        if isinstance(dim, int)
    ]


def verified(written: Path, call: Mapping[str, Any], outputs: Mapping[str, torch.Tensor]) -> str:
    """Compare the file with what the model gave."""
    try:
        leaves = {name: value.detach().cpu().numpy() for name, value in call.items() if isinstance(value, torch.Tensor)}
        expected = {name: value.detach().cpu().numpy() for name, value in outputs.items()}
    except TypeError as error:  # bf16 has no NumPy dtype
        return f"not verified: {error}"
    try:
        got = run(written, leaves)
    except CannotVerify as reason:
        return f"not verified: {reason}"
    except Exception as error:
        raise VerificationError(f"the exported file does not run: {error}") from error
    return f"verified against the model, largest relative RMS difference {compare(got, expected):.1e}"


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the exporter's notes on optional packages and on its own deprecations."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
