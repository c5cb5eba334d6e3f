"""`trimaran bench compare`: what changed between two results of a model beyond noise.

For each engine and case that both have: the ratio of the medians, new over old, with an interval from resampling the
rounds of each. The intervals are as wide as makes all of them together right 19 times in 20, and what a machine does by
itself is added: by as much as the ceilings drifted in either run, or were apart, nothing is called a change.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from rich.box import SIMPLE
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from trimaran.benchmarks.measure import percentile
from trimaran.benchmarks.result import Result, load
from trimaran.benchmarks.sidebyside import Row

RESAMPLED = 2000
WRONG = 0.05  # how likely any of the intervals may be off
LEAST_PERCENT = 1.0  # smaller changes say nothing: two runs of the same code differ by as much
SAME = ("device", "driver", "torch", "triton", "transformers", "onnxruntime")


@dataclass
class Change:
    """ratio: new over old, with its interval. verdict: slower, faster, same, or why nothing can be said."""

    case: str
    engine: str
    ours: bool
    verdict: str
    old_ms: float | None = None
    new_ms: float | None = None
    ratio: float | None = None
    low: float | None = None
    high: float | None = None


@dataclass
class Changes:
    """floor_percent: below it nothing is called a change. warnings: what else differs between the runs."""

    model: str
    floor_percent: float
    warnings: list[str] = field(default_factory=list)
    rows: list[Change] = field(default_factory=list)

    def slower_ours(self) -> list[Change]:
        return [row for row in self.rows if row.ours and row.verdict == "slower"]


def compare(old_path: Path, new_path: Path) -> Changes:
    """ValueError for a file that is no result, or results of different models or dtypes."""
    old, new = load(old_path), load(new_path)
    if (old.model, old.dtype) != (new.model, new.dtype):
        raise ValueError(f"old is {old.model} in {old.dtype}, new is {new.model} in {new.dtype}: expected the same")
    found = Changes(old.model, floor(old, new), warnings(old, new))
    pairs = [(case.name, row) for case in old.cases for row in case.timed()]
    after = {(case.name, row.engine): row for case in new.cases for row in case.timed()}
    both = sum((case, row.engine) in after for case, row in pairs)
    for case, row in pairs:
        later = after.pop((case, row.engine), None)
        found.rows.append(change(case, row, later, old.is_ours(row.engine), found.floor_percent, both))
    for (case, engine), row in after.items():
        found.rows.append(Change(case, engine, new.is_ours(engine), "only in new", new_ms=percentile(row.wall_ms, 50)))
    return found


def change(case: str, old: Row, new: Row | None, ours: bool, floor_percent: float, count: int) -> Change:
    before = percentile(old.wall_ms, 50)
    if new is None:
        return Change(case, old.engine, ours, "only in old", old_ms=before)
    low, high = interval(old.wall_ms, new.wall_ms, count)
    near, far = 1 - floor_percent / 100, 1 + floor_percent / 100
    verdict = "slower" if low > far else "faster" if high < near else "same"
    after = percentile(new.wall_ms, 50)
    return Change(case, old.engine, ours, verdict, before, after, after / before, low, high)


def interval(old: list[float], new: list[float], count: int) -> tuple[float, float]:
    """Of the ratio of medians; as wide as `count` of them need it."""
    random = np.random.default_rng(0)
    medians = [
        np.median(random.choice(np.asarray(samples), (RESAMPLED, len(samples))), axis=1) for samples in (old, new)
    ]
    tail = 100 * max(WRONG / max(count, 1) / 2, 1 / RESAMPLED)
    low, high = np.percentile(medians[1] / medians[0], [tail, 100 - tail])
    return float(low), float(high)


def floor(old: Result, new: Result) -> float:
    moved = [abs(percent) for result in (old, new) for percent in result.drift().values() if percent == percent]
    return max([LEAST_PERCENT, *moved, *apart(old, new).values()])


def apart(old: Result, new: Result) -> dict[str, float]:
    """By how much the ceilings of the two runs differ, in percent."""
    if not old.ceilings or not new.ceilings:
        return {}
    return {name: abs(100 * (new.ceilings[0][name] / value - 1)) for name, value in old.ceilings[0].items()}


def warnings(old: Result, new: Result) -> list[str]:
    found = [f"{which} does not count: {'; '.join(result.invalid_because())}"
             for which, result in (("old", old), ("new", new)) if not result.valid]  # fmt: skip
    for name in SAME:
        if (was := old.environment.get(name, "")) != (now := new.environment.get(name, "")):
            found.append(f"{name} was {was or 'absent'}, is {now or 'absent'}")
    return found


def table(found: Changes) -> RenderableType:
    shown = Table(box=SIMPLE, title=f"{found.model}: wall ms, new over old", title_justify="left", padding=(0, 1, 0, 0))
    for name in ("batch x seq", "engine"):
        shown.add_column(name)
    for name in ("old", "new", "ratio", "interval"):
        shown.add_column(name, justify="right", no_wrap=True)
    shown.add_column("")
    colors = {"slower": "red", "faster": "green"}
    for row in sorted(found.rows, key=lambda row: (row.verdict == "same", not row.ours)):
        shown.add_row(row.case, row.engine, *cells(row), row.verdict, style=colors.get(row.verdict, "dim"))
    changed = sum(row.verdict in colors for row in found.rows)
    said = f"{changed} of {len(found.rows)} rows changed by more than {found.floor_percent:.1f} % and their intervals"
    return Group(shown, *(Text(text, style="yellow") for text in found.warnings), Text(said, style="dim"))


def cells(row: Change) -> list[str]:
    def text(value: float | None, form: str) -> str:
        return "" if value is None else f"{value:{form}}"

    between = "" if row.low is None else f"{row.low:.3f}-{row.high:.3f}"
    return [text(row.old_ms, ".4g"), text(row.new_ms, ".4g"), text(row.ratio, ".3f"), between]
