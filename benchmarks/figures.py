"""`make figures`: the tables of the README and every picture of a result, from the JSON that is committed.

A table stands in the README between `<!-- figures: NAME -->` and `<!-- end -->`. A picture carries the digest of the
JSON that it was drawn from, so that a test sees when the two part.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from trimaran.benchmarks import nodes, report
from trimaran.benchmarks.bench import write_reports
from trimaran.benchmarks.report import read
from trimaran.benchmarks.result import Result, load
from trimaran.benchmarks.summary import COLUMNS, cells, headlines

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
README = ROOT / "README.md"
BLOCK = re.compile(r"(<!-- figures: (\w+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)
OPS = ("attention", "linear", "gated_linear", "layer_norm", "rms_norm", "rotary_embedding")


def markdown(columns: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Words to the left, figures to the right."""
    names, body = list(columns), [list(row) for row in rows]
    words = [not any(row[place][:1].isdigit() for row in body) for place in range(len(names))]
    rule = ["---" if word or not place else "---:" for place, word in enumerate(words)]
    return "".join(f"| {' | '.join(row)} |\n" for row in (names, rule, *body))


def where(environment: dict[str, str]) -> str:
    names = {"torch": "torch", "onnxruntime-gpu": "onnxruntime", "onnxruntime": "onnxruntime"}
    versions = dict.fromkeys(f"{said} {environment[name]}" for name, said in names.items() if environment.get(name))
    return f"{environment['device']}, {', '.join(versions)}, {environment['date'][:10]}, `{environment['command']}`"


def models(results: Path = RESULTS) -> str:
    """Each model's headlines: the best peer leads, transformers under autocast is second."""
    found = [load(path) for path in sorted((results / "models").glob("*.json"))]
    if not found:
        return "No run of whole models is committed yet: `trimaran bench bert-base` makes one.\n"
    return "\n".join(model(result) for result in found)


def model(result: Result) -> str:
    kept = "" if result.valid else f" This run does not count: {'; '.join(result.invalid_because())}."
    place = f"[page](benchmarks/results/models/{result.model}.html)"
    return (
        f"{result.model}, {result.dtype} ({result.source}), {place}; {where(result.environment)}. Wall ms.{kept}\n\n"
        + markdown(COLUMNS, map(cells, headlines(result)))
    )


def kernels(results: Path = RESULTS) -> str:
    """How each op stands against the best of its peers, over its cases."""
    rows, places = [], set()
    for op in OPS:
        if not (results / f"{op}.json").exists():
            continue
        found = read(results / f"{op}.json")
        ours = [row for case in found["cases"] for row in case["contenders"] if row["ours"] and row["ratio"]]
        ratios = sorted(row["ratio"]["median"] for row in ours)
        won = sum(ratio >= 1 for ratio in ratios)
        top = max(row["percent_of_ceiling"] for row in ours)
        span = f"{ratios[0]:.2f} to {ratios[-1]:.2f}"
        rows.append([f"`{op}`", f"{won} of {len(ratios)}", span, f"{ratios[len(ratios) // 2]:.2f}", f"{top:.0f}"])
        places.add(f"{found['environment']['device']}, {found['dtype']}, {found['environment']['date'][:10]}")
    columns = ["op", "as fast as the best peer or faster", "times as fast", "median", "% of the ceiling, at most"]
    return f"{'; '.join(sorted(places))}, `trimaran bench-kernels`.\n\n" + markdown(columns, rows)


def layer(results: Path = RESULTS) -> str:
    """One layer of BERT-base."""
    found = read(results / "layer.json")
    rows = []
    for case in found["cases"]:
        ours, *peers = case["contenders"]
        best = min((peer for peer in peers if peer["ms"]), key=lambda peer: peer["ms"]["median"])
        us = [f"{1e3 * row['ms']['median']:.3g}" for row in (ours, best)]
        rows.append([case["name"], *us, best["name"], f"{ours['ratio']['median']:.2f}"])
    place = f"{found['environment']['device']}, {found['environment']['date'][:10]}, `trimaran bench-kernels layer`"
    return f"A BERT-base layer, us of device time; {place}.\n\n" + markdown(
        ["batch x seq", "trimaran", "best of torch", "", "times as fast"], rows
    )


def node(results: Path = RESULTS) -> str:
    """What a node costs in ONNX Runtime, and a replay."""
    found = read(results / "nodes.json")
    rows = [
        [f"`{case['op']}`, {case['mode']}", *(f"{c['us_per_node']['median']:.2f}" for c in case["contenders"]),
         f"{case['ratio']['median']:.2f}"]
        for case in found["cases"]
    ]  # fmt: skip
    replay = {row["name"]: row["host_us"]["median"] for row in found["replay"]["contenders"] if row["host_us"]}
    said = "; ".join(f"{name} {us:.0f}" for name, us in replay.items())
    place = f"{found['environment']['device']}, {found['environment']['date'][:10]}, `trimaran bench-nodes`"
    head = f"A node of ONNX Runtime, us in a chain of {found['nodes']}; {place}.\n\n"
    return (
        head
        + markdown(["", "trimaran", "onnxruntime's own", "times as fast"], rows)
        + f"\nHost us of a replay: {said}.\n"
    )


TABLES: dict[str, Callable[[], str]] = {"models": models, "kernels": kernels, "layer": layer, "nodes": node}


def filled(text: str) -> str:
    """The text with every table made anew. KeyError for a table that nobody makes."""
    return BLOCK.sub(lambda match: f"{match[1]}{TABLES[match[2]]()}{match[4]}", text)


def draw(results: Path = RESULTS) -> None:
    for path in results.glob("*.json"):
        found: dict[str, Any] = read(path)
        if "op" in found:
            report.figure(found, path.with_suffix(".png"))
        elif "nodes" in found:
            nodes.figure(found, path.with_suffix(".png"))
    for path in (results / "models").glob("*.json"):
        write_reports(path.with_suffix(""))


def main() -> None:
    README.write_text(filled(README.read_text(encoding="utf-8")), encoding="utf-8")
    draw()


if __name__ == "__main__":
    main()
