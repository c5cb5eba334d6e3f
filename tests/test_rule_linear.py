"""Linear layers and what joins them: activations, gates, shared inputs, residuals, norms; and what does not."""

import functools
import math

import pytest
import torch
from rules import assert_found, assert_left, rand, rewritten
from torch import nn

F = nn.functional
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
        return s, F.rms_norm(s, (24,), w)

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
