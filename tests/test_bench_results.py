"""What `trimaran bench` keeps and shows: files, tables, page, and what changed between two results."""

import csv
import json
import math
import re

import numpy as np
import pytest
from bench_fakes import result
from rich.console import Console
from transformers.exporters import OnnxConfig
from typer.testing import CliRunner

from trimaran.benchmarks import bench, changes, page, plots, summary, tables
from trimaran.benchmarks.engines.catalog import ENGINES
from trimaran.benchmarks.result import Cold, Row, Stream, load, write_csv
from trimaran.benchmarks.worker import work
from trimaran.cli import app


def times(ms, seed=0, noise=0.01, rounds=30):
    return list(ms * np.random.default_rng(seed).normal(1, noise, rounds))


def usual(**options):
    found = result(
        {"transformers autocast fp16": times(8.0), "peer": times(1.0), "slow peer": times(2.0), "mine": times(0.5),
         "mine too": times(1.5)}, ours=("mine", "mine too"), **options,
    )  # fmt: skip
    found.cases[0].rows.append(Row("refused", reason="RMS error <1>"))
    found.engines.append(type(found.engines[0])("absent", "first table", False, reason="absent is not installed"))
    return found


def shown(renderable):
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(renderable)
    return " ".join(console.export_text().split())


# What follows from a result


@pytest.mark.parametrize(
    ("after", "valid"), [(100.0, True), (102.9, True), (97.1, True), (103.1, False), (96.9, False), (math.nan, False)]
)
def test_drift_beyond_three_percent_makes_a_run_invalid(after, valid):
    found = usual(after=after)
    assert found.valid == valid
    assert shown(tables.verdict(found)).startswith("INVALID: the matmul ceiling drifted by") != valid
    assert ("This run does not count" in page.page(found)) != valid


def test_the_worst_of_several_ceilings_counts():
    found = usual()
    found.ceilings.insert(1, {"copy": 4.0, "matmul": 95.0})
    assert found.drift() == {"copy": 0.0, "matmul": pytest.approx(-5.0)}
    assert not found.valid


def test_the_best_peer_leads_and_kernls_baseline_comes_second():
    (line,) = summary.headlines(usual())
    assert line.peer == "peer"
    assert line.ours_ms == line.ort_ms == pytest.approx(0.5, rel=0.02)
    assert line.speedup["median"] == pytest.approx(2.0, rel=0.02)
    assert line.over_baseline == pytest.approx(16.0, rel=0.02)
    assert line.percent_of_limit == pytest.approx(100.0, rel=0.02)
    assert line.percent_of_gemms == pytest.approx(160.0, rel=0.02)
    text = summary.sentence(usual())
    assert "ahead in 1 of 1 cases" in text
    assert text.index("best peer") < text.index("autocast")
    columns = [column.header for column in tables.headline_table(usual()).columns]
    assert columns.index("best peer") < columns.index("autocast fp16") < columns.index("trimaran PyTorch")


def test_where_we_lose_is_told():
    found = usual()
    assert [(row[1], row[3]) for row in summary.lost(found)] == [("mine too", "peer")]
    lost = page.page(found).split("Where we lose")[1].split("<h2>")[0]
    assert "mine too" in lost
    assert "1.5" in lost
    found.cases[0].rows = [row for row in found.cases[0].rows if row.engine != "mine"]
    (line,) = summary.headlines(found)
    assert line.lost
    assert 'class="lost"' in page.page(found)


# Files


def test_a_result_comes_back_as_it_was_written(tmp_path):
    found = usual()
    found.cold = [Cold("mine", "empty", "8 x 128", 1.0, 2.0, 3.0, 4.0)]
    found.streams = [Stream("mine", 100.0, 30, 1.0, 2.0, 3000.0)]
    found.cases[0].kernels = {"mine": [("gemm", 3.0)]}
    found.write(tmp_path / "a.json")
    first = load(tmp_path / "a.json")
    first.write(tmp_path / "b.json")
    assert (tmp_path / "a.json").read_text() == (tmp_path / "b.json").read_text()
    assert first.cases[0].rows[3].wall_ms == pytest.approx(found.cases[0].rows[3].wall_ms, rel=1e-3)
    assert first.engines == found.engines
    assert first.streams == found.streams
    assert first.cold == found.cold


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda found: found.pop("rounds"), r"missing fields \['rounds'\]"),
        (lambda found: found["cases"][0].update(more=1), r"cases: CaseResult has unknown fields \['more'\]"),
        (lambda found: found.update(version=99), "has version 99"),
    ],
)
def test_a_file_that_is_no_result_is_refused(tmp_path, change, reason):
    found = usual().as_dict()
    change(found)
    path = tmp_path / "a.json"
    path.write_text(json.dumps(found))
    with pytest.raises(ValueError, match=reason):
        load(path)
    path.write_text("{")
    with pytest.raises(ValueError, match=r"a\.json is not JSON"):
        load(path)


