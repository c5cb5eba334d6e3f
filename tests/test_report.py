"""The report: live, readable, and with a reason and a line for everything that does not run on the kernels."""

import re

import pytest
import torch
from models import build, inputs
from torch import nn

import trimaran

pytestmark = pytest.mark.usefixtures("fresh_compiler")


def test_the_report_is_live_and_readable():
    model = build("bert")
    report = trimaran.optimize_model(model)
    assert "not captured yet" in str(report)
    model(**inputs("bert"))
    assert str(report) == "BertModel: replaced 2 attention, 1 layer_norm, 5 linear, 4 linear_norm; 1 graph captured"


class Convolution(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())

    def forward(self, x):
        return self.layers(x)


def test_a_model_without_any_of_it_runs_as_before():
    model, x = Convolution().eval(), torch.randn(1, 3, 8, 8)
    with torch.no_grad():
        before = model(x)
    report = trimaran.optimize_model(model)
    torch.testing.assert_close(model(x), before)
    assert str(report) == "Convolution: replaced 0, because no rule looks for any of its operations; 1 graph captured"


class Unusual(nn.Module):
    def forward(self, x):
        return nn.functional.scaled_dot_product_attention(x, x, torch.cat([x, x], -1))


def test_what_is_left_alone_comes_with_the_reason_and_the_line():
    model, x = Unusual().eval(), torch.randn(1, 2, 3, 8)
    expected = model(x)
    report = trimaran.optimize_model(model)
    torch.testing.assert_close(model(x), expected)
    line = r"test_report.py:\d+, return nn.functional.scaled_dot_product_attention"
    reason = "v has a head dimension of 16, q and k of 8"
    assert re.search(rf"Unusual: replaced nothing; .*\n  left alone: attention at .*: {reason}\n.*{line}", str(report))


def test_a_rule_that_fails_leaves_the_model_as_it_was():
    def wrong(graph, node, match):
        graph.erase_node(node)

    rule = trimaran.Rule("wrong", (torch.ops.aten.layer_norm.default,), lambda node: node, wrong)
    model, x = nn.LayerNorm(8).eval(), torch.randn(2, 8)
    with torch.no_grad():
        expected = model(x)
    report = trimaran.optimize_model(model, rules=(rule,))
    with pytest.warns(UserWarning, match="LayerNorm runs without the kernels: a rule failed, RuntimeError"):
        assert torch.equal(model(x), expected)
    assert [reason[:28] for reason in report.fallbacks] == ["a rule failed, RuntimeError:"]
    assert not report.graphs


class Breaking(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(8)

    def forward(self, x):
        x = self.norm(x)
        torch._dynamo.graph_break()
        return self.norm(x)


def test_graph_breaks_are_reported_with_their_line():
    model, x = Breaking().eval(), torch.randn(2, 8)
    with torch.no_grad():
        eager = model(x)
    report = trimaran.optimize_model(model)
    torch.testing.assert_close(model(x), eager)
    assert [graph.replaced["layer_norm"] for graph in report.graphs] == [1, 1]
    assert len(report.graph_breaks) == 1
    assert re.search(r"graph break: .*\n.*test_report.py:\d+, torch._dynamo.graph_break\(\)", str(report))
    assert str(report).startswith("Breaking: replaced 2 layer_norm; 2 graphs captured"), "both, since one call is both"


def test_more_recompilations_than_dynamo_allows_are_reported():
    class Counting(nn.Module):
        step = 0

        def forward(self, x):
            return nn.functional.layer_norm(x, (8,)) + self.step

    model, x = Counting().eval(), torch.randn(2, 8)
    report = trimaran.optimize_model(model)
    with torch._dynamo.config.patch(recompile_limit=2):
        for step in range(4):
            model.step = step
            torch.testing.assert_close(model(x), nn.functional.layer_norm(x, (8,)) + step)
    assert len(report.graphs) == 2
    assert report.fallbacks == {"Dynamo ran the untouched model (recompile_limit is 2)": 2}
