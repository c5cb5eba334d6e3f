"""Buckets: calls of many lengths on a few graphs, with the outputs of the length that was asked for."""

import fake_graphs
import pytest
import torch
from test_optimize import batch, bert
from torch import nn

import trimaran
from trimaran.torch_path.buckets import Buckets
from trimaran.torch_path.optimize import untouched

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()


@pytest.mark.parametrize("device", DEVICES)
def test_many_lengths_on_few_graphs(device, monkeypatch):
    if device == "cpu":
        fake_graphs.use(monkeypatch)
    model = bert(pad_token_id=3).to(device)
    report = trimaran.optimize_model(model, buckets=[16, 8])
    for _ in range(2):
        for length in (3, 5, 8, 9, 13, 16):
            inputs = batch(2, length, device, pad=length > 4)
            for given in (inputs, {"input_ids": inputs["input_ids"]}):
                ours = model(**given, output_hidden_states=True)
                with torch.no_grad(), untouched(model):
                    expected = model(**given, output_hidden_states=True)
                torch.testing.assert_close(ours.to_tuple(), expected.to_tuple(), rtol=1e-4, atol=1e-4)
                assert type(ours) is type(expected)
    assert report.cuda_graphs <= 4, "at most two of Dynamo's graphs for each bucket"


def test_what_is_not_bucketed_runs_as_it_is():
    class Watched(nn.Module):
        def forward(self, input_ids, attention_mask=None, other=None, flag=True):
            self.seen.append(tuple(input_ids.shape))
            return input_ids * 2

    model, buckets = Watched(), Buckets([4, 8])
    model.seen = []
    ids = torch.ones(1, 5, dtype=torch.long)

    def seen(*args, **kwargs):
        model.seen.clear()
        result = buckets(model, model, args, kwargs)
        assert result.shape == kwargs.get("input_ids", args[0] if args else None).shape
        return model.seen[-1]

    assert seen(ids) == seen(input_ids=ids, flag=False) == seen(ids, torch.ones_like(ids)) == (1, 8)
    assert seen(torch.ones(1, 9, dtype=torch.long)) == (1, 9), "longer than all buckets"
    assert seen(ids, other=torch.ones(5)) == (1, 5), "a tensor that nobody knows how to pad"
    assert seen(ids, torch.ones(1, 1, 5, 5)) == (1, 5), "a mask of another shape"
    assert seen(torch.ones(5)) == (5,)


def test_an_axis_is_cut_for_what_it_counts_and_not_for_its_size():
    class Square(nn.Module):
        def forward(self, input_ids, attention_mask):
            x = input_ids.float()
            return x[:, :, None] * x[:, None], x @ x.mT, torch.ones(8, 8), x.sum(1)

    ids = torch.arange(6).view(1, 6)
    outputs = Buckets([8])(Square(), Square(), (ids,), {})
    assert [tuple(t.shape) for t in outputs] == [(1, 6, 6), (1, 1), (8, 8), (1,)]
    torch.testing.assert_close(outputs[0], Square()(ids, None)[0])


@pytest.mark.parametrize("bad", [[], [0, 8], [8.0], [True]])
def test_lengths_are_checked(bad):
    with pytest.raises(ValueError, match=r"buckets is .*, expected lengths of at least 1"):
        trimaran.optimize_model(nn.Linear(2, 2).eval(), buckets=bad)
