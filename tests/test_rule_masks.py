"""Masks read back: which part hides keys, which is causal or a window, and what stays a bias."""

import pytest
import torch
from rules import INF, assert_found, assert_left, rand, traced
from torch import nn
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from trimaran.torch_path.rules.masks import Mask, MaskReader, Term, number

F = nn.functional
Q, K, V = rand(2, 4, 5, 8), rand(2, 4, 6, 8, seed=1), rand(2, 4, 6, 8, seed=2)
SEEN = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 0, 1, 1, 1]]).bool()
BIAS = rand(1, 4, 5, 6, seed=3)


def weights(scores, v):
    return scores.softmax(-1) @ v


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
    "added, not far": (lambda s: s + torch.where(SEEN[:, None, None], 0.0, -1e4), ["bias"], "zero"),
    "bias": (lambda s: s + BIAS, ["bias"], "zero"),
    "two biases": (lambda s: s + BIAS - BIAS.exp(), ["bias"], "zero"),
    "subtracted": (lambda s: s - BIAS, ["bias"], "zero"),
    "neither by key nor a window": (lambda s: s.masked_fill(BIAS[:, :1] > 1, -INF), ["bias"], "zero"),
    "zeros": (lambda s: s + torch.zeros(5, 6), [], "zero"),
    "by query": (lambda s: s + BIAS[..., :1], ["bias"], "zero"),
    "filled by query": (lambda s: s.masked_fill(BIAS[..., :1] > 0, -1e9), ["bias"], "mean"),
    "a subtracted triangle": (lambda s: s - torch.full((5, 6), 9.0).triu(2), ["bias"], "zero"),
    "a triangle not far": (lambda s: s + torch.full((5, 6), -2e4).triu(2), ["bias"], "zero"),
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


def i():
    return torch.arange(5)[:, None]


def j():
    return torch.arange(6)


def in_one_document(jump=1, width=1, n=1):
    """As transformers finds packed documents: a new one begins where positions jump."""
    at, row = torch.arange(6)[None], torch.zeros(1, 1).long()
    documents = (torch.diff(at, prepend=at[:, :width] - jump, n=n, dim=-1) != 1).cumsum(-1)
    return documents[row, j()] == documents[row, i()]


