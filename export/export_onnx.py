"""PyTorch -> ONNX: the FX rules on the exported program, then torch's own exporter with our ops in its translation
table."""

from __future__ import annotations

import contextlib
import copy
import logging
import warnings
from collections import Counter
from collections.abc import Container, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch

from trimaran.export import files
from trimaran.export.call import Call, checked_call, named_outputs
from trimaran.export.functions import attach_functions, count_nodes
from trimaran.export.naming import name_everything, static_axes
from trimaran.export.packing import pack
from trimaran.export.program import exported_program, free_axes, rename_outputs
from trimaran.export.report import OnnxReport
from trimaran.export.translation import translation_table
from trimaran.export.verify import CannotVerify, check_run
from trimaran.torch_path.graph import dtype_of
from trimaran.torch_path.optimize import untouched
from trimaran.torch_path.rewrite import RULES, Rule, rewrite

OPSETS = range(18, 25)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SHARED = "shared_input"  # a rule that files have their own form of: see `packing`
BATCHES = (1, 7)  # what a file with a dynamic batch is run at before it is written
FP32_LINEAR = "in fp32 onnxruntime's own kernels are faster (dtype=torch.float16 or torch.bfloat16 takes them)"


def export_onnx(
    model: torch.nn.Module,
    inputs: Any,
    path: files.Paths,
    *,
    dynamic: bool = True,
    opset: int = 20,
    dtype: torch.dtype | None = None,
    verify: bool = True,
    overwrite: bool = False,
    rules: Sequence[Rule] | None = None,
) -> OnnxReport:
    """Write the model as ONNX with trimaran nodes, each with a function body in standard ops.

    model: in eval mode, optimized or not; it is left as it is. inputs: an example call, keyword arguments as a mapping
    (what a tokenizer returns), or positional ones as a tuple. A key cache among them (`past_key_values`, a DynamicCache
    or EncoderDecoderCache of transformers) becomes inputs `past_key_values.0.key`, ... and one that the model returns
    (`use_cache=True`) outputs `present.0.key`, ..., [B, Hkv, S, D]. dynamic: every axis that the model allows to vary
    does. opset: 18 to 24. dtype: export in it (float32, float16 or bfloat16), casting weights and inputs; a model's own
    unless given. verify: compare the file, run by onnxruntime on the CPU, with the model, on the same inputs, and where
    the batch is dynamic also on 1 and on 7 rows of them. rules: which fusions; unless given all but linear layers in
    fp32.

    Raises TypeError and ValueError for wrong arguments, FileExistsError for an existing file (unless overwrite=True),
    VerificationError where the file disagrees with the model; nothing is left behind then.
    """
    call = checked_call(model, inputs)
    if opset not in OPSETS:
        raise ValueError(f"opset is {opset}, expected {OPSETS.start} to {OPSETS.stop - 1}")
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype}, expected torch.float32, torch.float16 or torch.bfloat16")
    target = files.target_path("path", path, overwrite)
    with untouched(model), torch.no_grad():
        if dtype is not None:
            model, call = in_dtype(model, call, dtype)
        names = list(named_outputs(model(**call.rebuild(list(call.tensors.values())))))
        onnx_model, report = converted(model, call, names, dynamic, opset, EXPORT_RULES if rules is None else rules)
        report.path = str(target)
        with files.beside(target) as folder:
            written = files.save(onnx_model, folder, target.name)
            if verify:
                report.verified = verified(written, onnx_model, model, call)
            files.publish(folder, target)
    return report


def converted(
    model: torch.nn.Module, call: Call, names: list[str], dynamic: bool, opset: int, rules: Sequence[Rule]
) -> tuple[ir.Model, OnnxReport]:
    program = exported_program(model, call, dynamic)
    graph_report = rewrite(program.graph_module, [rule for rule in rules if rule.name != SHARED])
    rename_outputs(program)
    with quiet():
        exported = torch.onnx.export(
            program, dynamo=True, opset_version=opset, custom_translation_table=translation_table(), verbose=False
        )
    assert exported is not None
    onnx_model: ir.Model = exported.model
    if any(rule.name == SHARED for rule in rules):
        pack(onnx_model)
    name_everything(onnx_model, list(call.tensors), names)
    attach_functions(onnx_model)
    left = [miss for miss in graph_report.near_misses if miss.reason == FP32_LINEAR]
    report = OnnxReport("", Counter(count_nodes(onnx_model)), [m for m in graph_report.near_misses if m not in left])
    report.notes += [f"{len(left)} linear layers stay as they are: {FP32_LINEAR}"] if left else []
    if dynamic:
        report.notes += static_axes(onnx_model, {name: free_axes(name, x) for name, x in call.tensors.items()})
    return onnx_model, report


def in_half(rule: Rule) -> Rule:
    """The rule, where tensors are in half precision: a fp32 product has no kernel that is worth its while, and
    onnxruntime has no second way once a node is ours."""

    def check(node: Any) -> Any:
        found = rule.check(node)
        return FP32_LINEAR if found is not None and dtype_of(node) == "float32" else found

    return replace(rule, check=check)


EXPORT_RULES = tuple(in_half(rule) if rule.name == "linear" else rule for rule in RULES)


def in_dtype(model: torch.nn.Module, call: Call, dtype: torch.dtype) -> tuple[torch.nn.Module, Call]:
    """A copy of the model that has its weights in another dtype, and the call. As `from_pretrained` has it, buffers
    that are not saved keep theirs (rotary frequencies), and in fp16 also the layers of which the model says so."""
    kept = {*(getattr(model, "_keep_in_fp32_modules_strict", None) or ())}
    kept |= {*(getattr(model, "_keep_in_fp32_modules", None) or ())} if dtype is torch.float16 else set()
    weights: dict[int, Any] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if tensor.is_floating_point() and not kept & {*name.split(".")}:
            cast = tensor.detach().to(dtype)
            weights[id(tensor)] = torch.nn.Parameter(cast, False) if isinstance(tensor, torch.nn.Parameter) else cast
    twin = copy.deepcopy(model, weights)
    return twin, call.with_tensors(lambda _, tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor)


def verified(written: Path, onnx_model: ir.Model, model: torch.nn.Module, call: Call) -> str:
    """Compare the file with the model: on the example, and at the batches that a server would run it at."""
    batched = {
        str(value.name)
        for value in onnx_model.graph.inputs
        if value.shape and isinstance(value.shape[0], ir.SymbolicDim)
    }
    sizes = BATCHES if batched else ()
    worst = 0.0
    try:
        for now in (call, *(with_rows(call, batched, size) for size in sizes)):
            expected = named_outputs(model(**now.rebuild(list(now.tensors.values()))))
            worst = max(worst, check_run(written, now.tensors, expected))
    except CannotVerify as reason:
        return f"not verified: {reason}"
    at = f", at batch {' and '.join(map(str, sizes))} too" if sizes else ""
    return f"verified against the model{at}, largest relative RMS difference {worst:.1e}"


def with_rows(call: Call, batched: Container[str], count: int) -> Call:
    """The call with that many rows, from its first on again and again."""

    def change(name: str, tensor: torch.Tensor) -> torch.Tensor:
        return tensor[torch.arange(count) % tensor.shape[0]] if name in batched else tensor

    return call.with_tensors(change)


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
