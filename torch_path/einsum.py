"""einsum of two tensors as the product of matrices that it is: one spelling for attention and linear layers."""

from __future__ import annotations

from typing import Any, cast

from torch.fx import Graph, Node

from trimaran.torch_path.graph import aten, call, is_tensor, value


def as_product(graph: Graph, node: Node) -> Node | None:
    """matmul of the two tensors, transposed as it takes, where one letter is summed over; None for another einsum.

    Letters in both and in the result count batches. Each tensor has exactly one letter besides, its rows or columns,
    except that one without batches may be a weight, [in, out], under any number of letters of the other one.
    """
    equation, tensors = node.args[0], node.args[1]
    letters = _letters(equation)
    if letters is None or not all(map(is_tensor, tensors)):  # type: ignore[arg-type]
        return None
    (left, right, out), (a, b) = letters, cast("list[Node]", tensors)
    if [len(left), len(right)] != [value(a).dim(), value(b).dim()]:
        return None
    if _place(left, right, out) > _place(right, left, out):  # rows come before columns in the result
        left, right, a, b = right, left, b, a
    summed = [letter for letter in left if letter in right and letter not in out]
    batch = [letter for letter in out if letter in left and letter in right]
    rows, columns = ([x for x in one if x not in other] for one, other in ((left, right), (right, left)))
    if len(summed) != 1 or len(columns) != 1 or sorted(out) != sorted([*batch, *rows, *columns]):
        return None
    if len(rows) != 1 and batch:
        return None
    first = _permuted(graph, a, left, [*batch, *rows, *summed])
    if right.index(summed[0]) > right.index(columns[0]):  # as attention has its keys
        second = _permuted(graph, b, right, [*batch, *columns, *summed])
        second = call(graph, aten.transpose.int, second, -2, -1)
    else:
        second = _permuted(graph, b, right, [*batch, *summed, *columns])
    product = call(graph, aten.matmul.default, first, second)
    return _permuted(graph, product, [*batch, *rows, *columns], out)


def _letters(equation: Any) -> list[list[str]] | None:
    """The letters of both tensors and of the result; None where it is not spelt out."""
    sides = str(equation).replace(" ", "").replace("->", ",").split(",")
    if "->" not in equation or "." in equation or len(sides) != 3:
        return None
    return [list(side) for side in sides] if all(len(set(side)) == len(side) for side in sides) else None


def _place(one: list[str], other: list[str], out: list[str]) -> int:
    """Where in the result the first letter stands that only this tensor has."""
    return min((out.index(letter) for letter in one if letter in out and letter not in other), default=len(out))


def _permuted(graph: Graph, node: Node, given: list[str], wanted: list[str]) -> Node:
    moved = [i for i, (a, b) in enumerate(zip(given, wanted, strict=True)) if a != b]
    if not moved:
        return node
    if len(moved) == 2:
        return call(graph, aten.transpose.int, node, *moved)
    return call(graph, aten.permute.default, node, [given.index(letter) for letter in wanted])
