"""`trimaran soak` at 1 % of its counts, and that it sees what it looks for."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from trimaran.benchmarks import memory, soak
from trimaran.benchmarks.soak import Check, Soak
from trimaran.cli import app

CHECKS = {
    "8 threads, one session": 800,
    "8 threads, a session each": 800,
    "sessions made and dropped": 5,
    "the same without ops of ours": 5,
    "errors, and a good run after each": 20,
    "run_async": 100,
    "a growing sequence": 20,
    "8 threads, one runner": 160,
}


def soaked(scale: str, out: Path) -> tuple[int, dict[str, Any]]:
    done = CliRunner().invoke(app, ["soak", "--scale", scale, "--out", str(out)])
    return done.exit_code, json.loads(out.read_text())


def test_one_percent_of_everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # CI's counts, on any machine
    code, found = soaked("0.01", tmp_path / "soak.json")
    assert {check["name"]: check["runs"] for check in found["checks"]} == CHECKS
    assert [check for check in found["checks"] if not check["ok"]] == []
    growing = next(check for check in found["checks"] if "growing" in check["name"])
    assert growing["notes"] == ["0 plans"], "a session that is alive has the one that serves them all"
    assert code == 0


@pytest.fixture
def small() -> Soak:
    return Soak(0.0001, Console(quiet=True))


def test_other_bits_and_errors_are_counted(small: Soak) -> None:
    check = Check("it", 4)
    session = small.session()
    for turn in range(2):
        small.right(session, turn, check)
    assert check.wrong == 0
    small.expected[1][0] = b"\0" + small.expected[1][0][1:]
    small.right(session, 1, check)
    assert (check.wrong, check.ok) == (1, False)
    assert "run 1 has other bits" in check.first
    small.feeds[0] = {"x": np.zeros(3, np.float32)}
    small.right(session, 0, check)
    assert check.wrong == 2


def test_a_first_result_that_is_not_the_references(small: Soak, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(soak, "reference", lambda x, residual: [x])
    with pytest.raises(RuntimeError, match="nothing can be soaked"):
        small.first(small.feeds[0])


def test_growth_is_measured_after_the_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    levels = iter([(100.0, 10.0), (170.0, 11.0)])
    monkeypatch.setattr(memory.Growth, "now", lambda self: next(levels))
    growth = memory.Growth(False, after=3)
    for _ in range(30):
        growth.step()
    host, device = growth.total()
    assert (host, device) == (70.0, 1.0)
    assert not Check("it", 30, host_mib=host, device_mib=device).ok
    assert not Check("it", 30, host_mib=device, device_mib=host).ok
    assert Check("it", 30, host_mib=device, device_mib=device).ok


@pytest.mark.parametrize(
    ("rows", "found"),
    [
        (["GPU-7, 41, 300", "GPU-7, {pid}, 200", "GPU-8, {pid}, 9"], (200.0, "this process")),
        (["GPU-7, 41, 300", "GPU-8, 42, 9"], (300.0, "this process")),
        (["GPU-7, 41, 300", "GPU-7, 42, 200"], (6.0, "all processes")),
        (["GPU-7, {pid}, [N/A]"], (6.0, "all processes")),
        ([], (6.0, "all processes")),
    ],
)
def test_whose_memory_is_measured(rows: list[str], found: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a container a process is listed by another number, so the only one on the device is taken for this."""
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(uuid="7"))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (4 << 20, 10 << 20))
    monkeypatch.setattr(memory, "_processes", lambda: [row.format(pid=os.getpid()) for row in rows])
    assert memory.of_device() == found


@pytest.mark.slow
def test_a_failed_check_fails_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Soak, "compare", lambda self, got, turn, check: check.fail("planted"))
    code, found = soaked("0.0001", tmp_path / "soak.json")
    assert code == 1
    assert found["checks"][0]["first"] == "str: planted"
    assert not found["checks"][0]["ok"]
