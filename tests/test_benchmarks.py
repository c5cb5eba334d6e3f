"""The kernel benchmark: its method on fake contenders and a fake clock, and one quick run on this CPU."""

import json
import math
import random
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from trimaran.benchmarks import attention, kernels, linear, machine, norms, report, rotary
from trimaran.benchmarks.cases import Case
from trimaran.benchmarks.gate import allowed, error_of
from trimaran.benchmarks.measure import Armed, Contender, HostWatch, Timing, compare, copies_for, percentile
from trimaran.cli import app

CPU = torch.device("cpu")
QUICK = ["layer_norm", "attention", "linear", "gated_linear", "rotary_embedding", "layer"]
EXACT = torch.linspace(1, 2, 1000, dtype=torch.float64)


class FakeClock:
    """Seconds that pass only when a contender says so."""

    def __init__(self) -> None:
        self.now = 0.0
        self.calls: list[tuple[str, int]] = []

    def __call__(self) -> float:
        return self.now

    def contender(self, name: str, ms: float, relative_error: float = 0.0, ours: bool = False) -> Contender:
        def prepare(copy: int):
            def run() -> torch.Tensor:
                self.now += ms / 1e3
                self.calls.append((name, copy))
                return (EXACT * (1 + relative_error)).float()

            return run

        return Contender(name, prepare, ours)


def timed(clock: FakeClock, contenders: list[Contender], **options) -> dict[str, Timing]:
    settings = {"exact": EXACT, "dtype": torch.float32, "watch": HostWatch(clock)} | options
    return {timing.name: timing for timing in compare(contenders, **settings)}


# The clock and the order


def test_times_are_per_call_whatever_a_sample_holds() -> None:
    clock = FakeClock()
    found = timed(clock, [clock.contender("slow", 5.0), clock.contender("fast", 0.01, ours=True)], rounds=7)
    assert found["slow"].samples == pytest.approx([5.0] * 7)
    assert found["fast"].samples == pytest.approx([0.01] * 7)
    assert found["fast"].wall == pytest.approx([0.01] * 7)
    assert found["slow"].calls == 1
    assert found["fast"].calls in (20, 21), "a sample lasts at least 0.2 ms"


def test_percentiles() -> None:
    samples = [float(value) for value in range(1, 102)]
    random.Random(0).shuffle(samples)
    assert [percentile(samples, p) for p in (20, 50, 80, 95)] == pytest.approx([21, 51, 81, 96])
    assert math.isnan(percentile([], 50))
    assert kernels.spread(samples) == pytest.approx({"median": 51, "p20": 21, "p80": 81, "p95": 96})


def orders(seed: int, rounds: int) -> list[tuple[str, ...]]:
    """Who was timed, round by round."""
    clock = FakeClock()
    seen: list[str] = []

    class Watch:
        method = "fake"

        def arm(self, runs) -> Armed:
            def sample() -> float:
                runs[0]()
                seen.append(clock.calls[-1][0])
                return 1.0

            return Armed(sample, lambda: 1.0, 1, runs[0])

    names = ["a", "b", "c"]
    timed(clock, [clock.contender(name, 1.0) for name in names], watch=Watch(), rounds=rounds, seed=seed)
    assert seen[:3] == names, "each is sampled once to check what the timed calls compute"
    return [tuple(seen[i : i + 3]) for i in range(3, len(seen), 3)]


def test_contenders_take_turns_in_an_order_that_the_seed_decides() -> None:
    found = orders(0, 20)
    assert len(found) == 20
    assert all(sorted(order) == ["a", "b", "c"] for order in found)
    assert len(set(found)) > 2
    assert found == orders(0, 20)
    assert found != orders(1, 20)


def test_copies_are_used_in_turn() -> None:
    clock = FakeClock()
    timed(clock, [clock.contender("a", 1.0)], copies=3, rounds=8)
    assert {copy for _, copy in clock.calls} == {0, 1, 2}
    later = [copy for _, copy in clock.calls][-9:]
    assert sorted(later[:3]) == sorted(later[3:6]) == sorted(later[6:]) == [0, 1, 2]


