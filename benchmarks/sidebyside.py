"""One case, all engines: the gate first, then rounds in which they take turns. The only place where times are made.

Three times of a call, each once a round. Wall: inputs on the GPU, output on the GPU, the host clock around the call
and a synchronization. Device: the same between two events, the GPU kept busy until the host has enqueued the call, so
that only what waits for the host inside the call is in it. Host: inputs in pinned host memory, output back in it. On a
CPU there is the wall alone.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from trimaran.benchmarks.engines.contract import Call, Engine, Inapplicable
from trimaran.benchmarks.gate import Gate, errors_of
from trimaran.benchmarks.measure import percentile, turns, why

MIB = 2**20
WALL_CALLS, LONG_MS = 5, 5.0  # a sample of the wall is the median of some calls, of a call that is this long one
METHOD = "wall: host clock around a call and a synchronization, the median of 5 where it is short"
Step = Callable[[str, str], None]  # engine, what is done


class Poisoned(RuntimeError):
    """An engine left the GPU in a state in which nothing runs any more in this process."""

    def __init__(self, engine: str, reason: str) -> None:
        super().__init__(reason)
        self.engine, self.reason = engine, reason


class Clock(Protocol):
    """What measures; tests have one in which time passes only when an engine says so."""

    def now(self) -> float: ...
    def wall(self, run: Callable[[], Any]) -> float: ...
    def device(self, run: Callable[[], Any], wall_ms: float) -> float | None: ...
    def host(self, call: Call, copy: int) -> float | None: ...
    def memory(self) -> float: ...
    def check_alive(self, engine: str, reason: str) -> None: ...


class CpuClock:
    def now(self) -> float:
        return time.perf_counter()

    def wall(self, run: Callable[[], Any]) -> float:
        start = time.perf_counter()
        run()
        return (time.perf_counter() - start) * 1e3

    def device(self, run: Callable[[], Any], wall_ms: float) -> float | None:
        return None

    def host(self, call: Call, copy: int) -> float | None:
        return None

    def memory(self) -> float:
        return 0.0

    def check_alive(self, engine: str, reason: str) -> None:
        pass


class GpuClock(CpuClock):
    """inputs: of the case, on the device; the pinned twins are made here."""

    def __init__(self, inputs: Sequence[dict[str, torch.Tensor]], device: torch.device) -> None:
        self.pinned = [{name: tensor.cpu().pin_memory() for name, tensor in copy.items()} for copy in inputs]
        self.gpu, self.results = device, {}  # type: ignore[var-annotated]

    def wall(self, run: Callable[[], Any]) -> float:
        torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        torch.cuda.synchronize()
        return (time.perf_counter() - start) * 1e3

    def device(self, run: Callable[[], Any], wall_ms: float) -> float | None:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        torch.cuda._sleep(int((1.2 * wall_ms + 0.1) * 2e6))  # cycles, of at most 2e6 a ms
        start.record()
        run()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end))

    def host(self, call: Call, copy: int) -> float | None:
        torch.cuda.synchronize()
        start = time.perf_counter()
        found = call({name: tensor.to(self.gpu, non_blocking=True) for name, tensor in self.pinned[copy].items()})
        kind = (found.shape, found.dtype)
        if kind not in self.results:  # in the call that is not timed
            self.results[kind] = torch.empty(found.shape, dtype=found.dtype, pin_memory=True)
        self.results[kind].copy_(found, non_blocking=True)
        torch.cuda.synchronize()
        return (time.perf_counter() - start) * 1e3

    def memory(self) -> float:
        """MiB that are taken of the device."""
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info()
        return (total - free) / MIB

    def check_alive(self, engine: str, reason: str) -> None:
        try:
            torch.cuda.synchronize()
        except Exception as error:
            raise Poisoned(engine, reason) from error


@dataclass
class Entry:
    """An engine that was built. last_s: how long its last new shape took."""

    engine: Engine
    call: Call
    note: str = ""
    last_s: float = 0.0


@dataclass
class Row:
    """An engine in a case. Times in ms, one for each round; none where `reason` says why it was not timed. error:
    relative RMS. prepare_s and prepare_mib: what the first calls of this shape took, of time and of the device.
    launches: kernels and copies of a call, None where nobody counted."""

    engine: str
    reason: str = ""
    note: str = ""
    error: float | None = None
    prepare_s: float | None = None
    prepare_mib: float | None = None
    launches: int | None = None
    wall_ms: list[float] = field(default_factory=list)
    device_ms: list[float] = field(default_factory=list)
    host_ms: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Data:
    """Of a case: some sets of inputs that differ in their values, the exact output of each in fp64, and what of an
    output counts. More than one, so that a graph that does not read its inputs anew is found out."""

    inputs: Sequence[dict[str, torch.Tensor]]
    exact: Sequence[torch.Tensor]
    select: Callable[[dict[str, torch.Tensor], torch.Tensor], torch.Tensor] = lambda inputs, output: output


def measure(
    entries: Sequence[Entry], data: Data, *, reference: str, dtype: torch.dtype, clock: Clock, rounds: int, seed: int,
    enough: Callable[[int], bool] = lambda done: False,
    affordable: Callable[[Entry], bool] = lambda entry: True,
    step: Step = lambda engine, doing: None,
) -> list[Row]:  # fmt: skip
    """Gate and time the entries. reference: the engine whose error sets what is allowed, which comes first. enough:
    whether that many rounds will do. affordable: whether there is time for a slow engine's new shape."""
    rows = {entry.engine.name: Row(entry.engine.name, note=entry.note) for entry in entries}
    gate = Gate.of(dtype)
    ready: dict[str, Entry] = {}
    for entry in sorted(entries, key=lambda entry: entry.engine.name != reference):
        name, row = entry.engine.name, rows[entry.engine.name]
        step(name, "gate")
        if entry.engine.slow and not affordable(entry):
            row.reason = f"left out: a new shape took it {entry.last_s:.0f} s, which the budget has not left"
            continue
        errors: list[tuple[float, float]] = []
        if name == reference:
            row.reason = attempted(lambda e=entry, into=errors: into.extend(errors_in(e.call, data)))  # type: ignore[misc]
            gate = Gate.of(dtype, errors)
        row.reason = row.reason or attempted(lambda e=entry, r=row, g=gate: admit(e, r, data, g, clock))  # type: ignore[misc]
        if row.reason:
            clock.check_alive(name, row.reason)
            continue
        ready[name] = entry
    tick = dict.fromkeys(ready, 0)
    for name in turns(list(ready), rounds, seed, enough):
        if name not in ready:
            continue
        step(name, "rounds")
        tick[name] = (tick[name] + 1) % len(data.inputs)
        rows[name].reason = attempted(lambda n=name: sample(ready[n].call, rows[n], data, tick[n], clock))  # type: ignore[misc]
        if rows[name].reason:
            rows[name].wall_ms, rows[name].device_ms, rows[name].host_ms = [], [], []
            clock.check_alive(name, rows[name].reason)
            del ready[name]
    return [rows[entry.engine.name] for entry in entries]


