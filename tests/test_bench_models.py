"""`trimaran bench-models` on this CPU, where a tiny model only shows that every engine runs and is held to be right."""

import json

import pytest
import torch
from typer.testing import CliRunner

from trimaran.benchmarks import engines, models
from trimaran.cli import app


@pytest.fixture(autouse=True)
def on_a_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(models, "QUICK_ROUNDS", 2)
    torch._dynamo.reset()


def ran(out):
    done = CliRunner().invoke(app, ["bench-models", "--quick", "--out", str(out)])
    assert (out / "models.json").exists(), done.output + repr(done.exception)
    return done.exit_code, done.output, json.loads((out / "models.json").read_text())


@pytest.mark.slow
def test_a_run_writes_json_and_a_figure(tmp_path):
    code, output, found = ran(tmp_path)
    assert code == 0, output
    assert [case["name"] for case in found["cases"]] == ["1 x 8", "2 x 12, padded"]
    for case in found["cases"]:
        rows = {row["name"]: row for row in case["contenders"]}
        assert list(rows) == [engine.name for engine in engines.ENGINES if not engine.cuda]
        for row in rows.values():
            assert row["reason"] == "", row
            assert len(row["samples_ms"]) == found["rounds"] == 2
            assert row["ms"]["median"] > 0
    assert found["environment"]["transformers"]
    assert (tmp_path / "models.png").read_bytes().startswith(b"\x89PNG")
    assert "trimaran in PyTorch" in output


def test_an_engine_that_fails_or_is_wrong_is_listed(tmp_path, monkeypatch):
    def broken(model, inputs, folder):
        raise OSError("no such engine")

    def wrong(model, inputs, folder):
        return lambda given: lambda: 2 * engines.hidden(model(**given))

    some = [
        engines.ENGINES[0],  # transformers itself
        engines.Engine("broken", broken),
        engines.Engine("wrong", wrong, ours=True),
    ]
    monkeypatch.setattr(models, "ENGINES", some)
    code, output, found = ran(tmp_path)
    assert code == 1
    assert "FAILED: 1 x 8, wrong: ValueError: the largest error" in output
    assert "broken, not timed: RuntimeError: OSError: no such engine [2 cases]" in output.replace("\n", " ")
    assert [row["ms"] is None for row in found["cases"][0]["contenders"]] == [False, True, True]


def test_padded_batches_are_what_they_say():
    shape = models.Shape(16, 20, padded=True)
    inputs = shape.inputs(50, torch.device("cpu"), 0)
    lengths = inputs["attention_mask"].sum(1)
    assert 10 <= lengths.min() < lengths.max() <= 20
    assert not torch.equal(inputs["input_ids"], shape.inputs(50, torch.device("cpu"), 1)["input_ids"])
    assert "attention_mask" not in models.Shape(1, 20).inputs(50, torch.device("cpu"), 0)


def test_a_run_of_one_engine_has_the_reference_with_it(tmp_path, monkeypatch):
    monkeypatch.setattr(models, "TINY", models.TINY[:1])
    done = CliRunner().invoke(app, ["bench-models", "trimaran in PyTorch", "--quick", "--out", str(tmp_path)])
    assert done.exit_code == 0, done.output
    (case,) = json.loads((tmp_path / "models.json").read_text())["cases"]
    assert [row["name"] for row in case["contenders"]] == ["transformers", "trimaran in PyTorch"]


def test_an_unknown_engine_is_refused(tmp_path):
    done = CliRunner().invoke(app, ["bench-models", "tensorrt", "--out", str(tmp_path)])
    assert done.exit_code == 2
    assert "no engine 'tensorrt', expected some of ['transformers'" in done.output.replace("\n", " ")