OPEN, CAUSAL = {}, {"causal": True}  # the query stands one further: there are six keys and five queries
CONDITIONS = {
    "at most": (lambda: j() <= i() + 1, CAUSAL),
    "less": (lambda: j() < i() + 2, CAUSAL),
    "at least": (lambda: i() + 1 >= j(), CAUSAL),
    "greater": (lambda: i() + 2 > j(), CAUSAL),
    "not greater": (lambda: ~(j() > i() + 1), CAUSAL),
    "not less": (lambda: ~(i() + 1 < j()), CAUSAL),
    "not at least": (lambda: torch.logical_not(j() >= i() + 2), CAUSAL),
    "not at most": (lambda: (i() + 2 <= j()) == 0, CAUSAL),
    "a difference": (lambda: j() - i() <= 1, CAUSAL),
    "a negated difference": (lambda: -(i() - j()) <= 1, CAUSAL),
    "and": (lambda: (j() <= i() + 1) & (j() > i() - 1), CAUSAL | {"window_left": 1}),
    "times": (lambda: (j() <= i() + 1) * (j() > i() - 1), CAUSAL | {"window_left": 1}),
    "times, cast": (lambda: ((j() <= i() + 1) * (j() > i() - 1)).int() != 0, CAUSAL | {"window_left": 1}),
    "not or": (lambda: ~((j() > i() + 1) | (j() <= i() - 1)), CAUSAL | {"window_left": 1}),
    "twice": (lambda: (j() <= i() + 1) & (j() <= i() + 2), CAUSAL),
    "both windows": (lambda: (j() > i() - 1) & (j() > i() - 2), {"window_left": 1}),
    "or": (lambda: (j() <= i() + 1) | (j() > i() - 1), "bias"),
    "band": (lambda: (j() - i() - 1).abs() <= 2, {"window_left": 2, "window_right": 2}),
    "narrow band": (lambda: (j() - i() - 1).abs() < 2, {"window_left": 1, "window_right": 1}),
    "band of something": (lambda: (j() * j() - i()).abs() <= 2, "bias"),
    "band by a line": (lambda: (j() - i()).abs() <= j(), "bias"),
    "to the right": (lambda: j() <= i() + 2, {"window_right": 1}),
    "not up to the query": (lambda: j() <= i(), "bias"),
    "not from the query": (lambda: j() >= i() + 2, "bias"),
    "from the query": (lambda: j() >= i() + 1, {"window_left": 0}),
    "steep": (lambda: j() + j() <= i(), "bias"),
    "wrapping": (lambda: j().to(torch.uint8) - 3 <= i().to(torch.uint8), "bias"),
    "both grow": (lambda: j() + i() <= 6, "bias"),
    "products": (lambda: j() * 1 * j() <= i(), "bias"),
    "scaled sum": (lambda: torch.add(j(), i(), alpha=-1) <= 1, "bias"),
    "floats": (lambda: j().float() <= i().float() + 1, "bias"),
    "equal": (lambda: (j() == i()) | (j() != i()), "bias"),
    "always": (lambda: j() >= 0, OPEN),
    "always, of queries": (lambda: i() > -1, OPEN),
    "never negative": (lambda: ~(j() < 0), OPEN),
    "not always": (lambda: j() >= 1, "key_mask"),
    "tril": (lambda: torch.tril(torch.ones(5, 6).bool(), 1), CAUSAL),
    "tril, default": (lambda: torch.tril(torch.ones(6, 6))[:5] != 0, "bias"),
    "not triu": (lambda: ~torch.triu(torch.ones(5, 6).bool(), 2), CAUSAL),
    "triu": (lambda: torch.triu(torch.ones(5, 6).bool()), {"window_left": 1}),
    "not tril": (lambda: ~torch.tril(torch.ones(5, 6).bool(), -1), {"window_left": 1}),
    "tril of something": (lambda: torch.tril((j() != i()), 1), "bias"),
    "tril of zeros": (lambda: ~torch.tril(torch.zeros(5, 6).bool(), 1), "bias"),
    "from a start": (lambda: torch.arange(1, 7) <= i() + 2, CAUSAL),
    "in steps": (lambda: torch.arange(0, 12, 2) <= i() + 1, "bias"),
    "sliced": (lambda: torch.arange(8)[2:] <= i() + 3, CAUSAL),
    "sliced in steps": (lambda: torch.arange(12)[::2] <= i() + 1, "bias"),
    "sliced from the end": (lambda: torch.arange(12)[-6:] <= i() + 7, "bias"),
    "unsqueezed, expanded, cast": (
        lambda: j()[None].expand(5, 6).to(torch.int32) <= i().unsqueeze(0).to(torch.int32) + 1, CAUSAL),
    "viewed": (lambda: j().view(1, 6) <= torch.arange(5).view(5, 1) + 1, CAUSAL),
    "folded": (lambda: torch.arange(30).view(5, 6) <= 20, "bias"),
    "repeated": (lambda: j()[None].repeat(5, 1) <= i() + 1, CAUSAL),
    "repeated along": (lambda: torch.arange(3).repeat(2) <= i() + 1, "bias"),
    "looked up": (lambda: torch.arange(1, 8)[j()] <= i() + 2, CAUSAL),
    "looked up in a table": (lambda: torch.tensor([0, 1, 2, 3, 4, 5])[j()] <= i() + 1, "bias"),
    "looked up by something": (lambda: torch.arange(7)[j() * j() % 7] <= i() + 1, "bias"),
    "looked up in rows": (lambda: j()[None].repeat(6, 1)[j()[:5]] <= 3, "bias"),
    "zeros added": (lambda: torch.zeros(6, dtype=torch.long) + j() <= i() + torch.full((1,), 1), CAUSAL),
    "ones": (lambda: torch.ones(5, 6).bool(), OPEN),
    "not zeros": (lambda: ~torch.zeros(5, 6).bool(), OPEN),
    "full": (lambda: torch.full((5, 6), True), OPEN),
    "full, new and like": (lambda: torch.full_like(j().new_full((6,), 3), 2) != 0, OPEN),
    "ones, new and like": (lambda: torch.ones_like(j().new_ones(6)).expand(5, 6).bool(), OPEN),
    "zeros, new and like": (lambda: torch.zeros_like(j().new_zeros(6)) == 0, OPEN),
    "constants compared": (lambda: torch.ones(6) == torch.ones(5, 1), OPEN),
    "constants unlike": (lambda: torch.ones(6) != torch.zeros(5, 1), OPEN),
    "a complex number": (lambda: torch.full((6,), 1j) != 0, "key_mask"),
    "nothing": (lambda: torch.ones(6) == torch.zeros(5, 1), "bias"),
    "counted zeros": (lambda: torch.zeros(6).cumsum(0) == 0, OPEN),
    "counted ones": (lambda: torch.ones(6).cumsum(0) == 1, "key_mask"),
    "one document": (lambda: in_one_document(), OPEN),
    "two documents": (lambda: in_one_document(2), "bias"),
    "second differences": (lambda: in_one_document(width=2, n=2), "bias"),
    "two before the first": (lambda: in_one_document(width=2), "bias"),
    "no start": (lambda: (torch.diff(torch.arange(7)) == 1), "key_mask"),
    "of a constant": (lambda: torch.diff(torch.ones(6).long(), prepend=torch.ones(1).long()) == 0, "key_mask"),
}  # fmt: skip


