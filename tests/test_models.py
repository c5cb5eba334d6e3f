"""Every usual transformer: how much of it is replaced, and that it is as near to fp64 as it was before."""

import copy
import itertools
from unittest import mock

import pytest
import torch
from models import FAMILIES, build, inputs, tensors

import trimaran
from trimaran.torch_path.optimize import untouched

pytestmark = pytest.mark.usefixtures("fresh_compiler")

EPSILON = {torch.float32: 2.0**-20, torch.bfloat16: 2.0**-8}
PADS = ("right", "left", "none", "absent")
EVERY = list(itertools.product(EPSILON, (1, 3), PADS))  # 16 ways to call a model
# Neighbours in this walk differ in everything, so that a few models meet every pair of dtype, batch and padding.
WALK = [EVERY[(5 * step) % len(EVERY)] for step in range(len(EVERY))]
MODELS = [(name, attention) for name, made in FAMILIES.items() for attention in made.attentions]
ONE_EACH = [(*model, *WALK[place % len(WALK)]) for place, model in enumerate(MODELS)]
PADDED = {name for name, made in FAMILIES.items() if made.kind not in ("image", "sound")}
ALL = [(*model, *way) for model in MODELS for way in EVERY if model[0] in PADDED or way[-1] == "absent"]


def spelt(case):
    name, attention, dtype, size, pad = case
    return f"{name}-{attention}-{str(dtype)[6:]}-{size}-{pad}"


@pytest.mark.parametrize("case", ONE_EACH, ids=spelt)
def test_a_model(case):
    check(*case)


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in ALL if case not in ONE_EACH], ids=spelt)
def test_a_model_in_every_way(case):
    check(*case)


def check(name, attention, dtype, size, pad):
    model = build(name, attention, dtype)
    call = inputs(name, size, pad=pad, dtype=dtype)
    with torch.no_grad():
        with mock.patch.object(torch.nn.functional, "softmax", softmax):
            exact = tensors(copy.deepcopy(model).double()(**widened(call)), call)
        eager = tensors(model(**call), call)
    report = trimaran.optimize_model(model)
    ours = tensors(model(**call), call)
    assert report.replaced == FAMILIES[name].counts, report
    assert len(report.graphs) == 1, report
    assert not report.near_misses, report
    assert not report.fallbacks, report
    assert len(ours) == len(exact) > 0
    for right, before, after in zip(exact, eager, ours, strict=True):
        assert after.dtype == before.dtype
        limit = 3 * (before - right).abs().max() + EPSILON[dtype] * right.abs().max()
        assert (after - right).abs().max() <= limit


def softmax(x, dim, dtype=None):
    """In the dtype of x. Models ask for fp32, where the lowest fp64, in their masks, is -inf."""
    return torch.softmax(x, dim)


def widened(call):
    return {
        key: value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
        for key, value in call.items()
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bert", "t5", "gemma2", "deberta-v2"])
def test_the_kernels_themselves(name):
    """The forms of attention and norm that models ask for, by the kernels' own source."""
    model = build(name, FAMILIES[name].attentions[-1])
    call = inputs(name, 2)
    trimaran.optimize_model(model)
    with torch.no_grad(), untouched(model):
        eager = tensors(model(**call), call)
    with trimaran.interpret():
        ours = tensors(model(**call), call)
    for before, after in zip(eager, ours, strict=True):
        torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)
