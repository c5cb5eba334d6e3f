"""ONNX -> ONNX: a file's attention and norm nodes become trimaran nodes, whatever wrote the file."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass, ShapeInferencePass

from trimaran.export import files
from trimaran.export.functions import attach_functions, count_nodes
from trimaran.export.report import OnnxReport
from trimaran.export.rules.attention import ATTENTION_ANCHORS, check_attention, rewrite_attention
from trimaran.export.rules.layer_norm import LAYER_NORM_ANCHORS, check_layer_norm, rewrite_layer_norm
from trimaran.export.schemas import register_schemas
from trimaran.export.verify import CannotVerify, compare_files, example_inputs
from trimaran.torch_path.report import NearMiss

OLDEST_OPSET = 11


@dataclass(frozen=True)
class Rule:
    """check(node) -> a match of the rule's own kind, or a str: the reason why not. rewrite(node, match)."""

    name: str
    anchors: tuple[str, ...]
    check: Callable[[ir.Node], Any]
    rewrite: Callable[[ir.Node, Any], None]


def rewrite_onnx(
    src: files.Paths,
    dst: files.Paths,
    *,
    verify: bool = True,
    inputs: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> OnnxReport:
    """Write `src` to `dst` with its attention and layer norm nodes replaced by trimaran's.

    The result runs on the kernels in `trimaran.ort_session` and, by function bodies, in any onnxruntime from 1.27 on.
    It is checked by running both files on `inputs` (arrays by name; generated where not given) on the CPU. `src` stays
    as it is; a file in which nothing matches is copied byte for byte.

    Raises FileNotFoundError, FileExistsError (unless overwrite=True), ValueError for a file that is not ONNX, and
    VerificationError where the two files disagree; nothing is left behind then.
    """
    source = files.source_path("src", src)
    target = files.target_path("dst", dst, overwrite)
    if target.exists() and os.path.samefile(source, target):
        raise ValueError(f"dst is {str(target)!r}, which is src itself")
    model = files.load("src", source)
    near_misses = rewrite(model)
    replaced = Counter(count_nodes(model))
    report = OnnxReport(str(target), replaced, near_misses)
    with files.beside(target) as folder:
        if not replaced:
            report.verified = "a copy of the source"
            copy(model, source, folder, target.name, report)
        else:
            written = files.save(model, folder, target.name)
            if verify:
                report.verified = verified(source, written, model, inputs)
        files.publish(folder, target)
    return report


def rewrite(model: ir.Model) -> list[NearMiss]:
    """Apply the rules to a model in memory, in place, and give its nodes function bodies; what was not matched and
    why."""
    register_schemas()
    opset = model.opset_imports.get("", 0)
    if opset < OLDEST_OPSET:
        return [NearMiss("all rules", "the model", f"it is of opset {opset}, supported from {OLDEST_OPSET}")]
    ShapeInferencePass()(model)
    near_misses, changed = [], False
    for rule in rules(opset):
        for node in [n for n in ir.traversal.RecursiveGraphIterator(model.graph) if is_anchor(n, rule)]:
            match = rule.check(node)
            if isinstance(match, str):
                near_misses.append(NearMiss(rule.name, str(node.name), match))
            else:
                rule.rewrite(node, match)
                changed = True
        if changed:
            RemoveUnusedNodesPass()(model)
    if changed:
        model.graph.sort()
        attach_functions(model)
    return near_misses


def rules(opset: int) -> tuple[Rule, ...]:
    """The rules, for one model: layers that share a mask share what is computed from it."""
    attention = partial(rewrite_attention, cache={}, opset=opset)
    return (
        Rule("attention", ATTENTION_ANCHORS, check_attention, attention),
        Rule("layer_norm", LAYER_NORM_ANCHORS, check_layer_norm, rewrite_layer_norm),
    )


def is_anchor(node: ir.Node, rule: Rule) -> bool:
    return node.domain in ("", "ai.onnx") and node.op_type in rule.anchors


def verified(source: Path, written: Path, model: ir.Model, inputs: Mapping[str, Any] | None) -> str:
    try:
        return compare_files(source, written, inputs if inputs is not None else example_inputs(model))
    except CannotVerify as reason:
        return f"not verified: {reason}"


def copy(model: ir.Model, source: Path, folder: Path, name: str, report: OnnxReport) -> None:
    """The source under another name. Weights in files of their own stay where the model looks for them."""
    shutil.copyfile(source, folder / name)
    external = {
        str(v.const_value.location)
        for v in model.graph.initializers.values()
        if isinstance(v.const_value, ir.ExternalTensor)
    }
    for location in sorted(external):
        if source.parent.resolve() != folder.parent.resolve():
            if Path(location).is_absolute() or ".." in Path(location).parts:
                raise ValueError(f"src keeps weights in {location!r}, outside its folder")
            if (folder.parent / location).exists():
                raise FileExistsError(f"dst needs its weights in {location!r} beside it, which exists")
            shutil.copyfile(source.parent / location, folder.parent / location)
            report.notes.append(f"copied its weights, {location}")
