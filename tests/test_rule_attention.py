"""The attention rule: every way to write attention, and for each branch of its checks what it leaves and why."""

import functools
import math

import pytest
import torch
from rules import assert_found, assert_left, rand, traced
from torch import nn

from trimaran.torch_path.rewrite import rewrite

F = nn.functional
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
    "a number in a tensor first": (lambda q, k, v: weights(torch.tensor(0.3) * (q @ k.mT), v), {"scale": 0.3}),
    "scaled by a tensor": (lambda q, k, v: weights((q * q.mean()) @ k.mT, v), {"scale": 1.0}),
    "scaled, then copied": (lambda q, k, v: weights((q.mT * 0.3).contiguous().mT @ k.mT, v), {"scale": 0.3}),
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


WIDE = {  # products in fp32 of what is in half precision: the op's own
    "cast": lambda q, k, v: (q.float() @ k.float().mT).softmax(-1).to(v.dtype) @ v,
    "scaled": lambda q, k, v: (q.float() * 0.5 @ (k.float() / 0.5).mT).softmax(-1).to(v.dtype) @ v,
    "viewed": lambda q, k, v: (q.mT.float().mT @ k.float().mT).softmax(-1).to(v.dtype) @ v,
    "large": lambda q, k, v: (((q * 900).float() @ (k * 900).float().mT) / 900**2).softmax(-1).to(v.dtype) @ v,
}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", WIDE)
def test_half_precision_with_fp32_scores(name, dtype):
    tolerance = 0.005 if dtype == torch.float16 else 0.03
    found = assert_found(WIDE[name], *(t.to(dtype) for t in (Q, K, V)), op="attention", tolerance=tolerance)
    assert found[1]["scale"] == pytest.approx(1 / 900 if name == "large" else 1.0)


NOT_WIDE = {
    "queries": lambda q, k, v: (q.float() @ k.bfloat16().float().mT).softmax(-1).to(v.dtype) @ v,
    "neither": lambda q, k, v: (q.float().sin() @ k.float().mT).softmax(-1).to(v.dtype) @ v,
    "rounded": lambda q, k, v: (q.bfloat16().float() @ k.float().mT).softmax(-1).to(v.dtype) @ v,
}


@pytest.mark.parametrize("name", NOT_WIDE)
def test_fp32_scores_of_something_else(name):
    half = [t.half() for t in (Q, K, V)]
    assert_left(NOT_WIDE[name], *half, op="attention", reason="q and k are float32 and v is not")


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


def heads_last(x):
    return x.transpose(1, 2)


SPELT_OTHERWISE = {
    "einsum": lambda q, k, v: torch.einsum("bhij,bhjd->bhid", torch.einsum("bhid,bhjd->bhij", q, k).softmax(-1), v),
    "einsum, heads after positions": lambda q, k, v: heads_last(
        torch.einsum("bhij,bjhd->bihd", torch.einsum("bihd,bjhd->bhij", *map(heads_last, (q, k))).softmax(-1),
                     heads_last(v))),
    "einsum, keys first": lambda q, k, v: torch.einsum(
        "bhij,bhjd->bhid", torch.einsum("bhjd,bhid->bhij", k, q).softmax(-1), v),
    "einsum, batch in the middle": lambda q, k, v: torch.einsum(
        "bhij,jbhd->bhid", torch.einsum("ibhd,jbhd->bhij", *(x.permute(2, 0, 1, 3) for x in (q, k))).softmax(-1),
        v.permute(2, 0, 1, 3)),
    "one head of keys, broadcast": lambda q, k, v: F.scaled_dot_product_attention(q, k[:, :1], v[:, :1], scale=1.0),
    "one head of keys, written out": lambda q, k, v: weights(q @ k[:, :1].mT, v[:, :1]),
}  # fmt: skip


