"""What an engine is: a way to run a model, with the same inputs and the same output as every other.

`build` is called once for a model. What it returns is called with any inputs of the model, tensors on the device, on
the stream that was current when it was built, and returns a tensor of its own: nothing that a later call overwrites.
Whatever a caller would have to do for a call is therefore in its time, such as copying inputs to where a CUDA graph
reads them. What a new shape needs (compiling, capturing) is done in the first calls of that shape.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

Inputs = Mapping[str, torch.Tensor]
Call = Callable[[Inputs], torch.Tensor]


class Inapplicable(Exception):
    """This engine has nothing to do here, for the reason given; it is listed with it."""


@dataclass
class Subject:
    """The model under test. module: in eval mode, in `dtype`, on `device`; None where only a file is given. flags: what
    a call needs besides tensors. output: the name, or the place, of the one output that everybody returns.
    folder: for files that engines write; `source`: where the weights are from."""

    name: str
    module: torch.nn.Module | None
    dtype: torch.dtype
    device: torch.device
    folder: Path
    file: Path | None = None
    flags: dict[str, Any] = field(default_factory=dict)
    output: str = "last_hidden_state"
    source: str = ""
    max_graphs: int = 64  # shapes that are going to come
    _files: dict[str, Path | Exception] = field(default_factory=dict)

    @property
    def model(self) -> torch.nn.Module:
        """The module; Inapplicable where there is only a file."""
        if self.module is None:
            raise Inapplicable("needs a PyTorch model, and this is an ONNX file")
        return self.module

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    def forward(self, module: Any, inputs: Inputs) -> torch.Tensor:
        """The output that counts of one call of a module."""
        return module(**inputs, **self.flags)[self.output]  # type: ignore[no-any-return]

    def written(self, kind: str, write: Callable[[Path], None]) -> Path:
        """The ONNX file of this kind, written once: several engines run the same. Raises what writing it raised."""
        if kind not in self._files:
            path = self.folder / kind / "model.onnx"
            path.parent.mkdir(parents=True)
            try:
                write(path)
                self._files[kind] = path
            except Exception as error:
                self._files[kind] = error
        found = self._files[kind]
        if isinstance(found, Exception):
            raise found
        return found


@dataclass
class Built:
    """What is called, and what must be said of it, such as that it runs without a CUDA graph."""

    call: Call
    note: str = ""


@dataclass(frozen=True)
class Engine:
    """why_not: the reason in one line why it cannot run here, None where it can. slow: a new shape takes it many
    seconds."""

    name: str
    group: str
    build: Callable[[Subject, Inputs], Built]
    why_not: Callable[[Subject], str | None]
    ours: bool = False
    slow: bool = False


def anywhere(subject: Subject) -> str | None:
    return None


def torch_model(subject: Subject) -> str | None:
    return None if subject.module is not None else "needs a PyTorch model, and this is an ONNX file"


def torch_on_gpu(subject: Subject) -> str | None:
    return torch_model(subject) or (None if subject.cuda else "needs a CUDA device")


def missing(package: str) -> str | None:
    """That a package is not there. A mere folder of that name is none, such as our kernels/."""
    found = importlib.util.find_spec(package)
    return None if found is not None and found.origin is not None else f"{package} is not installed"
