"""Graphs that write into memory: what is written into after it was read is read where it was, by every rule."""

import math

import pytest
import torch
from rules import INF, rand, rewritten
from torch import nn

F = nn.functional
Q, K, V = rand(2, 4, 5, 8), rand(2, 4, 6, 8, seed=1), rand(2, 4, 6, 8, seed=2)
ROWS, COLUMNS = 5, 6


def weights(scores, v):
    return scores.softmax(-1) @ v


def with_mask(make):
    """A mask that is made in place, before it is used."""
    return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=make())


def written(mask, where, value):
    mask[where] = value
    return mask


def zeros():
    return torch.zeros(ROWS, COLUMNS)


def ones():
    return torch.ones(ROWS, COLUMNS, dtype=torch.bool)


def compared_with_written():
    position = torch.arange(COLUMNS)
    position[2] = 100
    return position <= torch.arange(ROWS)[:, None] + 1


def scaled_by_written(q, k, v):
    scale = torch.tensor(8.0)
    scale.view(1).mul_(2)
    return weights(q @ k.mT / scale, v)


def repeated(q, k, v):
    k = k + 1
    wide = k[:, :2].repeat_interleave(2, 1)
    k[0].mul_(2)
    return F.scaled_dot_product_attention(q, wide, v) + k.sum()


def scaled(q, k, v):
    q = q + 1
    half = q * 0.5
    q[0].mul_(3)
    return weights(half @ k.mT, v) + q.sum()


def cast(q, k, v):
    k = k.half() + 1
    wide = k.float()
    k[0].mul_(2)
    return weights(q @ wide.mT, v) + k.sum()


def masked(q, k, v):
    seen = (k[:, :1, :, 0] > 0)[:, :, None]
    bias = torch.where(seen, 0.0, -INF)
    seen[0].logical_not_()
    return weights(q @ k.mT + bias, v) + seen.sum()


def biased(q, k, v):
    bias = q[:, 0, :, :1] @ k[:, 0, :, :1].mT
    scores = q @ k.mT + bias[:, None]
    bias[0].zero_()
    return weights(scores, v)


def queries_written(q, k, v):
    q = q + 1
    scores = q @ k.mT
    q[0].zero_()
    return weights(scores, v) + q


def values_written(q, k, v):
    v = v + 1
    p = (q @ k.mT).softmax(-1)
    v[0].mul_(2)
    return p @ v


def scores_written(q, k, v):
    return weights(written(q @ k.mT, (..., slice(2, None)), -INF), v)


def weights_written(q, k, v):
    return written((q @ k.mT).softmax(-1), (..., 0), 0) @ v


def root_written(q, k, v):
    root = torch.rsqrt(q.pow(2).mean(-1, keepdim=True) + 1e-6)
    return q * written(root, 0, 1.0)


def normed_then_written(q, k, v):
    x = q + 1
    y = F.layer_norm(x, (8,))
    x[0].zero_()
    return y + x


def weight_written_before_its_norm(q, k, v):
    weight, x = k[0, 0, 0] + 1, q + v[:, :, :5]
    weight[:2] *= 3
    return F.layer_norm(x, (8,), weight)


def weight_written_between_layers(q, k, v):
    one, other = k[0, 0, :, :] + 1, v[0, 0, :, :] + 1
    y = F.linear(q, one)
    other[:2] *= 3
    return y * F.linear(q, other)


def weight_written_before_a_norm_in_fp32(q, k, v):
    weight = v[0, 0, 0] + 1
    total = F.linear(q.half(), k[0, 0, :1].half().expand(8, 8)) + q
    weight[:2] *= 3
    return F.layer_norm(total, (8,), weight)


def differences_written(q, k, v):
    x = q + 1
    variance = (x - x.mean(-1, keepdim=True)).pow(2).mean(-1, keepdim=True)
    x[0].mul_(2)
    return (x - x.mean(-1, keepdim=True)) * torch.rsqrt(variance + 1e-5)


