"""`trimaran compare-fusions`: what each optimizer of ONNX files finds in one, by kind of fusion.

A file's nodes are counted after each optimizer has been over it, and a whole operator counts for those who leave it as
it is (`Attention`, `LayerNormalization`, `RotaryEmbedding` of newer opsets), but for us only our own nodes do.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import torch

from trimaran.benchmarks.machine import environment
from trimaran.export.rewrite_onnx import rewrite
from trimaran.kernels.interpreter import interpret
from trimaran.ort_ops.session import ort_session

KINDS = ("attention", "norm", "residual norm", "rotary", "gated", "activation")
FUSED = "-transformers-fused"  # in the name of a file that transformers' exporter wrote with its own fusions
HALF = "-float16"  # at the end of the name of what is in half precision
MODEL_TYPES = ("bert", "gpt2", "t5", "vit", "clip", "bart")
THEIRS = {
    "attention": {"Attention", "MultiHeadAttention", "GroupQueryAttention", "DecoderMaskedMultiHeadAttention",
                  "DecoderMaskedSelfAttention", "QAttention", "PackedAttention", "PackedMultiHeadAttention"},
    "norm": {"LayerNormalization", "SimplifiedLayerNormalization", "RMSNormalization", "SkipLayerNormalization",
             "SkipSimplifiedLayerNormalization", "EmbedLayerNormalization"},
    "residual norm": {"SkipLayerNormalization", "SkipSimplifiedLayerNormalization"},
    "rotary": {"RotaryEmbedding"},
    "gated": {"BiasSplitGelu", "SwiGLU"},
    "activation": {"BiasGelu", "FusedGemm", "FusedMatMulActivation", "GemmFastGelu"},
}  # fmt: skip


def theirs(nodes: Iterable[Any]) -> Counter[str]:
    """Of nodes of onnx or onnx_ir, by kind. Rotary embeddings count by the tensors that they turn."""
    found: Counter[str] = Counter()
    for node in nodes:
        found.update(kind for kind, types in THEIRS.items() if node.op_type in types)
        if node.op_type == "GroupQueryAttention" and "do_rotary" in str(node):
            found["rotary"] += 2
        if node.op_type == "FastGelu" and len([name for name in _names(node) if name]) == 2:
            found["activation"] += 1
    return found


def ours(nodes: Iterable[ir.Node]) -> Counter[str]:
    found: Counter[str] = Counter()
    for node in (node for node in nodes if node.domain == "trimaran"):
        given = [value is not None for value in node.inputs] + [False] * 16
        if node.op_type == "attention":
            found["attention"] += 1
        elif node.op_type in ("layer_norm", "rms_norm", "linear_norm"):
            found["norm"] += 1
            place = {"layer_norm": 3, "rms_norm": 2, "linear_norm": 3}[node.op_type]
            found["residual norm"] += given[place]
        elif node.op_type == "rotary_embedding":
            packed = node.attributes.get("packed")
            found["rotary"] += 1 + (given[3] or (packed is not None and packed.as_int() == 1))
        elif node.op_type == "gated_linear":
            found["gated"] += 1
        elif node.op_type == "linear" and _activation(node) != "none":
            found["activation"] += 1
    return found


def by_session(path: Path) -> Counter[str]:
    """ORT's own optimizer, at its highest level."""
    import onnxruntime

    with tempfile.TemporaryDirectory() as folder:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        options.optimized_model_filepath = str(Path(folder) / "optimized.onnx")
        onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        return theirs(onnx.load(options.optimized_model_filepath).graph.node)


def by_transformers_optimizer(path: Path) -> Counter[str]:
    """onnxruntime.transformers.optimizer, with the model type under which it finds most."""
    from onnxruntime.transformers.optimizer import optimize_model

    found, errors = [], []
    for model_type in MODEL_TYPES:
        try:
            optimized = optimize_model(str(path), model_type=model_type, opt_level=0, use_gpu=True)
            found.append(theirs(optimized.model.graph.node))
        except Exception as error:
            errors.append(error)
    if not found:
        raise errors[0]
    return max(found, key=lambda counts: counts.total())


def by_onnxscript(path: Path) -> Counter[str]:
    """onnxscript's rules for ORT, after its own simplifications."""
    import onnxscript.optimizer
    from onnxscript.rewriter.ort_fusions import optimize_for_ort

    model = ir.load(path)
    onnxscript.optimizer.optimize(model)
    return theirs(optimize_for_ort(model)[0].graph)


def by_trimaran(path: Path) -> Counter[str]:
    """Our nodes, and what activations onnxruntime fuses beside them when it opens the file."""
    import onnxruntime

    model = ir.load(path)
    rewrite(model)
    found = ours(ir.traversal.RecursiveGraphIterator(model.graph))
    with tempfile.TemporaryDirectory() as folder, interpret():
        ir.save(model, Path(folder) / "ours.onnx", external_data="ours.data")
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        options.optimized_model_filepath = str(Path(folder) / "optimized.onnx")
        ort_session(Path(folder) / "ours.onnx", ["CPUExecutionProvider"], session_options=options)
        nodes = onnx.load(options.optimized_model_filepath, load_external_data=False).graph.node
        found["activation"] += theirs(node for node in nodes if node.domain == "com.microsoft")["activation"]
    return found


