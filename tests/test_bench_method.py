"""How `trimaran bench` makes a figure: the gate, the rounds, the clock; on engines that only say how long they take."""

import json
import sys
import time

import pytest
import torch
from bench_fakes import FakeClock, data, doubled

from trimaran.benchmarks import limits, streams, supervise, workload
from trimaran.benchmarks.engines.contract import Built, Engine, Inapplicable, anywhere
from trimaran.benchmarks.engines.transformers_eager import REFERENCE
from trimaran.benchmarks.gate import Gate
from trimaran.benchmarks.models import subject_of
from trimaran.benchmarks.result import Result
from trimaran.benchmarks.sidebyside import Poisoned, measure
from trimaran.benchmarks.worker import Plan, Worker, work
from trimaran.benchmarks.workload import Case, cases_of, inputs_of

CPU = torch.device("cpu")


def measured(clock, entries, **options):
    settings = {"reference": REFERENCE, "dtype": torch.float16, "clock": clock, "rounds": 4, "seed": 0} | options
    return {row.engine: row for row in measure(entries, data(), **settings)}


# One case


def test_times_are_of_one_call_and_short_calls_are_timed_five_times():
    clock = FakeClock()
    found = measured(clock, [clock.entry("short", 1.0, doubled), clock.entry("long", 7.0, doubled)])
    assert found["short"].wall_ms == pytest.approx([1.0] * 4)
    assert found["long"].wall_ms == pytest.approx([7.0] * 4)
    assert found["long"].device_ms == pytest.approx([3.5] * 4)
    assert found["short"].host_ms == []
    rounds = clock.timed[2:]  # each was called once by the clock before
    assert rounds.count("short") == 20
    assert rounds.count("long") == 4


def test_a_wrong_engine_is_refused_before_it_is_timed():
    clock = FakeClock()
    entries = [clock.entry(REFERENCE, 1.0, doubled), clock.entry("wrong", 0.1, lambda inputs: 2.01 * inputs["x"])]
    found = measured(clock, entries)
    assert found["wrong"].wall_ms == []
    assert "RMS error 5.0" in found["wrong"].reason
    assert "wrong" not in clock.timed
    assert found[REFERENCE].wall_ms


def test_an_engine_that_does_not_read_new_inputs_is_found_out():
    clock, first = FakeClock(), data().inputs[0]
    found = measured(clock, [clock.entry("stale", 1.0, lambda inputs: doubled(first))])
    assert "error" in found["stale"].reason
    assert found["stale"].wall_ms == []


def test_what_the_reference_is_off_by_sets_what_is_allowed():
    def off(by):
        return lambda inputs: 2 * inputs["x"] * (1 + by)

    clock = FakeClock()
    entries = [clock.entry("in the middle", 1.0, off(0.0014)), clock.entry(REFERENCE, 1.0, off(0.001)),
               clock.entry("beyond", 1.0, off(0.0016))]  # fmt: skip
    found = measured(clock, entries)
    assert found["in the middle"].wall_ms
    assert found["in the middle"].error == pytest.approx(0.0014, rel=0.01)
    assert "allowed 1.50e-03" in found["beyond"].reason
    alone = measured(clock, [clock.entry("in the middle", 1.0, off(0.0014))])
    assert "allowed 4.88e-04" in alone["in the middle"].reason


def test_a_single_wrong_element_is_seen():
    exact = torch.linspace(1, 2, 100_000).double()
    one = exact.clone()
    one[7] += 0.01
    gate = Gate.of(torch.float16)
    gate.check(exact.half(), exact)
    with pytest.raises(ValueError, match=r"largest error is 5\.0"):
        gate.check(one.float(), exact)


def test_who_has_nothing_to_do_says_so_and_who_fails_later_loses_its_times():
    def refuse(inputs):
        raise Inapplicable("nothing is padded here")

    calls = []

    def breaks(inputs):
        calls.append(1)
        if len(calls) > 12:
            raise RuntimeError("out of luck")
        return doubled(inputs)

    clock = FakeClock()
    entries = [clock.entry("idle", 1.0, refuse), clock.entry("breaks", 1.0, breaks), clock.entry("fine", 1.0, doubled)]
    found = measured(clock, entries)
    assert found["idle"].reason == "nothing is padded here"
    assert found["breaks"].reason == "RuntimeError: out of luck"
    assert found["breaks"].wall_ms == found["breaks"].device_ms == []
    assert len(found["fine"].wall_ms) == 4


def test_rounds_end_when_they_are_enough_and_slow_engines_wait_for_what_they_can_afford():
    clock = FakeClock()
    entries = [clock.entry("fast", 1.0, doubled), clock.entry("slow", 1.0, doubled, slow=True)]
    found = measured(clock, entries, enough=lambda done: done >= 2, affordable=lambda entry: entry.last_s > 0)
    assert len(found["fast"].wall_ms) == 2
    assert found["slow"].reason.startswith("left out: a new shape took it 0 s")
    entries[1].last_s = 1.0
    assert measured(clock, entries, affordable=lambda entry: entry.last_s > 0)["slow"].wall_ms


