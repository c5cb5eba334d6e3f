"""`trimaran soak`: the custom ops of ONNX Runtime over many runs, threads and sessions.

Each check counts what went wrong and looks at memory: after a warm-up of a tenth of its runs neither that of the
process nor what it has of the device may grow by more than a bound. Where the driver does not tell this process from
others on the device it is what all of them have, and the result says so. Kernels are deterministic, so a result is
right where it has the same bits as the first one for its input, which is held against the reference.

`soak_model` has what is run.
"""

from __future__ import annotations

import gc
import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from trimaran.benchmarks.machine import environment
from trimaran.benchmarks.memory import Growth, of_device
from trimaran.benchmarks.nodes import Chain
from trimaran.benchmarks.soak_model import COLUMNS, STAND_IN, model, reference
from trimaran.kernels.interpreter import interpret
from trimaran.ort_ops.abi import CPU, CUDA
from trimaran.ort_ops.kernel import KERNELS
from trimaran.ort_ops.native import native
from trimaran.ort_ops.runner import Runner
from trimaran.ort_ops.session import ort_session

THREADS = 8
HOST_LIMIT_MIB, DEVICE_LIMIT_MIB = 64.0, 64.0


@dataclass
class Check:
    """What one check found. wrong: how many runs gave an error or other bits; growth in MiB after the warm-up."""

    name: str
    runs: int
    wrong: int = 0
    first: str = ""
    host_mib: float = 0.0
    device_mib: float = 0.0
    seconds: float = 0.0
    notes: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not self.wrong and self.host_mib <= HOST_LIMIT_MIB and self.device_mib <= DEVICE_LIMIT_MIB

    def fail(self, reason: object) -> None:
        self.wrong += 1
        self.first = self.first or f"{type(reason).__name__}: {reason}"[:300]


