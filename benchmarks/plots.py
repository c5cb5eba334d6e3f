"""A result as pictures: every engine's time over the best peer's, and the times themselves."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from trimaran.benchmarks.engines.catalog import groups
from trimaran.benchmarks.report import OURS, digest
from trimaran.benchmarks.result import CaseResult, Result
from trimaran.benchmarks.summary import wall

COLORS = {"transformers": "#8d99ae", "torch.compile": "#e0a458", "onnxruntime": "#30638e", "TensorRT": "#7a9e7e",
          "first table": "#c9ada7", "trimaran": OURS}  # fmt: skip
OTHER = "#b8b8a8"
SLOWEST = 16.0  # times the best peer's; slower ones stand at the edge
ROW = 0.34  # inches a case
STYLE: Any = {"svg.hashsalt": "trimaran", "svg.fonttype": "none", "font.family": "sans-serif"}


def write(result: Result, stem: Path) -> None:
    """`stem.png` and `stem.svg`."""
    stem.with_suffix(".svg").write_text(svg(result), encoding="utf-8")
    with matplotlib.rc_context(STYLE):
        figure(result).savefig(stem.with_suffix(".png"), dpi=120, metadata={"Source": digest(result.as_dict())})


def svg(result: Result) -> str:
    """The figure as text; the same for the same result, so without a date."""
    written = io.StringIO()
    with matplotlib.rc_context(STYLE):
        figure(result).savefig(written, format="svg", metadata={"Date": None, "Source": digest(result.as_dict())})
    return written.getvalue()


def figure(result: Result) -> Any:
    """A line for each case, a dot for each engine, at its wall time over the best peer's. Ours are larger and red, a
    line marks the bound."""
    drawn = Figure(figsize=(10.5, 1.9 + ROW * max(len(result.cases), 1)), layout="constrained")
    FigureCanvasAgg(drawn)
    axes = drawn.add_subplot()
    for place, case in enumerate(result.cases):
        dots(axes, place, result, case)
    finish(axes, result)
    return drawn


def dots(axes: Any, place: int, result: Result, case: CaseResult) -> None:
    best = wall(result.best_peer(case))
    if best is None:
        return
    group = {state.name: state.group for state in result.engines}
    axes.axhline(place, color="#eeeeee", linewidth=1, zorder=0)
    for row in sorted(case.timed(), key=lambda row: result.is_ours(row.engine)):
        ours, time = result.is_ours(row.engine), wall(row) or math.nan
        axes.scatter(
            min(time / best, SLOWEST), place, s=64 if ours else 34, color=COLORS.get(group.get(row.engine, ""), OTHER),
            alpha=0.95 if ours else 0.75, linewidths=0.5, edgecolors="white", zorder=3 if ours else 2,
        )  # fmt: skip
    if case.limit_ms:
        axes.scatter(case.limit_ms / best, place, marker="|", s=120, color="#222222", linewidths=1.4, zorder=1)
    mine = wall(result.best_of_ours(case))
    shown = f"{best:.3g} ms" + (f"  →  {mine:.3g}" if mine else "")
    axes.text(1.012, place, shown, transform=axes.get_yaxis_transform(), va="center", fontsize=8, color="#444444")


def finish(axes: Any, result: Result) -> None:
    axes.set_xscale("log")
    ticks = [0.1, 0.2, 0.5, 1, 2, 5, 10]
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_xlim(0.08, SLOWEST * 1.1)
    axes.axvline(1, color="#444444", linewidth=1, linestyle="--", zorder=1)
    axes.set_yticks(range(len(result.cases)), [case.name for case in result.cases], fontsize=9)
    axes.set_ylim(len(result.cases) - 0.5, -0.5)
    axes.set_xlabel(f"wall time over the best peer's (less is better; {SLOWEST:g} and more at the edge)", fontsize=9)
    axes.text(1.012, 1.0, "best peer  →  ours", transform=axes.transAxes, va="bottom", fontsize=8, color="#444444")
    where = result.environment
    title = f"{result.model}, {result.dtype}, {where['device']}, {where['date'][:10]}"
    axes.set_title(title if result.valid else f"{title}: this run does not count", fontsize=10,
                   loc="left", color="black" if result.valid else "#b00020")  # fmt: skip
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    seen = {state.group for state in result.engines if any(case.row(state.name) for case in result.cases)}
    handles = [
        Line2D([], [], marker="o", linestyle="", color=COLORS.get(group, OTHER), label=group)
        for group in groups()
        if group in seen
    ]
    handles.append(Line2D([], [], marker="|", linestyle="", color="#222222", markersize=9, label="bound"))
    axes.figure.legend(handles=handles, loc="outside lower left", ncols=len(handles), fontsize=8, frameon=False)
