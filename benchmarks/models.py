"""`trimaran bench-models`: whole models by every engine, inputs and outputs on the device, from the caller's view.

A figure is the host clock around one call and a synchronization. Everyone gets the same inputs: the mask is there where
rows are padded, and padding is computed by all.
"""

from __future__ import annotations

import copy
import gc
import json
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE
from rich.console import Console, Group, RenderableType
from rich.progress import Progress
from rich.table import Table
from rich.text import Text

from trimaran.benchmarks.engines import ENGINES, Engine, Inputs, Ready, hidden, optimized
from trimaran.benchmarks.kernels import SEED, spread
from trimaran.benchmarks.machine import ceilings, drift, environment, unsteady
from trimaran.benchmarks.measure import Armed, Contender, Run, Timing, compare, percentile, rounds_of, why
from trimaran.benchmarks.report import OURS, PEERS

VERSION = 1  # of the JSON, described in benchmarks/README.md
ROUNDS, QUICK_ROUNDS = 30, 7
COPIES = 2  # of the inputs: a graph that would not read new ones were found out


@dataclass(frozen=True)
class Shape:
    """A batch; `padded` with lengths uniform in [seq/2, seq]. slow: whether a quick run has slow engines here too.
    target_ms: of PyTorch and of onnxruntime, on an H100."""

    batch: int
    seq: int
    padded: bool = False
    slow: bool = False
    target_ms: tuple[float | None, float | None] = (None, None)

    @property
    def name(self) -> str:
        return f"{self.batch} x {self.seq}" + ", padded" * self.padded

    def inputs(self, vocabulary: int, device: torch.device, seed: int) -> dict[str, torch.Tensor]:
        source = torch.Generator().manual_seed(SEED + seed)
        ids = torch.randint(0, vocabulary, (self.batch, self.seq), generator=source)
        found = {"input_ids": ids, "token_type_ids": torch.zeros_like(ids)}
        if self.padded:
            lengths = torch.randint(self.seq // 2, self.seq + 1, (self.batch, 1), generator=source)
            found["attention_mask"] = (torch.arange(self.seq) < lengths).long()
        return {name: tensor.to(device) for name, tensor in found.items()}


SHAPES = (
    Shape(1, 16, slow=True, target_ms=(0.25, None)),
    Shape(1, 128, slow=True, target_ms=(0.27, 0.30)),
    Shape(8, 128, padded=True, target_ms=(0.55, None)),
    Shape(32, 128, padded=True, slow=True, target_ms=(1.65, 1.75)),
    Shape(8, 512, padded=True, target_ms=(1.75, None)),
    Shape(32, 512, padded=True, slow=True, target_ms=(6.1, 6.4)),
    Shape(32, 512, target_ms=(6.5, None)),
)
TINY = (Shape(1, 8), Shape(2, 12, padded=True))


class WallWatch:
    """The host clock around one call and a synchronization; a sample is the median of a few."""

    method = "host clock around a call and a synchronization, median of 5"

    def __init__(self, device: torch.device) -> None:
        self.wait: Callable[[], None] = torch.cuda.synchronize if device.type == "cuda" else lambda: None

    def arm(self, runs: list[Run]) -> Armed:
        timed = rounds_of(runs, time.perf_counter, self.wait)
        for _ in range(3):
            timed(1)
        return Armed(lambda: percentile([timed(1) for _ in range(5)], 50), lambda: timed(1), 1, runs[0])


def bert(device: torch.device) -> torch.nn.Module:
    """BERT-base with random weights, fp16; on a CPU a tiny one in fp32."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(SEED)
    small = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = BertConfig() if device.type == "cuda" else BertConfig(**small, intermediate_size=64)
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    return BertModel(config, add_pooling_layer=False).eval().to(device, dtype)  # type: ignore[no-any-return]


def bench(quick: bool, console: Console, names: Sequence[str] = (), shapes: Sequence[Shape] = ()) -> dict[str, Any]:
    """The result as it is written to JSON. names: of engines, all of them where there is none; the first, against whose
    error the others' is held, in any case. On a machine without a GPU a tiny model only shows that it runs. ValueError
    for an unknown name."""
    if unknown := set(names) - {engine.name for engine in ENGINES}:
        raise ValueError(f"no engine {sorted(unknown)[0]!r}, expected some of {[engine.name for engine in ENGINES]}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shapes = shapes or (SHAPES if device.type == "cuda" else TINY)
    engines = [e for e in ENGINES if e.name in names or not names or e is ENGINES[0]]
    engines = [engine for engine in engines if device.type == "cuda" or not engine.cuda]
    model = bert(device)
    dtype = next(model.parameters()).dtype
    before = ceilings(device, dtype)
    with (
        tempfile.TemporaryDirectory() as folder,
        Progress(console=console, transient=True) as progress,
        torch.no_grad(),
    ):
        task = progress.add_task("", total=len(engines) + len(shapes))

        def step(text: str) -> None:
            progress.update(task, description=text)

        loaded = {}
        for engine in engines:
            step(f"loading {engine.name}")
            loaded[engine.name] = _loaded(engine, model, Path(folder))
            progress.advance(task)
        cases = []
        for shape in shapes:
            chosen = [engine for engine in engines if not (quick and engine.slow and not shape.slow)]
            cases.append(measure(model, shape, chosen, loaded, QUICK_ROUNDS if quick else ROUNDS, step))
            if device.type == "cuda":
                cases[-1]["kernels"] = _kernels(model, shape, engines, loaded)
            progress.advance(task)
    reasons = unsteady(drifts := drift(before, ceilings(device, dtype)))
    return {
        "version": VERSION,
        "model": "bert-base" if device.type == "cuda" else "tiny",
        "valid": not reasons,
        "invalid_because": reasons,
        "drift_percent": drifts,
        "dtype": str(dtype).removeprefix("torch."),
        "quick": quick,
        "rounds": QUICK_ROUNDS if quick else ROUNDS,
        "method": WallWatch.method,
        "environment": environment(device) | _versions(),
        "cases": cases,
    }


def _versions() -> dict[str, str]:
    import onnxruntime
    import transformers

    return {"transformers": transformers.__version__, "onnxruntime": onnxruntime.__version__}


def _loaded(engine: Engine, model: torch.nn.Module, folder: Path) -> Ready | str:
    """The engine with the model, or why it has none."""
    device = next(model.parameters()).device
    own = folder / engine.name.replace(" ", "-")
    own.mkdir()
    padded = Shape(2, 16, padded=True)
    try:
        return engine.load(model, padded.inputs(64, device, 0), own)
    except Exception as error:  # whatever an engine does, the others are measured
        return why(error, [])


def measure(
    model: torch.nn.Module,
    shape: Shape,
    engines: Sequence[Engine],
    loaded: dict[str, Ready | str],
    rounds: int,
    step: Callable[[str], None],
) -> dict[str, Any]:
    """One shape, all engines in turn."""
    device, config = next(model.parameters()).device, model.config
    inputs = [shape.inputs(config.vocab_size, device, seed) for seed in range(COPIES)]  # type: ignore[union-attr, arg-type]
    step(f"{shape.name}: exact result")
    exact = hidden(copy.deepcopy(model).double()(**inputs[0]))
    timings = compare(
        [_contender(engine, loaded[engine.name], inputs) for engine in engines],
        exact=exact,
        dtype=next(model.parameters()).dtype,
        watch=WallWatch(device),
        rounds=rounds,
        copies=COPIES,
        seed=SEED,
        step=lambda name: step(f"{shape.name}: {name}"),
    )
    gc.collect()
    found = {"name": shape.name, "batch": shape.batch, "seq": shape.seq, "padded": shape.padded}
    return found | {"target_ms": list(shape.target_ms), "contenders": rows(timings)}


def _kernels(
    model: torch.nn.Module, shape: Shape, engines: Sequence[Engine], loaded: dict[str, Ready | str]
) -> dict[str, Any]:
    """The kernels of our own engines in PyTorch."""
    inputs = shape.inputs(64, next(model.parameters()).device, 0)
    found = {}
    for engine in engines:
        ready = loaded[engine.name]
        if engine.ours and engine.load is optimized and not isinstance(ready, str):
            found[engine.name] = kernels(ready(inputs))
    return found


def _contender(engine: Engine, loaded: Ready | str, inputs: Sequence[Inputs]) -> Contender:
    def prepare(number: int) -> Run:
        if isinstance(loaded, str):
            raise RuntimeError(loaded)
        return loaded(inputs[number])

    return Contender(engine.name, prepare, engine.ours)


def rows(timings: Sequence[Timing]) -> list[dict[str, Any]]:
    """ratio: the best peer's time over this one's, round by round."""
    peers = [timing for timing in timings if timing.samples and not timing.ours]
    best = min(peers, key=lambda timing: timing.median, default=None)
    found = []
    for timing in timings:
        ratios = [p / m for p, m in zip(best.samples, timing.samples, strict=False)] if best else []
        row: dict[str, Any] = {"name": timing.name, "ours": timing.ours, "reason": timing.reason, "error": timing.error}
        row |= {"ms": spread(timing.samples) if timing.samples else None, "ratio": spread(ratios) if ratios else None}
        found.append(row | {"samples_ms": timing.samples})
    return found


def kernels(run: Run) -> list[dict[str, Any]]:
    """The GPU's work in one call, in order: name and microseconds."""
    from torch.profiler import ProfilerActivity, profile

    run()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        run()
        torch.cuda.synchronize()
    events = [event for event in seen.events() if event.device_type.name == "CUDA"]
    events.sort(key=lambda event: event.time_range.start)
    return [{"name": event.name[:80], "us": event.time_range.elapsed_us()} for event in events]


def failures(found: dict[str, Any]) -> list[str]:
    """Our own engines that could not be timed."""
    return [
        f"{case['name']}, {row['name']}: {row['reason']}"
        for case in found["cases"]
        for row in case["contenders"]
        if row["ours"] and row["reason"]
    ]


def heading(found: dict[str, Any]) -> str:
    where = found["environment"]
    return f"{found['model']}, {found['dtype']}, ms a call; {where['device']}; {where['date'][:10]}"


def table(found: dict[str, Any]) -> RenderableType:
    """A row per case and engine. ratio: the best peer's time over its own."""
    shown = Table(box=SIMPLE, title=heading(found), title_justify="left", padding=0)
    shown.add_column("batch x seq", no_wrap=True)
    for name in ("ms", "p20-p80", "ratio", "target"):
        shown.add_column(name, justify="right", no_wrap=True)
    refused: Counter[str] = Counter()
    for case in found["cases"]:
        shown.add_row(case["name"], style="cyan")
        targets = iter(case["target_ms"])
        for row in case["contenders"]:
            target = next(targets, None) if row["ours"] else None
            if row["reason"]:
                refused[f"{row['name']}, not timed: {row['reason']}"] += 1
            shown.add_row(f"  {row['name']}", *cells(row, target), style="bold" if row["ours"] else "")
        shown.add_section()
    verdict = found["method"] if found["valid"] else "INVALID: " + "; ".join(found["invalid_because"])
    notes = [Text(f"{note} [{count} cases]", style="dim") for note, count in refused.items()]
    return Group(shown, *notes, Text(verdict, style="dim" if found["valid"] else "bold red"))


def cells(row: dict[str, Any], target: float | None) -> list[str]:
    if row["ms"] is None:
        return ["", "not timed"]
    ms, ratio = row["ms"], row["ratio"]
    shown = [f"{ms['median']:.4g}", f"{ms['p20']:.3g}-{ms['p80']:.3g}", f"{ratio['median']:.2f}" if ratio else ""]
    return [*shown, f"{target:g}" if target else ""]


def write(found: dict[str, Any], folder: Path) -> None:
    """`folder/models.json` and `folder/models.png`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "models.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    figure(found, folder / "models.png")


def figure(found: dict[str, Any], path: Path) -> None:
    """Bars per case, an engine each: times over the best peer's, less is better; ours in red."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(row["name"] for case in found["cases"] for row in case["contenders"]))
    ours = {row["name"] for case in found["cases"] for row in case["contenders"] if row["ours"]}
    colors = {name: OURS if name in ours else PEERS[at % len(PEERS)] for at, name in enumerate(names)}
    count = sum(len(case["contenders"]) + 1 for case in found["cases"])
    drawn = Figure(figsize=(12, 1.6 + 0.21 * count), dpi=100, layout="constrained")
    FigureCanvasAgg(drawn)
    axes = drawn.add_subplot()
    at, ticks = 0, []
    for case in found["cases"]:
        timed = [row for row in case["contenders"] if row["ms"]]
        ticks.append((at + (len(timed) - 1) / 2, case["name"]))
        for row in timed:
            share = 1 / row["ratio"]["median"] if row["ratio"] else 1.0
            axes.barh(at, min(share, 3), height=0.9, color=colors[row["name"]])
            weight = "bold" if row["ours"] else "normal"
            text = f" {row['ms']['median']:.3g} ms  {row['name']}"
            axes.text(min(share, 3), at, text, va="center", fontsize=8, weight=weight)
            at += 1
        at += 1
    axes.axvline(1, color="#444444", linewidth=1, linestyle="--")
    axes.set_xlim(0, 4)
    axes.set_yticks([place for place, _ in ticks], [name for _, name in ticks], fontsize=9)
    axes.invert_yaxis()
    axes.margins(y=0.01)
    axes.set_xlabel("time over the best peer's (less is better; cut at 3)")
    axes.set_title(heading(found) + ("" if found["valid"] else "\nINVALID"), fontsize=10, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    drawn.savefig(path)
