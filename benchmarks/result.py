"""What a run of `trimaran bench` found, as it is kept: dataclasses that are one JSON file, described in
docs/benchmark.md. Built from the worker's events, so that whatever is lost later, what was measured is there."""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from trimaran.benchmarks.kernels import spread
from trimaran.benchmarks.machine import MAX_DRIFT
from trimaran.benchmarks.measure import percentile
from trimaran.benchmarks.sidebyside import Row

VERSION = 1
DIGITS = 4  # significant ones of a sample
NUMBERS = re.compile(r"\[[-+.\deE,\s]+\]")  # a list of samples, which is written in one line


@dataclass
class EngineState:
    """An engine of the run. reason: why it could not be used; "" where it was. failed: it should have run here."""

    name: str
    group: str
    ours: bool
    failed: bool = False
    reason: str = ""
    note: str = ""
    build_s: float | None = None
    build_mib: float | None = None


@dataclass
class CaseResult:
    """flop: of the real tokens. limit_ms, gemms_ms: the bound, and torch's own products at the padded shapes; None
    where the model is a file. gpu: clocks, power, temperature after the rounds. kernels: by engine, the GPU's work in
    one call in order, as [name, us]."""

    name: str
    batch: int
    seq: int
    lengths: str
    tokens: float
    flop: float | None
    limit_ms: float | None
    gemms_ms: float | None
    gpu: dict[str, float]
    rows: list[Row]
    kernels: dict[str, list[tuple[str, float]]] = field(default_factory=dict)

    def timed(self) -> list[Row]:
        return [row for row in self.rows if row.wall_ms]

    def row(self, engine: str) -> Row | None:
        return next((row for row in self.timed() if row.engine == engine), None)


@dataclass
class Cold:
    """The first output in a new process, seconds. import_s and model_s come before and are not the engine's; build_s
    and first_s are. cache: `empty` or `warm`."""

    engine: str
    cache: str
    case: str
    import_s: float | None = None
    model_s: float | None = None
    build_s: float | None = None
    first_s: float | None = None
    reason: str = ""


@dataclass
class Stream:
    """An engine under requests that arrive by chance. load: requests per second; ms: from arrival to output in host
    memory."""

    engine: str
    load: float
    served: int = 0
    p50_ms: float | None = None
    p99_ms: float | None = None
    tokens_per_s: float | None = None
    behind: bool = False
    reason: str = ""


@dataclass
class Result:
    """One model. ceilings: each time they were measured, in order."""

    version: int
    model: str
    source: str
    dtype: str
    parameters: int
    seed: int
    rounds: int
    method: str
    lengths: dict[str, str]
    environment: dict[str, str]
    complete: bool = False
    incomplete_because: str = "the run was cut"
    left_out: list[str] = field(default_factory=list)
    ceilings: list[dict[str, float]] = field(default_factory=list)
    engines: list[EngineState] = field(default_factory=list)
    cases: list[CaseResult] = field(default_factory=list)
    cold: list[Cold] = field(default_factory=list)
    streams: list[Stream] = field(default_factory=list)

    # What follows from it

    def drift(self) -> dict[str, float]:
        """By how much each ceiling moved at most over the run, in percent of the first."""
        first, *later = self.ceilings or [{}]
        return {
            name: max((100 * (now[name] / value - 1) for now in later), key=abs, default=math.nan)
            for name, value in first.items()
        }

    def invalid_because(self) -> list[str]:
        """Why the run does not count."""
        found = [
            f"the {name} ceiling drifted by {percent:+.1f} %, allowed are {MAX_DRIFT:g} %"
            for name, percent in self.drift().items()
            if not abs(percent) <= MAX_DRIFT
        ]
        return found + [f"incomplete: {self.incomplete_because}"] * (not self.complete)

    @property
    def valid(self) -> bool:
        return not self.invalid_because()

    def is_ours(self, engine: str) -> bool:
        return any(state.ours for state in self.engines if state.name == engine)

    def best_peer(self, case: CaseResult) -> Row | None:
        peers = [row for row in case.timed() if not self.is_ours(row.engine)]
        return min(peers, key=lambda row: percentile(row.wall_ms, 50), default=None)

    def best_of_ours(self, case: CaseResult) -> Row | None:
        mine = [row for row in case.timed() if self.is_ours(row.engine)]
        return min(mine, key=lambda row: percentile(row.wall_ms, 50), default=None)

    # As the worker tells it

    def take(self, kind: str, told: dict[str, Any]) -> None:
        """An event of the worker. A worker that takes another's place tells of its engines again: the latest counts."""
        if kind == "model":
            self.source, self.parameters, self.dtype = told["source"], told["parameters"], told["dtype"]
        elif kind == "ceilings":
            self.ceilings.append(told)
        elif kind == "engine":
            state = read(EngineState, told, "engine")
            self.engines = [old for old in self.engines if old.name != state.name] + [state]
        elif kind == "case":
            self.cases.append(read(CaseResult, told, "case"))
        elif kind == "kernels":
            case = next(case for case in self.cases if case.name == told["case"])
            case.kernels[told["engine"]] = told["kernels"]
            for row in case.rows:
                if row.engine == told["engine"]:
                    row.launches = len(told["kernels"])
        elif kind == "stream":
            self.streams.append(read(Stream, told, "stream"))
        elif kind == "cold":
            self.cold.append(read(Cold, told, "cold"))
        elif kind == "left_out":
            self.left_out.append(told["what"])
        elif kind == "done":
            self.complete, self.incomplete_because = not self.left_out, "; ".join(self.left_out)

    # On disk

    def as_dict(self) -> dict[str, Any]:
        derived = {"valid": self.valid, "invalid_because": self.invalid_because(), "drift_percent": self.drift()}
        found: dict[str, Any] = rounded(asdict(self) | derived)
        return found

    def write(self, path: Path) -> None:
        """Whole or not at all: a run may be cut while it is written."""
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(".part")
        text = json.dumps(self.as_dict(), indent=1)
        unfinished.write_text(NUMBERS.sub(lambda found: " ".join(found[0].split()), text) + "\n", encoding="utf-8")
        unfinished.replace(path)