def attempted(action: Callable[[], Any]) -> str:
    """ "" or why it failed, in one line: whatever an engine does, the others are measured."""
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        try:
            action()
        except Inapplicable as error:
            return str(error)
        except Exception as error:
            return why(error, heard)
    return ""


def admit(entry: Entry, row: Row, data: Data, gate: Gate, clock: Clock) -> None:
    """The first calls of a shape, in which it is compiled and captured, and what they give: for each set of inputs, and
    for the first once more, since a captured call may compute something else than the one that it was captured from.
    ValueError for a wrong result."""
    start, before = clock.now(), clock.memory()
    for copy in (*range(len(data.inputs)), 0):
        output = entry.call(data.inputs[copy])
        if copy == 0 and row.prepare_s is None:
            row.prepare_s = entry.last_s = clock.now() - start
        rms = gate.check(data.select(data.inputs[copy], output), data.exact[copy])
        row.error = max(row.error or 0.0, rms)
    row.prepare_mib = clock.memory() - before
    clock.host(entry.call, 0)
    clock.wall(lambda: entry.call(data.inputs[0]))


def errors_in(call: Call, data: Data) -> list[tuple[float, float]]:
    pairs = zip(data.inputs, data.exact, strict=True)
    return [errors_of(data.select(inputs, call(inputs)), exact) for inputs, exact in pairs]


def sample(call: Call, row: Row, data: Data, copy: int, clock: Clock) -> None:
    """One round of one engine."""
    inputs = data.inputs[copy]

    def run() -> torch.Tensor:
        return call(inputs)

    walls = [clock.wall(run)]
    if walls[0] < LONG_MS:
        walls += [clock.wall(run) for _ in range(WALL_CALLS - 1)]
    row.wall_ms.append(percentile(walls, 50))
    for into, found in ((row.device_ms, clock.device(run, row.wall_ms[-1])), (row.host_ms, clock.host(call, copy))):
        if found is not None:
            into.append(found)
