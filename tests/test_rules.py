"""Each rule alone: what it finds, in which form, and for each branch of its checks what it leaves and why."""

import functools
import math
import re

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from trimaran.torch_path.ops import TORCH_OPS
from trimaran.torch_path.rewrite import rewrite

F = nn.functional
INF = float("inf")


def traced(function, *inputs):
    """The graph of a function of tensors; those that it has by itself are constants in it."""
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        graph = make_fx(function, pre_dispatch=True)(*map(mode.from_tensor, inputs))
        for node in graph.graph.nodes:
            if node.op == "get_attr":
                node.meta["val"] = mode.from_tensor(getattr(graph, node.target))
    return graph


def rewritten(function, *inputs):
    """(report, calls of our ops as (name, attributes, which inputs), what it computes now)"""
    graph = traced(function, *inputs)
    report = rewrite(graph)
    names = {bound.overload: bound.op for bound in TORCH_OPS.values()}
    calls = []
    for node in graph.graph.nodes:
        if node.target in names:
            op = names[node.target]
            given = [port.name for port, arg in zip(op.inputs, node.args, strict=False) if arg is not None]
            calls.append((op.name, node.kwargs, given))
    with torch.no_grad():
        return report, calls, graph(*inputs)


def assert_found(function, *inputs, op, tolerance=1e-5, also=(), **attrs):
    report, calls, ours = rewritten(function, *inputs)
    torch.testing.assert_close(ours, function(*inputs), rtol=tolerance, atol=tolerance)
    found = [call for call in calls if call[0] == op]
    assert len(found) == 1, (report, calls)
    shown = {name: found[0][1].get(name) for name in attrs}
    assert shown == pytest.approx(attrs) if all(isinstance(v, float) for v in attrs.values()) else shown == attrs
    assert not {*also} - {*found[0][2]}, found
    assert not report.near_misses, report
    return found[0]


def assert_left(function, *inputs, op, reason=None):
    report, calls, ours = rewritten(function, *inputs)
    torch.testing.assert_close(ours, function(*inputs), rtol=1e-4, atol=1e-4, equal_nan=True)
    assert op not in [name for name, *_ in calls], calls
    if reason is None:
        assert not [miss for miss in report.near_misses if miss.rule == op], report
    else:
        assert any(re.search(reason, miss.reason) for miss in report.near_misses), report


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


Q, K, V = rand(2, 4, 5, 8), rand(2, 4, 6, 8, seed=1), rand(2, 4, 6, 8, seed=2)
SEEN = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 0, 1, 1, 1]]).bool()
BIAS = rand(1, 4, 5, 6, seed=3)
CAUSAL = torch.arange(6) <= torch.arange(5)[:, None] + 1


def weights(scores, v, **softmax):
    return scores.softmax(-1, **softmax) @ v


def capped(q, k, v):
    return weights(torch.tanh(q @ k.mT * 0.3 / 5) * 5 + BIAS, v)


def in_batches(q, k, v):
    q, k, v = (t.flatten(0, 1) for t in (q, k, v))
    return torch.bmm(torch.softmax(torch.bmm(q, k.transpose(1, 2)) / 3, -1), v)


def baddbmm(q, k, v):
    q, k, v = (t.flatten(0, 1) for t in (q, k, v))
    bias = BIAS.expand(2, -1, -1, -1).flatten(0, 1)
    return torch.bmm(torch.baddbmm(bias, q * 0.5, k.transpose(-2, -1), alpha=0.5).softmax(-1), v)


WRITTEN_OUT = {
    "plain": (lambda q, k, v: weights(q @ k.transpose(-2, -1), v), {"scale": 1.0}),
    "times a number": (lambda q, k, v: weights(q @ k.transpose(2, 3) * 0.3, v), {"scale": 0.3}),
    "number first": (lambda q, k, v: weights(0.3 * (q @ k.mT), v), {"scale": 0.3}),
    "divided": (lambda q, k, v: weights(q @ k.mT / math.sqrt(8), v), {"scale": 8**-0.5}),
    "divided by a tensor": (lambda q, k, v: weights(q @ k.mT / torch.sqrt(torch.tensor(8.0)), v), {"scale": 8**-0.5}),
    "scaled queries": (lambda q, k, v: weights(q * 0.3 @ k.mT, v), {"scale": 0.3}),
    "scaled keys": (lambda q, k, v: weights(q @ (k / 2).mT, v), {"scale": 0.5}),
    "scaled everywhere": (lambda q, k, v: weights((q * 2) @ (k * 3).mT / 4, v), {"scale": 1.5}),
    "permuted keys": (lambda q, k, v: weights(q @ k.permute(0, 1, 3, 2), v), {"scale": 1.0}),
    "in place": (lambda q, k, v: weights((q @ k.mT).mul_(0.5).add_(BIAS), v), {"scale": 0.5}),
    "capped": (capped, {"scale": 0.3, "softcap": 5.0}),
    "three dimensions": (in_batches, {"scale": 1 / 3}),
    "baddbmm": (baddbmm, {"scale": 0.25}),
    "softmax in fp32": (lambda q, k, v: weights(q @ k.mT, v, dtype=torch.float32), {"scale": 1.0}),
}


