"""The machine a figure comes from: what it is, what it can do at most, and whether it held still meanwhile."""

from __future__ import annotations

import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from trimaran.benchmarks.measure import percentile

MAX_DRIFT = 3.0  # percent
WARM_S, COLD_S = 2.0, 8.0  # of warming up: of a GPU in use, and of one that was idle, which 2 s have left 7 % too fast


def ceilings(device: torch.device, dtype: torch.dtype, warm_s: float = WARM_S) -> dict[str, float]:
    """What this machine reaches now: `copy`, TB/s read plus written; `matmul`, TFLOP/s in `dtype` on random data.
    warm_s: for how long a GPU multiplies before; one that was idle takes longer than one that is in use."""
    cuda = device.type == "cuda"
    count, side = (2**30, 8192) if cuda else (2**24, 512)  # bytes of the copied tensor; rows of the square matrices
    source = torch.randint(0, 255, (count,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    a, b = (noise((side, side), device, dtype) for _ in range(2))
    product = torch.empty_like(a)

    def matmul() -> Any:
        return torch.mm(a, b, out=product)

    warm(
        matmul, device, warm_s
    )  # an idle GPU has to raise its clocks first, and a cool one runs faster than it can keep up
    matmul_ms = median_ms(matmul, device)
    copy_ms = median_ms(lambda: target.copy_(source), device)
    return {"copy": 2 * count / copy_ms / 1e9, "matmul": 2 * side**3 / matmul_ms / 1e9}


def noise(shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """Random data by a generator of its own: torch's default one is no use any more once a capture has failed."""
    return torch.randn(shape, generator=torch.Generator(device).manual_seed(0), device=device).to(dtype)


def warm(run: Callable[[], Any], device: torch.device, seconds: float) -> None:
    end = time.perf_counter() + (seconds if device.type == "cuda" else 0.02)
    while time.perf_counter() < end:
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)


def median_ms(run: Callable[[], Any], device: torch.device) -> float:
    """Median time of a long call; on a GPU all rounds are enqueued before the first is looked at."""
    rounds = 100 if device.type == "cuda" else 10
    run()
    if device.type == "cpu":
        times = []
        for _ in range(rounds):
            start = time.perf_counter()
            run()
            times.append((time.perf_counter() - start) * 1e3)
        return percentile(times, 50)
    events = [torch.cuda.Event(enable_timing=True) for _ in range(rounds + 1)]
    events[0].record()
    for event in events[1:]:
        run()
        event.record()
    torch.cuda.synchronize(device)
    return percentile([events[i].elapsed_time(events[i + 1]) for i in range(rounds)], 50)


def drift(before: dict[str, float], after: dict[str, float]) -> dict[str, float]:
    """By how much each ceiling moved, in percent of its value before."""
    return {name: 100 * (after[name] / value - 1) for name, value in before.items()}


def unsteady(drifts: dict[str, float]) -> list[str]:
    """Why a run does not count; empty where it does."""
    return [
        f"the {name} ceiling drifted by {percent:+.1f} %, allowed are {MAX_DRIFT:g} %"
        for name, percent in drifts.items()
        if not abs(percent) <= MAX_DRIFT
    ]


def without_folder(argument: str) -> str:
    """A path by its last name: results are for others, who have other folders."""
    return Path(argument).name if "/" in argument else argument


def environment(device: torch.device) -> dict[str, str]:
    """Device, driver, versions, date (UTC) and command."""
    cuda = device.type == "cuda"
    found = {
        "device": torch.cuda.get_device_name(device) if cuda else f"CPU, {torch.get_num_threads()} threads",
        "driver": driver() if cuda else "",
        "cuda": torch.version.cuda or "",
        "cudnn": str(torch.backends.cudnn.version()) if cuda else "",
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["trimaran", *map(without_folder, sys.argv[1:])]),
    }
    return found | {name: version(name) for name in ("torch", "triton", "trimaran")}


def state() -> dict[str, float]:
    """Clocks in MHz, power in W, temperature in C of the first GPU now; empty where nvidia-smi does not say."""
    names = {"sm_mhz": "clocks.sm", "memory_mhz": "clocks.mem", "power_w": "power.draw", "celsius": "temperature.gpu"}
    query = ["nvidia-smi", f"--query-gpu={','.join(names.values())}", "--format=csv,noheader,nounits"]
    try:
        shown = subprocess.run(query, capture_output=True, text=True, check=True, timeout=20).stdout
        return dict(zip(names, map(float, shown.splitlines()[0].split(",")), strict=True))
    except (OSError, subprocess.SubprocessError, IndexError, ValueError):
        return {}


def driver() -> str:
    try:
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(query, capture_output=True, text=True, check=True, timeout=20).stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return "unknown"


def version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "from a checkout"
