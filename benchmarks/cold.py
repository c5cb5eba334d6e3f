"""Cold start: the first output of an engine in a process of its own, with empty caches on disk and with warm ones.

`python -m trimaran.benchmarks.cold` reads what to do from stdin. What is timed is the engine's: building it from a
model that is there (an exporter's work included), and its first call. Imports and making the model come before, and
are given beside it.
"""

from __future__ import annotations

import time

START = time.perf_counter()

import json  # noqa: E402
import os  # noqa: E402
import subprocess  # noqa: E402
import sys  # noqa: E402
import tempfile  # noqa: E402
from collections.abc import Callable, Iterator, Sequence  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

LONGEST_S = 180.0


def run(
    model: str, dtype: str, engines: Sequence[str], case: dict[str, Any], left_s: Callable[[], float],
    at: Callable[[str, str], None],
) -> Iterator[Any]:  # fmt: skip
    """A `result.Cold` for each engine and state of the caches, which are in a home folder of their own."""
    from trimaran.benchmarks.result import Cold

    name = case.pop("name")
    for engine in engines:
        with tempfile.TemporaryDirectory() as home:
            for cache in ("empty", "warm"):
                at(engine, f"cold start, {cache} caches")
                found = Cold(engine, cache, name)
                if left_s() <= 0:
                    found.reason = "left out: the budget was used up"
                else:
                    ask(found, {"model": model, "dtype": dtype, "engine": engine, "case": case}, home, left_s())
                yield found


def ask(found: Any, task: dict[str, Any], home: str, left_s: float) -> None:
    from trimaran.benchmarks.supervise import environment, said

    kept = {"HOME": home, "TORCHINDUCTOR_CACHE_DIR": f"{home}/inductor", "TRITON_CACHE_DIR": f"{home}/triton",
            "CUDA_CACHE_PATH": f"{home}/cuda"}  # fmt: skip
    command = [sys.executable, "-m", "trimaran.benchmarks.cold"]
    try:
        done = subprocess.run(
            command, input=json.dumps(task), capture_output=True, text=True, env=environment() | kept,
            timeout=min(LONGEST_S, left_s), check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        found.reason = "it did not end in time"
        return
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        found.reason = f"{said(done.returncode)}; {lines[-1].strip()[:200] if lines else 'it said nothing'}"
        return
    for name, value in json.loads(done.stdout.splitlines()[-1]).items():
        setattr(found, name, value)


def timed(task: dict[str, Any]) -> dict[str, float]:
    import torch

    from trimaran.benchmarks.engines.catalog import by_name
    from trimaran.benchmarks.models import subject_of
    from trimaran.benchmarks.worker import own_stream
    from trimaran.benchmarks.workload import Case, inputs_of, padded_case

    engine, case = by_name(task["engine"]), Case(**task["case"])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    times = [time.perf_counter()]

    def lap() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter())
        return times[-1] - times[-2]

    with tempfile.TemporaryDirectory() as folder, torch.no_grad(), own_stream():
        import_s = times[0] - START
        subject = subject_of(task["model"], getattr(torch, task["dtype"]), device, Path(folder))
        example, inputs = inputs_of(subject, padded_case(subject)), inputs_of(subject, case)
        model_s = lap()
        call = engine.build(subject, example).call
        build_s = lap()
        call(inputs).sum().item()
        return {"import_s": import_s, "model_s": model_s, "build_s": build_s, "first_s": lap()}


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    print(json.dumps(timed(json.loads(sys.stdin.read()))), file=answers, flush=True)
    os._exit(0)  # nothing that is torn down now is measured


if __name__ == "__main__":
    main()
