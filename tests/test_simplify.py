"""The smaller dialect: for each of its equivalences what goes, what stays, and that the result is the same."""

import pytest
import torch
from rules import rand, traced

from trimaran.torch_path.rewrite import rewrite
from trimaran.torch_path.simplify import simplify

X, Y, W = rand(2, 3, 4), rand(2, 3, 4, seed=1), rand(4, 5)
einsum = torch.einsum


def then_written(function):
    """What is a copy of its input stays one where somebody writes into it."""

    def run(x, y):
        x = x.sin()
        z = function(x)
        z.mul_(2)
        return x + z

    return run


def written_after(function):
    """What is a copy of its input stays one where somebody writes into that."""

    def run(x, y):
        x = x.sin()
        z = function(x)
        x[0].mul_(2)
        return x.sum() + z

    return run


def added_in_place(x, y):
    x = x.sin()
    x += y
    return x


def added_to_an_input(x, y):
    x.add_(y)
    return x * 1.5


def added_to_a_view(x, y):
    x = x.sin()
    x[0].add_(y[0])
    return x


def added_while_used(x, y):
    x = x.sin()
    z = x.cos()
    w = x.add_(y)
    return x + z * w


def added_while_seen(x, y):
    x = x.sin()
    first = x[0]
    x.add_(y)
    return x + first


def added_and_cast(x, y):
    x = x.sin()
    return x.add_(y.double()) + x


def written_between(x, y):
    x = x.clone()
    first = x.sin()
    x.mul_(2)
    return first + x.sin()


# name: (function of X and Y, how often which operators are left)
CASES = {
    "no dropout": (lambda x, y: torch.dropout(x.sin(), 0.5, False), {"dropout": 0}),
    "dropout of nothing": (lambda x, y: torch.dropout(x.sin(), 0.0, True), {"dropout": 0}),
    "dropout": (lambda x, y: torch.dropout(x.sin(), 1.0, True), {"dropout": 1}),
    "detach": (lambda x, y: x.sin().detach(), {"detach": 0}),
    "times one": (lambda x, y: x.sin() * 1 + y.sin() / 1.0, {"mul": 0, "div": 0}),
    "plus zero": (lambda x, y: (x.sin() + 0) * (y.sin() - 0), {"add": 0, "sub": 0}),
    "times two": (lambda x, y: x.sin() * 2, {"mul": 1}),
    "an input times one": (lambda x, y: x * 1, {"mul": 1}),
    "integers times one": (lambda x, y: x.sin().long() * 1.0, {"mul": 1}),
    "times one, then written": (then_written(lambda x: x * 1), {"mul": 1}),
    "whole slice": (lambda x, y: x[:, 0:] + y[:, :3] + y[:, :7], {"slice": 0}),
    "slices": (lambda x, y: x[:, 1:] + x[:, :2] + x[:, ::2], {"slice": 3}),
    "joined with nothing": (lambda x, y: torch.cat([x.sin(), y[:, :0]], 1), {"cat": 0}),
    "joined": (lambda x, y: torch.cat([x.sin(), y], 1), {"cat": 1}),
    "an input with nothing": (lambda x, y: torch.cat([x, y[:, :0]], 1), {"cat": 1}),
    "joined with nothing of another dtype": (lambda x, y: torch.cat([x.sin(), y[:, :0].double()], 1), {"cat": 1}),
    "joined with nothing, then written": (then_written(lambda x: torch.cat([x, x[:0]])), {"cat": 0, "mul_": 0}),
    "same dtype": (lambda x, y: x.sin().to(torch.float32).type_as(y), {"to": 0, "type_as": 0}),
    "another dtype": (lambda x, y: x.to(torch.float64), {"to": 1}),
    "another order of memory": (
        lambda x, y: x.mT.sin().to(torch.float32, memory_format=torch.contiguous_format, copy=True), {"to": 1}),
    "a copy, then written": (then_written(lambda x: x.to(torch.float32, copy=True)), {"to": 1}),
    "a copy of what is written": (written_after(lambda x: x.to(torch.float32, copy=True)), {"to": 1}),
    "copied there and back": (written_after(lambda x: x.mT.reshape(2, 12).reshape(2, 4, 3)), {"reshape": 2}),
    "there and back": (lambda x, y: x.transpose(0, 1).transpose(1, 0).sin(), {"transpose": 0}),
    "there and elsewhere": (lambda x, y: x.transpose(0, 1).transpose(1, 2).sin(), {"transpose": 2}),
    "same shape": (lambda x, y: x.view(2, 3, 4).sin() + y.flatten(1).view(2, 3, 4), {"view": 0, "flatten": 0}),
    "another shape": (lambda x, y: x.view(6, 4).sin(), {"view": 1}),
    "permuted": (lambda x, y: x.permute(0, 2, 1) + y.mT + y.swapaxes(1, 2), {"transpose": 2, "permute": 0, "mT": 0}),
    "turned round": (lambda x, y: x.permute(2, 0, 1), {"permute": 1, "transpose": 0}),
    "matrices": (lambda x, y: x[0].t() + y[0].T, {"t": 0, "numpy_T": 0, "transpose": 2}),
    "a cast of a view": (
        lambda x, y: (x.sin().transpose(0, 1).unsqueeze(0).double(), y.mT.half()), {"to": 2, "unsqueeze": 1}),
    "a cast of a view that is used": (lambda x, y: (lambda z: z.double() + z)(x.sin().mT), {"to": 1, "transpose": 1}),
    "in place": (added_in_place, {"add": 1, "add_": 0}),
    "into an input": (added_to_an_input, {"add_": 1}),
    "into a view": (added_to_a_view, {"add_": 1}),
    "into what was used": (added_while_used, {"add_": 0}),
    "into what a view shows": (added_while_seen, {"add_": 1}),
    "in place, of another dtype": (added_and_cast, {"add_": 1}),
    "twice": (lambda x, y: x.sin() + x.sin() + y.sin(), {"sin": 2}),
    "twice, written between": (written_between, {"sin": 2}),
    "numbers of two types": (lambda x, y: (x.sin() * 2, x.sin() * 2.0), {"mul": 2, "sin": 1}),
    "at random": (lambda x, y: torch.rand_like(x) * 0 + torch.rand_like(x) * 0 + y, {"rand_like": 2}),
    "a product": (lambda x, y: einsum("bij,bkj->bik", x, y), {"einsum": 0, "matmul": 1, "transpose": 1}),
    "a product of values": (lambda x, y: einsum("bij,bjk->bik", x, y.mT), {"einsum": 0, "matmul": 1}),
    "the other way round": (lambda x, y: einsum("bkj,bij->bik", y, x), {"einsum": 0, "matmul": 1, "transpose": 1}),
    "with spaces": (lambda x, y: einsum("b i j, b k j -> b k i", x, y), {"einsum": 0, "matmul": 1}),
    "permuted batches": (lambda x, y: einsum("ibj,kbj->bik", x, y), {"einsum": 0, "matmul": 1}),
    "a weight": (lambda x, y: einsum("bij,jk->bik", x, W), {"einsum": 0, "matmul": 1, "transpose": 0}),
    "implicit": (lambda x, y: einsum("bij,bkj", x, y), {"einsum": 1}),
    "dots": (lambda x, y: einsum("...ij,...kj->...ik", x, y), {"einsum": 1}),
    "a diagonal": (lambda x, y: einsum("bii,bkj->bik", x[:, :, :3], y), {"einsum": 1}),
    "three tensors": (lambda x, y: einsum("bij,bkj,bkj->bik", x, y, y), {"einsum": 1}),
    "one tensor": (lambda x, y: einsum("bij->bji", x), {"einsum": 1}),
    "nothing summed": (lambda x, y: einsum("bij,bkj->bikj", x, y), {"einsum": 1}),
    "two letters summed": (lambda x, y: einsum("bij,bij->b", x, y), {"einsum": 1}),
    "summed in one": (lambda x, y: einsum("bij,bkj->bk", x, y), {"einsum": 1}),
    "two columns": (lambda x, y: einsum("bij,jcd->bicd", x, W.unflatten(1, (5, 1))), {"einsum": 1}),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_equivalences(name):
    function, left = CASES[name]
    graph = traced(function, X, Y)
    simplify(graph.graph)
    graph.recompile()
    called = [getattr(node.target, "_opname", "") for node in graph.graph.nodes]
    assert {op: called.count(op) for op in left} == left, graph.code
    ours, expected = graph(X.clone(), Y.clone()), function(X.clone(), Y.clone())
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)


