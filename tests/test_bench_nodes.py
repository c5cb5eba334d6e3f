"""`trimaran bench-nodes` on this CPU, where a tiny chain is interpreted: it runs, and it says what it should."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from trimaran.benchmarks import replay
from trimaran.benchmarks.measure import Timing
from trimaran.benchmarks.nodes import PEER, Chain
from trimaran.cli import app
from trimaran.ort_ops.session import ort_session


@pytest.fixture(autouse=True)
def on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def ran(out: Path) -> tuple[int, str, dict[str, Any]]:
    done = CliRunner().invoke(app, ["bench-nodes", "--nodes", "2", "--rounds", "2", "--out", str(out)])
    return done.exit_code, done.output, json.loads((out / "nodes.json").read_text())


def test_a_run_writes_json_and_a_figure(tmp_path: Path) -> None:
    code, output, found = ran(tmp_path)
    assert code == 0
    assert (found["nodes"], found["rows"], found["columns"], found["dtype"]) == (2, 4, 16, "float32")
    assert [(case["op"], case["mode"]) for case in found["cases"]] == [(op, "plain run") for op in PEER]
    for case in found["cases"]:
        ours, peer = case["contenders"]
        assert (ours["name"], peer["name"]) == ("trimaran", f"onnxruntime's {PEER[case['op']]}")
        assert ours["reason"] == peer["reason"] == ""
        assert len(ours["samples_us"]) == found["rounds"] == 2
        assert ours["us_per_node"]["median"] > peer["us_per_node"]["median"] > 0, "one of them is interpreted"
        assert case["ratio"]["median"] < 1
    assert [row["name"] for row in found["replay"]["contenders"]] == [*replay.NAMES.values()]
    for row in found["replay"]["contenders"]:
        assert row["reason"] == ""
        assert len(row["samples_us"]) == 2
        assert row["host_us"] == row["call_us"], "there is no device"
    assert found["environment"]["onnxruntime"]
    assert (tmp_path / "nodes.png").read_bytes().startswith(b"\x89PNG")
    assert "layer_norm, plain run" in output
    assert "trimaran.Runner, outputs copied" in output


def test_what_of_ours_is_refused_fails_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    exact = Chain.exact
    monkeypatch.setattr(Chain, "exact", lambda self, device: 2 * exact(self, device))
    monkeypatch.setattr(replay, "layer_norm_reference", lambda x, *_, **__: (x, x))
    code, output, found = ran(tmp_path)
    assert code == 1
    assert "FAILED: layer_norm, plain run: ValueError: the largest error" in output
    assert "FAILED: replay: ValueError" in output
    assert found["cases"][0]["contenders"][0]["us_per_node"] is None
    assert found["replay"]["contenders"][0]["call_us"] is None


def test_what_the_device_works_is_taken_off() -> None:
    timing = Timing("it", True, samples=[0.03, 0.05], calls=1)
    found = replay.row(timing, busy=10.0)
    assert (found["call_us"]["median"], found["host_us"]["median"]) == (pytest.approx(40), pytest.approx(30))
    assert replay.row(timing, busy=None)["host_us"] is None
    assert replay.row(Timing("it", True, "refused"), busy=None)["call_us"] is None


@pytest.mark.parametrize("op", PEER)
def test_both_chains_are_the_same_function(op: str) -> None:
    """ONNX Runtime's own, on the CPU, is what our exact chain says, and stays so over a hundred nodes."""
    chain = Chain(op, 100, 3, 64, torch.float32)
    session = ort_session(chain.model(ours=False), ["CPUExecutionProvider"])
    (y,) = session.run(None, {"x": chain.input().numpy()})
    assert torch.allclose(torch.from_numpy(y).double(), chain.exact(torch.device("cpu")), atol=1e-4)
