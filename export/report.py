"""What became of an ONNX file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from trimaran.torch_path.report import NearMiss


@dataclass
class OnnxReport:
    """Of one file written by `export_onnx` or `rewrite_onnx`.

    replaced: trimaran nodes by op. near_misses: what looked like a fusion and was left, with the reason. verified: what
    the file's outputs were compared with, or why they were not. notes: what else is worth knowing.
    """

    path: str
    replaced: Counter[str] = field(default_factory=Counter)
    near_misses: Sequence[NearMiss] = ()
    verified: str = "not verified: verify=False"
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        counts = ", ".join(f"{count} {name}" for name, count in sorted(self.replaced.items())) or "nothing"
        lines = [f"{self.path}: replaced {counts}; {self.verified}"]
        lines += [f"  left alone: {miss}" for miss in self.near_misses]
        lines += [f"  {note}" for note in self.notes]
        return "\n".join(lines)
