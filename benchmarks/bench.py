"""`trimaran bench`: a model by every engine, side by side. What to run, and what becomes of it."""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from trimaran.benchmarks import cold, page, plots, tables
from trimaran.benchmarks.engines.catalog import chosen
from trimaran.benchmarks.engines.contract import missing
from trimaran.benchmarks.engines.ours import IN_PYTORCH
from trimaran.benchmarks.machine import environment, version
from trimaran.benchmarks.models import PRESETS, SEED, shapes_of
from trimaran.benchmarks.result import VERSION, Result, load, write_csv
from trimaran.benchmarks.sidebyside import METHOD
from trimaran.benchmarks.supervise import supervise
from trimaran.benchmarks.worker import Plan
from trimaran.benchmarks.workload import LENGTHS, cases_of, lee

ROUNDS = 30
DTYPES = ("float16", "bfloat16", "float32")
OTHER = ("transformers", "onnxruntime", "onnxscript", "liger_kernel", "tensorrt", "deepspeed")
COLD = ("trimaran PyTorch", "trimaran ORT rewritten Runner", "torch.compile default")


def plan_of(
    model: str, *, dtype: str = "", batch: Sequence[int] = (), seq: Sequence[int] = (),
    shapes: Sequence[tuple[int, int]] = (), lengths: Sequence[str] = (), engines: Sequence[str] = (),
    rounds: int = ROUNDS, stream_s: float = 0.0,
) -> Plan:  # fmt: skip
    """What a command means. ValueError for an unknown model, dtype, engine or kind of lengths, and sizes below 1."""
    if model not in PRESETS and not Path(model).exists():
        raise ValueError(f"model is {model!r}, expected a folder, an .onnx file, or one of {', '.join(PRESETS)}")
    if dtype and dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}, expected {', '.join(DTYPES)}")
    if unknown := [kind for kind in lengths if kind not in LENGTHS]:
        raise ValueError(f"lengths is {unknown[0]!r}, expected some of {', '.join(LENGTHS)}")
    if "lee" in lengths:
        lee()
    known = shapes_of(model)
    crossed = list(itertools.product(batch or sorted({b for b, _ in known}), seq or sorted({s for _, s in known})))
    asked = [*shapes, *(crossed if batch or seq else ())] or list(known)
    if wrong := [shape for shape in asked if min(shape) < 1]:
        raise ValueError(f"a shape is {wrong[0]}, expected a batch and a length of at least 1")
    text = model not in PRESETS or PRESETS[model].model not in ("ViTModel", "WhisperModel")
    cases = cases_of(asked, list(lengths) or (["dense", "uniform"] if text else ["dense"]))
    if not text and any(case.lengths != "dense" for case in cases):
        raise ValueError(f"lengths is {', '.join(lengths)}: {model} takes no attention mask, so only dense")
    kind = dtype or ("float16" if torch.cuda.is_available() else "float32")
    return Plan(model, kind, cases, chosen(list(engines)), rounds, stream_s=stream_s)


def new_result(plan: Plan) -> Result:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    where = environment(device) | {name: found for name in OTHER if (found := version(name)) != "from a checkout"}
    if missing("onnxruntime") is None:  # the one that is imported may stand before the one that is installed
        where["onnxruntime"] = importlib.import_module("onnxruntime").__version__
    said = METHOD if device.type == "cuda" else f"{METHOD}; on a CPU, which has fewer engines and no device time"
    kinds = {case.lengths: LENGTHS[case.lengths] for case in plan.cases}
    model = Path(plan.model).name if plan.model not in PRESETS else plan.model
    return Result(VERSION, model, "", plan.dtype, 0, SEED, plan.rounds, said, kinds, where)


class Recorder:
    """Takes events, keeps the files up to date, shows what goes on."""

    def __init__(self, result: Result, folder: Path, live: tables.Live) -> None:
        self.result, self.folder, self.live = result, folder, live
        self.stem = folder / Path(result.model).stem

    def take(self, kind: str, told: dict[str, Any]) -> None:
        if kind == "at":
            self.live.at(told["engine"], told["doing"])
            return
        self.result.take(kind, told)
        if kind in ("case", "stream", "cold", "left_out", "done", "ceilings"):
            self.result.write(self.stem.with_suffix(".json"))
            self.live.show(self.result)


def bench(plan: Plan, folder: Path, console: Console, with_cold: bool = False) -> Result:
    """Run the plan, and write `folder/<model>.json`, `.csv`, `.png`, `.svg` and `.html`. The JSON is there from the
    first case on, marked incomplete until all is done."""
    folder.mkdir(parents=True, exist_ok=True)
    result = new_result(plan)
    with tables.Live(console, len(plan.cases)) as live:
        recorder = Recorder(result, folder, live)
        result.write(recorder.stem.with_suffix(".json"))
        supervise(plan, result, recorder.take, folder / "bench.log")
        if with_cold and result.cases:
            for found in cold.run(plan.model, plan.dtype, cold_engines(result), plan.cases[0].as_dict(), plan.left_s,
                                  live.at):  # fmt: skip
                result.cold.append(found)
                result.write(recorder.stem.with_suffix(".json"))
    result.write(recorder.stem.with_suffix(".json"))
    return write_reports(recorder.stem)


def write_reports(stem: Path) -> Result:
    """Everything beside the JSON, of what is written there: its digits are rounded."""
    result = load(stem.with_suffix(".json"))
    write_csv(result, stem.with_suffix(".csv"))
    plots.write(result, stem)
    stem.with_suffix(".html").write_text(page.page(result), encoding="utf-8")
    return result


def cold_engines(result: Result) -> list[str]:
    """Ours, the best peer of the first case, and torch.compile, of those that were built."""
    best = result.best_peer(result.cases[0])
    wanted = dict.fromkeys([IN_PYTORCH, *COLD, *([best.engine] if best else [])])
    built = {state.name for state in result.engines if not state.reason}
    return [name for name in wanted if name in built]


def failures(result: Result) -> list[str]:
    """Our own engines that could not be built or timed."""
    found = [f"{state.name}: {state.reason}" for state in result.engines if state.ours and state.failed]
    return found + [
        f"{case.name}, {row.engine}: {row.reason}"
        for case in result.cases
        for row in case.rows
        if result.is_ours(row.engine) and row.reason
    ]