def test_a_run_that_is_cut_leaves_what_it_has_marked_incomplete(tmp_path):
    class Quiet:
        def at(self, engine, doing):
            pass

        def show(self, found):
            pass

    whole = usual()
    found = result({}, ours=())
    found.complete, found.incomplete_because, found.cases, found.ceilings = False, "the run was cut", [], []
    recorder = bench.Recorder(found, tmp_path, Quiet())
    recorder.take("ceilings", {"copy": 4.0, "matmul": 100.0})
    for state in whole.engines:
        recorder.take("engine", vars(state))
    case = json.loads(json.dumps(whole.as_dict()["cases"][0]))
    recorder.take("case", case)
    cut = load(tmp_path / "fake.json")
    assert len(cut.cases[0].timed()) == 5
    assert "incomplete: the run was cut" in cut.invalid_because()
    recorder.take("ceilings", {"copy": 4.0, "matmul": 100.0})
    recorder.take("done", {})
    assert load(tmp_path / "fake.json").valid


def test_csv_has_a_line_for_each_case_and_engine(tmp_path):
    write_csv(usual(), tmp_path / "a.csv")
    with (tmp_path / "a.csv").open() as file:
        lines = {line["engine"]: line for line in csv.DictReader(file)}
    assert list(lines)[-1] == "refused"
    assert float(lines["mine"]["wall_median"]) == pytest.approx(0.5, rel=0.02)
    assert float(lines["mine"]["best_peer_over_this"]) == pytest.approx(2.0, rel=0.02)
    assert lines["refused"]["wall_median"] == ""
    assert lines["refused"]["reason"] == "RMS error <1>"


def test_the_page_has_everything_and_needs_nothing(tmp_path):
    text = page.page(usual())
    assert not re.search(r"""(src|href)=["']?(http|//)|@import|url\(http""", text)
    assert "<svg" in text
    for part in (
        "peer",
        "slow peer",
        "mine too",
        "absent is not installed",
        "RMS error &lt;1&gt;",
        "trimaran bench fake",
    ):
        assert part in text
    assert "<1>" not in text


def test_pictures_are_the_same_for_the_same_result(tmp_path):
    plots.write(usual(), tmp_path / "a")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    svg = (tmp_path / "a.svg").read_text()
    assert svg == plots.svg(usual())
    assert svg != plots.svg(usual(after=110.0))


def test_the_table_lists_who_was_not_measured():
    text = shown(tables.report(usual()))
    assert "not measured: absent: absent is not installed" in text
    assert "not measured: refused: RMS error <1> [8 x 128]" in text
    assert "1 of our 2 rows are slower than the best peer" in text


# Two results


def pair(tmp_path, factor, *, noise=0.01, after=100.0):
    old = usual()
    new = result(
        {"transformers autocast fp16": times(8.0, 1, noise), "peer": times(1.0, 2, noise),
         "slow peer": times(2.0, 3, noise), "mine": times(0.5 * factor, 4, noise), "mine too": times(1.5, 5, noise)},
        ours=("mine", "mine too"), after=after,
    )  # fmt: skip
    old.write(tmp_path / "old.json")
    new.write(tmp_path / "new.json")
    return tmp_path / "old.json", tmp_path / "new.json"


@pytest.mark.parametrize(("factor", "verdict"), [(1.05, "slower"), (1 / 1.05, "faster"), (1.0, "same")])
def test_a_change_of_five_percent_is_found_and_noise_is_not(tmp_path, factor, verdict):
    found = changes.compare(*pair(tmp_path, factor))
    verdicts = {row.engine: row.verdict for row in found.rows}
    assert verdicts.pop("mine") == verdict
    assert set(verdicts.values()) == {"same"}
    row = next(row for row in found.rows if row.engine == "mine")
    assert row.low < factor < row.high
    done = CliRunner().invoke(app, ["bench", "compare", *map(str, pair(tmp_path, factor))])
    assert done.exit_code == (verdict == "slower"), done.output
    assert f"{0 if verdict == 'same' else 1} of 5 rows changed" in " ".join(done.output.split())


@pytest.mark.parametrize("seed", range(10))
def test_noise_alone_is_never_a_change(seed):
    random = np.random.default_rng(seed)
    old, new = (Row("e", wall_ms=list(random.normal(1, 0.03, 30))) for _ in range(2))
    assert changes.change("c", old, new, True, changes.LEAST_PERCENT, 20).verdict == "same"


def test_what_the_machine_did_is_no_change_of_ours(tmp_path):
    found = changes.compare(*pair(tmp_path, 1.05, after=94.0))
    assert found.floor_percent == pytest.approx(6.0)
    assert {row.verdict for row in found.rows} == {"same"}
    assert "new does not count" in found.warnings[0]


def test_only_results_of_one_model_are_compared(tmp_path):
    old, new = pair(tmp_path, 1.0)
    other = json.loads(new.read_text()) | {"model": "another"}
    new.write_text(json.dumps(other))
    done = CliRunner().invoke(app, ["bench", "compare", str(old), str(new)])
    assert done.exit_code == 2
    assert "old is fake in float16, new is another in float16" in " ".join(done.output.split())