# A worker


def eager(subject, example):
    return Built(lambda inputs: subject.forward(subject.model, inputs))


def explodes(subject, example):
    raise OSError("no such engine")


FAKES = (
    Engine(REFERENCE, "transformers", eager, anywhere),
    Engine("absent", "first table", eager, lambda subject: "it is not installed"),
    Engine("broken", "onnxruntime", explodes, anywhere, ours=True),
    Engine("mine", "trimaran", eager, anywhere, ours=True),
)


def plan(**options):
    names = [engine.name for engine in FAKES]
    settings = {"model": "tiny-bert", "dtype": "float32", "cases": [Case(1, 8), Case(2, 12, "uniform")]}
    return Plan(**settings | {"engines": names, "rounds": 2} | options)


def told(made, engines=FAKES):
    from trimaran.benchmarks import bench

    found, events = bench.new_result(made), []

    def take(kind, event):
        events.append(kind)
        if kind != "at":
            found.take(kind, json.loads(json.dumps(event)))

    work(made, take, engines)
    return found, events


@pytest.fixture
def on_a_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def test_a_run_lists_everybody_and_is_complete(on_a_cpu):
    found, events = told(plan())
    assert [state.name for state in found.engines] == [engine.name for engine in FAKES]
    reasons = {state.name: state.reason for state in found.engines}
    assert reasons["absent"] == "it is not installed"
    assert reasons["broken"] == "OSError: no such engine"
    assert [state.name for state in found.engines if state.failed] == ["broken"]
    assert [case.name for case in found.cases] == ["1 x 8", "2 x 12, uniform"]
    for case in found.cases:
        assert [row.engine for row in case.timed()] == [REFERENCE, "mine"]
        assert all(len(row.wall_ms) == 2 for row in case.timed())
        assert case.flop > 0
        assert case.limit_ms > 0
        assert case.gemms_ms > 0
    assert found.complete
    assert len(found.ceilings) == 2
    assert events.index("ceilings") < events.index("case") < events.index("done")


def test_a_run_past_its_budget_says_what_it_left_out(on_a_cpu):
    found, _ = told(plan(deadline=time.time() - 1))
    assert found.cases == []
    assert not found.complete
    assert found.left_out == ["1 x 8: the budget was used up", "2 x 12, uniform: the budget was used up"]
    assert "incomplete: 1 x 8: the budget was used up" in found.invalid_because()[-1]


def test_an_engine_that_poisons_the_gpu_ends_the_worker(on_a_cpu, monkeypatch, tmp_path):
    class Dead(FakeClock):
        def check_alive(self, engine, reason):
            raise Poisoned(engine, reason)

    monkeypatch.setattr(Worker, "clock", lambda self, inputs: Dead())
    with pytest.raises(Poisoned, match="no such engine") as raised:
        Worker(plan(), lambda kind, event: None, tmp_path, FAKES).run()
    assert raised.value.engine == "broken"


# Workers that die

STUB = """
import json, os, signal, sys, time
plan = json.load(sys.stdin)
def emit(kind, **told):
    print(json.dumps({"kind": kind, **told}), flush=True)
print("engine says a word", file=sys.stderr)
for case in plan["cases"]:
    for engine in plan["engines"]:
        emit("at", engine=engine, doing="rounds")
        if engine == "kills" and engine not in plan["excluded"] and case["batch"] == 2:
            os.kill(os.getpid(), signal.SIGSEGV)
        if engine == "poisons" and engine not in plan["excluded"]:
            emit("poisoned", engine=engine, reason="an illegal access")
            sys.exit(1)
        if engine == "hangs":
            time.sleep(60)
    name = f"{case['batch']} x {case['seq']}"
    emit("case", name=name, batch=case["batch"], seq=case["seq"], lengths="dense", tokens=1.0, flop=None,
         limit_ms=None, gemms_ms=None, gpu={}, rows=[], kernels={})
emit("done")
"""


def supervised(tmp_path, monkeypatch, engines, deadline=0.0):
    stub = tmp_path / "stub.py"
    stub.write_text(STUB)
    monkeypatch.setattr(supervise, "COMMAND", [sys.executable, str(stub)])
    monkeypatch.setattr(supervise, "GRACE_S", 0.0)
    made = plan(cases=[Case(1, 8), Case(2, 8), Case(3, 8)], engines=engines, deadline=deadline)
    found = Result(1, "m", "", "float32", 0, 0, 1, "", {}, {})
    steps = []

    def take(kind, event):
        if kind == "at":
            steps.append(event["doing"])
        else:
            found.take(kind, event)

    supervise.supervise(made, found, take, tmp_path / "log")
    return found, [step for step in steps if "took" in step]


