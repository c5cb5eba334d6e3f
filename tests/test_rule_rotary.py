"""Rotary embeddings in every spelling, and what only looks like one."""

import pytest
import torch
from rules import assert_found, assert_left, rand, rewritten

Q, K = rand(2, 4, 5, 8), rand(2, 2, 5, 8)
COS, SIN = rand(1, 1, 5, 8, seed=5), rand(1, 1, 5, 8, seed=6)
LOW, HIGH = COS[..., :4], SIN[..., :4]  # tables of one value for each pair


def halves(x, at=4):
    return torch.cat((-x[..., at:], x[..., :at]), -1)


def neighbours(x):
    return torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)


def turn(x, cos=COS, sin=SIN, crossed=halves):
    return x * cos + crossed(x) * sin


def first_four(crossed):
    """Of a head's eight elements."""
    return lambda x: torch.cat((turn(x[..., :4], LOW, HIGH, crossed), x[..., 4:]), -1)


def by_halves(x, cos=LOW, sin=HIGH):
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


def by_neighbours(x):
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((a * LOW - b * HIGH, a * HIGH + LOW * b), -1).flatten(-2)


def positions_first(x):
    """As GPT-J has it, [B, S, H, D]"""
    tables = (t.transpose(1, 2).repeat_interleave(2, 3) for t in (LOW, HIGH))
    return turn(x.transpose(1, 2), *tables, neighbours).transpose(1, 2)


