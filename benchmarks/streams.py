"""An open loop: requests of mixed lengths arrive by chance, whether or not the last one is done.

One request is one text, served alone and in the order of arrival, from host memory to host memory. Everyone gets it
padded to the next of a few lengths, with its mask, since engines with CUDA graphs have one for each shape. Arrivals
follow a Poisson process with a fixed seed, at rates that are parts of what the best peer can serve at most.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from trimaran.benchmarks.engines.contract import Call, Subject
from trimaran.benchmarks.measure import percentile
from trimaran.benchmarks.models import SEED
from trimaran.benchmarks.result import Stream
from trimaran.benchmarks.sidebyside import Entry, attempted
from trimaran.benchmarks.workload import Case, inputs_of, takes_mask

LENGTHS = (32, 64, 128, 256, 512)  # what a request is padded to
SHORTEST = 16
LOADS = (0.5, 0.8)  # of the best peer's most
PROBES = 40  # requests from which the mean time of service is taken
READY = 4  # calls after which a shape is compiled and captured
BEHIND = 0.95  # of what arrives: an engine that serves less in the same time does not keep up
METHOD = (
    f"one text a request, lengths uniform in [{SHORTEST}, {LENGTHS[-1]}], padded to one of {list(LENGTHS)}; Poisson "
    f"arrivals at {' and '.join(f'{100 * load:.0f} %' for load in LOADS)} of what the best peer serves at most"
)


@dataclass(frozen=True)
class Request:
    """arrival: seconds after the start."""

    arrival: float
    tokens: int
    inputs: dict[str, torch.Tensor]


def requests(subject: Subject, rate: float, count: int) -> list[Request]:
    """The same for everyone at one rate."""
    random = np.random.default_rng(SEED)
    arrivals = np.cumsum(random.exponential(1 / rate, count))
    lengths = random.integers(SHORTEST, LENGTHS[-1] + 1, count)
    prepared = {size: padded(subject, size) for size in LENGTHS}
    inputs = {int(length): cut(prepared, int(length)) for length in set(lengths)}
    return [Request(float(at), int(n), inputs[int(n)]) for at, n in zip(arrivals, lengths, strict=True)]


def padded(subject: Subject, size: int) -> dict[str, torch.Tensor]:
    found = {name: tensor.cpu() for name, tensor in inputs_of(subject, Case(1, size, "uniform")).items()}
    return {name: tensor.pin_memory() for name, tensor in found.items()} if subject.cuda else found


def cut(prepared: dict[int, dict[str, torch.Tensor]], length: int) -> dict[str, torch.Tensor]:
    size = next(size for size in LENGTHS if size >= length)
    mask = (torch.arange(size)[None] < length).long()
    return {**prepared[size], "attention_mask": mask.pin_memory() if torch.cuda.is_available() else mask}


def serve(call: Call, inputs: dict[str, torch.Tensor], device: torch.device) -> torch.Tensor:
    return call({name: tensor.to(device, non_blocking=True) for name, tensor in inputs.items()}).cpu()


def loop(
    call: Callable[[Request], object], arriving: Sequence[Request], clock: Callable[[], float],
    wait: Callable[[float], None], longest_s: float,
) -> tuple[list[float], int, float]:  # fmt: skip
    """(ms from arrival to answer of each that was served, their tokens, seconds it took)."""
    start, latencies, tokens = clock(), [], 0
    for request in arriving:
        wait(request.arrival - (clock() - start))
        call(request)
        done = clock() - start
        latencies.append((done - request.arrival) * 1e3)
        tokens += request.tokens
        if done > longest_s:
            break
    return latencies, tokens, clock() - start


def pause(seconds: float) -> None:
    """Until then, by looking at the clock at the end: a sleep may be a tenth of a millisecond late."""
    end = time.perf_counter() + seconds
    if seconds > 0.002:
        time.sleep(seconds - 0.001)
    while time.perf_counter() < end:
        pass


def run(
    subject: Subject, entries: Sequence[Entry], seconds: float, left_s: Callable[[], float],
    at: Callable[[str, str], None],
) -> Iterator[Stream]:  # fmt: skip
    """Each engine at each load. Nothing for a model that takes no mask."""
    if not takes_mask(subject):
        return
    probes, mean_s, failed = requests(subject, 1.0, PROBES), {}, {}
    for entry in entries:
        at(entry.engine.name, "open loop: how long a request takes")
        reason = attempted(lambda e=entry: mean_s.update({e.engine.name: service_s(e.call, probes, subject)}))  # type: ignore[misc]
        if reason:
            failed[entry.engine.name] = reason
    peers = [mean_s[e.engine.name] for e in entries if e.engine.name in mean_s and not e.engine.ours]
    if not peers:
        return
    for load in LOADS:
        rate = load / min(peers)
        arriving = requests(subject, rate, max(20, int(rate * seconds)))
        for entry in entries:
            name = entry.engine.name
            if name in failed or left_s() < 2 * seconds:
                yield Stream(name, rate, reason=failed.get(name, "left out: the budget was used up"))
                continue
            at(name, f"open loop: {rate:.0f} requests a second")
            yield measured(entry, rate, arriving, seconds, subject)


def service_s(call: Call, probes: Sequence[Request], subject: Subject) -> float:
    """The mean over the probes, all shapes made ready."""
    for inputs in {probe.inputs["attention_mask"].shape: probe.inputs for probe in probes}.values():
        for _ in range(READY):
            serve(call, inputs, subject.device)
    start = time.perf_counter()
    for probe in probes:
        serve(call, probe.inputs, subject.device)
    return (time.perf_counter() - start) / len(probes)


def measured(entry: Entry, rate: float, arriving: Sequence[Request], seconds: float, subject: Subject) -> Stream:
    found = Stream(entry.engine.name, rate)

    def go() -> None:
        latencies, tokens, took = loop(
            lambda request: serve(entry.call, request.inputs, subject.device), arriving, time.perf_counter, pause,
            2 * seconds,
        )  # fmt: skip
        found.served, found.tokens_per_s = len(latencies), tokens / took
        found.p50_ms, found.p99_ms = percentile(latencies, 50), percentile(latencies, 99)
        found.behind = BEHIND * (took - found.p50_ms / 1e3) > arriving[len(latencies) - 1].arrival

    found.reason = attempted(go)
    return found
