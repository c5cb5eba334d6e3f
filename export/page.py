"""A report as one page of HTML, without anything from outside: what was replaced, what was left and why, and the graph
before and after, node by node, each operand a link to the node that makes it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING

import onnx_ir as ir

if TYPE_CHECKING:
    from trimaran.export.report import OnnxReport

_STYLE = """
body { font: 14px/1.5 system-ui, sans-serif; margin: 2rem; color: #222; background: #fff }
h1 { font-size: 1.3rem } h2 { font-size: 1.05rem; margin-top: 2rem }
table { border-collapse: collapse } td, th { text-align: left; padding: .15rem .8rem .15rem 0; vertical-align: top }
.graphs { display: grid; grid-template-columns: 1fr 1fr; gap: 2rem } .graphs > div { overflow-x: auto }
ol { padding-left: 3.5rem; font: 12px/1.6 ui-monospace, monospace } li:target { background: #fff3c4 }
b { font-weight: 600 } .gone b { color: #b3261e } .ours b { color: #1b6e3c } .missed b { color: #a15c00 }
a { color: inherit; text-decoration: none; border-bottom: 1px dotted #999 } .note { color: #a15c00 }
"""


@dataclass(frozen=True)
class NodeLine:
    """A node as the page shows it."""

    op: str
    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


def node_lines(model: ir.Model) -> list[NodeLine]:
    """The nodes of a model and its subgraphs, in order."""
    return [
        NodeLine(
            node.op_type if node.domain in ("", "ai.onnx") else f"{node.domain}.{node.op_type}",
            str(node.name or ""),
            tuple("" if value is None else str(value.name) for value in node.inputs),
            tuple(str(value.name) for value in node.outputs),
        )
        for node in ir.traversal.RecursiveGraphIterator(model.graph)
    ]


def page(report: OnnxReport) -> str:
    """The whole page."""
    title = escape(report.path)
    counts = "".join(f"<tr><td>{escape(name)}<td>{count}" for name, count in sorted(report.replaced.items()))
    misses = "".join(
        f"<tr><td>{escape(miss.rule)}<td>{escape(miss.node)}<td>{escape(miss.reason)}<td>{escape(miss.value)}"
        for miss in report.near_misses
    )
    reasons = {miss.node: miss.reason for miss in report.near_misses}
    kept = {line.outputs for line in report.after}
    before = _graph("before", report.before, reasons, {line.outputs for line in report.before} - kept)
    after = _graph("after", report.after, reasons, set())
    notes = "".join(f"<p>{escape(note)}" for note in report.notes)
    left = f"<h2>Left alone</h2><table><tr><th>rule<th>node<th>reason<th>value{misses}</table>" if misses else ""
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{title}</title><style>{_STYLE}</style>"
        f"<h1>{title}</h1><p>{escape(report.verified)}{notes}<h2>Replaced</h2>"
        f"<table>{counts or '<tr><td>nothing'}</table>{left}<div class=graphs>{before}{after}</div></html>"
    )


def _graph(side: str, lines: Sequence[NodeLine], reasons: dict[str, str], gone: set[tuple[str, ...]]) -> str:
    maker = {output: index for index, line in enumerate(lines) for output in line.outputs if output}
    items = []
    for index, line in enumerate(lines):
        kind = "gone" if line.outputs in gone else "ours" if line.op.startswith("trimaran.") else ""
        note = reasons.get(line.name or line.outputs[0])
        inputs = ", ".join(
            f"<a href='#{side}{maker[name]}'>{escape(name)}</a>" if name in maker else escape(name) or "-"
            for name in line.inputs
        )
        items.append(
            f"<li id={side}{index} class='{'missed' if note else kind}' title='{escape(line.name, quote=True)}'>"
            f"<b>{escape(line.op)}</b>({inputs}) &rarr; {escape(', '.join(line.outputs))}"
            + (f" <span class=note>{escape(note)}</span>" if note else "")
        )
    return f"<div><h2>{side.capitalize()}: {len(lines)} nodes</h2><ol start=0>{''.join(items)}</ol></div>"
