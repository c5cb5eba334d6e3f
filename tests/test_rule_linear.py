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
    "no sum": lambda y: 0.5 * y * torch.erf(y / math.sqrt(2.0)),
    "another error function": lambda y: 0.5 * y * (1.0 + torch.erf(y)),
    "no cubic": lambda y: 0.5 * y * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * y)),
    "two plus": lambda y: 0.5 * y * (2.0 + torch.erf(y / math.sqrt(2.0))),
    "another power": lambda y: (
        0.5 * y * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (y + 0.044715 * torch.pow(y, 2.0))))
    ),
    "a gate of something": lambda y: y * torch.sigmoid(1.702 * y.cos()),
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
    "halves of what is used whole": lambda x: (lambda y, a, b: F.gelu(a) * b + y.sum())(
        *(lambda y: (y, *y.chunk(2, -1)))(F.linear(x, A))
    ),
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
        x[1:].mul_(y.sum())
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


SPELT_OTHERWISE = {
    "product": (lambda x, w, b: x @ w.t() + b, {"transpose_weight": False}, True),
    "bias first": (lambda x, w, b: b + x @ w.t(), {"transpose_weight": False}, True),
    "transposed": (lambda x, w, b: x @ w + b, {"transpose_weight": True}, True),
    "no bias": (lambda x, w, b: torch.matmul(x, w.T), {"transpose_weight": False}, False),
    "matrices": (lambda x, w, b: torch.mm(x[0], w.t()), {"transpose_weight": False}, False),
    "einsum": (lambda x, w, b: torch.einsum("bsi,oi->bso", x, w) + b, {"transpose_weight": False}, True),
    "einsum, weight first": (lambda x, w, b: torch.einsum("oi,bsi->bso", w, x), {"transpose_weight": False}, False),
    "addmm": (lambda x, w, b: torch.addmm(b, x.view(-1, 16), w).view(2, 5, 24), {"transpose_weight": True}, True),
    "addmm, its rows used": (lambda x, w, b: torch.addmm(b, x.view(10, 16), w), {"transpose_weight": True}, True),
    "a scaled bias": (lambda x, w, b: torch.add(x @ w, b, alpha=2), {"transpose_weight": True}, False),
    "a matrix added": (lambda x, w, b: x @ w + w[:1, :24], {"transpose_weight": True}, False),
    "used before the bias": (lambda x, w, b: (lambda y: y + b + y.sum())(x @ w), {"transpose_weight": True}, False),
}


@pytest.mark.parametrize("name", SPELT_OTHERWISE)
def test_linear_layers_spelt_otherwise(name):
    function, attrs, bias = SPELT_OTHERWISE[name]
    weight = A.t().contiguous() if attrs["transpose_weight"] else A
    found = assert_found(function, X, weight, B, op="linear", tolerance=1e-4, **attrs)
    assert ("bias" in found[2]) is bias


def then(follow):
    """What follows a layer whose input is written into in between."""

    def run(x):
        x = x + 1
        y = F.linear(x, A)
        x[1:].mul_(2)
        return follow(y)

    return run


WRITTEN = {
    "activation": F.gelu,
    "gate": lambda y: F.silu(y[..., :12]) * y[..., 12:],
    "residual": lambda y: y + R,
    "norm": lambda y: F.layer_norm(y + R, (24,)),
}
R = rand(2, 5, 24)


@pytest.mark.parametrize("name", WRITTEN)
def test_nothing_reads_an_input_after_it_was_written_into(name):
    function = then(WRITTEN[name])
    _, calls, ours = rewritten(function, X)
    torch.testing.assert_close(ours, function(X), rtol=1e-4, atol=1e-4)
    assert [attrs.get("activation", "none") for op, attrs, _ in calls if op == "linear"] == ["none"]
    assert not [given for _, _, given in calls if "residual" in given and "norm_weight" in given]