@pytest.mark.parametrize("name", WRITTEN_OUT)
def test_written_out_attention(name):
    function, attrs = WRITTEN_OUT[name]
    assert_found(function, Q, K, V, op="attention", tolerance=1e-4, **attrs)


def test_half_precision_with_an_fp32_softmax():
    def attend(q, k, v):
        return (q @ k.mT).float().softmax(-1).to(q.dtype) @ v

    assert_found(attend, *(t.bfloat16() for t in (Q, K, V)), op="attention", tolerance=0.05, scale=1.0)


LOWEST = torch.finfo(torch.float32).min
MASKED = {
    "filled with -inf": (lambda s: s.masked_fill(~SEEN[:, None, None], -INF), ["key_mask"], "zero"),
    "filled with a low number": (lambda s: s.masked_fill(~SEEN[:, None, None], -1e9), ["key_mask"], "mean"),
    "== 0": (lambda s: s.masked_fill(SEEN.long()[:, None, None] == 0, -1e9), ["key_mask"], "mean"),
    "where": (lambda s: torch.where(SEEN[:, None, None], s, LOWEST), ["key_mask"], "mean"),
    "where, turned": (lambda s: torch.where(~SEEN[:, None, None], LOWEST, s), ["key_mask"], "mean"),
    "added": (lambda s: s + torch.where(SEEN[:, None, None], 0.0, LOWEST), ["key_mask"], "mean"),
    "added with a bias": (
        lambda s: s + torch.where(SEEN[:, None, None], BIAS, LOWEST), ["bias", "key_mask"], "mean"),
    "bias": (lambda s: s + BIAS, ["bias"], "zero"),
    "two biases": (lambda s: s + BIAS - BIAS.exp(), ["bias"], "zero"),
    "subtracted": (lambda s: s - BIAS, ["bias"], "zero"),
    "neither by key nor a window": (lambda s: s.masked_fill(BIAS[:, :1] > 1, -INF), ["bias"], "zero"),
    "zeros": (lambda s: s + torch.zeros(5, 6), [], "zero"),
    "inverted floats": (
        lambda s: s + (1 - SEEN.float()[:, None, None]) * -1e9, ["bias"], "zero"),
}  # fmt: skip


@pytest.mark.parametrize("name", MASKED)
def test_masks_of_written_out_attention(name):
    mask, inputs, row = MASKED[name]
    found = assert_found(
        lambda q, k, v: weights(mask(q @ k.mT), v), Q, K, V, op="attention", tolerance=1e-4, masked_row=row
    )
    assert [name for name in ("bias", "key_mask") if name in found[2]] == inputs


WINDOWS = {
    "tril": (lambda s: s.masked_fill(~torch.tril(torch.ones(5, 6).bool(), 1), -INF), True, -1),
    "triu of -inf": (lambda s: s + torch.triu(torch.full((5, 6), -INF), 2), True, -1),
    "less than": (
        lambda s: s.masked_fill(torch.arange(6) > torch.arange(5)[:, None] + 1, -INF), True, -1),
    "band": (
        lambda s: torch.where((torch.arange(6) - torch.arange(1, 6)[:, None]).abs() <= 2, s, -INF), False, 2),
    "left": (
        lambda s: torch.where((torch.arange(6) < torch.arange(5)[:, None] + 2)
                              & (torch.arange(6) > torch.arange(5)[:, None] - 2), s, -INF), True, 2),
}  # fmt: skip


@pytest.mark.parametrize("name", WINDOWS)
def test_windows(name):
    mask, causal, left = WINDOWS[name]
    found = assert_found(
        lambda q, k, v: weights(mask(q @ k.mT), v), Q, K, V, op="attention", causal=causal, window_left=left
    )
    assert "bias" not in found[2] or name in ("less than",), found


