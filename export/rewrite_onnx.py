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
from trimaran.export.external import external_files
from trimaran.export.functions import attach_functions, count_nodes
from trimaran.export.inlining import inlined_where_needed
from trimaran.export.onnx_graph import used
from trimaran.export.page import node_lines
from trimaran.export.reading import read_model
from trimaran.export.report import FileMiss, OnnxReport
from trimaran.export.rules import attention_rule, layer_scale, linear
from trimaran.export.rules.activations import ACTIVATION_ANCHORS
from trimaran.export.rules.layer_norm import LAYER_NORM_ANCHORS, check_layer_norm, rewrite_layer_norm
from trimaran.export.rules.rms_norm import RMS_NORM_ANCHORS, check_rms_norm, rewrite_rms_norm
from trimaran.export.rules.rotary_embedding import ROTARY_ANCHORS, check_rotary, rewrite_rotary
from trimaran.export.schemas import DOMAIN, register_schemas
from trimaran.export.shapes import infer
from trimaran.export.verify import SIZES, CannotVerify, compare_files, example_inputs, rounding

OLDEST_OPSET = 11
KNOWN_DOMAINS = ("", "ai.onnx", "com.microsoft", DOMAIN)
Progress = Callable[[str, float], None]


def nothing(stage: str, done: float) -> None:
    """Shows no progress."""


@dataclass(frozen=True)
class Rule:
    """check(node) gives a match of the rule's own kind; or a str, the reason why this place is none though it looks
    like one; or None, where there is nothing to say. rewrite(node, match) replaces it."""

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
    progress: Progress = nothing,
) -> OnnxReport:
    """Write `src` to `dst` with its attention, norm, linear and rotary embedding nodes replaced by trimaran's.

    The result runs on the kernels in `trimaran.ort_session` and, by function bodies, in any onnxruntime from 1.27 on.
    It is checked by running both files on `inputs` (arrays by name; generated where not given) on the CPU. `src` stays
    as it is; a file in which nothing matches is copied byte for byte. Linear layers are replaced in 16 bits only, in
    fp32 onnxruntime's own are sooner done. `progress` is called with a stage and how much is done, from 0 to 1.

    Raises FileNotFoundError, FileExistsError (unless overwrite=True), ValueError for a file that is not ONNX, and
    VerificationError where the two files disagree; nothing is left behind then.
    """
    source = files.source_path("src", src)
    target = files.target_path("dst", dst, overwrite)
    if target.exists() and os.path.samefile(source, target):
        raise ValueError(f"dst is {str(target)!r}, which is src itself")
    model = files.load("src", source)
    before = node_lines(model)
    near_misses, changed = rewrite_nodes(model, progress)
    after = node_lines(model) if changed else before
    report = OnnxReport(str(target), Counter(count_nodes(model)), near_misses, before=before, after=after)
    with files.beside(target) as folder:
        if not changed:
            report.verified = "a copy of the source"
            copy(source, folder, target.name, report)
        else:
            progress("writing", 0.9)
            written = files.save(model, folder, target.name)
            if verify:
                progress("running both files", 0.95)
                report.verified = verified(source, written, model, inputs)
        files.publish(folder, target)
    progress("done", 1.0)
    return report


def rewrite(model: ir.Model, progress: Progress = nothing) -> list[FileMiss]:
    """Apply the rules to a model in memory, in place, and give its nodes function bodies; what was not matched and
    why. `progress` is called with what is being done and how far it is, from 0 to 1."""
    return rewrite_nodes(model, progress)[0]


def rewrite_nodes(model: ir.Model, progress: Progress = nothing) -> tuple[list[FileMiss], bool]:
    """(what was not matched and why, whether anything was)"""
    register_schemas()
    opset = model.opset_imports.get("", model.opset_imports.get("ai.onnx", 0))
    if opset < OLDEST_OPSET:
        return [FileMiss("all rules", "the model", f"it is of opset {opset}, supported from {OLDEST_OPSET}")], False
    progress("shapes", 0.0)
    left = inlined_where_needed(model, lambda trial: apply_rules(trial, opset)[0])
    misses, changed = apply_rules(model, opset, progress)
    if changed:
        progress("function bodies", 0.85)
        model.graph.sort()
        attach_functions(model)
    return [*left, *misses], changed


