"""How much memory this process has, of the host and of a CUDA device."""

from __future__ import annotations

import gc
import os
import subprocess
import threading
from pathlib import Path

import torch

MIB = 2**20


class Growth:
    """Growth from the step number `after` on, which ends the warm-up. Many threads may step."""

    def __init__(self, cuda: bool, after: int) -> None:
        self.cuda, self.after = cuda, after
        self.steps = 0
        self.before: tuple[float, float] | None = None
        self._lock = threading.Lock()

    def step(self) -> None:
        with self._lock:
            self.steps += 1
            if self.steps == self.after:
                self.before = self.now()

    def total(self) -> tuple[float, float]:
        """MiB of the host and of the device."""
        assert self.before is not None
        host, device = self.now()
        return host - self.before[0], device - self.before[1]

    def now(self) -> tuple[float, float]:
        gc.collect()
        return of_host(), of_device()[0] if self.cuda else 0.0


def of_host() -> float:
    """MiB of this process that are in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / MIB


def of_device(index: int = 0) -> tuple[float, str]:
    """MiB taken of the device, and by whom: this process where the driver tells it from others, else all of them."""
    uuid = str(torch.cuda.get_device_properties(index).uuid)
    rows = [line.split(", ") for line in _processes() if uuid in line]
    mine = [row for row in rows if row[1] == str(os.getpid())]
    if not mine and len(rows) == 1:  # in a container the driver may know this process by another number
        mine = rows
    if mine and mine[0][2].isdigit():
        return float(mine[0][2]), "this process"
    free, total = torch.cuda.mem_get_info(index)
    return (total - free) / MIB, "all processes"


def _processes() -> list[str]:
    """One line for each that uses a GPU: the GPU, the process, MiB."""
    query = ["nvidia-smi", "--query-compute-apps=gpu_uuid,pid,used_memory", "--format=csv,noheader,nounits"]
    try:
        return subprocess.run(query, capture_output=True, text=True, timeout=20, check=False).stdout.splitlines()
    except (OSError, subprocess.SubprocessError):
        return []