@pytest.mark.parametrize("row", ["zero", "mean"])
def test_a_row_without_keys_gives_what_it_gave(row):
    nothing = torch.zeros(2, 1, 1, 6).bool()

    def zero(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=nothing & (k[:, :1, :, 0] < 9)[:, :, None])

    def mean(q, k, v):
        return weights((q @ k.mT).masked_fill(~(nothing & (k[:, :1, :, 0] < 9)[:, :, None]), -1e9), v)

    found = assert_found({"zero": zero, "mean": mean}[row], Q, K, V, op="attention", masked_row=row)
    assert "key_mask" in found[2]


@pytest.mark.parametrize("repeat", ["expand", "repeat_interleave"])
@pytest.mark.parametrize("written_out", [False, True])
def test_grouped_heads_are_not_repeated(repeat, written_out):
    k, v = K[:, :2], V[:, :2]

    def wide(x):
        if repeat == "repeat_interleave":
            return torch.repeat_interleave(x, 2, dim=1)
        return x[:, :, None].expand(2, 2, 2, 6, 8).reshape(2, 4, 6, 8)

    def attend(q, k, v):
        k, v = wide(k), wide(v)
        return weights(q @ k.mT * 0.5, v) if written_out else F.scaled_dot_product_attention(q, k, v, scale=0.5)

    graph = traced(attend, Q, k, v)
    report = rewrite(graph)
    assert report.replaced == {"attention": 1}
    assert not [n for n in graph.graph.nodes if "expand" in str(n.target) or "repeat" in str(n.target)]
    torch.testing.assert_close(graph(Q, k, v), attend(Q, k, v))


def written_between(q, k, v):
    v = v + 1
    p = (q @ k.mT).softmax(-1)
    v.mul_(v)
    return p @ v


def used_twice(q, k, v):
    p = (q @ k.mT).softmax(-1)
    return p @ v, p


def five(q, k, v):
    return (q[None] @ k[None].mT).softmax(-1) @ v[None]


NO_ATTENTION = {
    "over queries": (lambda q, k, v: (q @ k.mT).softmax(2) @ v, "the softmax is not over the keys"),
    "weights used": (used_twice, "its weights are used by something else too"),
    "scores from elsewhere": (lambda q, k, v: (BIAS + q.sum()).softmax(-1) @ v, "no product of queries and keys"),
    "keys not transposed": (lambda q, k, v: (q @ k.reshape(2, 4, 8, 6)).softmax(-1) @ v, "no transpose"),
    "low but not low enough": (
        lambda q, k, v: weights((q @ k.mT).masked_fill(~CAUSAL, -100.0), v), "become -100.0, which does not hide"),
    "masked before the cap": (
        lambda q, k, v: weights(torch.tanh((q @ k.mT) + BIAS) * 5, v), "before they are capped"),
    "five dimensions": (five, "no product of queries and keys"),
    "double": (lambda q, k, v: weights(q.double() @ k.double().mT, v.double()), "q is float64"),
    "large heads": (lambda q, k, v: weights(q.repeat(1, 1, 1, 33) @ k.repeat(1, 1, 1, 33).mT, v.repeat(1, 1, 1, 33)),
                    "the head dimension is 264, supported are up to 256"),
    "another head for values": (lambda q, k, v: weights(q @ k.mT, v[..., :4]), "v has a head dimension of 4, q and k"),
    "a mask of another dtype": (
        lambda q, k, v: weights((q @ k.mT + BIAS.double()).float(), v), "mask is float64"),
    "a classifier": (lambda q, k, v: (q @ k.mT).softmax(-1), None),
}  # fmt: skip


@pytest.mark.parametrize("name", NO_ATTENTION)
def test_no_attention(name):
    function, reason = NO_ATTENTION[name]
    assert_left(function, Q, K, V, op="attention", reason=reason)


def rms(x, eps=1e-5):
    return torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)


