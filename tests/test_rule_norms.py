"""Norms, whole and written out, with the additions before them: what is found, and what is none and why."""

import pytest
import torch
from rules import assert_found, assert_left, rand, rewritten
from torch import nn

F = nn.functional


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
    "a weight that is rounded": (
        lambda x, w: w.bfloat16() * (x.bfloat16().float() * rms(x.bfloat16().float())).bfloat16(),
        "weight is float32 and x is bfloat16"),
    "double": (lambda x, w: (x.double() * rms(x.double())).float(), "x is float64"),
    "wide": (lambda x, w: x.bfloat16().float() * rms(x.bfloat16().float()), "result is float32 and x is bfloat16"),
    "two dimensions": (lambda x, w: F.rms_norm(x, (5, 8)), "it normalizes the last 2 dimensions"),
    "a weight of another dtype": (lambda x, w: (x * rms(x) * DOUBLE).float(), "weight is float64, supported are"),
    "never cast back": (
        lambda x, w: x.bfloat16().float() * rms(x.bfloat16().float()) * w, "its result is float32 and x is bfloat16"),
}  # fmt: skip
DOUBLE = W.double()
WITHOUT_WEIGHT = {  # what follows is no weight
    "a number": lambda x, w: x * rms(x) * 2,
    "another tensor": lambda x, w: x * rms(x) * x,
    "two and a weight": lambda x, w: x * rms(x) * (2.0 + w),
    "used before": lambda x, w: (lambda y: y * w + y)(x * rms(x)),
}


@pytest.mark.parametrize("name", WITHOUT_WEIGHT)
def test_rms_norms_whose_weight_is_another(name):
    found = assert_found(WITHOUT_WEIGHT[name], rand(3, 5, 8), W, op="rms_norm")
    assert "weight" not in found[2]


def test_a_weight_plus_one_on_what_is_rounded_is_no_weight():
    def function(x, w):
        return (x.float() * rms(x.float())).bfloat16() * (1 + w)

    x, w = rand(3, 5, 8).bfloat16(), W.bfloat16()
    found = assert_found(function, x, w, op="rms_norm", tolerance=0.02)
    assert "weight" not in found[2]


@pytest.mark.parametrize("name", NO_RMS)
def test_no_rms_norm(name):
    function, reason = NO_RMS[name]
    assert_left(function, rand(3, 5, 8), W, op="rms_norm", reason=reason)


B = rand(8, seed=4)


def mean(x):
    return x.mean(-1, keepdim=True)


def affine(normalized):
    return lambda x, w, b: normalized(x) * w + b


