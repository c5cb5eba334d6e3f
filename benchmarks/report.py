"""A result of `kernels.bench` for people: a table, a JSON file, a figure."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

from rich.box import SIMPLE
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

OURS = "#d1495b"
PEERS = ["#30638e", "#6096ba", "#a3bcd0", "#8d99ae", "#b8b8a8", "#7a9e7e", "#c9ada7"]


def write(found: dict[str, Any], folder: Path) -> None:
    """`folder/<op>.json` and `folder/<op>.png`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{found['op']}.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    figure(found, folder / f"{found['op']}.png")


def heading(found: dict[str, Any]) -> str:
    where, ceiling = found["environment"], f"{found['ceiling']:.3g} {found['unit']}"
    return f"{found['op']}, {found['dtype']}, {where['device']}; ceiling {ceiling}; {where['date'][:10]}"


def table(found: dict[str, Any]) -> RenderableType:
    """A row per case and contender: times in ms, the rate in % of the ceiling ("% top"), the best peer's time over its
    own ("ratio"). Lost cases stay; who was refused is listed below with the reason."""
    shown = Table(box=SIMPLE, title=heading(found), title_justify="left", padding=0)
    shown.add_column("contender, by case", no_wrap=True)
    for name in ("ms", "p20-p80", "wall", found["unit"], "% top", "ratio"):
        shown.add_column(name, justify="right", no_wrap=True)
    refused: dict[tuple[str, str], list[str]] = {}
    for case in found["cases"]:
        shown.add_row(case["name"], style="cyan")
        for contender in case["contenders"]:
            if contender["reason"]:
                refused.setdefault((contender["name"], contender["reason"]), []).append(case["name"])
            style = "bold" if contender["ours"] else ""
            shown.add_row(f"  {contender['name']}", *cells(contender), style=style)
        shown.add_section()
    notes = [f"{name}, not timed: {reason} [{', '.join(cases)}]" for (name, reason), cases in refused.items()]
    return Group(shown, *(Text(note, style="dim") for note in notes), Text(verdict(found), style=color(found)))


def cells(contender: dict[str, Any]) -> list[str]:
    if contender["reason"]:
        return ["", "not timed"]
    ms, ratio = contender["ms"], contender["ratio"]
    return [
        f"{ms['median']:.4g}",
        f"{ms['p20']:.3g}-{ms['p80']:.3g}",
        f"{contender['wall_ms']['median']:.3g}",
        f"{contender['rate']:.3g}" if contender["rate"] >= 0.01 else f"{contender['rate']:.1e}",
        f"{contender['percent_of_ceiling']:.0f}",
        f"{ratio['median']:.2f}" if ratio else "",
    ]


def verdict(found: dict[str, Any]) -> str:
    """How it was measured and whether it counts."""
    if not found["valid"]:
        return "INVALID: " + "; ".join(found["invalid_because"])
    drifts = ", ".join(f"{name} {percent:+.1f} %" for name, percent in found["ceilings"]["drift_percent"].items())
    return f"{found['method']}, {found['rounds']} rounds; drift of the ceilings: {drifts}"


def color(found: dict[str, Any]) -> str:
    return "dim" if found["valid"] else "bold red"


def figure(found: dict[str, Any], path: Path) -> None:
    """Bars per case, a contender each, ours on top and in red; 1200 pixels wide."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(row["name"] for case in found["cases"] for row in case["contenders"]))
    ours = {row["name"] for case in found["cases"] for row in case["contenders"] if row["ours"]}
    peers = iter(PEERS * len(names))
    colors = {name: OURS if name in ours else next(peers) for name in names}
    count = sum(len(timed(case)) + 1 for case in found["cases"])
    drawn = Figure(figsize=(12, 1.6 + 0.21 * count), dpi=100, layout="constrained")
    FigureCanvasAgg(drawn)
    axes = drawn.add_subplot()
    at, ticks, labelled = 0.0, [], set()
    for case in found["cases"]:
        rows = timed(case)
        ticks.append((at + (len(rows) - 1) / 2, case["name"]))
        for row in rows:
            name = row["name"]
            label = "" if name in labelled else name
            labelled.add(name)
            axes.barh(at, row["rate"], height=0.9, color=colors[name], label=label)
            weight = "bold" if row["ours"] else "normal"
            text = f" {row['rate']:.3g}   {row['ms']['median']:.3g} ms"
            axes.text(row["rate"], at, text, va="center", fontsize=8, weight=weight)
            at += 1
        at += 1
    finish(axes, found, ticks)
    drawn.savefig(path, metadata={"Source": digest(found)})


def digest(found: dict[str, Any]) -> str:
    """Of a result: what a picture is marked with, to be told from one of other figures."""
    return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()[:16]


def read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def timed(case: dict[str, Any]) -> list[dict[str, Any]]:
    return [row for row in case["contenders"] if not row["reason"]]


def finish(axes: Any, found: dict[str, Any], ticks: list[tuple[float, str]]) -> None:
    """Axes, title, legend, and the ceiling where it is near enough to be seen."""
    top = max((row["rate"] for case in found["cases"] for row in timed(case)), default=math.nan)
    if top > 0.25 * found["ceiling"]:
        axes.axvline(found["ceiling"], color="#444444", linewidth=1, linestyle="--", label="measured ceiling")
        top = max(top, found["ceiling"])
    if top > 0:
        axes.set_xlim(0, 1.12 * top)
    axes.set_yticks([place for place, _ in ticks], [name for _, name in ticks], fontsize=9)
    axes.invert_yaxis()
    axes.margins(y=0.01)
    axes.set_xlabel(f"{found['unit']} of useful work (more is better)")
    title = heading(found)
    if not found["valid"]:
        title += "\n" + verdict(found)
    axes.set_title(title, fontsize=10, loc="left", color="black" if found["valid"] else "#b00020")
    axes.spines[["top", "right"]].set_visible(False)
    if axes.get_legend_handles_labels()[0]:
        axes.figure.legend(loc="outside lower center", ncols=4, fontsize=9, frameon=False)
