"""The ONNX files of a model by every exporter and optimizer, each written once for all engines that run it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from trimaran.benchmarks.engines.contract import Inapplicable, Inputs, Subject
from trimaran.export.export_onnx import export_onnx, quiet
from trimaran.export.rewrite_onnx import rewrite_onnx

MODEL_TYPES = {"gpt2": "gpt2", "t5": "t5", "vit": "vit", "whisper": "bart"}  # of ORT's optimizer; else bert
Writer = Callable[[Subject, Inputs, Path], None]


class Flat(torch.nn.Module):
    """The model with its inputs by place and the one output that counts, as exporters take it."""

    def __init__(self, subject: Subject, model: torch.nn.Module, names: list[str]) -> None:
        super().__init__()
        self.model, self.names, self._subject = model, names, subject

    def forward(self, *values: torch.Tensor) -> torch.Tensor:
        return self._subject.forward(self.model, dict(zip(self.names, values, strict=True)))

    def filled(self, inputs: Inputs) -> list[torch.Tensor]:
        """The inputs by place, a mask of ones where the call has none."""
        ones = {"attention_mask": torch.ones_like(next(iter(inputs.values())))}
        return [{**ones, **inputs}[name] for name in self.names]


def axes_of(name: str, tensor: torch.Tensor) -> dict[int, str]:
    """The axes that vary: the batch, and the length of what has one."""
    return {0: "batch", 1: "decoded" if "decoder" in name else "sequence"} if tensor.dim() == 2 else {0: "batch"}


def by_dynamo(opset: int) -> Writer:
    """torch's exporter as it is."""

    def write(subject: Subject, example: Inputs, path: Path) -> None:
        flat = Flat(subject, subject.model, list(example)).eval()
        axes = tuple(dict.fromkeys(axes_of(n, t), torch.export.Dim.AUTO) for n, t in example.items())
        with quiet(), torch.no_grad():
            program = torch.export.export(flat, tuple(example.values()), dynamic_shapes=(axes,))
            torch.onnx.export(
                program, (), str(path), input_names=list(example), output_names=[subject.output], dynamo=True,
                opset_version=opset, external_data=True, verbose=False,
            )  # fmt: skip

    return write


def by_torchscript(subject: Subject, example: Inputs, path: Path) -> None:
    """The TorchScript exporter on eager attention, opset 17: the form in which ORT's optimizer finds attention."""
    twin: Any = copy.deepcopy(subject.model).requires_grad_(False)
    if hasattr(twin, "set_attn_implementation"):
        twin.set_attn_implementation("eager")
    axes: dict[str, dict[int, str]] = {name: axes_of(name, tensor) for name, tensor in example.items()}
    with quiet(), torch.no_grad():
        torch.onnx.export(
            Flat(subject, twin, list(example)).eval(), tuple(example.values()), str(path), input_names=list(example),
            output_names=[subject.output], dynamic_axes=axes | {subject.output: {0: "batch", 1: "sequence"}},
            opset_version=17, dynamo=False,
        )  # fmt: skip


def by_ort_optimizer(subject: Subject, example: Inputs, path: Path) -> None:
    """onnxruntime.transformers.optimizer on the TorchScript export, or on the file that is given."""
    from onnxruntime.transformers.optimizer import optimize_model

    source = subject.file or file_of("torchscript", subject, example)
    config: Any = getattr(subject.module, "config", None)
    kind = MODEL_TYPES.get(getattr(config, "model_type", ""), "bert")
    heads, hidden = (getattr(config, name, 0) or 0 for name in ("num_attention_heads", "hidden_size"))
    with quiet():
        fused = optimize_model(str(source), kind, heads, hidden, opt_level=1 if subject.cuda else 0,
                               use_gpu=subject.cuda)  # fmt: skip
    fused.save_model_to_file(str(path), use_external_data_format=True)


def by_packing(subject: Subject, example: Inputs, path: Path) -> None:
    """ORT's packing mode on what its optimizer made: padding is taken out and put back by nodes in the file."""
    import onnx
    from onnxruntime.transformers.convert_to_packing_mode import PackingMode
    from onnxruntime.transformers.onnx_model import OnnxModel

    if "attention_mask" not in example:
        raise Inapplicable("the model takes no attention mask")
    model = onnx.load(str(file_of("optimized", subject, example)))
    packing = PackingMode(OnnxModel(model))
    with quiet():
        packing.convert()
    if not any(node.op_type.startswith("Packed") for node in packing.model.model.graph.node):
        raise Inapplicable("ORT's packing mode found no attention that it can pack")
    packing.model.save_model_to_file(str(path), use_external_data_format=True)


def by_onnxscript(subject: Subject, example: Inputs, path: Path) -> None:
    """onnxscript's fusions for ORT on torch's export."""
    import onnx_ir as ir
    import onnxscript.optimizer
    from onnxscript.rewriter.ort_fusions import optimize_for_ort

    model = ir.load(subject.file or file_of("dynamo-18", subject, example))
    with quiet():
        onnxscript.optimizer.optimize(model)
        fused, _ = optimize_for_ort(model)
    ir.save(fused, path, external_data=f"{path.name}.data")


def by_transformers(subject: Subject, example: Inputs, path: Path) -> None:
    """transformers' own exporter, with its fusions for onnxruntime."""
    import onnx_ir as ir
    from transformers.exporters import OnnxConfig, OnnxExporter

    config = OnnxConfig(dynamic=True, ort_fusions="cuda" if subject.cuda else "cpu")
    with quiet(), torch.no_grad():
        found = OnnxExporter().export(subject.model, {**example, **subject.flags}, config)
    ir.save(found.program, path, external_data=f"{path.name}.data")


def by_us(subject: Subject, example: Inputs, path: Path) -> None:
    export_onnx(subject.model, {**example, **subject.flags}, path, verify=False)


def rewritten_by_us(subject: Subject, example: Inputs, path: Path) -> None:
    """What `trimaran.rewrite_onnx` makes of the file that is given, or of torch's export."""
    rewrite_onnx(subject.file or file_of("dynamo-20", subject, example), path, verify=False)


WRITERS: dict[str, Writer] = {
    "dynamo-18": by_dynamo(18),
    "dynamo-20": by_dynamo(20),
    "dynamo-23": by_dynamo(23),
    "torchscript": by_torchscript,
    "optimized": by_ort_optimizer,
    "packed": by_packing,
    "onnxscript": by_onnxscript,
    "transformers": by_transformers,
    "trimaran": by_us,
    "trimaran-rewritten": rewritten_by_us,
}


def file_of(kind: str, subject: Subject, example: Inputs) -> Path:
    """The file, written now if it was not yet. Raises what its writer raised, then and later."""
    return subject.written(kind, lambda path: WRITERS[kind](subject, example, path))