DERIVED = {"valid", "invalid_because", "drift_percent"}
INNER: dict[str, type] = {
    "engines": EngineState, "cases": CaseResult, "rows": Row, "cold": Cold, "streams": Stream,
}  # fmt: skip


def load(path: Path) -> Result:
    """A result that was written. ValueError where it is none of this version, naming what is wrong."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path.name} is not JSON: {error}") from error
    if not isinstance(found, dict) or found.get("version") != VERSION or "model" not in found:
        version = found.get("version") if isinstance(found, dict) else None
        raise ValueError(f"{path.name} has version {version!r}, expected a result of trimaran bench, version {VERSION}")
    found_result: Result = read(
        Result, {name: value for name, value in found.items() if name not in DERIVED}, path.name
    )
    return found_result


def read(kind: type, found: Any, where: str) -> Any:
    """A dataclass from its dict. ValueError for a field that is missing or unknown."""
    known = {f.name: f for f in fields(kind)}
    if odd := set(found) ^ set(known):
        said = "unknown" if odd - set(known) else "missing"
        raise ValueError(f"{where}: {kind.__name__} has {said} fields {sorted(odd)}")
    values = {
        name: [read(INNER[name], one, f"{where}: {name}") for one in value] if name in INNER else value
        for name, value in found.items()
    }
    return kind(**values)


def rounded(value: Any) -> Any:
    """Floats with as many digits as mean something."""
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: rounded(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(one) for one in value]
    return value


# Figures of a row


def median(samples: Sequence[float]) -> float | None:
    return percentile(samples, 50) if len(samples) else None


def ms(samples: Sequence[float]) -> dict[str, float] | None:
    return spread(samples) if samples else None


def ratio(peer: Row | None, mine: Row) -> dict[str, float] | None:
    """The peer's wall time over this one's, round by round: more than 1 where this one is faster."""
    if peer is None or not mine.wall_ms:
        return None
    return spread([p / m for p, m in zip(peer.wall_ms, mine.wall_ms, strict=False)])


def percent(bound: float | None, row: Row) -> float | None:
    """How much of the time the bound alone would take."""
    return None if bound is None or not row.wall_ms else 100 * bound / percentile(row.wall_ms, 50)


CLOCKS = ("wall", "device", "host")
Column = Callable[[Result, CaseResult, Row], Any]


def timing(clock: str, name: str) -> Column:
    return lambda result, case, row: (ms(getattr(row, f"{clock}_ms")) or {}).get(name)


COLUMNS: dict[str, Column] = {
    "model": lambda r, c, row: r.model,
    "dtype": lambda r, c, row: r.dtype,
    "batch": lambda r, c, row: c.batch,
    "seq": lambda r, c, row: c.seq,
    "lengths": lambda r, c, row: c.lengths,
    "engine": lambda r, c, row: row.engine,
    **{f"{clock}_{name}": timing(clock, name) for clock in CLOCKS for name in ("median", "p20", "p80", "p95")},
    "best_peer_over_this": lambda r, c, row: (ratio(r.best_peer(c), row) or {}).get("median"),
    "percent_of_limit": lambda r, c, row: percent(c.limit_ms, row),
    "percent_of_vendor_gemms": lambda r, c, row: percent(c.gemms_ms, row),
    "launches": lambda r, c, row: row.launches,
    "error": lambda r, c, row: row.error,
    "prepare_s": lambda r, c, row: row.prepare_s,
    "prepare_mib": lambda r, c, row: row.prepare_mib,
    "gpu": lambda r, c, row: r.environment["device"],
    "torch": lambda r, c, row: r.environment["torch"],
    "onnxruntime": lambda r, c, row: r.environment.get("onnxruntime", ""),
    "date": lambda r, c, row: r.environment["date"],
    "reason": lambda r, c, row: row.reason or row.note,
}


def write_csv(result: Result, path: Path) -> None:
    """A line for each case and engine."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for case in result.cases:
            for row in case.rows:
                values = [column(result, case, row) for column in COLUMNS.values()]
                writer.writerow(["" if value is None else rounded(value) for value in values])
