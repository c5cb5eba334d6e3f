"""A result on the terminal: live while it is made, whole at the end."""

from __future__ import annotations

from types import TracebackType
from typing import Any

from rich.box import SIMPLE
from rich.console import Console, Group, RenderableType
from rich.live import Live as RichLive
from rich.table import Table
from rich.text import Text

from trimaran.benchmarks.result import CaseResult, Result, median, ms, percent, ratio
from trimaran.benchmarks.sidebyside import Row
from trimaran.benchmarks.summary import COLUMNS, headlines, lost, number
from trimaran.benchmarks.summary import cells as headline_cells

FEW = 6  # cases that are shown row by row; the page has them all


class Live:
    """The headlines so far, and under them what is being done."""

    def __init__(self, console: Console, cases: int) -> None:
        self.cases, self.done = cases, 0
        self.body: RenderableType = Text("")
        self.status = ""
        self.live = RichLive(get_renderable=self.render, console=console, refresh_per_second=4, transient=True)

    def __enter__(self) -> Live:
        self.live.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.live.__exit__(kind, error, at)

    def at(self, engine: str, doing: str) -> None:
        self.status = f"{doing}: {engine}" if engine else doing

    def show(self, result: Result) -> None:
        self.done = len(result.cases)
        self.body = headline_table(result) if result.cases else Text("")

    def render(self) -> RenderableType:
        return Group(
            self.body, Text(f"case {min(self.done + 1, self.cases)} of {self.cases}; {self.status}", style="dim")
        )


def heading(result: Result) -> str:
    where = result.environment
    return f"{result.model}, {result.dtype}, {where['device']}, {where['date'][:10]}; wall ms"


def headline_table(result: Result) -> Table:
    """The best peer leads, transformers under autocast comes second."""
    shown = Table(box=SIMPLE, title=heading(result), title_justify="left", padding=(0, 1, 0, 0))
    for place, name in enumerate(COLUMNS):
        shown.add_column(name, justify="left" if place < 2 else "right", no_wrap=place != 1)
    for line in headlines(result):
        shown.add_row(*headline_cells(line), style="red" if line.lost else "")
    return shown


def case_table(result: Result, case: CaseResult) -> Table:
    shown = Table(box=SIMPLE, title=case.name, title_justify="left", title_style="cyan", padding=(0, 1, 0, 0))
    shown.add_column("engine")
    for name in ("wall", "p20-p80", "device", "host", "peer/this", "% limit", "launches", "MiB"):
        shown.add_column(name, justify="right", no_wrap=True)
    peer = result.best_peer(case)
    for row in sorted(case.timed(), key=lambda row: (ms(row.wall_ms) or {})["median"]):
        shown.add_row(*cells(result, case, row, peer), style="bold" if result.is_ours(row.engine) else "")
    return shown


def cells(result: Result, case: CaseResult, row: Row, peer: Row | None) -> list[str]:
    wall, over = ms(row.wall_ms), ratio(peer, row)
    assert wall is not None
    return [
        row.engine + (f" ({row.note})" if row.note else ""),
        number(wall["median"], ".4g"),
        f"{wall['p20']:.3g}-{wall['p80']:.3g}",
        number(median(row.device_ms)),
        number(median(row.host_ms)),
        number(over["median"] if over else None, ".2f"),
        number(percent(case.limit_ms, row), ".0f"),
        number(row.launches, "d") if row.launches is not None else "",
        number(row.prepare_mib, ".0f"),
    ]


def refused(result: Result) -> list[str]:
    """Who was not measured, and why: engines as a whole first, then in which cases."""
    found = [f"{state.name}: {state.reason}" for state in result.engines if state.reason]
    reasons: dict[tuple[str, str], list[str]] = {}
    for case in result.cases:
        for row in case.rows:
            if row.reason:
                reasons.setdefault((row.engine, row.reason), []).append(case.name)
    return found + [f"{engine}: {reason} [{'; '.join(cases)}]" for (engine, reason), cases in reasons.items()]


def verdict(result: Result) -> str:
    if not result.valid:
        return "INVALID: " + "; ".join(result.invalid_because())
    moved = ", ".join(f"{name} {percent:+.1f} %" for name, percent in result.drift().items())
    return f"{result.method}; {result.rounds} rounds at most; drift of the ceilings: {moved}"


def report(result: Result) -> RenderableType:
    """All of it."""
    few = len(result.cases) <= FEW
    parts: list[Any] = [case_table(result, case) for case in result.cases] if few else []
    parts += [Text(f"not measured: {text}", style="dim") for text in refused(result)]
    parts.append(headline_table(result))
    if losses := len(lost(result)):
        rows = sum(result.is_ours(row.engine) for case in result.cases for row in case.timed())
        parts.append(
            Text(f"{losses} of our {rows} rows are slower than the best peer: the page lists them", style="red")
        )
    parts.append(Text(verdict(result), style="dim" if result.valid else "bold red"))
    return Group(*parts)
