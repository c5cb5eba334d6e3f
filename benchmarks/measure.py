"""How a figure is made, once for every benchmark: gate, capture, interleave, shuffle, percentiles, ceilings, drift.

A contender is timed only after its result is held against the exact one. On a GPU it is captured into a CUDA graph of
many calls, and events around a replay give device time; the host clock around one plain call gives wall time. All
contenders of a case take turns, in an order that is shuffled in each round, so that a clock that drifts hits all of
them alike.
"""

from __future__ import annotations

import math
import random
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch

from trimaran.benchmarks.gate import allowed, error_of

Run = Callable[[], Any]  # one call; returns a tensor, or a tuple of tensors and None

L2_BYTES = 60e6  # of an H200, the largest of the GPUs that are measured
MAX_COPIES = 1024
LEAST_MS = 0.2  # a replay or a host sample takes at least this long


@dataclass(frozen=True)
class Contender:
    """`prepare(copy)` makes the call that works on one copy of the inputs; preparing is not timed. `view` takes the
    exact outputs to what this contender computes of them, where that is less than all."""

    name: str
    prepare: Callable[[int], Run]
    ours: bool = False
    view: Callable[[Any], Any] = lambda exact: exact


@dataclass
class Timing:
    """One contender in one case. Times in ms per call: `samples` and `wall` have one entry per round, and none where
    `reason` says why the contender was not timed. error: relative RMS error; calls: calls per sample."""

    name: str
    ours: bool
    reason: str = ""
    error: float | None = None
    calls: int = 0
    samples: list[float] = field(default_factory=list)
    wall: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return percentile(self.samples, 50)


def percentile(samples: Sequence[float], percent: float) -> float:
    """With linear interpolation; NaN of no samples."""
    return float(np.percentile(samples, percent)) if len(samples) else math.nan


# Clocks


@dataclass
class Armed:
    """A contender that is ready to be timed. `sample` and `wall` give ms per call; `output` is what the timed calls
    compute on copy 0, valid after the first sample."""

    sample: Callable[[], float]
    wall: Callable[[], float]
    calls: int
    output: Callable[[], Any]


class Watch(Protocol):
    """What times a contender, and how, in words."""

    method: str

    def arm(self, runs: list[Run]) -> Armed: ...


def rounds_of(runs: list[Run], clock: Callable[[], float], wait: Callable[[], None]) -> Callable[[int], float]:
    """A function that makes some calls, over the copies in turn, and gives ms per call by the host clock."""
    turn = 0

    def timed(calls: int) -> float:
        nonlocal turn
        wait()
        start = clock()
        for _ in range(calls):
            runs[turn % len(runs)]()
            turn += 1
        wait()
        return (clock() - start) * 1e3 / calls

    return timed


class HostWatch:
    """The host clock, for CPUs."""

    method = "host clock"

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.clock = clock

    def arm(self, runs: list[Run]) -> Armed:
        timed = rounds_of(runs, self.clock, lambda: None)
        timed(1)  # warm
        calls = max(1, math.ceil(LEAST_MS / max(timed(1), 1e-4)))
        return Armed(lambda: timed(calls), lambda: timed(1), calls, runs[0])


class GraphWatch:
    """Events around the replay of a CUDA graph that holds many calls. Each timed replay follows an untimed one, so that
    the GPU is busy while the host enqueues: no launch gap is in the figure."""

    method = "CUDA graph replay, events"

    def arm(self, runs: list[Run]) -> Armed:
        graph, output = capture(runs, len(runs))
        replay_ms(graph)
        repeats = math.ceil(LEAST_MS / max(replay_ms(graph), 1e-4))
        calls = len(runs) * repeats
        if repeats > 1:
            graph, output = capture(runs, calls)
        host = rounds_of(runs, time.perf_counter, torch.cuda.synchronize)
        return Armed(lambda: replay_ms(graph) / calls, lambda: host(1), calls, lambda: output)