def mixed(follow):
    """A layer in half precision whose result is added in fp32, as under autocast."""
    return lambda x, r, b: follow(F.linear(x.half(), A.half()), r, b)


MIXED = {
    "added": (lambda y, r, b: F.layer_norm(y + r, (24,)), {"return_sum": False}),
    "residual first": (lambda y, r, b: F.rms_norm(r + y, (24,)), {"return_sum": False}),
    "used again": (lambda y, r, b: (lambda s: F.layer_norm(s, (24,)) + s)(y + r), {"return_sum": True}),
    "alone": (lambda y, r, b: F.layer_norm(y.float(), (24,), b), {"return_sum": False}),
}


@pytest.mark.parametrize("name", MIXED)
def test_linear_norm_of_two_dtypes(name):
    function, attrs = MIXED[name]
    assert_found(mixed(function), X, R, B, op="linear_norm", tolerance=0.01, **attrs)


NOT_MIXED = {
    "scaled": lambda y, r, b: F.layer_norm(torch.add(r, y, alpha=2), (24,)),
    "broadcast": lambda y, r, b: F.layer_norm(y + r[:1], (24,)),
    "used in half": lambda y, r, b: F.layer_norm(y + r, (24,)) + y,
    "wider": lambda y, r, b: F.layer_norm((y + r.double()).float(), (24,)),
    "alone, without a weight": lambda y, r, b: F.layer_norm(y.float(), (24,)),
    "two halves": lambda y, r, b: F.layer_norm((y + r.bfloat16()), (24,)),
}


@pytest.mark.parametrize("name", NOT_MIXED)
def test_no_linear_norm_of_two_dtypes(name):
    function = mixed(NOT_MIXED[name])
    _, calls, ours = rewritten(function, X, R, B)
    torch.testing.assert_close(ours, function(X, R, B), rtol=0.02, atol=0.02)
    assert "linear_norm" not in [op for op, *_ in calls]


def test_two_layers_whose_rows_somebody_else_reads():
    def function(x, a, b):
        return [y.transpose(0, 1).as_strided((5, 2, 24), (24, 120, 1)) for y in (F.linear(x, a), F.linear(x, b))]

    report, _, ours = rewritten(function, X, A, A + 1)
    assert report.replaced == {"linear": 1}
    torch.testing.assert_close(ours, function(X, A, A + 1), rtol=1e-4, atol=1e-4)


@torch.library.custom_op("trimaran_tests::rows", mutates_args=())
def rows_of_somebody_else(x: torch.Tensor) -> torch.Tensor:
    assert x.is_contiguous()
    return x * 2


@rows_of_somebody_else.register_fake
def _(x):
    return torch.empty_like(x)


def test_an_operator_of_somebody_else_gets_rows_that_lie_together():
    def function(x, a, b):
        return rows_of_somebody_else(F.linear(x, a)), F.linear(x, b)

    report, _, ours = rewritten(function, X, A, A + 1)
    assert report.replaced == {"linear": 1}
    torch.testing.assert_close(ours, function(X, A, A + 1), rtol=1e-4, atol=1e-4)


NO_LINEAR = {
    "double": (lambda x: F.linear(x.double(), A.double()), "x is float64"),
    "a vector": (lambda x: F.linear(x[0, 0], A), None),
    "a scaled sum": (lambda x: torch.addmm(B, x[0], A.t(), beta=2), None),
    "a matrix for a bias": (lambda x: torch.addmm(X[0, :, :1], x[0], A.t()), None),
    "a product of two results": (lambda x: x.sin() @ x.cos().mT, None),
    "a vector of weights": (lambda x: x @ A[0], None),
    "a vector for a weight": (lambda x: F.linear(x, A[0]), "its weight is no matrix"),
    "a computed weight": (lambda x: x @ (A * 2).t(), None),
}


@pytest.mark.parametrize("name", NO_LINEAR)
def test_no_linear(name):
    function, reason = NO_LINEAR[name]
    assert_left(function, X, op="linear", reason=reason)
