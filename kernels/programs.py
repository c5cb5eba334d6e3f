"""A plan as bytes, for readers that are not written in Python: ONNX Runtime's hot path in C, later a bundle.

Every number of a plan is a value: first the traced sizes, as `plans.sizes_of` gives them, then constants, then one for
each step. A step is an operation on two earlier values; a comparison is a guard, and the plan does not hold where its
answer differs. Equal expressions are one step. `ort_ops/hot_path.c` has the same layout as structs; all numbers are
little-endian:

    header      11 x u32  sizes, constants, guard steps, all steps, outputs, dimensions, scratch, launches, arguments,
                          attributes, boxes
    constants   i64 each
    steps       4 x u16   operation (its place in OPERATIONS), left, right, answer (of a guard)
    launches    u64 function, u32 threads, u32 shared bytes, 3 x u16 grid, u16 arguments, u16 attributes, u16 boxes,
                2 x u16 zero
    arguments   4 x u16   kind (0: a value, 1: an address, 2: a descriptor), base, value, bytes per element. An address
                          is that of tensor `base` (inputs, then outputs, then scratch) plus `value` elements, and so is
                          a descriptor's; the arguments after it are its shape and strides
    attributes  u32 CUlaunchAttributeID, u32 zero, 64 bytes of value
    boxes       8 x u32   CUtensorMapDataType, rank, CUtensorMapSwizzle, 5 sizes, the last axis first; of a descriptor
    outputs     2 x u16   whether it is computed, rank
    scratch     2 x u16   bytes (a value), whether it is zeroed
    dimensions  u16 each, the outputs' one after another (a value)
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any

from trimaran.kernels.contract import ITEMSIZE
from trimaran.kernels.cuda import TENSOR_MAP_TYPES
from trimaran.kernels.plans import Param, Plan, PlannedLaunch
from trimaran.kernels.sizes import Expression, simplified

OPERATIONS = ("+", "-", "*", "//", "%", "min", "max", "==", "!=", "<", "<=", ">", ">=")
VALUE, ADDRESS, DESCRIPTOR = 0, 1, 2
MAX_VALUES = 4096  # what the C path has room for


@dataclass(frozen=True)
class Loaded:
    """A compiled kernel where it can be launched: what cuLaunchKernelEx wants beyond grid, stream and parameters.

    function: a CUfunction; attributes: (CUlaunchAttributeID, words of its value); global_scratch: bytes per program
    that the compiler wants, as a parameter after the launch's own, before a null; boxes: as a `compiler.Binary` has.
    """

    function: int
    threads: int
    shared: int
    num_ctas: int = 1
    global_scratch: int = 0
    attributes: tuple[tuple[int, tuple[int, ...]], ...] = ()
    boxes: tuple[tuple[int, tuple[int, ...]], ...] = ()


def serialize(plan: Plan, inputs: int, load: Callable[[PlannedLaunch], Loaded]) -> bytes:
    """The plan as bytes. inputs: how many the op declares; load: what is launched for each launch.

    ValueError for a plan of more than MAX_VALUES values.
    """
    return _Writer(plan, inputs, load).content()


class _Writer:
    def __init__(self, plan: Plan, inputs: int, load: Callable[[PlannedLaunch], Loaded]) -> None:
        self.plan = plan
        self.bases = {"input": 0, "output": inputs, "scratch": inputs + len(plan.shapes)}
        self.scratch = list(plan.scratch)
        self.launches = [(launch, *self._completed(launch, load(launch))) for launch in plan.launches]
        self.steps: list[tuple[int, int, int, int]] = []
        self.numbers: dict[Expression, int] = {("size", index): index for index in range(plan.sizes)}
        self.constants = sorted({leaf for expression in self._expressions() for leaf in _constants(expression)})
        for value in self.constants:
            self.numbers[value] = len(self.numbers)

    def _completed(
        self, launch: PlannedLaunch, loaded: Loaded
    ) -> tuple[Loaded, tuple[Expression, ...], list[tuple[int, int, Expression, int]]]:
        """What is launched, its grid, and its arguments: the launch's own and the compiler's."""
        x, y, z = launch.grid
        grid = (_product(x, loaded.num_ctas), y, z)
        arguments = [self._argument(param) for param in launch.params]
        if loaded.global_scratch:
            self.scratch.append((_product(*grid, loaded.global_scratch), False))
            arguments.append((ADDRESS, self.bases["scratch"] + len(self.scratch) - 1, 0, 1))
        arguments += [(VALUE, 0, 0, 0)] * (1 if loaded.global_scratch else 2)
        return loaded, grid, arguments

    def _argument(self, param: Param) -> tuple[int, int, Expression, int]:
        if param.place is not None:
            kind = DESCRIPTOR if param.rank else ADDRESS
            return kind, self.bases[param.place] + param.index, param.expression, ITEMSIZE[param.dtype]
        if param.type == "fp32":
            return VALUE, 0, int.from_bytes(struct.pack("<f", param.expression), "little"), 0
        return VALUE, 0, param.expression, 0

    def _expressions(self) -> Iterator[Expression]:
        for _, left, right in self.plan.guards:
            yield from (left, right)
        yield from chain.from_iterable(shape for shape in self.plan.shapes if shape is not None)
        yield from (size for size, _ in self.scratch)
        for _, _, grid, arguments in self.launches:
            yield from grid
            yield from (expression for _, _, expression, _ in arguments)

    def number(self, expression: Expression) -> int:
        """The number of its value, after steps that compute it."""
        known = self.numbers.get(expression)
        if known is None:
            operation, left, right = expression
            known = self.numbers[expression] = self._step(operation, self.number(left), self.number(right))
        return known

    def _step(self, operation: str, left: int, right: int, answer: bool = False) -> int:
        self.steps.append((OPERATIONS.index(operation), left, right, int(answer)))
        return self.plan.sizes + len(self.constants) + len(self.steps) - 1

    def content(self) -> bytes:
        for (comparison, left, right), answer in self.plan.guards.items():
            self._step(comparison, self.number(left), self.number(right), answer)
        guards = len(self.steps)
        launches, arguments, attributes, boxes = [], [], [], []
        for launch, loaded, grid, given in self.launches:
            head = (loaded.function, loaded.threads, loaded.shared, *map(self.number, grid))
            own = (len(given), len(loaded.attributes), len(loaded.boxes))
            launches.append(struct.pack("<QII8H", *head, *own, 0, 0))
            arguments += [struct.pack("<4H", kind, base, self.number(e), size) for kind, base, e, size in given]
            attributes += [_attribute(*attribute) for attribute in loaded.attributes]
            described = [param.dtype for param in launch.params if param.rank]
            boxes += [_box(dtype, *box) for dtype, box in zip(described, loaded.boxes, strict=True)]
        outputs = [(int(shape is not None), len(shape or ())) for shape in self.plan.shapes]
        scratch = [(self.number(size), int(zero)) for size, zero in self.scratch]
        dimensions = [self.number(size) for shape in self.plan.shapes if shape is not None for size in shape]
        values = self.plan.sizes + len(self.constants) + len(self.steps)
        if values > MAX_VALUES:
            raise ValueError(f"a plan of {values} values, expected at most {MAX_VALUES}")
        sections = (launches, arguments, attributes, boxes)
        counts = (len(outputs), len(dimensions), len(scratch), *map(len, sections))
        return b"".join(
            [
                struct.pack("<11I", self.plan.sizes, len(self.constants), guards, len(self.steps), *counts),
                struct.pack(f"<{len(self.constants)}q", *self.constants),
                *(struct.pack("<4H", *step) for step in self.steps),
                *chain.from_iterable(sections),
                *(struct.pack("<2H", *pair) for pair in (*outputs, *scratch)),
                struct.pack(f"<{len(dimensions)}H", *dimensions),
            ]
        )


def _constants(expression: Expression) -> Iterator[int]:
    if isinstance(expression, int):
        yield expression
    elif expression[0] != "size":
        for side in expression[1:]:
            yield from _constants(side)


def _product(*expressions: Expression) -> Expression:
    return functools.reduce(functools.partial(simplified, "*"), expressions)


def _box(dtype: str, swizzle: int, sizes: tuple[int, ...]) -> bytes:
    room = [*reversed(sizes), *[0] * (5 - len(sizes))]
    return struct.pack("<8I", TENSOR_MAP_TYPES[dtype], len(sizes), swizzle, *room)


def _attribute(identity: int, words: tuple[Any, ...]) -> bytes:
    return struct.pack("<II16I", identity, 0, *words, *[0] * (16 - len(words)))