def apply_rules(model: ir.Model, opset: int, progress: Progress = nothing) -> tuple[list[FileMiss], bool]:
    """Apply every rule; what was not matched and why, and whether anything was."""
    ShapeInferencePass(check_type=False, strict_mode=False)(model)
    RemoveUnusedNodesPass()(model)  # what nobody uses would count as a user
    infer(model.graph, opset)
    near_misses, changed = [], False
    every = rules(opset)
    for index, rule in enumerate(every):
        progress(rule.name, 0.2 + 0.6 * index / len(every))
        misses, replaced = apply(rule, model.graph)
        near_misses += misses
        if replaced:
            changed = True
            RemoveUnusedNodesPass()(model)
    return near_misses, changed


def apply(rule: Rule, graph: ir.Graph) -> tuple[list[FileMiss], bool]:
    """Rewrite every match of one rule; what looked like one and is none comes back, and whether anything changed."""
    misses, changed = [], False
    for node in [n for n in ir.traversal.RecursiveGraphIterator(graph) if is_anchor(n, rule)]:
        if not any(used(output) for output in node.outputs):
            continue  # went with an earlier match
        match = rule.check(node)
        if isinstance(match, str):
            misses.append(FileMiss.of(rule.name, node, match))
        elif match is not None:
            rule.rewrite(node, match)
            changed = True
    return misses, changed


def rules(opset: int) -> tuple[Rule, ...]:
    """The rules, for one model: layers that share a mask share what is computed from it."""
    check_attention = partial(attention_rule.check_attention, opset=opset)
    rewrite_attention = partial(attention_rule.rewrite, cache={}, opset=opset)
    return (
        Rule("rotary_embedding", ROTARY_ANCHORS, check_rotary, rewrite_rotary),
        Rule("attention", attention_rule.ATTENTION_ANCHORS, check_attention, rewrite_attention),
        Rule("layer_norm", LAYER_NORM_ANCHORS, check_layer_norm, rewrite_layer_norm),
        Rule("rms_norm", RMS_NORM_ANCHORS, check_rms_norm, rewrite_rms_norm),
        Rule("linear", linear.LINEAR_ANCHORS, linear.check_linear, linear.rewrite_linear),
        Rule("layer_scale", ("linear",), layer_scale.check_scale, layer_scale.rewrite_scale),
        Rule("gated_linear", ("Mul",), linear.check_gated, linear.rewrite_gated),
        Rule("activation", ACTIVATION_ANCHORS, linear.check_activation, linear.rewrite_activation),
        Rule("shared_input", ("attention",), linear.check_shared, linear.rewrite_shared),
        Rule("linear_norm", ("layer_norm", "rms_norm"), linear.check_linear_norm, linear.rewrite_linear_norm),
        Rule("residual", ("linear",), linear.check_residual, linear.rewrite_residual),
    )


def is_anchor(node: ir.Node, rule: Rule) -> bool:
    return node.domain in KNOWN_DOMAINS and node.op_type in rule.anchors


def verified(source: Path, written: Path, model: ir.Model, inputs: Mapping[str, Any] | None) -> str:
    """Compare the two files. onnxruntime refuses some files but for a batch of one (rotary embeddings of opset 23), so
    that is tried too."""
    reason: CannotVerify | None = None
    for sizes in (SIZES, (1, SIZES[1])):
        try:
            found = compare_files(source, written, inputs or example_inputs(model, sizes=sizes), rounding(model))
            return found if reason is None else f"{found}, at batch 1"
        except CannotVerify as error:
            reason = reason or error
            if inputs:
                break
    return f"not verified: {reason}"


def copy(source: Path, folder: Path, name: str, report: OnnxReport) -> None:
    """The source under another name. Weights in files of their own stay where the model looks for them."""
    shutil.copyfile(source, folder / name)
    if source.parent.resolve() == folder.parent.resolve():
        return
    for location in sorted(external_files(read_model(source))):
        if (folder.parent / location).exists():
            raise FileExistsError(f"dst needs its weights in {location!r} beside it, which exists")
        (folder.parent / location).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source.parent / location, folder.parent / location)
        report.notes.append(f"copied its weights, {location}")
