"""CUDA graphs: a replay answers as the graph does that it was captured from, or there is none, and the report says why.

On the CPU a stand-in captures and replays; with a GPU, torch does."""

import copy
import gc
import pickle
import threading
import weakref

import fake_graphs
import pytest
import torch
from test_optimize import batch, bert
from torch import nn
from transformers import GPT2Config, GPT2Model
from transformers.modeling_outputs import BaseModelOutputWithPoolingAndCrossAttentions

import trimaran
from trimaran.torch_path import graphs
from trimaran.torch_path.optimize import untouched

CALLS = 4


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request, monkeypatch):
    if request.param == "cpu":
        fake_graphs.use(monkeypatch)
    return request.param


class Small(nn.Module):
    """A layer that is replaced, and a norm."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.norm = nn.Linear(32, 32), nn.LayerNorm(32)

    def forward(self, x):
        return self.norm(x + self.linear(x))


def rows(size, length, device, seed=0):
    return torch.randn(size, length, 32, generator=torch.Generator().manual_seed(seed)).to(device)


def eager(model, *args, **kwargs):
    with torch.no_grad(), untouched(model):
        return model(*args, **kwargs)


def assert_as_eager(model, *args, **kwargs):
    torch.testing.assert_close(model(*args, **kwargs), eager(model, *args, **kwargs), rtol=1e-4, atol=1e-4)


def optimized(model, device, **options):
    model = model.eval().to(device)
    return model, trimaran.optimize_model(model, **options)


def test_bert_is_replayed(device):
    model, report = optimized(bert(), device)
    for seed in range(CALLS):
        inputs = batch(3, 9, device)
        inputs["input_ids"] = (inputs["input_ids"] + seed) % 50
        ours, expected = model(**inputs), eager(model, **inputs)
        assert type(ours) is BaseModelOutputWithPoolingAndCrossAttentions
        assert list(ours) == list(expected)
        for key in ours:
            torch.testing.assert_close(ours[key], expected[key], rtol=1e-4, atol=1e-4)
    assert report.cuda_graphs == 1
    assert not report.without_graph
    assert "1 CUDA graph, " in str(report)


def test_grad_mode_is_as_fast(device):
    """Plain eval(), inputs that need no gradient: replayed as often as under no_grad."""
    replayed = []
    for mode in (False, True):
        model, report = optimized(bert(), device)
        before = fake_graphs.FakeRecorder.replayed
        with torch.set_grad_enabled(mode):
            for seed in range(CALLS):
                inputs = batch(3, 9, device)
                inputs["input_ids"] = (inputs["input_ids"] + seed) % 50
                ours = model(**inputs).last_hidden_state
                assert not ours.requires_grad
                torch.testing.assert_close(ours, eager(model, **inputs).last_hidden_state, rtol=1e-4, atol=1e-4)
        replayed.append(fake_graphs.FakeRecorder.replayed - before)
        assert report.cuda_graphs == 1
        assert not report.without_graph
        if device == "cpu":
            assert not report.fallbacks
    assert replayed[0] == replayed[1]
    if device == "cpu":
        assert replayed[1] >= CALLS - 2


def test_outputs_are_the_callers_own(device):
    model, _ = optimized(Small(), device)
    results = [model(rows(2, 8, device, seed)) for seed in range(5)]
    kept = [result.clone() for result in results]
    results[-1].zero_()
    model(rows(2, 8, device))
    for result, copied in zip(results[:-1], kept[:-1], strict=True):
        assert torch.equal(result, copied)
    assert len({result.data_ptr() for result in results}) == len(results)


class Outputs(nn.Module):
    """Returns all kinds of outputs: an argument, views of it and of a weight, two halves of one tensor, no tensor."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 6))

    def forward(self, x, flag=True):
        y = (x @ self.weight).sin()
        left, right = y.chunk(2, -1)
        return {
            "x": x,
            "view": x[:, 1:],
            "weight": self.weight[1:, ::2],
            "left": left,
            "right": right,
            "again": right,
            "transposed": y.cos().T,
            "none": None,
            "size": x.shape[0] if flag else 0,
        }


def test_all_kinds_of_outputs(device):
    model, report = optimized(Outputs(), device)
    for seed in range(CALLS):
        x = torch.randn(3, 5, device=device, generator=torch.Generator(device).manual_seed(seed))[:, :4]
        ours, expected = model(x), eager(model, x)
        torch.testing.assert_close(ours, expected)
        assert ours["x"] is x
        assert ours["view"].data_ptr() == x[:, 1:].data_ptr()
        assert ours["weight"].data_ptr() == model.weight[1:, ::2].data_ptr()
        assert ours["left"].untyped_storage().data_ptr() == ours["right"].untyped_storage().data_ptr()
        assert ours["again"] is ours["right"]
        assert ours["transposed"].stride() == expected["transposed"].stride()
        assert not ours["transposed"].requires_grad
    assert report.cuda_graphs == 1, report