def test_inputs_are_rotated_where_they_fit_the_cache() -> None:
    small, large = torch.empty(10_000_000, dtype=torch.float16), torch.empty(2**27, dtype=torch.float16)
    cuda = torch.device("cuda")
    assert copies_for([small, None], cuda) == 6, "20 MB six times are twice the L2"
    assert copies_for([large], cuda) == 1
    assert copies_for([torch.empty(1)], cuda) == 1024
    assert copies_for([small], CPU) == 1


# The gate


def test_a_wrong_contender_is_refused_with_its_error() -> None:
    clock = FakeClock()
    contenders = [clock.contender("right", 1.0), clock.contender("wrong", 0.1, relative_error=5e-6, ours=True)]
    found = timed(clock, contenders, rounds=3)
    assert found["right"].samples
    assert found["wrong"].samples == found["wrong"].wall == []
    assert "RMS error 5.0" in found["wrong"].reason
    assert "allowed 9.54e-07" in found["wrong"].reason
    assert found["wrong"].error == pytest.approx(5e-6, rel=0.05)


def test_the_gate_follows_the_most_accurate_peer_but_not_ourselves() -> None:
    assert allowed([3e-3, 2e-3], torch.float16) == pytest.approx(3e-3)
    assert allowed([1e-5], torch.float16) == 2.0**-11
    assert allowed([], torch.float16) == 2.0**-11
    clock = FakeClock()
    peers = [clock.contender("peer", 1.0, 4e-6)]
    assert not timed(clock, [*peers, clock.contender("ours", 1.0, 5.9e-6, ours=True)], rounds=1)["ours"].reason
    assert timed(clock, [*peers, clock.contender("ours", 1.0, 6.2e-6, ours=True)], rounds=1)["ours"].reason
    found = timed(clock, [*peers, clock.contender("ours", 1.0, 0.0, ours=True)], rounds=1)
    assert not found["peer"].reason, "what is allowed comes from the peers"


