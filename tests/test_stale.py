"""An optimized model never gives a stale answer: what is changed in it after its first call is seen at the next."""

import fake_graphs
import pytest
import torch
from torch import nn

import trimaran
from trimaran.torch_path.optimize import untouched


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()


class Config:
    flag = True


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.o, self.norm = nn.Linear(32, 96), nn.Linear(32, 32), nn.LayerNorm(32)
        self.scale = 0.3

    def forward(self, x):
        q, k, v = (t.unflatten(-1, (4, 8)).transpose(1, 2) for t in self.q(x).chunk(3, -1))
        y = nn.functional.scaled_dot_product_attention(q, k, v, scale=self.scale)
        return self.norm(x + self.o(y.transpose(1, 2).flatten(2)))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.config = Config()
        self.first, self.second = Layer(), Layer()
        self.register_buffer("table", torch.randn(32))
        nn.init.normal_(self.first.norm.weight)

    def forward(self, x):
        x = self.first(x + self.table)
        return self.second(x) if self.config.flag else x


class LowRank(nn.Module):
    """A linear layer with an adapter, as peft wraps it."""

    def __init__(self, base):
        super().__init__()
        self.base, self.a, self.b = base, nn.Linear(32, 2, bias=False), nn.Linear(2, 32, bias=False)

    def forward(self, x):
        return self.base(x) + self.b(self.a(x))


def in_place(model):
    with torch.no_grad():
        model.first.q.weight.mul_(1.5)


def through_data(model):
    model.first.o.weight.data *= 3


def load(model):
    model.load_state_dict({name: tensor * 0.9 for name, tensor in model.state_dict().items()})


def load_assigned(model):
    model.load_state_dict({name: tensor * 0.9 for name, tensor in model.state_dict().items()}, assign=True)


def other_parameter(model):
    model.first.norm.weight = nn.Parameter(torch.randn(32))


def other_buffer(model):
    model.table = torch.randn(32)


def other_module(model):
    model.second = Layer().eval()


def adapter(model):
    model.first.o = LowRank(model.first.o).to(model.table.device)


def adapter_merged(model):
    adapter(model)
    model(torch.randn(2, 6, 32).to(model.table.device))
    wrapped = model.first.o
    with torch.no_grad():
        wrapped.base.weight += wrapped.b.weight @ wrapped.a.weight
    model.first.o = wrapped.base


def eps(model):
    model.first.norm.eps = 5.0


def eps_twice(model):
    model.first.norm.eps = 0.5
    model(torch.randn(2, 6, 32).to(model.table.device))
    model.first.norm.eps = 0.25


def scale(model):
    model.second.scale = 1.0


def flag(model):
    model.config.flag = False


def no_affine(model):
    model.first.norm.weight = None


def hook(model):
    model.register_forward_hook(lambda module, args, out: out * 2)


def inner_hook(model):
    model.first.o.register_forward_hook(lambda module, args, out: out * 2)


def inner_pre_hook(model):
    model.second.norm.register_forward_pre_hook(lambda module, args: (args[0].cos(),))


def hook_removed(model):
    handle = model.first.norm.register_forward_hook(lambda module, args, out: out * 2)
    model(torch.randn(2, 6, 32).to(model.table.device))
    handle.remove()
    with torch.no_grad():
        model.first.norm.bias += 1


def forward(model):
    model.first.forward = lambda x: x * 2


def frozen(model):
    model.requires_grad_(False)
    with torch.no_grad():
        model.first.q.bias += 1


def bfloat16(model):
    model.to(torch.bfloat16)


def double(model):
    model.double()


CHANGES = [in_place, through_data, load, load_assigned, other_parameter, other_buffer, other_module, adapter,
           adapter_merged, eps, eps_twice, scale, flag, no_affine, hook, inner_hook, inner_pre_hook, hook_removed,
           forward, frozen, bfloat16, double]  # fmt: skip