OPTIMIZERS: dict[str, Callable[[Path], Counter[str]]] = {
    "session": by_session,
    "transformers optimizer": by_transformers_optimizer,
    "onnxscript": by_onnxscript,
    "trimaran": by_trimaran,
}


def compare(paths: Sequence[Path], done: Callable[[str], None] = lambda _: None) -> dict[str, Any]:
    """Counts by file and optimizer; a text where one could not do it. Files whose names end in
    `-transformers-fused` say what transformers' exporter finds in the models of the others."""
    fused = {path.stem.removesuffix(FUSED): path for path in paths if path.stem.endswith(FUSED)}
    files = {}
    for path in (path for path in paths if path not in fused.values()):
        row: dict[str, Any] = {name: _counted(optimizer, path) for name, optimizer in OPTIMIZERS.items()}
        exported = next((file for family, file in fused.items() if _same_model(path.stem, family)), None)
        row["transformers exporter"] = (
            "not one of its models" if exported is None else _counted(lambda p: theirs(ir.load(p).graph), exported)
        )
        files[path.stem] = row
        done(f"{path.stem}: {line(row)}")
    packages = ("onnxruntime", "onnxscript", "onnx", "transformers", "torch")
    where = environment(torch.device("cpu")) | {name: version(name) for name in packages}
    where["command"] = "trimaran compare-fusions FILE..."
    return {"kinds": KINDS, "environment": where, "files": files}


def fewer(row: dict[str, Any]) -> list[str]:
    """The kinds of which somebody finds more than we do."""
    mine = row["trimaran"] if isinstance(row["trimaran"], dict) else {}
    peers = [counts for name, counts in row.items() if name != "trimaran" and isinstance(counts, dict)]
    return [kind for kind in KINDS if any(peer[kind] > mine.get(kind, 0) for peer in peers)]


def line(row: dict[str, Any]) -> str:
    return "; ".join(f"{name} {cell(counts)}" for name, counts in row.items())


def cell(counts: Any) -> str:
    return " ".join(str(counts[kind]) for kind in KINDS) if isinstance(counts, dict) else "-"


def markdown(found: dict[str, Any]) -> str:
    """A row for each file, the numbers in the order of the kinds; the last column names where we find fewer."""
    names = [*OPTIMIZERS, "transformers exporter"]
    where = found["environment"]
    versions = ", ".join(f"{name} {where[name]}" for name in ("onnxruntime", "onnxscript", "transformers", "torch"))
    lines = [
        "# Fusions found, by file and optimizer",
        "",
        f"Each cell: {', '.join(KINDS)}. {versions}; {where['date'][:10]}. Made by `{where['command']}`.",
        "Whole operators of newer opsets count for those who leave them as they are; for us only our own nodes.",
        "In fp32 we leave linear layers, and what is activated after them, to onnxruntime, whose products are faster;",
        "what its session fuses of these beside our nodes is in our column.",
        "",
        f"| file | {' | '.join(names)} | we find fewer |",
        f"|{'---|' * (len(names) + 2)}",
    ]
    for file, row in found["files"].items():
        lines.append(f"| {file} | {' | '.join(cell(row[name]) for name in names)} | {', '.join(fewer(row))} |")
    failures = {f"{name} on {file}: {counts}" for file, row in found["files"].items() for name, counts in row.items()
                if isinstance(counts, str) and not counts.startswith("not one")}  # fmt: skip
    return "\n".join([*lines, "", *(f"- {failure}" for failure in sorted(failures))]) + "\n"


def write(found: dict[str, Any], folder: Path) -> None:
    """`folder/fusions.json` and `folder/fusions.md`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "fusions.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    (folder / "fusions.md").write_text(markdown(found), encoding="utf-8")


def _counted(optimizer: Callable[[Path], Counter[str]], path: Path) -> dict[str, int] | str:
    try:
        with _quiet():
            counts = optimizer(path)
    except Exception as error:
        text = str(error).strip().splitlines()
        return f"{type(error).__name__}: {text[0][:160] if text else ''}"
    return {kind: counts[kind] for kind in KINDS}


def _same_model(stem: str, family: str) -> bool:
    """Whether a file is of the family, and in its precision: `<family>-float16` is in half precision."""
    half = family.endswith(HALF)
    names = tuple(f"{family.removesuffix(HALF)}-{exporter}-" for exporter in ("dynamo", "torchscript"))
    return stem.startswith(names) and stem.endswith(HALF) == half


def _names(node: Any) -> list[Any]:
    return list(node.input if isinstance(node, onnx.NodeProto) else node.inputs)


def _activation(node: ir.Node) -> str:
    attribute = node.attributes.get("activation")
    return "none" if attribute is None else attribute.as_string()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what optimizers print and log."""
    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