LAYER = {
    "whole": lambda x, w, b: F.layer_norm(x, (8,), w, b, 1e-5),
    "torch's variance": affine(lambda x: (x - mean(x)) / torch.sqrt(x.var(-1, unbiased=False, keepdim=True) + 1e-5)),
    "correction": affine(lambda x: (x - mean(x)) * torch.rsqrt(torch.var(x, -1, correction=0, keepdim=True) + 1e-5)),
    "squares of differences": lambda x, w, b: (
        w * ((x - mean(x)) / torch.sqrt((x - mean(x)).pow(2).mean(-1, keepdim=True) + 1e-5)) + b),
    "difference of squares": affine(lambda x: torch.rsqrt(mean(x * x) - mean(x) ** 2 + 1e-5) * (x - mean(x))),
    "eps first": affine(lambda x: (x - mean(x)) * (1e-5 + mean((x - mean(x)).square())).rsqrt()),
    "both at once": affine(
        lambda x: (lambda v, m: (x - m) * (v + 1e-5).rsqrt())(*torch.var_mean(x, -1, unbiased=False, keepdim=True))),
    "both at once, corrected": affine(
        lambda x: (lambda v, m: (x - m) * (v + 1e-5).rsqrt())(*torch.var_mean(x, -1, correction=0, keepdim=True))),
    "bias first": lambda x, w, b: b + w * ((x - mean(x)) * torch.rsqrt(mean((x - mean(x)).pow(2)) + 1e-5)),
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", LAYER)
def test_layer_norms(name, dtype):
    def in_fp32(x, w, b):
        return LAYER[name](x.float(), w.float(), b.float()).to(dtype)

    inputs = [t.to(dtype) for t in (rand(3, 5, 8), W, B)]
    tolerance = 1e-5 if dtype == torch.float32 else 0.02
    found = assert_found(in_fp32, *inputs, op="layer_norm", tolerance=tolerance, also=["weight", "bias"])
    assert found[1]["eps"] == pytest.approx(1e-5)


def normalized(x):
    return (x - mean(x)) * torch.rsqrt(mean((x - mean(x)).pow(2)) + 1e-5)


PARTS = {
    "no weight": (lambda x, w, b: normalized(x), []),
    "no bias": (lambda x, w, b: normalized(x) * w, ["weight"]),
    "bias alone": (lambda x, w, b: normalized(x) + b, ["bias"]),
    "weight after bias": (lambda x, w, b: (normalized(x) + b) * w, ["bias"]),
    "two weights": (lambda x, w, b: normalized(x) * w * b, ["weight"]),
    "a number": (lambda x, w, b: normalized(x) * 2, []),
    "another tensor": (lambda x, w, b: normalized(x) * x, []),
    "used again": (lambda x, w, b: (lambda y: y * w + y)(normalized(x)), []),
    "a scaled bias": (lambda x, w, b: torch.add(normalized(x) * w, b, alpha=2), ["weight"]),
    "rounded in between": (
        lambda x, w, b: w.half() * normalized(x.half().float()).half() + b.half(), ["weight", "bias"]),
}  # fmt: skip


@pytest.mark.parametrize("name", PARTS)
def test_how_much_belongs_to_a_layer_norm(name):
    function, given = PARTS[name]
    found = assert_found(function, rand(3, 5, 8), W, B, op="layer_norm", tolerance=0.02)
    assert [port for port in found[2] if port != "x"] == given


def over(**options):
    return affine(lambda x: (x - mean(x)) * torch.rsqrt(torch.var(x, **options) + 1e-5))


NO_LAYER = {
    "two dimensions": (lambda x, w, b: F.layer_norm(x, (5, 8)), "it normalizes the last 2 dimensions"),
    "double": (lambda x, w, b: F.layer_norm(x.double(), (8,)), "x is float64"),
    "unbiased": (over(dim=-1, keepdim=True), "divided by N - 1, a layer norm's by N"),
    "unbiased, by its name": (over(dim=-1, unbiased=True, keepdim=True), "divided by N - 1"),
    "corrected by one": (over(dim=-1, correction=1, keepdim=True), "divided by N - 1"),
    "unbiased, both at once": (
        affine(lambda x: (lambda v, m: (x - m) * (v + 1e-5).rsqrt())(*torch.var_mean(x, -1, keepdim=True))), "N - 1"),
    "another axis": (over(dim=1, unbiased=False, keepdim=True), None),
    "deviation": (affine(lambda x: (x - mean(x)) / (x.std(-1, keepdim=True) + 1e-5)), "adds eps to the deviation"),
    "biased deviation": (
        affine(lambda x: (x - mean(x)) / (x.std(-1, unbiased=False, keepdim=True) + 1e-5)), "eps to the deviation"),
    "deviation alone": (affine(lambda x: (x - mean(x)) / x.std(-1, keepdim=True)), "eps to the deviation"),
    "deviation of something": (lambda x, w, b: x + x.std(-1, keepdim=True), None),
    "no eps": (affine(lambda x: (x - mean(x)) / x.var(-1, unbiased=False, keepdim=True).sqrt()), "it adds no eps"),
    "eps from a tensor": (
        affine(lambda x: (x - mean(x)) / (x.var(-1, unbiased=False, keepdim=True) + W[0]).sqrt()),
        "eps is computed at run time"),
    "not centered": (
        affine(lambda x: x * torch.rsqrt(x.var(-1, unbiased=False, keepdim=True) + 1e-5)), "is not x - mean"),
    "another mean": (
        affine(lambda x: (x - mean(x * 2)) * torch.rsqrt(x.var(-1, unbiased=False, keepdim=True) + 1e-5)),
        "not x - mean"),
    "another square": (affine(lambda x: (x - mean(x)) * torch.rsqrt(mean(x * x) - mean(x * 2) ** 2 + 1e-5)), None),
    "double statistics": (lambda x, w, b: F.layer_norm(x.double(), (8,)).float(), "x is float64"),
    "wider": (lambda x, w, b: normalized(x.half().float()), "its result is float32 and x is float16"),
    "a weight of another dtype": (
        lambda x, w, b: (normalized(x.half().float()) * w).half(), "weight is float32 and x is float16"),
}  # fmt: skip


@pytest.mark.parametrize("name", NO_LAYER)
def test_no_layer_norm(name):
    function, reason = NO_LAYER[name]
    assert_left(function, rand(3, 5, 8), W, B, op="layer_norm", reason=reason)


def used_before(a, b):
    s = a + b
    t = s.relu()
    return F.layer_norm(s, (8,)) + t


def written_between(a, b):
    s = a.relu() + b
    t = s * 2
    s.mul_(t)
    return F.layer_norm(s, (8,))


def returned(a, b):
    s = a + b
    return F.layer_norm(s, (8,)), s


RESIDUALS = {
    "plain": (lambda a, b: F.layer_norm(a + b, (8,)), True),
    "root mean square": (lambda a, b: F.rms_norm(a + b, (8,)), True),
    "written out": (lambda a, b: normalized(a + b), True),
    "used again": (lambda a, b: (lambda s: F.layer_norm(s, (8,)) + s)(a + b), True),
    "returned": (returned, True),
    "used before": (used_before, True),
    "broadcast": (lambda a, b: F.layer_norm(a + b[0], (8,)), False),
    "scaled": (lambda a, b: F.layer_norm(torch.add(a, b, alpha=2), (8,)), False),
    "a number": (lambda a, b: F.layer_norm(a + 1.0, (8,)), False),
    "written in between": (written_between, False),
    "another dtype": (lambda a, b: F.layer_norm(a + b.half(), (8,)), False),
}


@pytest.mark.parametrize("name", RESIDUALS)
def test_additions_before_a_norm(name):
    function, fused = RESIDUALS[name]
    a, b = rand(2, 4, 8), rand(2, 4, 8, seed=1)
    _, calls, ours = rewritten(function, a, b)
    torch.testing.assert_close(ours, function(a, b), rtol=1e-5, atol=1e-5)
    assert [("residual" in given) for _, _, given in calls] == [fused]
    assert [attrs["return_sum"] for _, attrs, _ in calls] == [name in ("used again", "returned", "used before")]