@pytest.mark.parametrize(
    ("outputs", "reason"),
    [
        (torch.full((1000,), math.nan), "not finite"),
        (torch.zeros(999), "shapes"),
        ((EXACT.float(), EXACT.float()), "shapes"),
        (torch.cat([torch.zeros(1), EXACT.float()[1:]]), "largest error"),
    ],
)
def test_outputs_that_never_pass(outputs, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        error_of(outputs, EXACT)


def test_the_gate_sees_every_output_and_takes_none_for_absent() -> None:
    assert error_of((EXACT.float(), None), (EXACT,)) < 1e-7
    with pytest.raises(ValueError, match="largest error"):
        error_of((EXACT.float(), EXACT.float() * 2), (EXACT, EXACT))


def test_who_raises_is_listed_and_the_others_are_timed() -> None:
    clock = FakeClock()

    def refuse(copy: int):
        raise RuntimeError("No available kernel. Aborting execution.\nmore")

    found = timed(clock, [Contender("peer", refuse), clock.contender("ours", 1.0, ours=True)], rounds=2)
    assert found["peer"].reason == "RuntimeError: No available kernel"
    assert found["ours"].samples


def test_what_is_timed_is_checked_too() -> None:
    """A graph may compute something else than the call that it was captured from."""

    class Watch(HostWatch):
        def arm(self, runs) -> Armed:
            armed = super().arm(runs)
            return Armed(armed.sample, armed.wall, armed.calls, lambda: torch.zeros(1000))

    clock = FakeClock()
    found = timed(clock, [clock.contender("ours", 1.0, ours=True)], watch=Watch(clock))
    assert "largest error" in found["ours"].reason
    assert not found["ours"].samples


def test_a_view_of_the_exact_result() -> None:
    half = Contender("half", lambda copy: lambda: EXACT[:500].float(), view=lambda exact: exact[:500])
    assert compare([half], exact=EXACT, dtype=torch.float32, watch=HostWatch(), rounds=1)[0].samples


# Ceilings and ratios


@pytest.mark.parametrize(
    ("after", "valid"), [(100.0, True), (102.9, True), (97.1, True), (103.1, False), (96.9, False), (math.nan, False)]
)
def test_drift_beyond_three_percent_marks_the_run_invalid(after: float, valid: bool) -> None:
    timings = [Timing("ours", True, samples=[1.0], wall=[1.0])]
    case = Case("c", {}, 1e9, lambda copy: {}, lambda inputs: [], lambda first: ())
    suite = kernels.Suite("layer_norm", "copy", [case])
    found = kernels.result(suite, {"copy": 4.0, "matmul": 100.0}, {"copy": 4.0, "matmul": after}, [(case, 1, timings)])
    assert found["valid"] == valid
    assert bool(found["invalid_because"]) != valid
    shown = found | {"method": "m", "rounds": 1}
    assert report.verdict(shown).startswith("INVALID: the matmul ceiling drifted by") != valid


def test_rates_and_ratios() -> None:
    ours, slow, best = (
        Timing(name, name == "ours", samples=samples, wall=samples)
        for name, samples in (("ours", [2.0, 2.0]), ("slow", [9.0, 9.0]), ("best", [1.0, 3.0]))
    )
    found = kernels.row(ours, min([slow, best], key=lambda t: t.median), work=4e9, ceiling=4.0)
    assert found["rate"] == pytest.approx(2.0)
    assert found["percent_of_ceiling"] == pytest.approx(50)
    assert found["ratio"]["median"] == pytest.approx(1.0)
    assert kernels.row(Timing("refused", False, reason="no"), best, 1.0, 1.0)["ms"] is None
    assert kernels.row(ours, None, 1.0, 1.0)["ratio"] is None


def test_only_useful_work_is_counted() -> None:
    assert attention.Shape("full", 2, 3, 8, 4).flop() == 4 * 2 * 3 * 64 * 4
    assert attention.Shape("causal", 2, 4, 8, 4, kv_heads=2).flop() == 4 * 2 * 4 * 36 * 4
    padded = attention.Shape("lengths", 32, 1, 512, 64)
    lengths = padded.lengths()
    assert lengths == padded.lengths()
    assert lengths[0] == 512
    assert min(lengths) >= 256
    assert max(lengths) <= 512
    assert len(set(lengths)) > 10
    assert padded.flop() == 4 * 64 * sum(length**2 for length in lengths)
    assert linear.Shape(2, 3, 4, "gelu").flop() == linear.Shape(2, 3, 4, "qkv").flop() == 2 * 24
    assert linear.Shape(2, 3, 4, "swiglu").flop() == 4 * 24
    assert linear.Layer(2, 4, hidden=8, wide=16).flop() == 2 * 8 * (4 * 64 + 2 * 128) + 4 * 8 * 4 * 8
    assert rotary.Shape(2, 4, 1, 8, 16).moved(torch.float16) == 2 * 8 * 16 * (2 * 2 * 5 + 2)
    assert norms.moved("layer_norm", 10, 8, False, torch.float16) == 2 * (2 * 80 + 16)
    assert norms.moved("rms_norm", 10, 8, True, torch.float16) == 2 * (4 * 80 + 8)


@pytest.mark.parametrize("shape", attention.TINY, ids=lambda shape: shape.name)
def test_the_exact_attention_is_sdpa_in_slices(shape: attention.Shape, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "SLICE", 2 * 32**2)  # so that there is more than one slice
    inputs = attention.case(shape, CPU, torch.float64).inputs
    contender = attention.sdpa(shape, inputs, attention.BACKENDS["SDPA math"])
    torch.testing.assert_close(attention.exact(shape, inputs(0)), contender(0)(), rtol=1e-10, atol=1e-12)


def test_packed_rows_are_the_rows_that_are_not_padding() -> None:
    shape = attention.Shape("lengths", 3, 2, 16, 4)
    full = torch.arange(3 * 2 * 16 * 4.0).view(3, 2, 16, 4)
    packed = attention.pack(full, attention.rows_of(shape))
    torch.testing.assert_close(
        packed, torch.cat([full[b, :, :n].transpose(0, 1) for b, n in enumerate(shape.lengths())])
    )


# The command


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("bench")
    done = CliRunner().invoke(app, ["bench-kernels", *QUICK, "--quick", "--out", str(folder)])
    torch.set_num_threads(threads)
    assert done.exit_code == 0, done.output
    return folder, done.output


@pytest.mark.parametrize("op", QUICK)
def test_a_quick_run_writes_json_with_every_field(ran: tuple[Path, str], op: str) -> None:
    found = json.loads((ran[0] / f"{op}.json").read_text())
    assert found["version"] == kernels.VERSION
    assert {"op", "dtype", "quick", "rounds", "seed", "method", "valid", "invalid_because", "unit", "ceiling"} <= {
        *found
    }
    assert found["method"] == "host clock"
    assert set(found["environment"]) >= {"device", "driver", "torch", "triton", "python", "date", "command"}
    ceilings = found["ceilings"]
    assert set(ceilings["before"]) == set(ceilings["after"]) == set(ceilings["drift_percent"]) == {"copy", "matmul"}
    assert found["valid"] == (not machine.unsteady(ceilings["drift_percent"]))
    assert found["cases"]
    for case in found["cases"]:
        assert {"name", "shape", "work", "copies", "rotated", "contenders"} == {*case}
        ours, *peers = case["contenders"]
        assert ours["ours"]
        assert not ours["reason"]
        assert len(ours["samples_ms"]) == kernels.QUICK_ROUNDS
        assert ours["ms"]["p20"] <= ours["ms"]["median"] <= ours["ms"]["p80"] <= ours["ms"]["p95"]
        assert ours["rate"] == pytest.approx(case["work"] / ours["ms"]["median"] / 1e9)
        assert any(peer["ratio"] and peer["ratio"]["median"] == 1 for peer in peers)
        assert all(bool(peer["reason"]) == (peer["ms"] is None) for peer in peers)


@pytest.mark.parametrize("op", QUICK)
def test_a_quick_run_draws_a_figure(ran: tuple[Path, str], op: str) -> None:
    data = (ran[0] / f"{op}.png").read_bytes()
    assert data.startswith(b"\x89PNG")
    assert int.from_bytes(data[16:20], "big") == 1200


def test_the_table_keeps_everybody(ran: tuple[Path, str]) -> None:
    text = " ".join(ran[1].split())
    for name in ("trimaran", "torch, eager", "SDPA math", "causal b2 h4/2 s32 d16", "8 x 64 + residual"):
        assert name in text
    assert "flex, compiled, not timed: RuntimeError: compiled only on a GPU" in text
    assert "…" not in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["softmax", "--quick"], "no benchmark for softmax"), (["--dtype", "int8", "--quick"], "dtype is 'int8'")],
)
def test_a_wrong_argument_is_refused(arguments: list[str], message: str, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["bench-kernels", *arguments, "--out", str(tmp_path)])
    assert done.exit_code == 2
    assert message in done.output


def test_the_full_cases_need_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    done = CliRunner().invoke(app, ["bench-kernels", "--out", str(tmp_path)])
    assert done.exit_code == 2
    assert "--quick" in done.output


def test_our_refused_contender_fails_the_command(ran: tuple[Path, str], monkeypatch: pytest.MonkeyPatch) -> None:
    found = json.loads((ran[0] / "layer_norm.json").read_text())
    assert kernels.failures([found]) == []
    ours = found["cases"][0]["contenders"][0]
    ours["reason"] = "RMS error 1"
    monkeypatch.setattr(kernels, "bench", lambda *arguments: [found])
    done = CliRunner().invoke(app, ["bench-kernels", "layer_norm", "--quick"])
    assert done.exit_code == 1
    assert "FAILED: layer_norm, 8 x 64: RMS error 1" in done.output


def test_a_declining_plan_is_not_timed_as_ours() -> None:
    with pytest.raises(RuntimeError, match="the plan declines: too wide"):
        kernels.refuse("layer_norm", "too wide")