def strided(x):
    return torch.stack((x, x), -1)[..., 0]


@pytest.mark.parametrize(
    "form", [lambda x: x.mT.contiguous().mT, strided, lambda x: x[:1].expand(3, -1, -1), lambda x: x[:, :, :1]]
)
def test_inputs_of_any_strides(device, form):
    class Sine(nn.Module):
        def forward(self, x):
            return x.sin().sum(1), x.cos()

    model, report = optimized(Sine(), device)
    for seed in range(CALLS):
        x = form(torch.randn(3, 5, 4, device=device, generator=torch.Generator(device).manual_seed(seed)))
        assert_as_eager(model, x)
    assert report.cuda_graphs == 1, report


def test_elements_that_share_memory_are_no_input_of_a_graph(device):
    model, report = optimized(Small(), device)
    x = torch.randn(2, 200, device=device).as_strided((2, 6, 32), (200, 16, 1))
    for _ in range(CALLS):
        assert_as_eager(model, x)
    assert set(report.without_graph) == {"elements of an argument share memory"}


def test_flags_and_names_are_told_apart(device):
    class Flags(nn.Module):
        def forward(self, x, y=None, scale=1, names=("a",)):
            return x * scale + (0 if y is None else y["bias"]) + len(names)

    model, report = optimized(Flags(), device)
    x, y = torch.randn(2, 3, device=device), {"bias": torch.randn(3, device=device)}
    for _ in range(CALLS):
        for kwargs in ({}, {"scale": 2}, {"scale": 2.0}, {"scale": True}, {"y": y}, {"names": ["b", "c"]}):
            assert_as_eager(model, x, **kwargs)
    assert report.cuda_graphs == 6, report


def test_grad_modes(device):
    model, report = optimized(Small(), device)
    for mode in (torch.no_grad, torch.inference_mode, torch.enable_grad, torch.inference_mode, torch.no_grad):
        with mode():
            for length in (7, 7, 7, 9, 9, 9):
                x = rows(2, length, device)
                ours = model(x)
                assert ours.is_inference() == torch.is_inference_mode_enabled()
                assert not ours.requires_grad
                torch.testing.assert_close(ours, eager(model, x), rtol=1e-4, atol=1e-4)
    assert report.cuda_graphs >= 2


def test_autocast(device):
    model, report = optimized(Small(), device)
    x = rows(2, 7, device)
    for enabled in (False, True, False, True) * 3:
        with torch.autocast(device, dtype=torch.bfloat16, enabled=enabled):
            ours, expected = model(x), eager(model, x)
        assert ours.dtype == expected.dtype
        torch.testing.assert_close(ours, expected, rtol=0.05, atol=0.05 if enabled else 1e-4)
    assert not report.without_graph or device == "cpu", "a CPU's autocast is no part of the key"


