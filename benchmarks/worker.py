"""The process that runs the engines: `python -m trimaran.benchmarks.worker`, a plan on stdin, events on stdout.

It is a process of its own because an engine may take it down, or leave the GPU unusable: whoever started it has every
event until then, knows which engine it was, and goes on without that one.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from trimaran.benchmarks import streams
from trimaran.benchmarks.engines.catalog import ENGINES, REFERENCE
from trimaran.benchmarks.engines.contract import Engine
from trimaran.benchmarks.engines.ort import GIVEN
from trimaran.benchmarks.engines.ours import IN_PYTORCH
from trimaran.benchmarks.engines.transformers_eager import floats
from trimaran.benchmarks.limits import Gemms, limit_ms, work_of
from trimaran.benchmarks.machine import COLD_S, WARM_S, ceilings, state
from trimaran.benchmarks.models import SEED, parameters, subject_of
from trimaran.benchmarks.result import CaseResult, EngineState, Stream
from trimaran.benchmarks.sidebyside import Clock, CpuClock, Data, Entry, GpuClock, Poisoned, attempted, measure
from trimaran.benchmarks.workload import Case, inputs_of, padded_case, real_rows

COPIES = 2  # of the inputs, see `Data`
LEAST_ROUNDS = 5
SLOW_SHARE = 0.5  # of a case's time, after which no slow engine gets ready any more
BUILD_SHARE = 0.5  # of the budget, after which no further engine is built
KEPT_FOR_PROFILES = 0.1  # of what is left of it
Emit = Callable[[str, dict[str, Any]], None]


@dataclass
class Plan:
    """deadline: seconds since the epoch; 0 for none. excluded: engines that failed a worker before, and why."""

    model: str
    dtype: str
    cases: list[Case]
    engines: list[str]
    rounds: int
    deadline: float = 0.0
    stream_s: float = 0.0
    profile: bool = True
    warm_s: float = COLD_S  # of warming the GPU up
    excluded: dict[str, str] = field(default_factory=dict)

    @classmethod
    def read(cls, text: str) -> Plan:
        found = json.loads(text)
        return cls(**found | {"cases": [Case(**case) for case in found["cases"]]})

    def starting_now(self, budget_s: float, idle: bool = True) -> Plan:
        """With so many seconds from now on; 0 for as many as it takes. idle: whether the GPU was, until now."""
        deadline = time.time() + budget_s if budget_s else 0.0
        return replace(self, deadline=deadline, warm_s=COLD_S if idle else WARM_S)

    def left_s(self) -> float:
        return self.deadline - time.time() if self.deadline else float("inf")


class Worker:
    """One run of a plan. engines: the catalog's, unless a test has others."""

    def __init__(self, plan: Plan, emit: Emit, folder: Path, engines: Sequence[Engine] = ENGINES) -> None:
        self.plan, self.emit = plan, emit
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.at("", f"making {plan.model}")
        self.subject = subject_of(plan.model, getattr(torch, plan.dtype), self.device, folder)
        self.dtype = self.subject.dtype
        self.subject.max_graphs = len(plan.cases) + 8
        self.catalog = [engine for engine in engines if engine.name in plan.engines]
        self.entries: list[Entry] = []
        self.first: dict[str, float] = {}  # the ceilings
        self.exact_twin: Any = None
        self.least_left_s = BUILD_SHARE * plan.left_s()
        self.gemms = Gemms(self.subject)

    def at(self, engine: str, doing: str) -> None:
        self.emit("at", {"engine": engine, "doing": doing})

    def run(self) -> None:
        made = {"source": self.subject.source, "parameters": parameters(self.subject.module)[0]}
        self.emit("model", made | {"dtype": str(self.dtype).removeprefix("torch.")})
        self.at("", "measuring the ceilings")
        self.first = ceilings(self.device, self.dtype, self.plan.warm_s)
        self.emit("ceilings", self.first)
        for engine in self.catalog:
            self.build(engine)
        for number, case in enumerate(self.plan.cases):
            if self.plan.left_s() <= 0:
                self.emit("left_out", {"what": f"{case.name}: the budget was used up"})
                continue
            self.case(case, len(self.plan.cases) - number)
        if self.plan.stream_s:
            self.stream()
        self.at("", "measuring the ceilings again")
        self.emit("ceilings", ceilings(self.device, self.dtype, WARM_S))
        if self.plan.profile and self.subject.cuda:
            self.profiles()  # last: a profiler that has been on makes later launches slower
        self.emit("done", {})

    # Engines

    def build(self, engine: Engine) -> None:
        self.at(engine.name, "building")
        found = EngineState(engine.name, engine.group, engine.ours)
        found.reason = self.plan.excluded.get(engine.name) or engine.why_not(self.subject) or ""
        found.failed = engine.name in self.plan.excluded
        if not found.reason and self.plan.deadline and self.plan.left_s() < self.least_left_s:
            found.reason = "left out: building the others took half of the budget"
        if not found.reason:
            clock = self.clock([])
            start, before = time.perf_counter(), clock.memory()
            found.reason = attempted(lambda: self.built(engine, found))
            found.build_s, found.build_mib = time.perf_counter() - start, clock.memory() - before
            if found.reason:
                found.failed = True
                clock.check_alive(engine.name, found.reason)
        self.emit("engine", asdict(found))

    def built(self, engine: Engine, state: EngineState) -> None:
        made = engine.build(self.subject, inputs_of(self.subject, padded_case(self.subject)))
        state.note = made.note
        self.entries.append(Entry(engine, made.call, made.note))

    # Cases

    def clock(self, inputs: Sequence[dict[str, torch.Tensor]]) -> Clock:
        return GpuClock(inputs, self.device) if self.subject.cuda else CpuClock()

    def case(self, case: Case, to_come: int) -> None:
        start = time.perf_counter()
        share = self.plan.left_s() * (1 - KEPT_FOR_PROFILES) / to_come
        self.at("", f"{case.name}: the exact result")
        inputs = [inputs_of(self.subject, case, copy) for copy in range(COPIES)]
        data = Data(inputs, [real_rows(given, self.exact(given)) for given in inputs], real_rows)

        def used() -> float:
            return (time.perf_counter() - start) / share

        reference = REFERENCE if self.subject.module is not None else GIVEN
        rows = measure(
            self.entries, data, reference=reference, dtype=self.dtype, clock=self.clock(inputs),
            rounds=self.plan.rounds, seed=SEED,
            enough=lambda done: done >= LEAST_ROUNDS and used() >= 1,
            affordable=lambda entry: used() + entry.last_s / share <= SLOW_SHARE,
            step=lambda engine, doing: self.at(engine, f"{case.name}: {doing}"),
        )  # fmt: skip
        gpu = state() if self.subject.cuda else {}
        tokens = float(torch.stack([case.sizes(copy).sum() for copy in range(COPIES)]).double().mean())
        found = CaseResult(**case.as_dict(), tokens=tokens, flop=None, limit_ms=None, gemms_ms=None, gpu=gpu, rows=rows)
        if self.subject.module is not None:
            self.at("", f"{case.name}: the vendor's GEMMs")
            work = work_of(self.subject, inputs[0])
            found.flop = work.useful(case, COPIES)
            found.limit_ms, found.gemms_ms = limit_ms(self.subject, found.flop, self.first), self.gemms(work)
        gc.collect()
        self.emit("case", asdict(found))

    def exact(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """In fp64; of a file, what onnxruntime makes of it on the CPU."""
        if self.subject.module is None:
            return self.exact_of_file(inputs)
        if self.exact_twin is None:
            self.exact_twin = copy.deepcopy(self.subject.model).double()
        return self.subject.forward(self.exact_twin, floats(inputs, torch.float64))

    def exact_of_file(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        from trimaran.export.verify import array, run

        assert self.subject.file is not None
        outputs = run(self.subject.file, {name: array(tensor) for name, tensor in inputs.items()})
        found = outputs.get(self.subject.output, next(iter(outputs.values())))
        return torch.from_numpy(found.astype("float64")).to(self.device)

    # What else is asked

    def stream(self) -> None:
        """Requests of mixed lengths that arrive by chance."""
        self.at("", "open loop: mean service times")
        quick = [entry for entry in self.entries if not entry.engine.slow]
        for found in streams.run(self.subject, quick, self.plan.stream_s, self.plan.left_s, self.at):
            self.emit("stream", asdict(found) if isinstance(found, Stream) else found)

    def profiles(self) -> None:
        """The GPU's work in one call: of ours in PyTorch in each case, of all in the first."""
        for number, case in enumerate(self.plan.cases):
            inputs = inputs_of(self.subject, case)
            for entry in self.entries:
                if self.plan.left_s() <= 0 or (number and entry.engine.name != IN_PYTORCH):
                    continue
                self.at(entry.engine.name, f"{case.name}: counting launches")
                found: list[tuple[str, float]] = []
                reason = attempted(lambda e=entry, i=inputs, f=found: f.extend(kernels(lambda: e.call(i))))  # type: ignore[misc]
                if not reason and found:
                    self.emit("kernels", {"case": case.name, "engine": entry.engine.name, "kernels": found})


def kernels(run: Callable[[], Any]) -> list[tuple[str, float]]:
    """The GPU's work in one call, in order: name and microseconds."""
    from torch.profiler import ProfilerActivity, profile

    run()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        run()
        torch.cuda.synchronize()
    events = [event for event in seen.events() if event.device_type.name == "CUDA"]
    events.sort(key=lambda event: event.time_range.start)
    return [(event.name[:80], event.time_range.elapsed_us()) for event in events]


def work(plan: Plan, emit: Emit, engines: Sequence[Engine] = ENGINES) -> None:
    """Run the plan in this process. On a GPU everything runs on one stream of its own, as ONNX Runtime cannot capture
    on the default one. Raises Poisoned where an engine left the GPU unusable."""
    torch._dynamo.config.recompile_limit = 1000  # past it a compiled call would quietly run eager, at its ninth shape
    torch._dynamo.config.accumulated_recompile_limit = 10000
    with tempfile.TemporaryDirectory() as folder, torch.no_grad(), own_stream():
        Worker(plan, emit, Path(folder), engines).run()


@contextlib.contextmanager
def own_stream() -> Iterator[None]:
    if torch.cuda.is_available():
        with torch.cuda.stream(torch.cuda.Stream()):
            yield
    else:
        yield


def main() -> None:
    events = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)  # what libraries print is no event

    def emit(kind: str, told: dict[str, Any]) -> None:
        events.write(json.dumps({"kind": kind, **told}) + "\n")
        events.flush()

    plan = Plan.read(sys.stdin.read())
    try:
        work(plan, emit)
    except Poisoned as error:
        emit("poisoned", {"engine": error.engine, "reason": error.reason})
        os._exit(1)  # nothing may be torn down with such a GPU


if __name__ == "__main__":
    main()
