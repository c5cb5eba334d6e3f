"""ONNX files of the families, as exporters in the wild write them; each is made once a session and kept in a folder."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from pathlib import Path
from typing import Any

import models
import torch
from torch.utils import _pytree as pytree


class Flat(torch.nn.Module):
    """The model with tensors as outputs, positional inputs by name; what exporters take."""

    def __init__(self, model: torch.nn.Module, names: list[str], flags: dict[str, Any]) -> None:
        super().__init__()
        self.model, self.names, self.flags = model, names, flags

    def forward(self, *values: torch.Tensor) -> Any:
        output = self.model(**dict(zip(self.names, values, strict=True)), **self.flags)
        found = pytree.tree_leaves(dict(output) if isinstance(output, dict) else output)
        return tuple(leaf for leaf in found if isinstance(leaf, torch.Tensor) and leaf.is_floating_point())


def call_of(name: str, pad: str, dtype: torch.dtype, size: int = 3, length: int = 7) -> Any:
    """(tensors by name, the other arguments) of a call of the family."""
    call = models.inputs(name, size, length, pad, dtype)
    tensors = {key: value for key, value in call.items() if isinstance(value, torch.Tensor)}
    return tensors, {key: value for key, value in call.items() if key not in tensors}


def feeds(name: str, pad: str = "right", dtype: torch.dtype = torch.float32, size: int = 3, length: int = 7) -> Any:
    """NumPy inputs of the file of the family."""
    return {key: value.numpy() for key, value in call_of(name, pad, dtype, size, length)[0].items()}


def expected(name: str, attention: str, pad: str, size: int, length: int) -> list[Any]:
    """What the model of a family's file computes, as NumPy arrays."""
    tensors, flags = call_of(name, pad, torch.float32, size, length)
    flat = Flat(sharpened(models.build(name, attention)), list(tensors), flags).eval()
    with torch.no_grad():
        return [output.numpy() for output in flat(*tensors.values())]


def exported(
    folder: Path,
    name: str,
    exporter: str = "dynamo",
    opset: int = 20,
    *,
    attention: str = "sdpa",
    pad: str = "right",
    dtype: torch.dtype = torch.float32,
) -> Path:
    """The file of a family. exporter: dynamo or torchscript."""
    label = f"{name}-{exporter}-{opset}-{attention}-{pad}-{str(dtype).removeprefix('torch.')}"
    path = folder / f"{label}.onnx"
    if path.exists():
        return path
    tensors, flags = call_of(name, pad, dtype)
    model = sharpened(models.build(name, attention, dtype))
    writing = path.with_suffix(".part")
    export(model, tensors, flags, writing, exporter, opset)
    writing.rename(path)
    return path


def export(
    model: torch.nn.Module,
    tensors: dict[str, torch.Tensor],
    flags: dict[str, Any],
    path: Path,
    exporter: str,
    opset: int,
) -> None:
    """Write the model as the exporter does, with a batch and lengths that vary."""
    flat = Flat(model, list(tensors), flags).eval()
    with quiet(), torch.no_grad():
        if exporter == "dynamo":
            auto = torch.export.Dim.AUTO
            axes = tuple(dict.fromkeys(axes_of(key, value), auto) for key, value in tensors.items())
            program = torch.export.export(flat, tuple(tensors.values()), dynamic_shapes=(axes,))
            torch.onnx.export(program, (), str(path), input_names=list(tensors), dynamo=True, opset_version=opset,
                              external_data=False, verbose=False)  # fmt: skip
        else:
            named = {key: axes_of(key, value) for key, value in tensors.items()}
            torch.onnx.export(flat, tuple(tensors.values()), str(path), input_names=list(tensors), dynamo=False,
                              opset_version=opset, dynamic_axes=named)  # fmt: skip


def sharpened(model: torch.nn.Module) -> torch.nn.Module:
    """With weights so large that attention is not uniform: small random ones would hide any mistake in it."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2 and not name.endswith("embeddings.weight"):
                parameter.mul_(8.0)
            elif parameter.dim() == 1:
                parameter.add_(torch.linspace(-0.2, 0.2, parameter.numel(), dtype=parameter.dtype))
    return model


def axes_of(name: str, value: torch.Tensor) -> dict[int, str]:
    """The axes that vary: the batch, and the length of what has one."""
    return {0: "batch", 1: "decoded" if "decoder" in name else "sequence"} if value.dim() == 2 else {0: "batch"}


@contextlib.contextmanager
def quiet() -> Any:
    """Without what exporters print and warn of."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
