"""`trimaran bench-kernels`: every op of `kernels/` that has cases, against what torch has for the same work."""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress

from trimaran.benchmarks import attention, linear, norms, rotary
from trimaran.benchmarks.cases import Case, Inputs, Suite
from trimaran.benchmarks.machine import COLD_S, MAX_DRIFT, WARM_S, ceilings, drift, environment, unsteady
from trimaran.benchmarks.measure import Timing, compare, copies_for, percentile, watch_for
from trimaran.torch_path.ops import on_decline

VERSION = 1  # of the JSON, described in benchmarks/README.md
ROUNDS, QUICK_ROUNDS = 30, 5
SEED = 0
DTYPES = ("float16", "bfloat16", "float32")
SUITES: dict[str, Callable[[torch.device, torch.dtype, bool], Suite]] = {
    "attention": attention.suite,
    "layer_norm": partial(norms.suite, "layer_norm"),
    "rms_norm": partial(norms.suite, "rms_norm"),
    "linear": linear.suite,
    "gated_linear": linear.gated_suite,
    "rotary_embedding": rotary.suite,
    "layer": linear.layer_suite,  # of several ops
}


def bench(
    ops: Sequence[str], dtype: str, quick: bool, console: Console, done: Callable[[dict[str, Any]], None]
) -> list[dict[str, Any]]:
    """Measure the ops, all that have cases where none is named; `done` gets each one's result as soon as it is there.

    ValueError for an unknown op or dtype, and for the full cases on a machine without a GPU.
    """
    names = list(dict.fromkeys(ops)) or list(SUITES)
    if unknown := [name for name in names if name not in SUITES]:
        raise ValueError(f"no benchmark for {', '.join(unknown)}, expected some of {', '.join(SUITES)}")
    if dtype and dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}, expected {', '.join(DTYPES)}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not quick:
        raise ValueError("torch sees no CUDA device: a CPU runs only the tiny cases of --quick")
    kind = getattr(torch, dtype or ("float16" if device.type == "cuda" else "float32"))
    found: list[dict[str, Any]] = []
    declines = on_decline.set(refuse)
    try:
        with Progress(console=console, transient=True) as progress, torch.no_grad():
            for name in names:
                idle = COLD_S if not found else WARM_S
                found.append(measure(SUITES[name](device, kind, quick), device, kind, quick, progress, idle))
                done(found[-1])
    finally:
        on_decline.reset(declines)
    return found


def refuse(op: str, reason: str) -> None:
    """Where a plan declines, the reference would be timed in the kernel's name."""
    raise RuntimeError(f"{op}: the plan declines: {reason}")


def measure(
    suite: Suite, device: torch.device, dtype: torch.dtype, quick: bool, progress: Progress, warm_s: float
) -> dict[str, Any]:
    """The result of one op, as it is written to JSON."""
    task = progress.add_task(f"{suite.op}: ceilings", total=len(suite.cases))
    before = ceilings(device, dtype, warm_s)
    rounds = QUICK_ROUNDS if quick else ROUNDS
    measured = []
    for case in suite.cases:

        def step(name: str, case: Case = case) -> None:
            progress.update(task, description=f"{suite.op}: {case.name}: {name}")

        measured.append((case, *run_case(case, device, dtype, rounds, step)))
        progress.advance(task)
    after = ceilings(device, dtype)
    progress.remove_task(task)
    return result(suite, before, after, measured) | {
        "dtype": str(dtype).removeprefix("torch."),
        "quick": quick,
        "rounds": rounds,
        "seed": SEED,
        "method": watch_for(device).method,
        "environment": environment(device),
    }


def run_case(
    case: Case, device: torch.device, dtype: torch.dtype, rounds: int, step: Callable[[str], None]
) -> tuple[int, list[Timing]]:
    """(copies of the inputs, timings)."""
    inputs: Callable[[int], Inputs] = cache(case.inputs)
    first = inputs(0)
    copies = copies_for(first.values(), device)
    torch.compiler.reset()  # at its eighth shape a compiled function would quietly run eager
    step("exact result")
    timings = compare(
        case.contenders(inputs),
        exact=case.exact(first),
        dtype=dtype,
        watch=watch_for(device),
        rounds=rounds,
        copies=copies,
        seed=SEED,
        step=step,
    )
    gc.collect()  # graphs hold memory pools
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return copies, timings


def result(
    suite: Suite, before: dict[str, float], after: dict[str, float], measured: list[tuple[Case, int, list[Timing]]]
) -> dict[str, Any]:
    """What was measured, with rates, ratios and whether it counts."""
    drifts = drift(before, after)
    ceiling = statistics.mean([before[suite.ceiling], after[suite.ceiling]])
    reasons = unsteady(drifts)
    return {
        "version": VERSION,
        "op": suite.op,
        "valid": not reasons,
        "invalid_because": reasons,
        "unit": suite.unit,
        "ceiling": ceiling,
        "ceilings": {"before": before, "after": after, "drift_percent": drifts, "allowed_percent": MAX_DRIFT},
        "cases": [
            {
                "name": case.name,
                "shape": case.shape,
                "work": case.work,
                "copies": copies,
                "rotated": copies > 1,
                "contenders": rows(case, timings, ceiling),
            }
            for case, copies, timings in measured
        ],
    }


def rows(case: Case, timings: list[Timing], ceiling: float) -> list[dict[str, Any]]:
    peers = [timing for timing in timings if timing.samples and not timing.ours]
    best = min(peers, key=lambda timing: timing.median, default=None)
    return [row(timing, best, case.work, ceiling) for timing in timings]


def row(timing: Timing, best: Timing | None, work: float, ceiling: float) -> dict[str, Any]:
    """One contender; what was not measured is None. ratio: the best peer's time over this one's, round by round."""
    found: dict[str, Any] = {"name": timing.name, "ours": timing.ours, "reason": timing.reason, "error": timing.error}
    empty = dict.fromkeys(("calls", "ms", "wall_ms", "rate", "percent_of_ceiling", "ratio", "samples_ms"))
    if not timing.samples:
        return found | empty
    rate = work / timing.median / 1e9
    ratios = [theirs / mine for theirs, mine in zip(best.samples, timing.samples, strict=True)] if best else []
    return found | {
        "calls": timing.calls,
        "ms": spread(timing.samples),
        "wall_ms": spread(timing.wall),
        "rate": rate,
        "percent_of_ceiling": 100 * rate / ceiling,
        "ratio": spread(ratios) if ratios else None,
        "samples_ms": timing.samples,
    }


def spread(samples: Sequence[float]) -> dict[str, float]:
    names = {"median": 50, "p20": 20, "p80": 80, "p95": 95}
    return {name: percentile(samples, percent) for name, percent in names.items()}


def failures(found: Sequence[dict[str, Any]]) -> list[str]:
    """Our own contenders that could not be timed."""
    return [
        f"{op['op']}, {case['name']}: {contender['reason']}"
        for op in found
        for case in op["cases"]
        for contender in case["contenders"]
        if contender["ours"] and contender["reason"]
    ]