W = rand(8, seed=9)
RMS = {
    "llama": (lambda x, w: w * (x.float() * rms(x.float())).to(x.dtype), "llama"),
    "t5": (lambda x, w: w * (x * rms(x.float())).to(w.dtype), "llama"),
    "gemma": (lambda x, w: (x.float() * rms(x.float()) * (1.0 + w.float())).type_as(x), "gemma"),
    "torch": (lambda x, w: F.rms_norm(x, (8,), w, 1e-5), "torch"),
    "olmo": (lambda x, w: (w.float() * (x.float() * rms(x.float()))).to(x.dtype), "torch"),
    "squared": (lambda x, w: w * (x.float() / torch.sqrt((x.float() * x.float()).mean(-1, True) + 1e-5)).to(x.dtype),
                "llama"),
    "no weight": (lambda x, w: (x.float() * rms(x.float())).to(x.dtype), "torch"),
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", RMS)
def test_rms_norms(name, dtype):
    function, cast = RMS[name]
    found = assert_found(
        function, rand(3, 5, 8).to(dtype), W.to(dtype), op="rms_norm", tolerance=1e-5 if dtype.itemsize == 4 else 0.02
    )
    assert (found[1]["cast"] == cast) or (dtype == torch.float32 and cast != "gemma")
    assert found[1]["eps"] == pytest.approx(1e-5)
    assert ("weight" in found[2]) is (name != "no weight")


NO_RMS = {
    "another axis": (lambda x, w: x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + 1e-5) * w, None),
    "cubes": (lambda x, w: x * torch.rsqrt(x.pow(4).mean(-1, keepdim=True) + 1e-5) * w, None),
    "no eps": (lambda x, w: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True)) * w, None),
    "eps from a tensor": (lambda x, w: x * rms(x, w[0]) * w, "eps is computed at run time"),
    "another numerator": (lambda x, w: (x + 1) * rms(x), "what is multiplied with the root is not what was squared"),
    "double": (lambda x, w: (x.double() * rms(x.double())).float(), "x is float64"),
    "wide": (lambda x, w: x.bfloat16().float() * rms(x.bfloat16().float()), "result is float32 and x is bfloat16"),
    "two dimensions": (lambda x, w: F.rms_norm(x, (5, 8)), "it normalizes the last 2 dimensions"),
}  # fmt: skip


@pytest.mark.parametrize("name", NO_RMS)
def test_no_rms_norm(name):
    function, reason = NO_RMS[name]
    assert_left(function, rand(3, 5, 8), W, op="rms_norm", reason=reason)


X, A, B = rand(2, 5, 16), rand(24, 16), rand(24, seed=4)
ACTIVATIONS = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda y: F.gelu(y, approximate="tanh"),
    "silu": F.silu,
    "tanh": torch.tanh,
    "quick_gelu": lambda y: y * torch.sigmoid(1.702 * y),
}
ALSO_SPELT = {
    "silu": lambda y: y * torch.sigmoid(y),
    "gelu": lambda y: y * 0.5 * (1.0 + torch.erf(y / math.sqrt(2.0))),
    "gelu_tanh": lambda y: 0.5 * y * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (y + 0.044715 * torch.pow(y, 3.0)))),
}


@pytest.mark.parametrize("spelling", [ACTIVATIONS, ALSO_SPELT])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations(name, spelling):
    if name in spelling:
        assert_found(lambda x: spelling[name](F.linear(x, A, B)), X, op="linear", activation=name)


NO_ACTIVATION = {
    "another": lambda y: F.leaky_relu(y),
    "another factor": lambda y: y * torch.sigmoid(1.5 * y),
    "another cubic": lambda y: 0.5 * y * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (y + 0.05 * torch.pow(y, 3.0)))),
    "another x": lambda y: y * torch.sigmoid(y + 1),
    "not half": lambda y: y * 0.4 * (1.0 + torch.erf(y / math.sqrt(2.0))),
    "used before too": lambda y: F.gelu(y) + y.sum(),
}


@pytest.mark.parametrize("name", NO_ACTIVATION)
def test_no_activation(name):
    found = assert_found(lambda x: NO_ACTIVATION[name](F.linear(x, A, B)), X, op="linear")
    assert found[1].get("activation", "none") == "none"


GATED = {
    "first": (lambda x: F.silu(F.linear(x, A)) * F.linear(x, A + 1), {"activation": "silu", "gate": "first"}),
    "other side": (lambda x: F.linear(x, A) * F.gelu(F.linear(x, A + 1)), {"activation": "gelu", "gate": "first"}),
    "chunked": (lambda x: (lambda a, b: F.gelu(a) * b)(*F.linear(x, A, B).chunk(2, -1)), {"gate": "first"}),
    "chunked, second": (lambda x: (lambda a, b: a * F.silu(b))(*F.linear(x, A).chunk(2, -1)), {"gate": "second"}),
}


@pytest.mark.parametrize("name", GATED)
def test_gated(name):
    function, attrs = GATED[name]
    assert_found(function, X, op="gated_linear", **attrs)


NOT_GATED = {
    "no activation": lambda x: F.linear(x, A) * F.linear(x, A + 1),
    "another input": lambda x: F.silu(F.linear(x, A)) * F.linear(x + 1, A + 1),
    "a half used twice": lambda x: (lambda a, b: F.gelu(a) * b + b)(*F.linear(x, A).chunk(2, -1)),
    "halves of the rows": lambda x: (lambda a, b: F.gelu(a) * b)(*F.linear(x[:, :4], A).chunk(2, 1)),
    "thirds": lambda x: (lambda a, b, c: F.gelu(a) * b)(*F.linear(x, A).chunk(3, -1)),
}