class Soak:
    """The checks, over sessions of one device. scale: what part of the full counts is run."""

    def __init__(self, scale: float, console: Console) -> None:
        self.cuda, self.scale = torch.cuda.is_available(), scale
        self.content = model(self.cuda)
        self.kept: list[Any] = []  # sessions that live as long as this
        self.progress = Progress(console=console, transient=True)
        self.feeds = [self.feed(index) for index in range(7)]
        with torch.no_grad():
            self.expected = [self.first(feed) for feed in self.feeds]

    def options(self) -> Any:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        options.intra_op_num_threads = 2
        return options

    def session(self, **kwargs: Any) -> Any:
        with interpret(not self.cuda):
            providers = [CUDA, CPU] if self.cuda else [CPU]
            domains = [] if self.cuda else [STAND_IN]
            return ort_session(self.content, providers, domains=domains, session_options=self.options(), **kwargs)

    def feed(self, index: int) -> dict[str, np.ndarray[Any, Any]]:
        """Inputs of a shape of their own."""
        source = np.random.default_rng(index)
        dtype = np.float16 if self.cuda else np.float32
        shape: tuple[int, ...] = (1 + index % 3, 1 + 2 * index, COLUMNS)
        values = {"x": shape, "residual": shape} | ({"weight": (COLUMNS,)} if self.cuda else {})
        return {name: source.standard_normal(dims).astype(dtype) for name, dims in values.items()}

    def first(self, feed: dict[str, Any]) -> list[bytes]:
        """The bits of a result that is close to the reference's."""
        got = self.session().run(None, feed)
        exact = reference(**{name: torch.from_numpy(value).double() for name, value in feed.items()})
        for mine, true in zip(got, exact, strict=True):
            if not np.allclose(mine, true.numpy(), rtol=2e-2, atol=2e-2):
                raise RuntimeError("the first result is not the reference's: nothing can be soaked")
        return [value.tobytes() for value in got]

    def count(self, full: int) -> int:
        return max(2, round(full * self.scale))

    def right(self, session: Any, turn: int, check: Check) -> None:
        try:
            got = session.run(None, self.feeds[turn % len(self.feeds)])
            self.compare(got, turn, check)
        except Exception as error:
            check.fail(error)

    def compare(self, got: list[Any], turn: int, check: Check) -> None:
        if [value.tobytes() for value in got] != self.expected[turn % len(self.feeds)]:
            check.fail(f"run {turn} has other bits than the first")

    def run(self) -> Iterator[Check]:
        checks: list[tuple[str, int, Callable[[Check, Callable[[], None]], None]]] = [
            ("8 threads, one session", 10_000 * THREADS, self.one_session),
            ("8 threads, a session each", 10_000 * THREADS, self.many_sessions),
            ("sessions made and dropped", 500, self.sessions),
            ("the same without ops of ours", 500, self.bare_sessions),
            ("errors, and a good run after each", 2_000, self.errors),
            ("run_async", 10_000, self.asynchronous),
            ("a growing sequence", 2_000, self.growing),
            ("8 threads, one runner", 2_000 * THREADS, self.runner),
        ]
        with self.progress:
            for name, full, action in checks:
                check = Check(name, self.count(full))
                start, task = time.perf_counter(), self.progress.add_task(name, total=check.runs)
                growth = Growth(self.cuda, after=max(1, check.runs // 10))

                def step(task: Any = task, growth: Growth = growth) -> None:
                    self.progress.advance(task)
                    growth.step()

                action(check, step)
                check.host_mib, check.device_mib = growth.total()
                check.seconds = time.perf_counter() - start
                yield check

    # The checks

    def in_threads(self, check: Check, work: Callable[[int, int], None], step: Callable[[], None]) -> None:
        """work(thread, turn), check.runs times over all threads."""

        def loop(thread: int) -> None:
            for turn in range(thread, check.runs, THREADS):
                try:
                    work(thread, turn)
                except Exception as error:
                    check.fail(error)
                step()

        threads = [threading.Thread(target=loop, args=(thread,)) for thread in range(THREADS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def one_session(self, check: Check, step: Callable[[], None]) -> None:
        session = self.session()
        self.in_threads(check, lambda thread, turn: self.right(session, turn, check), step)

    def many_sessions(self, check: Check, step: Callable[[], None]) -> None:
        sessions = [self.session() for _ in range(THREADS)]
        self.in_threads(check, lambda thread, turn: self.right(sessions[thread], turn, check), step)

    def sessions(self, check: Check, step: Callable[[], None]) -> None:
        kernels = len(KERNELS)
        for turn in range(check.runs):
            self.right(self.session(), turn, check)
            gc.collect()
            step()
        if len(KERNELS) != kernels:
            check.fail(f"{len(KERNELS) - kernels} kernels are left of sessions that are gone")

    def bare_sessions(self, check: Check, step: Callable[[], None]) -> None:
        """What onnxruntime leaves behind by itself, to compare with: its own op, on the same device."""
        import onnxruntime

        chain = Chain("layer_norm", 1, 4, COLUMNS, torch.float16 if self.cuda else torch.float32)
        content, x = chain.model(ours=False), chain.input().numpy()
        for _ in range(check.runs):
            providers = [CUDA] if self.cuda else [CPU]
            onnxruntime.InferenceSession(content, self.options(), providers=providers).run(None, {"x": x})
            gc.collect()
            step()

    def errors(self, check: Check, step: Callable[[], None]) -> None:
        session = self.session()
        for turn in range(check.runs):
            feed = dict(self.feeds[turn % len(self.feeds)])
            feed["residual"] = np.repeat(feed["residual"], 2, axis=0)
            try:
                session.run(None, feed)
                check.fail(f"run {turn} took a residual of another shape")
            except Exception as error:
                if not all(part in str(error) for part in (".layer_norm", "'norm'", "residual has shape")):
                    check.fail(error)
            self.right(session, turn, check)
            step()

    def asynchronous(self, check: Check, step: Callable[[], None]) -> None:
        session, done = self.session(), threading.Semaphore(0)
        # A session that is dropped waits, holding the GIL, for its thread, which may need the GIL to leave `finished`.
        self.kept.append(session)

        def finished(results: list[Any], turn: int, error: str) -> None:
            if error:
                check.fail(error)
            else:
                self.compare(results, turn, check)
            done.release()

        for turn in range(check.runs):
            session.run_async(None, self.feeds[turn % len(self.feeds)], finished, turn)
            done.acquire()
            step()

    def growing(self, check: Check, step: Callable[[], None]) -> None:
        """A sequence that grows by one at each run, as in decoding: few plans serve it."""
        session, misses = self.session(), table_misses()
        for turn in range(check.runs):
            x = np.full((1, 1 + turn, COLUMNS), 1.0, self.feeds[0]["x"].dtype)
            if not np.array_equal(session.run(["sum"], self.feeds[0] | {"x": x, "residual": x})[0], x + x):
                check.fail(f"run {turn}: the sum is wrong")
            step()
        check.notes.append(f"{table_misses() - misses} plans")

    def runner(self, check: Check, step: Callable[[], None]) -> None:
        run = Runner(self.session(cuda_graph=self.cuda))
        place = "cuda" if self.cuda else "cpu"
        feeds = [{name: torch.from_numpy(value).to(place) for name, value in feed.items()} for feed in self.feeds]

        def work(thread: int, turn: int) -> None:
            got = run(feeds[turn % len(feeds)])
            self.compare([value.cpu().numpy() for value in got.values()], turn, check)

        self.in_threads(check, work, step)
        check.notes.append(f"{run.graphs} graphs")


def table_misses() -> int:
    """How often C has asked Python for a plan, over all kernels there are."""
    tables = {id(kernel.table): kernel.table.misses for kernel in KERNELS.values() if hasattr(kernel, "table")}
    return sum(tables.values())


def soak(scale: float, console: Console, done: Callable[[Check], None]) -> dict[str, Any]:
    """Run all checks; `done` gets each as soon as it is through. The result as it is written to JSON."""
    import onnxruntime

    soaked = Soak(scale, console)
    found = []
    for check in soaked.run():
        done(check)
        found.append(asdict(check) | {"ok": check.ok})
    where = environment(torch.device("cuda" if soaked.cuda else "cpu"))
    where |= {"onnxruntime": onnxruntime.__version__, "hot_path": native().how.split(",")[0]}
    limits = {"host_mib": HOST_LIMIT_MIB, "device_mib": DEVICE_LIMIT_MIB}
    where |= {"device_memory_of": of_device()[1] if soaked.cuda else ""}
    return {"version": 1, "scale": scale, "limits": limits, "environment": where, "checks": found}


def table(found: dict[str, Any]) -> Table:
    where = found["environment"]
    shown = Table(box=SIMPLE, title=f"soak, {where['device']}, {where['date'][:10]}", title_justify="left", padding=0)
    for name in ("check", "runs", "wrong", "host MiB", "device MiB", "s", ""):
        shown.add_column(name, justify="left" if name in ("check", "") else "right", no_wrap=True)
    for check in found["checks"]:
        cells = (f"{check['runs']:,}", str(check["wrong"]), f"{check['host_mib']:+.1f}", f"{check['device_mib']:+.1f}")
        said = ", ".join([*check["notes"], check["first"]]).strip(", ")
        shown.add_row(check["name"], *cells, f"{check['seconds']:.1f}", said, style="" if check["ok"] else "bold red")
    return shown


def write(found: dict[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
