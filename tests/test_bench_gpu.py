"""`trimaran bench` on a GPU: every engine on a BERT of two layers, so that one call shows all that is broken."""

import pytest
from rich.console import Console

from trimaran.benchmarks import bench, tables
from trimaran.benchmarks.engines.catalog import ENGINES
from trimaran.benchmarks.worker import Plan
from trimaran.benchmarks.workload import Case

pytestmark = pytest.mark.gpu
PATIENT = {"torch.compile max-autotune"}  # minutes, for the same code as the other modes
OPTIONAL = {  # what may be missing, or may refuse this model
    "transformers Liger CUDA graph", "transformers use_kernels CUDA graph", "onnxruntime given file",
    "onnxruntime transformers exporter fusions", "onnxruntime TensorRT provider", "TensorRT CUDA graph", "nvFuser",
    "DeepSpeed inference", "AITemplate", "Kernl", "AOTInductor CUDA graph",
    *(f"transformers CUDA graph SDPA {backend}" for backend in ("flash", "cuDNN", "memory-efficient")),  # its mask
}  # fmt: skip
ONLY_PADDED = {"transformers unpadded varlen"}
CASES = [Case(1, 16), Case(4, 32), Case(4, 32, "uniform")]


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    names = [engine.name for engine in ENGINES if engine.name not in PATIENT]
    plan = Plan("tiny-bert", "float16", CASES, names, rounds=5, stream_s=0.3)
    folder = tmp_path_factory.mktemp("bench")
    found = bench.bench(plan.starting_now(280), folder, Console(stderr=True))
    Console(width=160).print(tables.report(found))
    return found, folder


@pytest.mark.timeout(400)
def test_every_engine_runs_or_is_listed_with_its_reason(ran):
    found, folder = ran
    assert found.complete, (found.incomplete_because, (folder / "bench.log").read_text()[-3000:])
    assert [state.name for state in found.engines] == [e.name for e in ENGINES if e.name not in PATIENT]
    broken = [f"{state.name}: {state.reason}" for state in found.engines
              if state.reason and state.name not in OPTIONAL]  # fmt: skip
    broken += [
        f"{case.name}, {row.engine}: {row.reason}"
        for case in found.cases
        for row in case.rows
        if row.reason and row.engine not in OPTIONAL
        and not (row.engine in ONLY_PADDED and case.lengths == "dense")
    ]  # fmt: skip
    assert not broken, "\n".join(broken)


def test_every_time_is_there(ran):
    found, _ = ran
    for case in found.cases:
        assert case.gpu["sm_mhz"] > 0
        for row in case.timed():
            assert len(row.wall_ms) == len(row.device_ms) == len(row.host_ms) == 5, row.engine
            assert 0 < row.error < 0.05
    assert all(row.launches for row in found.cases[0].timed()), [
        r.engine for r in found.cases[0].timed() if not r.launches
    ]
    assert {stream.engine for stream in found.streams if stream.p99_ms} > {"trimaran PyTorch"}


def test_a_cold_start_is_timed(tmp_path):
    from trimaran.benchmarks import cold

    case = CASES[0].as_dict()
    rows = list(cold.run("tiny-bert", "float16", ["trimaran PyTorch"], case, lambda: 120.0, lambda engine, doing: None))
    assert [row.cache for row in rows] == ["empty", "warm"]
    assert all(row.first_s > 0 for row in rows), rows


def test_what_poisons_the_gpu_is_found_out_and_left_out(tmp_path, monkeypatch):
    """An engine whose kernel reads where nothing is: its worker ends, and another goes on."""
    from trimaran.benchmarks import supervise

    script = tmp_path / "poison.py"
    script.write_text(POISON)
    monkeypatch.setattr(supervise, "COMMAND", [*supervise.COMMAND[:1], str(script)])
    names = ["transformers eager", "poison"]
    plan = Plan("tiny-bert", "float16", [Case(1, 16)], names, rounds=2, profile=False).starting_now(200)
    found = bench.bench(plan, tmp_path / "out", Console(stderr=True))
    assert found.complete, found.incomplete_because
    assert [row.engine for row in found.cases[0].timed()] == ["transformers eager"]
    (poison,) = [state for state in found.engines if state.name == "poison"]
    assert poison.failed
    assert poison.reason.startswith("took its process down")


POISON = """
import torch, triton
import triton.language as tl
from trimaran.benchmarks import worker
from trimaran.benchmarks.engines.catalog import ENGINES
from trimaran.benchmarks.engines.contract import Built, Engine, anywhere

@triton.jit
def wild(x_ptr, far):
    tl.store(x_ptr + far, 1.0)

def build(subject, example):
    def call(inputs):
        wild[(1,)](torch.zeros(1, device="cuda"), 1 << 45)
        return subject.forward(subject.model, inputs)
    return Built(call)

kept = worker.work
worker.work = lambda plan, emit: kept(plan, emit, (*ENGINES[:1], Engine("poison", "fakes", build, anywhere)))
worker.main()
"""
