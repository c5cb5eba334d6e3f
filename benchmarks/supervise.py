"""Runs the worker, takes its events, and starts another without the engine that took it down."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from trimaran.benchmarks.result import Result
from trimaran.benchmarks.worker import Plan

DEATHS = 4  # after which nothing more is tried
GRACE_S = 45.0  # beyond the deadline, before a worker that does not end is killed
COMMAND = [sys.executable, "-m", "trimaran.benchmarks.worker"]
Take = Callable[[str, dict[str, Any]], None]


@dataclass
class Ended:
    """How a worker ended. engine: the one that it was at; reason: empty where it did all that was asked."""

    engine: str = ""
    reason: str = ""
    done: bool = False
    cases: list[str] = field(default_factory=list)


def supervise(plan: Plan, result: Result, take: Take, log: Path) -> None:
    """All of the plan, if it takes several workers. `take` gets every event; log: what the workers print."""
    for _ in range(DEATHS):
        ended = run_one(plan, take, log)
        if ended.done:
            return
        if not ended.engine or plan.left_s() <= 0:
            result.incomplete_because = ended.reason
            return
        take("at", {"engine": ended.engine, "doing": f"took the process down: {ended.reason}; starting another"})
        left = [case for case in plan.cases if case.name not in {c.name for c in result.cases}]
        reason = f"took its process down: {ended.reason}"
        plan = replace(plan, cases=left, excluded=plan.excluded | {ended.engine: reason})
    result.incomplete_because = f"{DEATHS} engines took their process down, the last {ended.engine}: {ended.reason}"


def run_one(plan: Plan, take: Take, log: Path) -> Ended:
    ended = Ended()
    with log.open("a", encoding="utf-8") as errors:
        process = subprocess.Popen(
            COMMAND, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment()
        )
        assert process.stdin is not None
        assert process.stdout is not None
        with killed_at(process, plan.deadline + GRACE_S if plan.deadline else 0.0) as late:
            with contextlib.suppress(BrokenPipeError):
                process.stdin.write(json.dumps(asdict(plan)))
                process.stdin.close()
            for line in process.stdout:
                told = json.loads(line)
                kind = told.pop("kind")
                follow(ended, kind, told)
                take(kind, told)
            code = process.wait()
    if not ended.done and not ended.reason:
        ended.reason = "it did not end in time" if late.is_set() else f"{said(code)}; {last_line(log)}"
    return ended


def follow(ended: Ended, kind: str, told: dict[str, Any]) -> None:
    if kind == "at":
        ended.engine = told["engine"]
    elif kind == "poisoned":
        ended.engine, ended.reason = told["engine"], told["reason"]
    elif kind == "case":
        ended.cases.append(told["name"])
    elif kind == "done":
        ended.done = True


@contextlib.contextmanager
def killed_at(process: subprocess.Popen[str], deadline: float) -> Iterator[threading.Event]:
    """Kills the process where it still runs then, and says so; 0 for never. Also when this one is interrupted."""
    late = threading.Event()

    def kill() -> None:
        late.set()
        process.kill()

    timer = threading.Timer(max(0.0, deadline - time.time()), kill)
    timer.daemon = True
    if deadline:
        timer.start()
    try:
        yield late
    finally:
        timer.cancel()
        if process.poll() is None:
            process.kill()
            process.wait()


def environment() -> dict[str, str]:
    """This process's, with its import path: a checkout need not be installed."""
    return os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}


def said(code: int) -> str:
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


def last_line(log: Path) -> str:
    lines = [line for line in log.read_text("utf-8", "replace").splitlines() if line.strip()]
    return lines[-1].strip()[:200] if lines else "it said nothing"
