"""optimize_model: what is replaced, that it is as right as before, and that it can be taken back."""

import copy
import itertools
import pickle
import threading
import time

import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from transformers import BertConfig, BertModel, GPT2Config, GPT2Model

import trimaran
from trimaran.kernels.interpreter import interpret

pytestmark = pytest.mark.usefixtures("fresh_compiler")

BERT = {"attention": 2, "layer_norm": 1, "linear": 5, "linear_norm": 4}
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def bert(**options):
    torch.manual_seed(0)
    config = {
        "vocab_size": 50,
        "hidden_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "intermediate_size": 64,
    }
    return BertModel(BertConfig(**config, **options)).eval()


def batch(size=3, length=9, device="cpu", pad=True):
    generator = torch.Generator().manual_seed(size * 100 + length)
    ids = torch.randint(0, 50, (size, length), generator=generator)
    lengths = torch.arange(size)[:, None] * 2 if pad else 0
    mask = (torch.arange(length) < length - lengths).long().expand(size, length)
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}


def hidden(model, inputs):
    return model(**inputs).last_hidden_state


def assert_as_right(model, inputs, **limits):
    """The optimized model is as near to fp64 as the eager one."""
    with torch.no_grad():
        exact = hidden(copy.deepcopy(model).double(), inputs)
        with trimaran.torch_path.optimize.untouched(model):
            eager = hidden(model, inputs)
    ours = hidden(model, inputs)
    limit = 3 * (eager - exact).abs().max().item() + 2.0**-20
    assert (ours - exact).abs().max().item() <= limit
    return ours


QUICK = [(False, 1, False), (False, 3, True), (True, 3, True)]
CALLS = itertools.product([False, True], [1, 3], [False, True])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("interpreted", "size", "pad"), [pytest.param(*c, marks=[] if c in QUICK else pytest.mark.slow) for c in CALLS]
)
def test_bert(device, interpreted, size, pad):
    model = bert().to(device)
    report = trimaran.optimize_model(model)
    inputs = batch(size, device=device, pad=pad)
    with interpret(interpreted):
        assert_as_right(model, inputs)
        assert_as_right(model, {"input_ids": inputs["input_ids"]})
    assert report.replaced == BERT
    assert not report.near_misses
    slower = {op: f"{op}: {op} in fp32 is slower than the vendor's" for op in ("linear", "linear_norm")}
    assert set(report.fallbacks) == (set(slower.values()) if device == "cuda" else set())


@pytest.mark.parametrize("device", DEVICES)
def test_lengths_that_were_not_traced(device):
    model = bert().to(device)
    report = trimaran.optimize_model(model)
    for length in (4, 9, 5, 17, 30, 2):
        assert_as_right(model, batch(2, length, device))
        assert_as_right(model, batch(3, length, device))
    assert all(graph.replaced == BERT for graph in report.graphs)
    assert len(report.graphs) <= 4, "dynamic sizes share a graph"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    model = bert().to(dtype)
    report = trimaran.optimize_model(model)
    inputs = batch()
    with torch.no_grad():
        exact = hidden(copy.deepcopy(model).double(), inputs)
        eager = model._call_impl(**inputs).last_hidden_state
    ours = hidden(model, inputs)
    assert ours.dtype == dtype
    assert (ours - exact).abs().max() <= 3 * (eager - exact).abs().max()
    assert report.replaced == BERT


def test_causal_model():
    torch.manual_seed(0)
    model = GPT2Model(GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=4, n_positions=64)).eval()
    report = trimaran.optimize_model(model)
    inputs = {**batch(2, 7), "use_cache": False}
    assert_as_right(model, inputs)
    assert_as_right(model, {"input_ids": inputs["input_ids"], "use_cache": False})
    assert report.replaced == {**BERT, "linear": 4}


BLOCK = {"attention": 1, "layer_norm": 1, "linear": 1, "linear_norm": 1}


class Block(nn.Module):
    """A pre-norm block, with grouped heads, causal, or scaled."""

    def __init__(self, kv_heads=4, causal=False, scale=None):
        super().__init__()
        torch.manual_seed(0)
        self.norm1, self.norm2 = nn.LayerNorm(32, eps=1e-3), nn.LayerNorm(32)
        self.q, self.kv, self.out = nn.Linear(32, 32), nn.Linear(32, 2 * 8 * kv_heads), nn.Linear(32, 32)
        self.kv_heads, self.causal, self.scale = kv_heads, causal, scale

    def forward(self, x):
        y = self.norm1(x)
        q = self.q(y).unflatten(-1, (4, 8)).transpose(1, 2)
        k, v = (t.unflatten(-1, (self.kv_heads, 8)).transpose(1, 2) for t in self.kv(y).chunk(2, dim=-1))
        a = nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=self.causal, scale=self.scale, enable_gqa=self.kv_heads != 4
        )
        x = x + self.out(a.transpose(1, 2).flatten(2))
        return x + self.norm2(x)


