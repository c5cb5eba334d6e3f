"""A clock and engines for the tests of `trimaran bench`: time passes only when an engine says so."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from trimaran.benchmarks.engines.contract import Built, Engine, anywhere
from trimaran.benchmarks.engines.transformers_eager import REFERENCE
from trimaran.benchmarks.result import CaseResult, EngineState, Result
from trimaran.benchmarks.sidebyside import Data, Entry, Row

ENVIRONMENT = {"device": "fake", "driver": "1", "date": "2026-11-30T00:00:00+00:00", "torch": "2.11", "triton": "3.6",
               "trimaran": "0.1", "command": "trimaran bench fake"}  # fmt: skip


class FakeClock:
    def __init__(self) -> None:
        self.time = 0.0
        self.timed: list[str] = []
        self.running = ""

    def now(self) -> float:
        return self.time

    def wall(self, run: Callable[[], Any]) -> float:
        start = self.time
        run()
        self.timed.append(self.running)
        return (self.time - start) * 1e3

    def device(self, run: Callable[[], Any], wall_ms: float) -> float | None:
        run()
        return wall_ms / 2

    def host(self, call: Callable[[Any], Any], copy: int) -> float | None:
        return None

    def memory(self) -> float:
        return 0.0

    def check_alive(self, engine: str, reason: str) -> None:
        pass

    def entry(
        self, name: str, ms: float, answer: Callable[[Mapping[str, torch.Tensor]], torch.Tensor], **options: Any
    ) -> Entry:
        def call(inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
            self.time += ms / 1e3
            self.running = name
            return answer(inputs)

        return Entry(Engine(name, "fakes", lambda subject, example: Built(call), anywhere, **options), call)


def doubled(inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    return 2 * inputs["x"]


def data() -> Data:
    """The right answer is twice the input."""
    inputs = [{"x": torch.linspace(1, 2, 100) + copy} for copy in range(2)]
    return Data(inputs, [2 * given["x"].double() for given in inputs])


def result(times: Mapping[str, list[float]], *, ours: tuple[str, ...] = ("mine",), after: float = 100.0) -> Result:
    """One case with these wall times by engine; the matmul ceiling goes from 100 to `after`."""
    rows = [Row(name, wall_ms=list(samples), device_ms=[s / 2 for s in samples]) for name, samples in times.items()]
    case = CaseResult("8 x 128", 8, 128, "dense", 1024.0, 1e12, 0.5, 0.8, {}, rows)
    found = Result(1, "fake", "nowhere", "float16", 10, 0, 30, "by hand", {"dense": "full"}, dict(ENVIRONMENT))
    found.engines = [EngineState(name, "trimaran" if name in ours else "onnxruntime", name in ours) for name in times]
    found.ceilings = [{"copy": 4.0, "matmul": 100.0}, {"copy": 4.0, "matmul": after}]
    found.cases = [case]
    found.complete, found.incomplete_because = True, ""
    return found


__all__ = ["ENVIRONMENT", "REFERENCE", "FakeClock", "data", "doubled", "result"]