@pytest.mark.parametrize("name", SPELT_OTHERWISE)
def test_attention_spelt_otherwise(name):
    assert_found(SPELT_OTHERWISE[name], Q, K, V, op="attention", tolerance=1e-4, scale=1.0)


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
    "heads in two groups": (
        lambda q, k, v: (q @ k.mT).view(2, 2, 2, 5, 6).softmax(-1).view(2, 4, 5, 6) @ v, "its scores have 5"),
    "values of fewer dimensions": (
        lambda q, k, v: (q @ k.mT).softmax(-1).view(8, 5, 6) @ v.flatten(0, 1).sin(), "v has 3 dimensions and q 4"),
    "double": (lambda q, k, v: weights(q.double() @ k.double().mT, v.double()), "q is float64"),
    "large heads": (lambda q, k, v: weights(q.repeat(1, 1, 1, 33) @ k.repeat(1, 1, 1, 33).mT, v.repeat(1, 1, 1, 33)),
                    "the head dimension is 264, supported are up to 256"),
    "another head for values": (lambda q, k, v: weights(q @ k.mT, v[..., :4]), "v has a head dimension of 4, q and k"),
    "a mask of another dtype": (
        lambda q, k, v: weights((q @ k.mT + BIAS.double()).float(), v), "mask is float64"),
    "dropped out": (lambda q, k, v: F.scaled_dot_product_attention(q, k, v, dropout_p=1.0),
                    "it drops out attention weights with probability 1.0"),
    "three dimensions": (lambda q, k, v: F.scaled_dot_product_attention(q[0], k[0], v[0]),
                         r"q has 3 dimensions, expected \[B, H, S, D\]"),
    "causal from the start": (lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
                              "is_causal with different numbers of queries and keys"),
    "queries of another batch": (lambda q, k, v: weights(q[:1] @ k.mT, v), "q has a batch of 1 and k of 2"),
    "values of another batch": (lambda q, k, v: weights(q @ k.mT, v[:1]), "q has a batch of 2 and v of 1"),
    "one head of queries": (lambda q, k, v: F.scaled_dot_product_attention(q[:, :1], k, v),
                            "q has 1 heads and k 4, without enable_gqa"),
    "one head of queries, written out": (lambda q, k, v: weights(q[:, :1] @ k.mT, v), "which do not share them evenly"),
    "one head of keys, not of values": (lambda q, k, v: weights(q @ k[:, :1].mT, v), "k has 1 heads and v 4"),
    "values of another dtype": (lambda q, k, v: weights(q @ k.mT, v.double(), dtype=torch.float64), "v is float64"),
    "a capped mask": (lambda q, k, v: weights(torch.tanh((q @ k.mT).masked_fill(~CAUSAL, -1e9)) * 2, v),
                      "before they are capped"),
    "scaled by a tensor": (lambda q, k, v: torch.bmm((q[0] @ k[0].mT * k.sum()).softmax(-1), v[0]),
                            "no product of queries and keys"),
    "through something else": (lambda q, k, v: (q @ k.mT).softmax(-1).relu() @ v, "go through aten.relu.default"),
    "a long chain": (lambda q, k, v: weights(functools.reduce(torch.mul, [0.9] * 17, q @ k.mT), v),
                     "no product of queries and keys"),
    "other scores, masked": (lambda q, k, v: weights((BIAS + q.sum()).masked_fill(~CAUSAL, -1e9), v),
                             "no product of queries and keys"),
    "other scores, capped": (lambda q, k, v: weights(torch.tanh(BIAS + q.sum()) * 2, v),
                             "no product of queries and keys"),
    "keys not transposed, with a bias": (lambda q, k, v: (q @ k.reshape(2, 4, 8, 6) + BIAS).softmax(-1) @ v,
                                         "no transpose"),
    "alpha from an input": (
        lambda q, k, v: torch.baddbmm(BIAS[0], q[0], k[0].mT, alpha=q[0, 0, 0, 0].item()).softmax(-1) @ v[0],
        "alpha or beta of its baddbmm is computed at run time"),
    "a mask wider than bfloat16": (
        lambda q, k, v: F.scaled_dot_product_attention(*(x.bfloat16() for x in (q, k, v)), attn_mask=BIAS),
        "the mask is float32 and q is bfloat16"),
    "to something else": (lambda q, k, v: (q @ k.mT).softmax(-1).relu().sum(), None),
    "on a long way": (lambda q, k, v: (q @ k.mT).softmax(-1).relu().exp().sin().cos().tan().abs() @ v, None),
    "a classifier": (lambda q, k, v: (q @ k.mT).softmax(-1), None),
}  # fmt: skip


@pytest.mark.parametrize("name", NO_ATTENTION)
def test_no_attention(name):
    function, reason = NO_ATTENTION[name]
    assert_left(function, Q, K, V, op="attention", reason=reason)
