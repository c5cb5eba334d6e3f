"""What `optimize_model` did: live, readable, and honest about what it did not do."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

NOTHING = "0, because no rule looks for any of its operations"


@dataclass(frozen=True)
class NearMiss:
    """A place that looked like a fusion: the rule, the graph's node, why it was left, where the user wrote it."""

    rule: str
    node: str
    reason: str
    source: str = ""

    def __str__(self) -> str:
        return f"{self.rule} at {self.node}: {self.reason}" + (f"\n      {self.source}" if self.source else "")


@dataclass
class GraphReport:
    """One captured graph."""

    replaced: Counter[str] = field(default_factory=Counter)
    near_misses: list[NearMiss] = field(default_factory=list)


@dataclass
class Report:
    """Of one optimized model; empty until its first call, then kept up to date.

    graphs: one entry per capture (a new kind of input may cause another). fallbacks: how often, and why, a call or an
    op ran without the kernels. graph_breaks: where Dynamo could not follow the model, so that a call is more than one
    graph with Python between them: the reason and the source line.
    """

    model: str
    graphs: list[GraphReport] = field(default_factory=list)
    fallbacks: Counter[str] = field(default_factory=Counter)
    graph_breaks: list[str] = field(default_factory=list)
    without_graph: Counter[str] = field(default_factory=Counter)
    cuda_graphs: int = 0
    graph_bytes: int = 0

    def add_graph_breaks(self, reasons: Iterable[Any]) -> None:
        """Dynamo's reasons, each once."""
        for broken in reasons:
            place = broken.user_stack[-1] if broken.user_stack else None
            line = f"\n      {place.filename}:{place.lineno}, {place.line}" if place else ""
            text = f"{broken.reason.strip().splitlines()[0]}{line}"
            if text not in self.graph_breaks:
                self.graph_breaks.append(text)

    @property
    def replaced(self) -> Counter[str]:
        """Ops replaced in the newest graph, by name."""
        return self.graphs[-1].replaced if self.graphs else Counter()

    @property
    def near_misses(self) -> list[NearMiss]:
        """What the rules left alone in the newest graph."""
        return self.graphs[-1].near_misses if self.graphs else []

    @property
    def shown(self) -> list[GraphReport]:
        """The newest graph, and all of them where a call is more than one."""
        return self.graphs if self.graph_breaks else self.graphs[-1:]

    def __str__(self) -> str:
        if not self.graphs:
            lines = [f"{self.model}: not captured yet (call the model once)"]
        else:
            replaced = sum((graph.replaced for graph in self.shown), Counter())
            counts = ", ".join(f"{count} {name}" for name, count in sorted(replaced.items()))
            counts = counts or ("nothing" if any(graph.near_misses for graph in self.shown) else NOTHING)
            lines = [
                f"{self.model}: replaced {counts}; {len(self.graphs)} graph{'s' * (len(self.graphs) != 1)} captured"
            ]
        lines += [f"  left alone: {miss}" for graph in self.shown for miss in graph.near_misses]
        if self.cuda_graphs:
            count = f"{self.cuda_graphs} CUDA graph{'s' * (self.cuda_graphs != 1)}"
            lines.append(f"  {count}, {self.graph_bytes / 2**20:.0f} MiB")
        lines += [f"  graph break: {text}" for text in self.graph_breaks]
        lines += [f"  without the kernels, {count} times: {reason}" for reason, count in self.fallbacks.items()]
        lines += [f"  without a CUDA graph, {count} times: {reason}" for reason, count in self.without_graph.items()]
        return "\n".join(lines)