@pytest.mark.parametrize("name", CONDITIONS)
def test_conditions_on_positions(name):
    condition, form = CONDITIONS[name]
    attrs = {"causal": False, "window_left": -1, "window_right": -1}

    def attend(q, k, v):
        mask = condition()
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask[(None,) * (4 - mask.dim())])

    attrs |= {} if isinstance(form, str) else form
    found = assert_found(attend, Q, K, V, op="attention", **attrs)
    inputs = [port for port in found[2] if port in ("bias", "key_mask")]
    assert inputs == ([form] if isinstance(form, str) else [])


def nothing(k):
    """A mask [B, 1, 1, Sk] that hides all keys, of which nothing is known."""
    return (k[:, :1, :, 0] > 9)[:, :, None]


def either(x, low):
    return torch.where(x[:, :1, None, :, 0] > 0, 0.0, low)


WITHOUT_KEYS = {  # which row is given, and by which inputs of the op
    "bool": (lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=nothing(k)), "zero", "key_mask"),
    "filled": (lambda q, k, v: weights((q @ k.mT).masked_fill(~nothing(k), -1e9), v), "mean", "key_mask"),
    "filled, not far": (lambda q, k, v: weights((q @ k.mT).masked_fill(~nothing(k), -1e4), v), "mean", "key_mask"),
    "added": (lambda q, k, v: weights(q @ k.mT + torch.where(nothing(k), 0.0, LOWEST), v), "mean", "key_mask"),
    "added, not far": (lambda q, k, v: weights(q @ k.mT + torch.where(nothing(k), 0.0, -1e4), v), "zero", "bias"),
    "by either of two": (
        lambda q, k, v: weights(q @ k.mT + either(k, LOWEST / 2) + either(-k, LOWEST / 2), v), "zero", "bias"),
    "filled twice": (lambda q, k, v: weights((q @ k.mT).masked_fill(k[:, :1, None, :, 0] > 0, -1e9).masked_fill(
        k[:, :1, None, :, 0] <= 0, -1e9), v), "mean", "key_mask"),
    "sdpa's, lowest": (
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=torch.where(nothing(k), 0.0, LOWEST)),
        "mean", "key_mask"),
    "sdpa's, not far": (
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=torch.where(nothing(k), 0.0, -1e4)),
        "zero", "bias"),
}  # fmt: skip


@pytest.mark.parametrize("name", WITHOUT_KEYS)
def test_a_row_without_keys_gives_what_it_gave(name):
    function, row, given = WITHOUT_KEYS[name]
    found = assert_found(function, Q, K, V, op="attention", tolerance=2e-3, masked_row=row)
    assert given in found[2]


DIFFERENT = {  # a row without keys would be no mean of all
    "filled with two numbers": (
        lambda s: s.masked_fill(~SEEN[:, None, None], -1e9).masked_fill(SEEN[:, None, None], -2e9),
        "masked with different numbers"),
    "filled, and taken away": (
        lambda s: s.masked_fill(~SEEN[:, None, None], -1e9).masked_fill(SEEN[:, None, None], -INF),
        "masked with different numbers"),
    "filled, then added to": (lambda s: s.masked_fill(~SEEN[:, None, None], -2e4) + BIAS, "with different numbers"),
    "scaled back": (lambda s: s.masked_fill(~SEEN[:, None, None], -1e9) / 1e8, "become -10.0, which does not hide"),
}  # fmt: skip


@pytest.mark.parametrize("name", DIFFERENT)
def test_masks_that_do_not_agree(name):
    mask, reason = DIFFERENT[name]
    assert_left(lambda q, k, v: weights(mask(q @ k.mT), v), Q, K, V, op="attention", reason=reason)


