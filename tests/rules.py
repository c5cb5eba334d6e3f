"""Rules on graphs of plain functions: what they find, in which form, and what they leave with which reason."""

from __future__ import annotations

import re

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from trimaran.torch_path.ops import TORCH_OPS
from trimaran.torch_path.rewrite import rewrite

INF = float("inf")


def traced(function, *inputs):
    """The graph of a function of tensors; those that it has by itself are constants in it."""
    with FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv()) as mode:
        fake = [mode.from_tensor(tensor, static_shapes=True) for tensor in inputs]
        graph = make_fx(function, pre_dispatch=True)(*fake)
        for node in graph.graph.nodes:
            if node.op == "get_attr":
                node.meta["val"] = mode.from_tensor(getattr(graph, node.target), static_shapes=True)
    return graph


def rewritten(function, *inputs):
    """(report, calls of our ops as (name, attributes, which inputs), what it computes now)"""
    graph = traced(function, *inputs)
    report = rewrite(graph)
    names = {bound.overload: bound.op for bound in TORCH_OPS.values()}
    calls = []
    for node in graph.graph.nodes:
        if node.target in names:
            op = names[node.target]
            given = [port.name for port, arg in zip(op.inputs, node.args, strict=False) if arg is not None]
            calls.append((op.name, node.kwargs, given))
    with torch.no_grad():
        return report, calls, graph(*inputs)


def assert_found(function, *inputs, op, tolerance=1e-5, also=(), **attrs):
    report, calls, ours = rewritten(function, *inputs)
    torch.testing.assert_close(ours, function(*inputs), rtol=tolerance, atol=tolerance)
    found = [call for call in calls if call[0] == op]
    assert len(found) == 1, (report, calls)
    shown = {name: found[0][1].get(name) for name in attrs}
    assert shown == pytest.approx(attrs) if all(isinstance(v, float) for v in attrs.values()) else shown == attrs
    assert not {*also} - {*found[0][2]}, found
    assert not report.near_misses, report
    return found[0]


def assert_left(function, *inputs, op, reason=None):
    report, calls, ours = rewritten(function, *inputs)
    torch.testing.assert_close(ours, function(*inputs), rtol=1e-4, atol=1e-4, equal_nan=True)
    assert op not in [name for name, *_ in calls], calls
    if reason is None:
        assert not [miss for miss in report.near_misses if miss.rule == op], report
    else:
        assert any(re.search(reason, miss.reason) for miss in report.near_misses), report


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))