def test_an_engine_that_takes_the_process_down_is_left_out_and_the_rest_is_measured(tmp_path, monkeypatch):
    found, said = supervised(tmp_path, monkeypatch, ["fine", "kills", "poisons"])
    assert [case.name for case in found.cases] == ["1 x 8", "2 x 8", "3 x 8"]
    assert found.complete
    assert said == [
        "took the process down: an illegal access; starting another",
        "took the process down: signal SIGSEGV; engine says a word; starting another",
    ]


def test_a_worker_that_hangs_is_ended_at_the_deadline(tmp_path, monkeypatch):
    found, _ = supervised(tmp_path, monkeypatch, ["fine", "hangs"], deadline=time.time() + 1.0)
    assert not found.complete
    assert found.incomplete_because == "it did not end in time"


# What is run


def test_padded_batches_are_what_they_say(tmp_path):
    subject = subject_of("tiny-bert", torch.float32, CPU, tmp_path)
    case = Case(16, 20, "uniform")
    first, second = inputs_of(subject, case, 0), inputs_of(subject, case, 1)
    lengths = first["attention_mask"].sum(1)
    assert lengths.tolist() == case.sizes(0).tolist()
    assert lengths[0] == 20
    assert 10 <= lengths.min() < lengths.max() <= 20
    assert not torch.equal(first["input_ids"], second["input_ids"])
    assert "attention_mask" not in inputs_of(subject, Case(1, 20))
    assert [c.name for c in cases_of([(1, 16), (8, 16)], ["dense", "uniform"])] == [
        "1 x 16",
        "8 x 16",
        "8 x 16, uniform",
    ]


@pytest.mark.zoo
def test_real_lengths_are_those_of_the_articles(tmp_path):
    case, subject = Case(8, 512, "lee"), subject_of("tiny-bert", torch.float32, CPU, tmp_path)
    sizes = case.sizes(0)
    assert sizes.max() <= 512
    assert len(set(sizes.tolist())) > 4
    inputs = inputs_of(subject, case)
    assert inputs["attention_mask"].sum(1).tolist() == sizes.tolist()
    texts = workload.lee()
    assert len(texts) == 300
    assert all(text[0] == 101 and text[-1] == 102 for text in texts), "as MiniLM's tokenizer marks them"


def test_flop_are_counted_by_rows_and_by_pairs(tmp_path):
    subject = subject_of("tiny-bert", torch.float32, CPU, tmp_path)
    case = Case(4, 32)
    found = limits.work_of(subject, inputs_of(subject, case))
    tokens, hidden, wide, layers = 4 * 32, 128, 512, 2
    assert found.rows == 2 * tokens * hidden * (4 * hidden + 2 * wide) * layers
    assert found.pairs == 4 * 4 * 32 * 32 * hidden * layers
    assert found.gemms == {(tokens, hidden, hidden): 4 * layers, (tokens, hidden, wide): layers,
                           (tokens, wide, hidden): layers}  # fmt: skip
    padded = Case(4, 32, "uniform")
    sizes = torch.cat([padded.sizes(0), padded.sizes(1)]).double()
    assert found.useful(case, 2) == found.rows + found.pairs
    useful = found.rows * sizes.mean().item() / 32 + found.pairs * sizes.square().mean().item() / 32**2
    assert found.useful(padded, 2) == pytest.approx(useful)


# Requests


def test_a_request_waits_for_those_before_it():
    now = [0.0]

    def wait(seconds):
        now[0] += max(seconds, 0.0)

    def serve(request):
        now[0] += 1.0

    arriving = [streams.Request(at, 10, {}) for at in (0.0, 0.1, 5.0)]
    latencies, tokens, took = streams.loop(serve, arriving, lambda: now[0], wait, 100.0)
    assert latencies == pytest.approx([1000.0, 1900.0, 1000.0])
    assert (tokens, took) == (30, 6.0)
    assert len(streams.loop(serve, arriving, lambda: now[0], wait, 1.5)[0]) == 2, (
        "an engine that is late is not waited for"
    )


def test_requests_are_the_same_for_everyone_and_padded_to_the_next_length(tmp_path):
    subject = subject_of("tiny-bert", torch.float32, CPU, tmp_path)
    some = streams.requests(subject, 100.0, 50)
    assert [r.arrival for r in some] == [r.arrival for r in streams.requests(subject, 100.0, 50)]
    assert some[-1].arrival == pytest.approx(0.5, rel=0.4)
    for request in some:
        length = request.inputs["attention_mask"].shape[1]
        assert request.inputs["input_ids"].shape == (1, length)
        assert request.inputs["attention_mask"].sum() == request.tokens
        assert length == min(size for size in streams.LENGTHS if size >= request.tokens)
