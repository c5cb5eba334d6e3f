"""Every usual transformer: how much of it is replaced, and that it is as near to fp64 as it was before."""

import copy
import itertools
from itertools import chain
from unittest import mock

import pytest
import torch
from models import FAMILIES, build, inputs, tensors

import trimaran
from trimaran.torch_path.optimize import untouched

pytestmark = pytest.mark.usefixtures("fresh_compiler")

EPSILON = {torch.float32: 2.0**-20, torch.bfloat16: 2.0**-8}
SIDES = ("right", "left", "none")  # of padding: one graph for all of them
PADDED = {name for name, made in FAMILIES.items() if made.kind not in ("image", "sound")}
MODELS = [(name, attention) for name, made in FAMILIES.items() for attention in made.attentions]
WAYS = list(itertools.product(EPSILON, (1, 3)))
EVERY = [
    (*model, *way, pads)
    for model, way, pads in itertools.product(MODELS, WAYS, (SIDES, ("absent",)))
    if model[0] in PADDED or pads == ("absent",)
]
# Models whose code is another one's: their eager attention is slow.
TWINS = {"bert-classes", "roberta", "xlm-roberta-tokens", "camembert-masked", "electra", "t5-encoder", "mistral"}
FEW = [model for model in MODELS if model[0] not in TWINS or model[1] == "sdpa"]
QUICK = [
    (*model, *WAYS[(place + place // 4) % 4], SIDES if place % 3 and model[0] in PADDED else ("absent",))
    for place, model in enumerate(FEW)
]


def spelt(case):
    name, attention, dtype, size, pads = case
    return f"{name}-{attention}-{str(dtype)[6:]}-{size}-{'absent' if pads == ('absent',) else 'mask'}"


@pytest.mark.parametrize("case", QUICK, ids=spelt)
def test_a_model(case):
    check(*case)


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in EVERY if case not in QUICK], ids=spelt)
def test_a_model_in_every_way(case):
    check(*case)


def check(name, attention, dtype, size, pads):
    model = build(name, attention, dtype)
    calls = [inputs(name, size, pad=pad, dtype=dtype) for pad in pads]
    wide = copy.deepcopy(model).double()
    with torch.no_grad():
        with mock.patch.object(torch.nn.functional, "softmax", softmax):
            exact = [tensors(wide(**widened(call)), call) for call in calls]
        eager = [tensors(model(**call), call) for call in calls]
    report = trimaran.optimize_model(model)
    ours = [tensors(model(**call), call) for call in calls]
    assert report.replaced == FAMILIES[name].counts, report
    assert len(report.graphs) == 1, report
    assert not report.near_misses, report
    assert not report.fallbacks, report
    for right, before, after in zip(chain(*exact), chain(*eager), chain(*ours), strict=True):
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
