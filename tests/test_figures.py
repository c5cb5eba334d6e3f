"""The README's tables and the committed pictures are those of the committed results."""

import json

import pytest
from bench_fakes import result
from PIL import Image

from trimaran.benchmarks import bench, figures
from trimaran.benchmarks.report import digest, read
from trimaran.benchmarks.result import load

PICTURES = sorted(figures.RESULTS.glob("**/*.png"))


def test_the_readme_has_the_figures_of_the_results():
    text = figures.README.read_text(encoding="utf-8")
    assert {name for _, name, _, _ in figures.BLOCK.findall(text)} == set(figures.TABLES)
    assert figures.filled(text) == text, "run `make figures`"


@pytest.mark.parametrize("path", PICTURES, ids=lambda path: path.stem)
def test_a_picture_is_of_the_result_beside_it(path):
    source = path.with_suffix(".json")
    found = load(source).as_dict() if path.parent.name == "models" else read(source)
    assert Image.open(path).text["Source"] == digest(found), "run `make figures`"


def test_every_result_has_its_picture():
    drawn = {path.stem for path in PICTURES}
    for path in figures.RESULTS.glob("**/*.json"):
        found = json.loads(path.read_text())
        assert ("cases" in found) <= (path.stem in drawn), path


def test_a_figure_that_changed_is_seen():
    text = figures.README.read_text(encoding="utf-8")
    (name, table), *_ = [(n, body) for _, n, body, _ in figures.BLOCK.findall(text) if n == "layer"]
    assert figures.filled(text.replace(table, table.replace("14.4", "13.4"))) == text, name


def test_a_models_table_leads_with_the_best_peer(tmp_path):
    assert "No run of whole models is committed yet" in figures.models(tmp_path)
    found = result({"transformers autocast fp16": [8.0] * 5, "peer": [1.0] * 5, "mine": [0.5] * 5})
    found.write(tmp_path / "models" / "fake.json")
    lines = figures.models(tmp_path).splitlines()
    assert lines[0].startswith("fake, float16 (nowhere), [page](benchmarks/results/models/fake.html); fake, torch 2.11")
    assert lines[-1] == "| 8 x 128 | peer | 1 | 8 |  | 0.5 | 2.00 | 2.00–2.00 | 16.0 | 100 | 160 |"
    found.ceilings[1]["matmul"] = 90.0
    found.write(tmp_path / "models" / "fake.json")
    assert "This run does not count: the matmul ceiling drifted by -10.0 %" in figures.models(tmp_path)


def test_what_a_run_draws_is_of_the_file_that_it_writes(tmp_path):
    found = result({"peer": [1.0] * 5, "mine": [0.5] * 5}, after=101.23456789)
    found.write(tmp_path / "fake.json")
    bench.write_reports(tmp_path / "fake")
    assert Image.open(tmp_path / "fake.png").text["Source"] == digest(load(tmp_path / "fake.json").as_dict())