@pytest.mark.parametrize("where", ["cpu", "graphs", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_change_after_the_first_call_is_seen(change, where, monkeypatch):
    if where == "graphs":
        fake_graphs.use(monkeypatch)
    device = "cuda" if where == "cuda" else "cpu"
    model, x = Model().eval().to(device), torch.randn(2, 6, 32, device=device)
    report = trimaran.optimize_model(model)
    before = [model(x) for _ in range(4)][-1]
    assert report.cuda_graphs == (where != "cpu")
    change(model)
    model.to(device)
    x = x.to(model.first.q.weight.dtype)
    with torch.no_grad(), untouched(model):
        expected = model(x)
    ours = model(x)
    assert ours.dtype == expected.dtype
    limit = 0.05 if x.dtype == torch.bfloat16 else 1e-5 if device == "cpu" else 1e-4
    torch.testing.assert_close(ours, expected, rtol=limit, atol=limit)
    if change is not bfloat16 and change is not double:
        assert not torch.allclose(ours, before, rtol=1e-2, atol=1e-2), "the change changed nothing"
    assert not report.near_misses or change is double, report
    counts = {double: 0, flag: 1, forward: 1}.get(change, 2)
    assert report.replaced["attention"] == counts, report


def test_edits_recapture_nothing():
    model, x = Model().eval(), torch.randn(2, 6, 32)
    report = trimaran.optimize_model(model)
    model(x)
    for change in (in_place, through_data, load, other_parameter, other_module):
        change(model)
        model(x)
    assert len(report.graphs) == 1


@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("change", [in_place, load, other_parameter, other_module, adapter, eps, inner_hook])
def test_half_precision_copies_follow(change, graphs, monkeypatch):
    if graphs:
        fake_graphs.use(monkeypatch)
    model, x = Model().eval(), torch.randn(2, 6, 32)
    trimaran.optimize_model(model, dtype=torch.bfloat16)
    before = [model(x) for _ in range(4)][-1]
    change(model)
    with torch.no_grad(), untouched(model):
        expected = model(x)
    torch.testing.assert_close(model(x), expected, rtol=0.05, atol=0.05)
    assert not torch.allclose(model(x), before, rtol=0.05, atol=0.05)


def test_refresh_makes_the_copies_anew():
    model, x = Model().eval(), torch.randn(2, 6, 32)
    report = trimaran.optimize_model(model, dtype=torch.bfloat16)
    before = model(x)
    model.second.o.weight.data.mul_(3)
    assert torch.equal(model(x), before), "a write through .data is seen by nobody"
    trimaran.refresh(model)
    with torch.no_grad(), untouched(model):
        expected = model(x)
    torch.testing.assert_close(model(x), expected, rtol=0.05, atol=0.05)
    assert len(report.graphs) == 2


def test_refresh_wants_an_optimized_model():
    with pytest.raises(ValueError, match=r"model \(Model\) is not optimized"):
        trimaran.refresh(Model())
    with pytest.raises(TypeError, match="model is a str"):
        trimaran.refresh("bert")


@pytest.mark.parametrize("where", ["cpu", "graphs", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_weights_of_another_dtype_under_the_same_inputs(where, monkeypatch):
    """Nothing but the weights' dtype tells that the graph is another."""
    if where == "graphs":
        fake_graphs.use(monkeypatch)
    device = "cuda" if where == "cuda" else "cpu"
    model = nn.Sequential(nn.Embedding(50, 32), Layer(), nn.LayerNorm(32)).eval().to(device)
    ids = torch.arange(12, device=device).view(2, 6)
    report = trimaran.optimize_model(model)
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float32):
        model.to(dtype)
        for _ in range(4):
            ours = model(ids)
            with torch.no_grad(), untouched(model):
                expected = model(ids)
            assert ours.dtype == dtype
            torch.testing.assert_close(ours, expected, rtol=0.05, atol=0.05)
        assert report.replaced["attention"] == 1
        assert report.cuda_graphs == (where != "cpu"), "old weights are let go"