@pytest.mark.parametrize(("kv_heads", "causal", "scale"), [(2, False, None), (1, True, 0.3), (4, True, None)])
def test_grouped_heads_causality_and_scale(kv_heads, causal, scale):
    model = Block(kv_heads=kv_heads, causal=causal, scale=scale).eval()
    x = torch.randn(2, 6, 32)
    with torch.no_grad():
        eager = model(x)
    report = trimaran.optimize_model(model)
    torch.testing.assert_close(model(x), eager, rtol=1e-5, atol=1e-5)
    assert report.replaced == BLOCK


def test_restore_gives_the_same_bits_again():
    model, inputs = bert(), batch()
    before_keys = {**model.__dict__}
    with torch.no_grad():
        before = hidden(model, inputs)
        trimaran.optimize_model(model)
        hidden(model, inputs)
        trimaran.restore(model)
        assert torch.equal(hidden(model, inputs), before)
    assert model.__dict__.keys() == before_keys.keys()
    with pytest.raises(ValueError, match="is not optimized"):
        trimaran.report(model)


def test_optimizing_twice_is_optimizing_once():
    model = bert()
    report = trimaran.optimize_model(model)
    hidden(model, batch())
    assert trimaran.optimize_model(model) is report is trimaran.report(model)
    assert len(report.graphs) == 1


def test_weights_are_read_at_every_call():
    model, inputs = bert(), batch()
    trimaran.optimize_model(model)
    hidden(model, inputs)
    with torch.no_grad():
        model.encoder.layer[0].attention.output.LayerNorm.weight.data += 0.5
        model.encoder.layer[1].attention.self.query.weight.mul_(1.5)
        model.load_state_dict({k: v * 1.01 if v.is_floating_point() else v for k, v in model.state_dict().items()})
        expected = model._call_impl(**inputs).last_hidden_state
    torch.testing.assert_close(hidden(model, inputs), expected, rtol=1e-4, atol=1e-4)


def test_state_dict_copies_and_pickles_are_the_plain_models():
    model, inputs = bert(), batch()
    keys = list(model.state_dict())
    with torch.no_grad():
        plain = hidden(model, inputs)
    trimaran.optimize_model(model)
    hidden(model, inputs)
    assert list(model.state_dict()) == keys
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with torch.no_grad():
            assert torch.equal(hidden(other, inputs), plain)
            other.embeddings.LayerNorm.bias.add_(1)
            assert not torch.equal(hidden(other, inputs), plain)
    torch.testing.assert_close(hidden(model, inputs), plain, rtol=1e-4, atol=1e-4)


def test_training_runs_the_untouched_model():
    model = bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    report = trimaran.optimize_model(model)
    model.train()
    hidden(model, batch()).sum().backward()
    assert model.embeddings.LayerNorm.weight.grad is not None
    assert report.fallbacks == {"the model is in training mode": 1}
    model.eval()
    assert not hidden(model, batch()).requires_grad
    assert "without the kernels, 1 times: the model is in training mode" in str(report)


def test_inputs_that_require_a_gradient_run_the_untouched_model():
    model = Block().eval()
    report = trimaran.optimize_model(model)
    x = torch.randn(2, 6, 32, requires_grad=True)
    model(x).sum().backward()
    assert x.grad is not None
    assert report.fallbacks == {"an input requires a gradient": 1}


def test_hooks_run():
    model, seen = bert(), []
    model.register_forward_hook(lambda *_: seen.append(True))
    trimaran.optimize_model(model)
    hidden(model, batch())
    assert seen == [True]


@pytest.mark.parametrize("verb", ["optimize_model", "restore", "report"])
@pytest.mark.parametrize("wrong", [None, "bert-base", BertModel])
def test_only_modules_are_models(verb, wrong):
    with pytest.raises(TypeError, match=r"model is a \w+, expected a torch.nn.Module"):
        getattr(trimaran, verb)(wrong)


def test_a_compiled_model_is_refused_and_left_alone():
    model = bert()
    model.compile(backend="eager")
    before = model._compiled_call_impl
    with pytest.raises(ValueError, match="model is compiled"):
        trimaran.optimize_model(model)
    assert model._compiled_call_impl is before


def test_restore_wants_an_optimized_model():
    with pytest.raises(ValueError, match=r"model \(BertModel\) is not optimized"):
        trimaran.restore(bert())