def turned(q, k, v):
    x, cos, sin = q + 1, k[:1, :1, :ROWS].cos(), k[:1, :1, :ROWS].sin()
    first = x * cos
    x[0].mul_(2)
    return first + torch.cat((-x[..., 4:], x[..., :4]), -1) * sin


def table_written(q, k, v):
    cos, sin = k[:1, :1, :ROWS].cos(), k[:1, :1, :ROWS].sin()
    first = q * cos
    cos[..., 0] = 5
    return first + torch.cat((-q[..., 4:], q[..., :4]), -1) * sin + cos


def half_written(q, k, v):
    y = F.linear(q, k[0, 0])
    half = y * 0.5
    y[0].mul_(2)
    return half * (1 + torch.erf(y / math.sqrt(2)))


def layer_written(q, k, v):
    return F.gelu(written(F.linear(q, k[0, 0]), (..., 0), 7))


def residual_in_place(q, k, v):
    x = q + 1
    x += F.linear(F.layer_norm(x, (8,)), k[0, 0, :1].expand(8, 8))
    x += F.gelu(F.layer_norm(x, (8,)))
    return x


# name: (function, the ops that are in it)
CASES = {
    "mask, added": (lambda q, k, v: weights(q @ k.mT + written(zeros(), (slice(None), slice(3, 6)), -INF), v),
                    ["attention"]),
    "mask": (with_mask(lambda: written(zeros(), (slice(None), slice(3, 6)), -INF)), ["attention"]),
    "bool mask": (with_mask(lambda: written(ones(), (slice(None), slice(3, 6)), False)), ["attention"]),
    "mask by places": (with_mask(lambda: written(ones(), (torch.arange(3), torch.arange(3)), False)), ["attention"]),
    "diagonal": (with_mask(lambda: ones().fill_diagonal_(False)), ["attention"]),
    "triangle": (with_mask(lambda: written(ones().tril(1), 0, True)), ["attention"]),
    "triangle in place": (with_mask(lambda: written(zeros().fill_(-INF).triu_(2), 0, -1.0)), ["attention"]),
    "positions": (with_mask(compared_with_written), ["attention"]),
    "a number": (scaled_by_written, []),
    "repeated keys": (repeated, ["attention"]),
    "scaled queries": (scaled, ["attention"]),
    "cast keys": (cast, ["attention"]),
    "a condition": (masked, ["attention"]),
    "a bias": (biased, []),
    "queries": (queries_written, []),
    "values": (values_written, ["attention"]),
    "scores": (scores_written, []),
    "weights": (weights_written, []),
    "a root": (root_written, []),
    "after a norm": (normed_then_written, ["layer_norm"]),
    "a norm's weight": (weight_written_before_its_norm, ["layer_norm"]),
    "a layer's weight": (weight_written_between_layers, ["linear", "linear"]),
    "the weight of a norm in fp32": (weight_written_before_a_norm_in_fp32, ["layer_norm", "linear"]),
    "differences": (differences_written, []),
    "what turns": (turned, []),
    "a table": (table_written, []),
    "a half": (half_written, ["linear"]),
    "a layer": (layer_written, ["linear"]),
    "residuals": (residual_in_place, ["layer_norm", "linear_norm"]),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_what_is_written_into(name):
    function, ops = CASES[name]
    given = [t.clone() for t in (Q, K, V)]
    report, calls, ours = rewritten(function, Q, K, V)
    torch.testing.assert_close(ours, function(*given), rtol=1e-4, atol=1e-4)
    assert sorted(op for op, *_ in calls) == ops, report
    assert all(map(torch.equal, given, (Q, K, V)))


def test_inputs_are_written_into_where_they_were():
    """A cache: the memory is the caller's."""

    def function(q, k, v):
        old = F.scaled_dot_product_attention(q, k, v)
        k[:, :, 2].copy_(q[:, :, 0])
        return old + F.scaled_dot_product_attention(q, k, v)

    ours, theirs = K.clone(), K.clone()
    report, _, out = rewritten(function, Q, ours, V)
    torch.testing.assert_close(out, function(Q, theirs, V))
    assert torch.equal(ours, theirs)
    assert report.replaced == {"attention": 2}