class Writes(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("count", torch.zeros(3))

    def forward(self, x):
        self.count.add_(1)
        return x + self.count


class Random(nn.Module):
    def forward(self, x):
        return nn.functional.dropout(x, 0.5, training=True)


class Waits(nn.Module):
    def forward(self, x):
        return x[x > 0]


class Branches(nn.Module):
    def forward(self, x):
        return x + 1 if x.sum() > 0 else x - 1


WHY = {
    Writes: "the model writes into its inputs or its state (aten.add_.Tensor)",
    Random: "the model draws random numbers (aten.dropout.default)",
    Waits: "",
    Branches: "",
}


@pytest.mark.parametrize("kind", WHY)
def test_what_cannot_be_captured_runs_without(device, kind):
    model, report = optimized(kind(), device)
    twin = copy.deepcopy(model)
    for step in range(CALLS):
        x = torch.full((2, 3), step - 1.5, device=device)
        torch.manual_seed(step)
        ours = model(x)
        torch.manual_seed(step)
        with untouched(twin):
            torch.testing.assert_close(ours, twin(x))
    if WHY[kind]:
        assert report.cuda_graphs == 0
        assert report.without_graph == {WHY[kind]: CALLS}, report
        assert f"without a CUDA graph, {CALLS} times: {WHY[kind]}" in str(report)


def test_a_capture_that_fails_is_said_once_and_the_call_is_right(monkeypatch):
    recorder = fake_graphs.use(monkeypatch)
    model, report = optimized(Small(), "cpu")
    recorder.fail = RuntimeError("operation not permitted\nwhen stream is capturing")
    for _ in range(CALLS):
        assert_as_eager(model, rows(2, 6, "cpu"))
    reason = "it could not be captured: RuntimeError: operation not permitted"
    assert report.without_graph == {reason: CALLS - 1}
    assert report.cuda_graphs == 0


@pytest.mark.gpu
def test_a_capture_that_fails_on_a_gpu():
    @torch.library.custom_op("trimaran_tests::peek", mutates_args=())
    def peek(x: torch.Tensor) -> torch.Tensor:
        return x + x.sum().item()

    peek.register_fake(torch.empty_like)

    class Peeks(nn.Module):
        def forward(self, x):
            return torch.ops.trimaran_tests.peek(x)

    model, report = optimized(Peeks(), "cuda")
    other, others = optimized(Small(), "cuda")
    for _ in range(CALLS):
        assert_as_eager(model, torch.randn(4, device="cuda"))
        other(rows(2, 7, "cuda"))
    assert report.cuda_graphs == 0
    assert others.cuda_graphs == 1, "a failed capture leaves others alone"
    assert any(reason.startswith("it could not be captured: ") for reason in report.without_graph), report


def test_cache_objects_are_no_inputs_of_a_graph(device):
    config = GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    model, report = optimized(GPT2Model(config), device)
    for _ in range(CALLS):
        first = model(**batch(2, 7, device, pad=False), use_cache=True)
        ids = torch.ones(2, 1, dtype=torch.long, device=device)
        again = model(input_ids=ids, past_key_values=first.past_key_values)
        assert again.last_hidden_state.shape == (2, 1, 32)
    assert "an argument is a DynamicCache, neither a tensor nor a plain value" in report.without_graph


def test_tensors_that_are_always_others_end_the_attempts(device):
    class Held(nn.Module):
        def forward(self, x):
            return x + self.table

    model, report = optimized(Held(), device)
    for seed in range(8):
        model.table = torch.full((3,), float(seed), device=device)
        assert_as_eager(model, torch.randn(2, 3, device=device))
    assert report.without_graph[graphs.MOVED] == 8 - 2 - graphs.PATIENCE, report
    assert report.cuda_graphs == 0


def test_the_number_of_graphs_is_bounded(device):
    model, report = optimized(Small(), device, max_graphs=3)
    for _ in range(2):
        for length in range(2, 7):
            for _ in range(3):
                assert_as_eager(model, rows(1, length, device))
            assert report.cuda_graphs <= 3
    assert report.cuda_graphs == 3
    for bad, error in ((-1, "max_graphs is -1, expected 0 or more"),):
        with pytest.raises(ValueError, match=error):
            trimaran.optimize_model(Small().eval(), max_graphs=bad)


def test_what_goes_back_and_forth_is_captured_once_each(device):
    """Several graphs of Dynamo's answer one kind of call in turn: a flag, or symbols that fit the same shapes."""

    class Flagged(Small):
        flag = True

        def forward(self, x):
            return super().forward(x) if self.flag else x * 2

    model, report = optimized(Flagged(), device)
    x = rows(2, 7, device)
    for _ in range(4):
        for model.flag in (True, False):
            for _ in range(2):
                assert_as_eager(model, x)
    assert report.cuda_graphs == 2
    assert not report.without_graph
    shapes = [(2, 7), (3, 7), (2, 8), (2, 7), (4, 9), (3, 7), (2, 7), (2, 8)]
    for size, length in shapes * 3:
        assert_as_eager(model, rows(size, length, device))
    assert not report.without_graph


def test_no_graphs_where_none_are_wanted(device):
    model, report = optimized(Small(), device, max_graphs=0)
    for _ in range(CALLS):
        assert_as_eager(model, rows(1, 4, device))
    assert report.cuda_graphs == 0
    assert not report.without_graph


def test_memory_is_bounded(monkeypatch):
    recorder = fake_graphs.use(monkeypatch)
    model, report = optimized(Small(), "cpu")
    model._compiled_call_impl.graphs.max_bytes = 5 * recorder.bytes_each
    for length in range(2, 12):
        for _ in range(3):
            assert_as_eager(model, rows(1, length, "cpu"))
        assert report.graph_bytes <= 5 * recorder.bytes_each
    assert 1 <= report.cuda_graphs <= 5


@pytest.mark.gpu
def test_memory_is_flat_over_many_shapes():
    model, report = optimized(bert(), "cuda", max_graphs=8)
    generator = torch.Generator().manual_seed(0)
    used = []
    for _ in range(50):
        size, length = (int(torch.randint(1, 33, (), generator=generator)) for _ in range(2))
        for _ in range(3):
            model(**batch(size, length, "cuda", pad=False))
        used.append(torch.cuda.memory_reserved())
    assert report.cuda_graphs == 8
    assert used[-1] <= used[9] + (64 << 20), [count >> 20 for count in used]
    trimaran.restore(model)
    assert report.cuda_graphs == 0


def test_old_weights_are_let_go(device):
    model, report = optimized(nn.Sequential(nn.Embedding(50, 32), Small()), device)
    ids = torch.arange(6, device=device)
    for _ in range(CALLS):
        model(ids)
    storage = weakref.ref(model[1].linear.weight.data.untyped_storage())
    model.to(torch.bfloat16)
    model(ids)
    gc.collect()
    assert storage() is None
    assert report.cuda_graphs == 0
    model(ids)
    model(ids)
    assert report.cuda_graphs == 1


def test_restored_copied_and_pickled(device):
    model, report = optimized(Small(), device)
    x = rows(2, 7, device)
    for _ in range(CALLS):
        ours = model(x)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with torch.no_grad():
            twin.linear.weight.mul_(2)
            assert not torch.allclose(twin(x), ours)
    assert torch.equal(model(x), ours)
    trimaran.restore(model)
    assert report.cuda_graphs == 0
    with torch.no_grad():
        assert torch.equal(model(x), copy.deepcopy(model)(x))


def test_refresh_drops_graphs(device):
    model, report = optimized(Small(), device)
    for _ in range(CALLS):
        model(rows(2, 7, device))
    trimaran.refresh(model)
    assert report.cuda_graphs == 0


@pytest.mark.parametrize("streams", [False, True])
def test_threads(device, streams):
    model, report = optimized(Small(), device)
    inputs = [rows(2 + n % 2, 7, device, seed=n) for n in range(4)]
    expected = [eager(model, x) for x in inputs]
    for x in (*inputs, *inputs):
        model(x)
    wrong = []

    def work(n):
        stream = torch.cuda.Stream() if streams and device == "cuda" else None
        with torch.cuda.stream(stream):
            for _ in range(50):
                ours = model(inputs[n])
                if stream is not None:
                    stream.synchronize()
                if not torch.allclose(ours, expected[n], rtol=1e-4, atol=1e-4):
                    wrong.append(n)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert report.cuda_graphs == 2


@pytest.mark.gpu
def test_threads_capture_side_by_side():
    wrong = []

    def work(n):
        model, _ = optimized(Small(), "cuda")
        with torch.cuda.stream(torch.cuda.Stream()), torch.no_grad():
            for length in (5, 5, 5, 9, 9, 9) * 4:
                x = rows(2, length, "cuda", seed=n)
                if not torch.allclose(model(x), eager(model, x), rtol=1e-4, atol=1e-4):
                    wrong.append((n, length))

    threads = [threading.Thread(target=work, args=(n,)) for n in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.gpu
def test_inside_a_capture_of_the_users_own():
    model, _ = optimized(bert(), "cuda")
    inputs = batch(2, 7, "cuda")
    for _ in range(CALLS):
        expected = model(**inputs).last_hidden_state
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ours = model(**inputs).last_hidden_state
    ours.zero_()
    graph.replay()
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


def test_warm_up(device, capsys):
    model, report = optimized(bert(), device)
    assert trimaran.warm_up(model, [(2, 7), batch(1, 9, device)]) is report
    assert report.cuda_graphs == 2
    model(**batch(2, 7, device))
    assert report.cuda_graphs == 2
    for bad in ((3,), (0, 7), (1, 2.0)):
        with pytest.raises(ValueError, match=r"a shape is \(.*\), expected \(batch, length\)"):
            trimaran.warm_up(model, [bad], progress=False)
    with pytest.raises(ValueError, match="is not optimized"):
        trimaran.warm_up(Small(), [(2, 7)])


@pytest.mark.gpu
def test_kernels_are_compiled_side_by_side_and_kept(tmp_path, monkeypatch):
    from trimaran.kernels import compiler

    monkeypatch.setattr(compiler.Path, "home", lambda: tmp_path)
    monkeypatch.setattr(compiler, "_BINARIES", {})
    model, _ = optimized(bert().half(), "cuda")
    model(**batch(2, 7, "cuda"))
    kept = len(compiler._BINARIES)
    assert kept > 3
    assert len(list((tmp_path / ".cache" / "trimaran" / "kernels").iterdir())) == kept


def test_a_model_that_goes_takes_its_graphs_along(device):
    model, _ = optimized(Small(), device)
    for _ in range(CALLS):
        model(rows(2, 7, device))
    left = [weakref.ref(model), weakref.ref(model._compiled_call_impl.graphs)]
    del model
    gc.collect()
    assert [reference() for reference in left] == [None, None]
