"""A result as one HTML page that needs nothing else: headlines, picture, where we lose, every row, how it was made."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from string import Template

from trimaran.benchmarks import plots, streams
from trimaran.benchmarks.engines.transformers_eager import AUTOCAST, REFERENCE
from trimaran.benchmarks.result import CaseResult, Result, median, ms, percent, ratio
from trimaran.benchmarks.summary import COLUMNS, cells, headlines, lost, memory, number, sentence
from trimaran.benchmarks.tables import refused

STYLE = """
:root { --ink: #22262b; --soft: #6b7480; --line: #e6e8eb; --ours: #b8323f; }
* { box-sizing: border-box; }
body { font: 15px/1.55 system-ui, -apple-system, "Segoe UI", sans-serif; color: var(--ink); background: #fff;
       max-width: 1120px; margin: 2.5rem auto 5rem; padding: 0 1.5rem; }
h1 { font-size: 1.7rem; font-weight: 600; margin: 0; }
h2 { font-size: 1.15rem; font-weight: 600; margin: 2.6rem 0 .6rem; }
p, li { max-width: 78ch; }
.soft { color: var(--soft); }
.bad { color: #b00020; font-weight: 600; }
table { border-collapse: collapse; width: 100%; font-size: 13px; font-variant-numeric: tabular-nums;
        margin: .4rem 0 1rem; }
th, td { text-align: right; border-bottom: 1px solid var(--line); padding: .3rem .55rem; vertical-align: top; }
th { font-weight: 500; color: var(--soft); vertical-align: bottom; }
.text { text-align: left; }
td:first-child { white-space: nowrap; }
tr.ours td { color: var(--ours); font-weight: 600; }
tr.lost td { background: #fdf3f3; }
details { border-bottom: 1px solid var(--line); padding: .45rem 0; }
summary { cursor: pointer; }
svg { width: 100%; height: auto; }
dl { display: grid; grid-template-columns: 12rem 1fr; gap: .2rem 1rem; }
dt { color: var(--soft); }
dd { margin: 0; }
"""
PAGE = Template("""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title><style>$style</style></head><body>
<h1>$title</h1>
<p class="soft">$under</p>
$body
</body></html>
""")


def page(result: Result) -> str:
    where = result.environment
    parts = [
        verdict(result),
        section("Headlines", f"<p>{escape(sentence(result))}</p>", headline_table(result)),
        section("Time over the best peer's", drawn(result)),
        section("Where we lose", losses(result)),
        section("Every row", "".join(case_details(result, case) for case in result.cases)),
        section("Cold start", cold(result)) if result.cold else "",
        section("Open loop", open_loop(result)) if result.streams else "",
        section("Memory of the device", memories(result)) if any(row[1] or row[2] for row in memory(result)) else "",
        section("Not measured", items(refused(result) + result.left_out)),
        section("Kernels of a call, ours in PyTorch", kernels(result)) if any(c.kernels for c in result.cases) else "",
        section("How it was measured", method(result)),
        section("Environment", definitions(where)),
    ]
    under = (
        f"{result.source}; {result.parameters:,} parameters; {result.dtype}; {where['device']}; {where['date'][:10]}"
    )
    title = escape(f"{result.model}, side by side")
    return PAGE.substitute(title=title, style=STYLE, under=escape(under), body="\n".join(parts))


def section(title: str, *parts: str) -> str:
    return "\n".join([f"<h2>{escape(title)}</h2>", *parts])


def table(columns: Sequence[str], rows: Iterable[tuple[str, Sequence[str]]], text: tuple[int, ...] = (0,)) -> str:
    """rows: (class, cells). text: the columns that are words."""

    def cell(tag: str, place: int, value: str) -> str:
        return f'<{tag} class="text">{escape(value)}</{tag}>' if place in text else f"<{tag}>{escape(value)}</{tag}>"

    head = "".join(cell("th", place, name) for place, name in enumerate(columns))
    body = "".join(
        f'<tr class="{kind}">' + "".join(cell("td", place, value) for place, value in enumerate(cells)) + "</tr>\n"
        for kind, cells in rows
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>\n{body}</tbody></table>"


def items(lines: Iterable[str]) -> str:
    shown = "".join(f"<li>{escape(line)}</li>" for line in lines)
    return f"<ul>{shown}</ul>" if shown else "<p>Nothing.</p>"


def definitions(found: dict[str, str]) -> str:
    return "<dl>" + "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in found.items() if v) + "</dl>"


def verdict(result: Result) -> str:
    if result.valid:
        return ""
    reasons = escape("; ".join(result.invalid_because()))
    return f'<p class="bad">This run does not count: {reasons}.</p>'


def headline_table(result: Result) -> str:
    rows = (("lost" if line.lost else "", cells(line)) for line in headlines(result))
    return table(COLUMNS, rows, (0, 1))


def drawn(result: Result) -> str:
    text = plots.svg(result)
    return text[text.index("<svg") :]


def losses(result: Result) -> str:
    rows = [
        ("", [case, mine, number(a), peer, number(b), number(a / b)]) for case, mine, a, peer, b in lost(result)
    ]  # fmt: skip
    if not rows:
        return "<p>Nowhere: each of ours is faster than the best peer in every case that was timed.</p>"
    return table(["batch x seq", "ours", "ms", "best peer", "ms", "times slower"], rows, (0, 1, 3))


def case_details(result: Result, case: CaseResult) -> str:
    peer = result.best_peer(case)
    rows = []
    for row in sorted(case.timed(), key=lambda row: (ms(row.wall_ms) or {})["median"]):
        wall, over = ms(row.wall_ms), ratio(peer, row)
        assert wall is not None
        name = row.engine + (f" ({row.note})" if row.note else "")
        cells = [name, number(wall["median"], ".4g"), f"{wall['p20']:.3g}-{wall['p80']:.3g}", number(wall["p95"]),
                 number(median(row.device_ms), ".4g"), number(median(row.host_ms), ".4g"),
                 number(over["median"] if over else None, ".2f"), number(percent(case.limit_ms, row), ".0f"),
                 number(percent(case.gemms_ms, row), ".0f"), "" if row.launches is None else str(row.launches),
                 number(row.prepare_s, ".2g"), number(row.error, ".1e")]  # fmt: skip
        rows.append(("ours" if result.is_ours(row.engine) else "", cells))
    columns = ["engine", "wall", "p20-p80", "p95", "device", "host", "peer / this", "% bound", "% GEMMs", "launches",
               "first call, s", "error"]  # fmt: skip
    facts = [f"{case.tokens:.0f} real tokens"]
    facts += (
        [f"bound {case.limit_ms:.3g} ms, vendor GEMMs {case.gemms_ms:.3g} ms"]
        if case.limit_ms and case.gemms_ms
        else []
    )
    facts += [f"{case.gpu['sm_mhz']:.0f} MHz, {case.gpu['power_w']:.0f} W"] if case.gpu else []
    return folded(case.name, "; ".join(facts), table(columns, rows))


def folded(title: str, soft: str, inside: str) -> str:
    shown = f'{escape(title)} <span class="soft">{escape(soft)}</span>'
    return f"<details><summary>{shown}</summary>{inside}</details>"


def cold(result: Result) -> str:
    rows = [
        ("ours" if result.is_ours(c.engine) else "",
         [c.engine, c.cache, c.reason or number((c.build_s or 0) + (c.first_s or 0), ".3g"), number(c.build_s),
          number(c.first_s), number(c.import_s), number(c.model_s)])
        for c in result.cold
    ]  # fmt: skip
    said = (
        f"A process of its own, {result.cold[0].case}. First output: the engine built from a model that is there, "
        "files exported, and its first call. Imports and making the model are beside it."
    )
    columns = ["engine", "caches on disk", "first output, s", "building", "first call", "imports", "making the model"]
    return f"<p>{escape(said)}</p>" + table(columns, rows, (0, 1))


def open_loop(result: Result) -> str:
    rows = [
        ("ours" if result.is_ours(s.engine) else "",
         [s.engine, f"{s.load:.0f}", number(s.p50_ms), number(s.p99_ms), number(s.tokens_per_s, ",.0f"),
          s.reason or ("does not keep up" if s.behind else "")])
        for s in sorted(result.streams, key=lambda s: (s.load, s.p99_ms or 1e9))
    ]  # fmt: skip
    columns = ["engine", "requests a second", "p50, ms", "p99, ms", "tokens a second", ""]
    return f"<p>{escape(streams.METHOD)}.</p>" + table(columns, rows)


def memories(result: Result) -> str:
    rows = [
        ("ours" if result.is_ours(name) else "", [name, f"{built:.0f}", f"{shapes:.0f}", str(count)])
        for name, built, shapes, count in memory(result)
    ]
    return "<p>MiB beyond the model that is there already.</p>" + table(
        ["engine", "built", "all shapes", "how many"], rows
    )


def kernels(result: Result) -> str:
    parts = []
    for case in result.cases:
        for engine, found in case.kernels.items():
            if result.is_ours(engine):
                total = sum(us for _, us in found)
                rows = [("", [name, f"{us:.1f}"]) for name, us in found]
                soft = f"{len(found)} launches, {total:.0f} us"
                parts.append(folded(f"{case.name}, {engine}", soft, table(["kernel", "us"], rows)))
    return "".join(parts)


def method(result: Result) -> str:
    return items([
        *(f"{kind}: {said}" for kind, said in result.lengths.items()),
        f"Before it is timed, each engine's output is held against fp64 on two sets of inputs; what {REFERENCE} is off "
        "by, times 1.5, or half a unit in the last place, is allowed. Padding rows do not count.",
        result.method,
        "device: between two events, the GPU kept busy until the host has enqueued the call; an engine that waits for "
        "the GPU inside a call has its host time in it. host: from pinned host memory and back to it.",
        f"Interleaved: in each of at most {result.rounds} rounds everybody is timed once, in shuffled order "
        f"(seed {result.seed}).",
        "bound: the larger of the weights over the bandwidth of a copy, and the FLOP of the real tokens over the rate "
        "of an 8192^3 product, both of this run. vendor GEMMs: torch's own products at the padded shapes alone.",
        f"The second column of figures, {AUTOCAST}, is the baseline of Kernl's table.",
        "Drift of the ceilings over the run: " + ", ".join(f"{k} {v:+.1f} %" for k, v in result.drift().items()),
    ])  # fmt: skip
