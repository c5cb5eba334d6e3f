"""The demo on the real model: the table it prints, and that it fails where it should."""

import io
import json

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from trimaran import demo
from trimaran.cli import app

pytestmark = pytest.mark.zoo


@pytest.fixture(scope="module")
def found():
    return demo.run(1, "float32", Console(quiet=True))


IN_TORCH = {"attention": 6, "layer_norm": 1, "linear": 13, "linear_norm": 12}


def test_every_route_gives_the_same_embeddings(found):
    assert not found.failures
    engines = [row.engine for row in found.rows]
    assert len(engines) == len(set(engines)) == (8 if found.device.startswith("CPU") else 6)
    for row in found.rows:
        assert row.error < 2e-6
        assert row.cosine > 0.99999
        assert row.milliseconds > 0
    replaced = [row.replaced for row in found.rows if row.replaced]
    for row in found.rows:
        in_torch = row.engine == "PyTorch, optimized"
        assert row.replaced in ({}, IN_TORCH if in_torch else {"attention": 6, "layer_norm": 13})
    assert len(replaced) == len(engines) - 2, "all but eager and the plain export"


def test_the_table_shows_every_engine(found):
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(demo.table(found))
    text = console.export_text()
    for row in found.rows:
        assert row.engine in text, "no name is cut off at 80 columns"
        assert f"{row.milliseconds:.2f}" in text
    assert "…" not in text
    assert "replaced 6 attention, 1 layer_norm, 13 linear, 12 linear_norm" in "\n".join(demo.lines(found))


def test_a_drifting_engine_or_a_missing_node_fails(found):
    bench = demo.Bench.__new__(demo.Bench)
    bench.demo, bench.expected = demo.Demo("m", "CPU", "float32", {}), {"attention": 6, "layer_norm": 13}
    good = demo.Row("good", bench.expected, 1e-7, 1.0, 1.0)
    bench.judge(good, good.replaced)
    assert not bench.demo.failures
    bench.judge(demo.Row("far", bench.expected, 1e-3, 1.0, 1.0), bench.expected)
    bench.judge(demo.Row("nan", bench.expected, float("nan"), float("nan"), 1.0), bench.expected)
    bench.judge(
        demo.Row("less", {"attention": 5, "layer_norm": 13}, 1e-7, 1.0, 1.0), {"attention": 5, "layer_norm": 13}
    )
    assert [failure.split(":")[0] for failure in bench.demo.failures] == ["far", "nan", "nan", "less"]


def test_the_command_fails_loudly(monkeypatch, found):
    monkeypatch.setattr(demo, "run", lambda *_: found)
    result = CliRunner().invoke(app, ["demo", "--json"])
    assert result.exit_code == 0
    assert json.loads(result.stdout)["rows"][0]["engine"] == "Hugging Face eager"
    monkeypatch.setattr(found, "failures", ["ORT, exported: 0.1 from fp64"])
    result = CliRunner().invoke(app, ["demo"])
    assert result.exit_code == 1
    assert "FAILED: ORT, exported" in result.output


@pytest.mark.parametrize(
    ("arguments", "message"), [(["--dtype", "int8"], "dtype is 'int8'"), (["--rounds", "0"], "rounds")]
)
def test_wrong_options(arguments, message):
    result = CliRunner().invoke(app, ["demo", *arguments])
    assert result.exit_code == 2
    assert message in result.output


def test_a_missing_model_says_what_to_install(monkeypatch):
    def missing(name):
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(demo.importlib.resources, "files", missing)
    with pytest.raises(RuntimeError, match=r"pip install 'trimaran\[zoo\]'"):
        demo.model_folder()


def test_an_embedding_is_of_unit_length_and_ignores_padding():
    states = torch.randn(2, 3, 4)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    embedded = demo.unit(states, {"attention_mask": mask})
    torch.testing.assert_close(embedded.norm(dim=-1), torch.ones(2, dtype=torch.float64))
    torch.testing.assert_close(embedded[1], torch.nn.functional.normalize(states[1, 0].double(), dim=-1))