SEEN_BY_KEY = SEEN[:, None, None]
WIDER = torch.cat((SEEN, torch.zeros(2, 2).bool()), 1)
FORMS = {  # of sdpa's own mask: how, and which inputs of the op it becomes
    "none": (lambda q: None, []),
    "float": (lambda q: BIAS, ["bias"]),
    "float, finite": (lambda q: torch.where(SEEN_BY_KEY, 0.0, LOWEST), ["key_mask"]),
    "float, by number": (lambda q: torch.full((5, 6), -INF).triu(2), []),
    "float, from before the query": (lambda q: torch.full((5, 6), -INF).triu(1), ["bias"]),
    "float, another triangle": (lambda q: torch.full((5, 6), -3.0).triu(2), ["bias"]),
    "float, a triangle of something": (lambda q: BIAS[0].triu(2), ["bias"]),
    "keys": (lambda q: SEEN_BY_KEY, ["key_mask"]),
    "keys, as numbers": (lambda q: SEEN_BY_KEY.long() != 0, ["key_mask"]),
    "keys twice": (lambda q: SEEN_BY_KEY & (K[:, :1, None, :, 0] > -9), ["key_mask"]),
    "keys and causal": (lambda q: SEEN_BY_KEY & (j() <= i() + 1), ["key_mask"]),
    "keys, expanded": (lambda q: SEEN_BY_KEY.expand(2, 1, 5, 6), ["key_mask"]),
    "keys, looked up": (
        lambda q: SEEN[torch.arange(2)[:, None, None, None], j()[None, None, None]].expand(2, 1, 5, 6), ["key_mask"]),
    "keys, looked up otherwise": (
        lambda q: SEEN[torch.arange(2).flip(0)[:, None, None, None], j()[None, None, None]], ["key_mask"]),
    "keys, looked up in a wider table": (
        lambda q: WIDER[torch.arange(2)[:, None, None, None], j()[None, None, None]], ["key_mask"]),
    "keys, looked up by a range": (
        lambda q: WIDER[torch.arange(2)[:, None, None, None], torch.arange(0, 6)[None, None, None]], ["key_mask"]),
    "for each head": (lambda q: q[..., :6] > 0, ["bias"]),
    "two dimensions": (lambda q: BIAS[0, 0] > 0, ["bias"]),
}  # fmt: skip


@pytest.mark.parametrize("name", FORMS)
def test_masks_of_sdpa(name):
    mask, inputs = FORMS[name]
    found = assert_found(
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=mask(q)), Q, K, V, op="attention"
    )
    assert [port for port in found[2] if port in ("bias", "key_mask")] == inputs
    assert ("key_lengths" in found[2]) is ("key_mask" in found[2])


def test_a_mask_that_is_scaled_with_the_scores():
    found = assert_found(
        lambda q, k, v: weights((q @ k.mT + torch.where(SEEN_BY_KEY, 0.0, LOWEST)) / 2, v), Q, K, V, op="attention"
    )
    assert found[2] == ["q", "k", "v", "key_lengths", "key_mask"]


ROWS_OF_HEADS = {  # what is added to scores [B*H, Sq, Sk]
    "a view": lambda scores: scores + torch.where(SEEN_BY_KEY, 0.0, LOWEST).expand(2, 4, 5, 6).reshape(8, 5, 6),
    "in four dimensions": lambda scores: (scores.view(2, 4, 5, 6) + BIAS).view(8, 5, 6),
    "in four dimensions, as large": lambda scores: (scores.view(2, 4, 5, 6) + BIAS.repeat(2, 1, 1, 1)).view(8, 5, 6),
}


@pytest.mark.parametrize("name", ROWS_OF_HEADS)
def test_masks_of_rows_of_heads(name):
    def attend(q, k, v):
        return torch.bmm(ROWS_OF_HEADS[name](torch.bmm(q, k.mT)).softmax(-1), v)

    rows = [x.flatten(0, 1) for x in (Q, K, V)]
    found = assert_found(attend, *rows, op="attention", tolerance=1e-4)
    assert found[2] == ["q", "k", "v", "bias"]


UNFIT = {"batch": (3, 1, 5, 6), "heads": (2, 3, 5, 6), "queries": (1, 1, 4, 6), "keys": (2, 1, 1, 5), "rank": (1,) * 5}


@pytest.mark.parametrize("name", UNFIT)
def test_masks_of_unfit_shapes(name):
    """No operator of torch's takes such a mask; with sizes that are symbols a graph may not tell."""
    graph = traced(lambda seen, bias: (seen, bias), torch.ones(UNFIT[name]).bool(), rand(*UNFIT[name]))
    seen, bias = (node for node in graph.graph.nodes if node.op == "placeholder")
    reader = MaskReader((2, 4, 5), 6, torch.float32)
    wanted = f"the mask's shape {list(UNFIT[name])} is not provably [1|B, 1|H, 1|Sq, Sk]"
    assert reader.seen(Term(seen)) == wanted
    assert reader.added(Term(bias), "float32") == wanted
    assert reader.mask == Mask()


def test_numbers_of_symbols():
    symbol = ShapeEnv().create_unbacked_symint()
    assert number(symbol) is None
    assert number(symbol - symbol + 3) == number(3) == 3


def test_a_mask_of_another_dtype():
    def attend(q, k, v):
        return (q @ k.mT + BIAS.double()).softmax(-1).float() @ v

    assert_left(attend, Q, K, V, op="attention", reason="the mask is float64 and q is float32")
