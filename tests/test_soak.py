"""`trimaran soak` at 1 % of its counts, and that it sees what it looks for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from trimaran.benchmarks import soak
from trimaran.benchmarks.soak import Check, Memory, Soak
from trimaran.cli import app

CHECKS = {
    "8 threads, one session": 800,
    "8 threads, a session each": 800,
    "sessions made and dropped": 5,
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


def test_growth_is_measured_from_a_tenth_on(monkeypatch: pytest.MonkeyPatch) -> None:
    levels = iter([(100.0, 10.0), (170.0, 11.0)])
    monkeypatch.setattr(Memory, "now", lambda self: next(levels))
    check = Check("it", 30)
    meter = Memory(False, check)
    for _ in range(30):
        meter.step()
    meter.close()
    assert (check.host_mib, check.device_mib, check.ok) == (70.0, 1.0, False)


def test_a_failed_check_fails_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Soak, "compare", lambda self, got, turn, check: check.fail("planted"))
    code, found = soaked("0.0001", tmp_path / "soak.json")
    assert code == 1
    assert found["checks"][0]["first"] == "str: planted"
    assert not found["checks"][0]["ok"]