# The command


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nobody"], "model is 'nobody', expected a folder, an .onnx file, or one of bert-base"),
        (["tiny-bert", "--engines", "kernal"], "no engine 'kernal'"),
        (["tiny-bert", "--batch", "one"], "batch is 'one', expected numbers"),
        (["tiny-bert", "--shapes", "3"], "shapes is '3', expected batches and lengths"),
        (["tiny-bert", "--seq", "0"], "expected a batch and a length of at least 1"),
        (["tiny-bert", "--lengths", "short"], "lengths is 'short', expected some of dense, uniform, lee"),
        (["vit-b-16", "--lengths", "uniform"], "vit-b-16 takes no attention mask"),
        (["tiny-bert", "--dtype", "int8"], "dtype is 'int8'"),
    ],
)
def test_a_wrong_argument_is_refused(arguments, message, tmp_path):
    done = CliRunner().invoke(app, ["bench", *arguments, "--out", str(tmp_path)])
    assert done.exit_code == 2, done.output
    assert message in " ".join(done.output.split())


def test_shapes_are_crossed_named_and_the_presets_own():
    assert [c.name for c in bench.plan_of("bert-base").cases][:2] == ["1 x 16", "1 x 128"]
    crossed = bench.plan_of("bert-base", batch=[1, 8], seq=[16, 32], lengths=["dense"]).cases
    assert [c.name for c in crossed] == ["1 x 16", "1 x 32", "8 x 16", "8 x 32"]
    assert [c.name for c in bench.plan_of("gpt2", shapes=[(2, 3)]).cases] == ["2 x 3", "2 x 3, uniform"]
    assert [c.name for c in bench.plan_of("vit-b-16").cases] == ["1 x 197", "32 x 197"]


def test_engines_are_chosen_by_group_or_by_a_part_of_their_names():
    names = bench.plan_of("tiny-bert", engines=["trimaran", "flash"]).engines
    assert names[:2] == ["transformers eager", "transformers CUDA graph SDPA flash"], "the reference is always there"
    assert len([name for name in names if name.startswith("trimaran")]) == len(names) - 2 == 5


def ran(tmp_path, monkeypatch, *arguments):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # for the worker's process
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    done = CliRunner().invoke(app, ["bench", "tiny-bert", "--rounds", "2", "--out", str(tmp_path), *arguments])
    assert done.exit_code == 0, done.output
    found = load(tmp_path / "tiny-bert.json")
    assert found.complete
    assert found.source == "random weights, seed 0"
    for suffix in (".csv", ".png", ".svg", ".html"):
        assert (tmp_path / f"tiny-bert{suffix}").stat().st_size > 500
    return found, " ".join(done.output.split())


def test_a_run_on_this_cpu_writes_everything(tmp_path, monkeypatch):
    def in_this_process(plan, result, take, log):
        work(plan, lambda kind, told: take(kind, json.loads(json.dumps(told))))

    monkeypatch.setattr(bench, "supervise", in_this_process)
    found, output = ran(tmp_path, monkeypatch, "--engines", "eager,PyTorch", "--shapes", "2x12")
    assert [case.name for case in found.cases] == ["2 x 12", "2 x 12, uniform"]
    assert {row.engine for row in found.cases[1].timed()} == {"transformers eager", "trimaran PyTorch"}
    assert "trimaran PyTorch" in output
    assert "transformers eager fp32: the run is in fp32" in output
    assert "on a CPU, which has fewer engines" in found.method


@pytest.mark.slow
def test_all_engines_of_this_cpu(tmp_path, monkeypatch):
    found, _ = ran(tmp_path, monkeypatch, "--shapes", "2x12")
    assert [state.name for state in found.engines] == [engine.name for engine in ENGINES]
    runs = {state.name for state in found.engines if state.group in ("onnxruntime", "trimaran")} - {
        "onnxruntime given file", "onnxruntime TensorRT provider", "onnxruntime TorchScript + ORT optimizer packed",
    }  # fmt: skip
    runs.add("transformers eager")
    if "ort_fusions" not in OnnxConfig.__dataclass_fields__:
        runs -= {"onnxruntime transformers exporter fusions"}
    assert {state.name for state in found.engines if not state.reason} == runs
    for case in found.cases:
        assert {row.engine for row in case.timed()} == runs


@pytest.mark.slow
def test_a_cold_start_and_an_open_loop_on_this_cpu(tmp_path, monkeypatch):
    more = ["--engines", "eager,PyTorch", "--shapes", "1x12", "--cold", "--open-loop", "0.3"]
    found, _ = ran(tmp_path, monkeypatch, *more)
    runs = {"transformers eager", "trimaran PyTorch"}
    assert {row.engine for row in found.streams if row.p99_ms} == runs
    assert len({row.load for row in found.streams}) == 2
    assert [(row.reason, row.cache) for row in found.cold] == [("", "empty"), ("", "warm")] * 2
    assert {row.engine for row in found.cold} == runs