SPELLINGS = {
    "halves": (lambda q: turn(q), {"interleaved": False, "rotary_dim": None}),
    "neighbours": (lambda q: turn(q, crossed=neighbours), {"interleaved": True, "rotary_dim": None}),
    "sin first": (lambda q: neighbours(q) * SIN + COS * q, {"interleaved": True}),
    "reshaped as x": (
        lambda q: turn(q, crossed=lambda x: torch.stack((-x[..., 1::2], x[..., ::2]), -1).reshape_as(x)),
        {"interleaved": True},
    ),
    "in chunks": (
        lambda q: turn(q, crossed=lambda x: (lambda a, b: torch.cat((-b, a), -1))(*x.chunk(2, -1))),
        {"interleaved": False},
    ),
    "split": (
        lambda q: turn(q, crossed=lambda x: (lambda a, b: torch.cat((-b, a), -1))(*x.split([4, 4], -1))),
        {"interleaved": False},
    ),
    "the first four": (first_four(lambda x: halves(x, 2)), {"interleaved": False, "rotary_dim": 4}),
    "the first four, neighbours": (first_four(neighbours), {"interleaved": True, "rotary_dim": 4}),
    "all, as if they were the first": (
        lambda q: torch.cat((turn(q[..., :8]), q[..., 8:]), -1),
        {"interleaved": False, "rotary_dim": None},
    ),
    "one kind at a time": (lambda q: by_halves(q), {"interleaved": False}),
    "one kind at a time, neighbours": (by_neighbours, {"interleaved": True}),
    "tables without axes": (lambda q: turn(q, COS[0, 0], SIN[0, 0]), {"interleaved": False}),
    "positions before heads": (positions_first, {"interleaved": True}),
    "another rest": (
        lambda q: torch.cat((turn(q[..., :4], LOW, HIGH, neighbours), q[..., 4:] * 2), -1),
        {"interleaved": True, "rotary_dim": None},
    ),
    "the rest twice": (
        lambda q: torch.cat((turn(q[..., :4], LOW, HIGH, neighbours), q[..., 4:], q[..., 4:]), -1),
        {"interleaved": True, "rotary_dim": None},
    ),
    "the last four": (
        lambda q: torch.cat((q[..., :4], turn(q[..., 4:], LOW, HIGH, neighbours)), -1),
        {"interleaved": True, "rotary_dim": None},
    ),
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_rotary_embedding(name):
    function, attrs = SPELLINGS[name]
    assert_found(function, Q, op="rotary_embedding", return_k_out=False, **attrs)


@pytest.mark.parametrize("crossed", [halves, neighbours])
def test_in_fp32_and_back(crossed):
    def inner_cast(x):
        return turn(x.float(), crossed=crossed).to(x.dtype)

    def fp32_tables(x):
        return turn(x, crossed=crossed).to(x.dtype)

    for function in (inner_cast, fp32_tables):
        assert_found(function, Q.bfloat16(), op="rotary_embedding", tolerance=0.02)


def test_rows_are_read_where_they_lie():
    rows = rand(2, 5, 32)
    found = assert_found(lambda x: turn(x.view(2, 5, 4, 8).transpose(1, 2)), rows, op="rotary_embedding")
    assert found[1]["num_heads"] == 4
    found = assert_found(lambda x: positions_first(x.view(2, 5, 4, 8).transpose(1, 2)), rows, op="rotary_embedding")
    assert found[1]["num_heads"] == 4


def test_queries_and_keys_turn_at_once():
    both = assert_found(lambda q, k, *cs: (turn(q, *cs), turn(k, *cs)), Q, K, COS, SIN, op="rotary_embedding")
    assert "k" in both[2]
    swapped = assert_found(lambda q, k, *cs: (turn(k, *cs), turn(q, *cs)), Q, K, COS, SIN, op="rotary_embedding")
    assert "k" in swapped[2]


def needed_before(q, k, cos, sin):
    q = turn(q, cos, sin)
    return q, turn(k * q.sum(), cos, sin)


APART = {
    "other tables": lambda q, k, cos, sin: (turn(q, cos, sin), turn(k, sin, cos)),
    "another style": lambda q, k, cos, sin: (turn(q, cos, sin), turn(k, cos, sin, neighbours)),
    "another batch": lambda q, k, cos, sin: (turn(q, cos, sin), turn(k[:1], cos, sin)),
    "another dtype": lambda q, k, cos, sin: (turn(q, cos, sin), turn(k.half(), cos, sin).half()),
    "one needed for the other": needed_before,
}


@pytest.mark.parametrize("name", APART)
def test_two_that_do_not_turn_at_once(name):
    report, _, ours = rewritten(APART[name], Q, K, COS, SIN)
    assert report.replaced == {"rotary_embedding": 2}
    torch.testing.assert_close(ours, APART[name](Q, K, COS, SIN), rtol=1e-3, atol=1e-3)


def used_again(q):
    crossed = halves(q)
    return q * COS + crossed * SIN + crossed.sum()


def written_into(q):
    q = q + 1
    first = q * COS
    q.mul_(2)
    return first + halves(q) * SIN


NO_ROTARY = {
    "unequal parts": (lambda q: q * COS + halves(q, 3) * SIN, None),
    "three parts": (lambda q: turn(q, crossed=lambda x: torch.cat((-x[..., 4:6], x[..., 6:], x[..., :4]), -1)), None),
    "another axis": (lambda q: turn(q, crossed=lambda x: torch.cat((-x[:, 2:], x[:, :2]), 1)), None),
    "signs": (lambda q: turn(q, crossed=lambda x: torch.cat((x[..., 4:], -x[..., :4]), -1)), None),
    "no sign": (lambda q: turn(q, crossed=lambda x: torch.cat((x[..., 4:], x[..., :4]), -1)), None),
    "not exchanged": (lambda q: turn(q, crossed=lambda x: torch.cat((-x[..., :4], x[..., 4:]), -1)), None),
    "every third": (lambda q: turn(q[..., :6], COS[..., :6], SIN[..., :6],
                                   lambda x: torch.cat((-x[..., ::2], x[..., 1::2]), -1)), None),
    "of two tensors": (lambda q: turn(q, crossed=lambda x: torch.cat((-x[..., 4:], (x + 1)[..., :4]), -1)), None),
    "stacked, not flattened": (
        lambda q: (q.unflatten(-1, (4, 2)) * COS.unflatten(-1, (4, 2))
                   + torch.stack((-q[..., 1::2], q[..., ::2]), -1) * SIN.unflatten(-1, (4, 2))), None),
    "stacked in front": (
        lambda q: turn(q, crossed=lambda x: torch.stack((-x[..., 1::2], x[..., ::2]), -2).flatten(-2)), None),
    "another x": (lambda q: (q + 1) * COS + halves(q) * SIN, None),
    "no sum": (lambda q: q * COS - halves(q) * SIN, None),
    "no product": (lambda q: q + halves(q) * SIN, None),
    "used again": (used_again, None),
    "turned back": (lambda q: (lambda a, b: torch.cat((a * LOW + b * HIGH, b * LOW - a * HIGH), -1))(*q.chunk(2, -1)),
                    None),
    "other tables for the second kind": (
        lambda q: (lambda a, b: torch.cat((a * LOW - b * HIGH, b * HIGH + a * LOW), -1))(*q.chunk(2, -1)), None),
    "pairs that lie apart": (
        lambda q: (lambda a, b: torch.stack((a * LOW - b * HIGH, a * HIGH + LOW * b), -1).flatten(-2))(
            *q.unflatten(-1, (2, 4)).unbind(-2)), None),
    "no products of kinds": (lambda q: (lambda a, b: torch.cat((a - b, b + a), -1))(*q.chunk(2, -1)), None),
    "a table for each head": (lambda q: turn(q, COS.repeat(1, 4, 1, 1)), "cos and sin are .*, expected one row"),
    "one row": (lambda q: turn(q, COS, SIN[:, :, :1]), "expected one row for each position of q"),
    "a number": (lambda q: q * 2.0 + halves(q) * SIN, "cos and sin are 2.0 and"),
    "three axes": (lambda q: turn(q, COS[0], SIN[0]), "expected one row for each position"),
    "another batch": (lambda q: turn(q[:1], COS.repeat(2, 1, 1, 1), SIN.repeat(2, 1, 1, 1)), "expected one row"),
    "double": (lambda q: turn(q.double(), COS.double(), SIN.double()), "q is float64"),
    "wider": (lambda q: turn(q.bfloat16()), "q is bfloat16 and turned it is float32"),
    "tables of two dtypes": (lambda q: turn(q, COS, SIN.bfloat16()), "cos is float32 and sin bfloat16, supported"),
}  # fmt: skip


@pytest.mark.parametrize("name", NO_ROTARY)
def test_no_rotary_embedding(name):
    function, reason = NO_ROTARY[name]
    assert_left(function, Q, op="rotary_embedding", reason=reason)