def test_an_attention_whose_shapes_disagree_is_the_models_own_error():
    class Wrong(nn.Module):
        def forward(self, x):
            return nn.functional.scaled_dot_product_attention(x, x[..., :4], x)

    model = Wrong().eval()
    trimaran.optimize_model(model)
    with pytest.raises(RuntimeError, match=r"size|shape"):
        model(torch.randn(1, 2, 3, 8))


def test_many_models_do_not_share_dynamos_limit():
    x = torch.randn(2, 6, 32)
    for _ in range(10):
        model = Block().eval()
        report = trimaran.optimize_model(model)
        model(x)
        assert not report.fallbacks


def test_inside_a_compiled_model():
    inner, x = Block().eval(), torch.randn(2, 6, 32)
    outer = nn.Sequential(inner, nn.ReLU())
    with torch.no_grad():
        expected = outer(x)
        report = trimaran.optimize_model(inner)
        torch.testing.assert_close(torch.compile(outer, backend="eager")(x), expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(outer(x), expected, rtol=1e-5, atol=1e-5)
    assert report.replaced == BLOCK


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_kernels_are_really_launched(dtype):
    model = bert().to("cuda", dtype)
    trimaran.optimize_model(model)
    inputs = batch(device="cuda")
    for _ in range(3):
        hidden(model, inputs)
    with torch.profiler.profile() as profile:
        hidden(model, inputs)  # a replay
    names = [event.name for event in profile.events()]
    assert names.count("attention_kernel" if dtype == torch.float32 else "attention_few_kernel") == 2
    joined = 0 if dtype == torch.float32 else 4  # with linear layers, which in fp32 are the vendor's
    assert names.count("layer_norm_kernel") == 1
    assert names.count("sum_norm_kernel") == joined


@pytest.mark.gpu
def test_an_old_gpu_gets_the_reference_and_the_report_says_so(monkeypatch):
    from trimaran.kernels import driver
    from trimaran.kernels.contract import Device

    model = bert().cuda()
    report = trimaran.optimize_model(model)
    monkeypatch.setattr(driver.driver(0), "device", Device("cuda", 0, 75, 40, 65536))
    hidden(model, batch(device="cuda"))
    assert report.fallbacks["attention: attention needs a GPU of compute capability 8.0, this one has 7.5"] == 2


def test_a_batchs_mask_is_no_lookup(monkeypatch):
    """transformers broadcasts it by indexing with every row and column; also where sizes are symbols nothing of that
    is left."""
    from trimaran.torch_path import optimize

    seen, rewrite = [], optimize.rewrite

    def watched(module, rules):
        found = rewrite(module, rules)
        seen.append({node.target for node in module.graph.nodes})
        return found

    monkeypatch.setattr(optimize, "rewrite", watched)
    model = bert()
    trimaran.optimize_model(model)
    for size, length in ((3, 9), (4, 7), (5, 11)):
        assert_as_right(model, batch(size, length))
    assert len(seen) > 1
    for targets in seen:
        assert torch.ops.aten.index.Tensor not in targets
        assert torch.ops.trimaran.attention.default in targets


def test_a_thread_calls_while_another_traces(monkeypatch):
    """torch refuses calls of what is compiled while anybody traces; they wait, and the mha setting is put back."""
    from trimaran.torch_path import capture

    inside, go, results = threading.Event(), threading.Event(), {}

    class Slow(capture.Interpreter):
        def run(self, *args, **kwargs):
            inside.set()
            assert go.wait(60)
            return super().run(*args, **kwargs)

    models = [bert(), bert()]
    expected = hidden(models[0], batch())
    for model in models:
        trimaran.optimize_model(model)
    hidden(models[1], batch())
    monkeypatch.setattr(capture, "Interpreter", Slow)

    def work(n):
        results[n] = hidden(models[n], batch())

    tracing, calling = (threading.Thread(target=work, args=(n,)) for n in (0, 1))
    tracing.start()
    assert inside.wait(60)
    calling.start()
    time.sleep(0.5)  # some releases of torch refuse it until now
    go.set()
    for thread in (tracing, calling):
        thread.join(120)
    torch.testing.assert_close(results[0], expected)
    torch.testing.assert_close(results[1], expected)
    assert torch.backends.mha.get_fastpath_enabled()


def test_a_trace_of_the_users_own_is_not_waited_for():
    model = bert()
    trimaran.optimize_model(model)
    with pytest.raises(RuntimeError, match="FX to symbolically trace"):
        make_fx(lambda: model(**batch()).last_hidden_state)()