@pytest.mark.parametrize("name", NOT_GATED)
def test_not_gated(name):
    assert_left(NOT_GATED[name], X, op="gated_linear")


def test_layers_of_one_input_are_one():
    found = assert_found(
        lambda x: tuple(F.linear(x, w, b).view(10, -1) for w, b in ((A, B), (A[:16], None), (A[:8], B[:8]))),
        X, op="linear", also=["weight_1", "weight_2", "bias", "bias_2"],
    )  # fmt: skip
    assert "bias_1" not in found[2]


def test_four_layers_of_one_input_are_two_ops():
    report, _, _ = rewritten(lambda x, *weights: [F.linear(x, w) for w in weights], X, A, A + 1, A + 2, A + 3)
    assert report.replaced == {"linear": 2}


def test_an_input_written_in_between_is_not_shared():
    def function(x):
        x = x + 1
        y = F.linear(x, A)
        x.mul_(y.sum())
        return y, F.linear(x, A)

    report, _, ours = rewritten(function, X)
    assert report.replaced == {"linear": 2}
    torch.testing.assert_close(ours, function(X), rtol=1e-4, atol=1e-4)


def plus(other, x):
    return F.linear(x, A, B) + other


def test_residuals():
    r = rand(2, 5, 24)
    assert_found(lambda x: F.linear(x, A, B) + r, X, op="linear", also=["residual"])
    assert_found(lambda x: r + F.gelu(F.linear(x, A, B)), X, op="linear", also=["residual"], activation="gelu")
    for other in (r[:1], r.double(), 1.0):
        _, calls, _ = rewritten(functools.partial(plus, other), X)
        assert "residual" not in calls[0][2]


def test_linear_norm():
    w, r = rand(24), rand(2, 5, 24)

    def post_norm(x, w, r):
        return F.layer_norm(F.linear(x, A, B) + r, (24,), w)

    def pre_norm(x, w, r):
        s = r + F.linear(x, A)
        return s, w * (s * rms(s))

    def used(x, w, r):
        y = F.linear(x, A)
        return F.layer_norm(y + r, (24,), w), y

    assert_found(post_norm, X, w, r, op="linear_norm", norm="layer", return_sum=False)
    assert_found(pre_norm, X, w, r, op="linear_norm", norm="rms", return_sum=True)
    assert_left(used, X, w, r, op="linear_norm")


def test_no_linear():
    assert_left(lambda x: F.linear(x.double(), A.double()), X, op="linear", reason="x is float64")
    assert_left(lambda x: F.linear(x[0, 0], A), X, op="linear")
    assert_left(lambda x: torch.addmm(X[0, :, :1], x[0], A.t(), beta=2), X, op="linear")


COS, SIN = rand(1, 1, 5, 8, seed=5), rand(1, 1, 5, 8, seed=6)


def half(x, at=4):
    return torch.cat((-x[..., at:], x[..., :at]), -1)


def turn(x, cos=COS, sin=SIN):
    return x * cos + half(x) * sin


def in_fp32(x):
    return turn(x.float()).to(x.dtype)


def test_rotary_embedding():
    k = rand(2, 2, 5, 8)
    assert_found(lambda q: turn(q), Q, op="rotary_embedding", return_k_out=False)
    both = assert_found(lambda q, k, *cs: (turn(q, *cs), turn(k, *cs)), Q, k, COS, SIN, op="rotary_embedding")
    assert "k" in both[2]
    assert_found(in_fp32, Q.bfloat16(), op="rotary_embedding", tolerance=0.02)
    rows = rand(2, 5, 32)
    found = assert_found(lambda x: turn(x.view(2, 5, 4, 8).transpose(1, 2)), rows, op="rotary_embedding")
    assert found[1]["num_heads"] == 4


NO_ROTARY = {
    "unequal parts": (lambda q: q * COS + half(q, 3) * SIN, None),
    "signs": (lambda q: q * COS + torch.cat((q[..., 4:], -q[..., :4]), -1) * SIN, None),
    "another x": (lambda q: (q + 1) * COS + half(q) * SIN, None),
    "a table for each head": (lambda q: turn(q, COS.repeat(1, 4, 1, 1)), "cos and sin are"),
    "one row": (lambda q: turn(q, COS, SIN[:, :, :1]), "cos and sin are"),
    "double": (lambda q: turn(q.double(), COS.double(), SIN.double()), "q is float64"),
}


@pytest.mark.parametrize("name", NO_ROTARY)
def test_no_rotary_embedding(name):
    function, reason = NO_ROTARY[name]
    assert_left(function, Q, op="rotary_embedding", reason=reason)
