"""What became of an ONNX file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import onnx_ir as ir

from trimaran.export.page import NodeLine, page
from trimaran.torch_path.report import NearMiss


class Fault(str):
    """A reason, as a str, and the value that is at fault."""

    value = ""

    @classmethod
    def of(cls, reason: str, value: ir.Value | None) -> Fault:
        fault = cls(reason)
        fault.value = "" if value is None else str(value.name)
        return fault


@dataclass(frozen=True)
class FileMiss(NearMiss):
    """A near miss in a file. value: the name of the value at fault, of the node's first input where no one is."""

    value: str = ""

    @classmethod
    def of(cls, rule: str, node: ir.Node, reason: str) -> FileMiss:
        first = next((str(value.name) for value in node.inputs if value is not None), "")
        return cls(rule, str(node.name or node.outputs[0].name), str(reason), "", getattr(reason, "value", "") or first)


@dataclass
class OnnxReport:
    """Of one file written by `export_onnx` or `rewrite_onnx`.

    replaced: trimaran nodes by op. near_misses: what looked like a fusion and was left, with the reason. verified: what
    the file's outputs were compared with, or why they were not. notes: what else is worth knowing. before, after: the
    nodes of a rewritten file, for `page`.
    """

    path: str
    replaced: Counter[str] = field(default_factory=Counter)
    near_misses: Sequence[Any] = ()
    verified: str = "not verified: verify=False"
    notes: list[str] = field(default_factory=list)
    before: Sequence[NodeLine] = ()
    after: Sequence[NodeLine] = ()

    def __str__(self) -> str:
        counts = ", ".join(f"{count} {name}" for name, count in sorted(self.replaced.items())) or "nothing"
        lines = [f"{self.path}: replaced {counts}; {self.verified}"]
        lines += [f"  left alone: {miss}" for miss in self.near_misses]
        lines += [f"  {note}" for note in self.notes]
        return "\n".join(lines)

    def as_dict(self) -> dict[str, Any]:
        """For JSON: all but the graphs."""
        misses = [
            {"rule": miss.rule, "node": miss.node, "reason": miss.reason, "value": getattr(miss, "value", "")}
            for miss in self.near_misses
        ]
        return {
            "path": self.path,
            "replaced": dict(self.replaced),
            "near_misses": misses,
            "verified": self.verified,
            "notes": list(self.notes),
        }

    def page(self) -> str:
        """The report as a page of HTML that needs nothing else, with the graph before and after."""
        return page(self)