def test_outputs_of_the_ops_are_contiguous_already():
    graph = traced(lambda x, y: torch.nn.functional.layer_norm(x, (4,)).contiguous() + y.mT.contiguous().mT, X, Y)
    rewrite(graph)
    assert sum("contiguous" in str(node.target) for node in graph.graph.nodes) == 1


STRIDED = {
    "rows": (lambda x: (x.sin() * 2).as_strided((3, 2), (2, 1)), True),
    "columns": (lambda x: x.sin().t().as_strided((3, 2), (1, 2)), True),
    "one row": (lambda x: x.sin()[:1].as_strided((3,), (1,)), True),
    "gaps": (lambda x: x.sin()[:, ::2].as_strided((2, 2), (3, 1)), False),
}


@pytest.mark.parametrize("name", STRIDED)
def test_what_as_strided_reads_keeps_its_strides(name):
    function, pinned = STRIDED[name]
    x = rand(2, 3)
    graph = traced(lambda x: torch.nn.functional.layer_norm(function(x), (function(x).shape[-1],)), x)
    report = rewrite(graph)
    assert report.replaced == ({"layer_norm": 1} if pinned else {})
    assert [miss.reason[:30] for miss in report.near_misses] == (
        [] if pinned else ["as_strided reads memory between"[:30]]
    )
    torch.testing.assert_close(graph(x), torch.nn.functional.layer_norm(function(x), (function(x).shape[-1],)))


def test_shared_layers_do_not_move_what_as_strided_reads():
    def chunks(x, a, b):
        one, other = torch.nn.functional.linear(x, a), torch.nn.functional.linear(x, b)
        return one.transpose(0, 1).as_strided((2, 4), (4, 1)) + other.transpose(0, 1).as_strided((2, 4), (4, 1))

    inputs = rand(3, 2, 8), rand(4, 8), rand(4, 8, seed=1)
    graph = traced(chunks, *inputs)
    rewrite(graph)
    torch.testing.assert_close(graph(*inputs), chunks(*inputs))