def capture(runs: list[Run], calls: int) -> tuple[torch.cuda.CUDAGraph, Any]:
    """A graph of `calls` calls over the copies in turn, and the output of the first, kept from being overwritten."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # what is made lazily, per stream, may not be made while capturing
        for run in runs[:3]:
            run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = runs[0]()
        for call in range(1, calls):
            runs[call % len(runs)]()
    return graph, output


def replay_ms(graph: torch.cuda.CUDAGraph) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    graph.replay()
    start.record()
    graph.replay()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end))


def watch_for(device: torch.device) -> Watch:
    return GraphWatch() if device.type == "cuda" else HostWatch()


def copies_for(tensors: Iterable[torch.Tensor | None], device: torch.device) -> int:
    """How many copies of the inputs to rotate over, so that none is still in the L2 when its turn comes again: together
    they are at least twice the L2. 1 where one is that large, and on a CPU."""
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)
    return 1 if device.type == "cpu" else min(MAX_COPIES, math.ceil(2 * L2_BYTES / max(size, 1)))


# Taking turns


def why(error: Exception, heard: Sequence[Any]) -> str:
    """An exception and the warnings before it in one line: SDPA tells in warnings why a backend refuses."""
    said = [str(warning.message).split(" (Triggered")[0].strip() for warning in heard]
    told = [text for text in said if "kernel not used because" not in text and "has been runtime disabled" not in text]
    message = (str(error).strip() or "no message").splitlines()[0].split(". ")[0]
    return "; ".join(dict.fromkeys([f"{type(error).__name__}: {message}", *told]))[:300]


def compare(
    contenders: Sequence[Contender],
    *,
    exact: Any,
    dtype: torch.dtype,
    watch: Watch,
    rounds: int = 30,
    copies: int = 1,
    seed: int = 0,
    step: Callable[[str], None] = lambda name: None,
) -> list[Timing]:
    """Time the contenders against each other. exact: the outputs in fp64 for copy 0. Whoever raises or is less accurate
    than `allowed` is listed with the reason and not timed."""
    timings = [Timing(contender.name, contender.ours) for contender in contenders]
    runs: dict[int, list[Run]] = {}
    armed: dict[int, Armed] = {}

    def attempt(index: int, action: Callable[[int], None]) -> None:
        step(contenders[index].name)
        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always")
            try:
                action(index)
            except Exception as error:  # whatever a contender does, the others are measured
                timings[index].reason = why(error, heard)

    def judge(index: int) -> None:
        ready = [contenders[index].prepare(copy) for copy in range(copies)]
        timings[index].error = error_of(ready[0](), contenders[index].view(exact))
        runs[index] = ready

    def check(index: int, outputs: Any = None) -> None:
        if outputs is not None:
            timings[index].error = error_of(outputs, contenders[index].view(exact))
        error = timings[index].error
        if error is None or not error <= limit:
            raise ValueError(f"RMS error {error:.2e} of the exact result's RMS, allowed {limit:.2e}")

    def arm(index: int) -> None:
        check(index)
        ready = watch.arm(runs[index])
        ready.sample()
        check(index, ready.output())  # what is timed, not only what was called
        timings[index].calls = ready.calls
        armed[index] = ready

    for index in range(len(contenders)):
        attempt(index, judge)
    peers = [timings[i].error or 0.0 for i in runs if not contenders[i].ours]
    limit = allowed(peers, dtype)
    for index in list(runs):
        attempt(index, arm)
    for index in turns(list(armed), rounds, seed):
        timings[index].samples.append(armed[index].sample())
        timings[index].wall.append(armed[index].wall())
    return timings


def turns(
    order: list[Any], rounds: int, seed: int, enough: Callable[[int], bool] = lambda done: False
) -> Iterator[Any]:
    """Whose turn it is: everybody once in each round, in an order that is shuffled anew. `enough(rounds done)` ends it
    before."""
    order, shuffler = list(order), random.Random(seed)
    for done in range(rounds):
        if enough(done):
            return
        shuffler.shuffle(order)
        yield from order
