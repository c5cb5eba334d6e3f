"""From a declaration to something that can be launched: one trace of `Op.plan`, kept for every shape whose guards hold.

A `Plan` is data: guards, output shapes, scratch sizes and launches, all as expressions over the sizes and strides of
the inputs. Nothing in it depends on torch, on a GPU or on where tensors lie. A reader evaluates it (`Plan.evaluate`),
allocates what it asks for and launches; the C hot path or a bundle walks the same expressions.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from trimaran.kernels.contract import (
    ALIGNMENT,
    ITEMSIZE,
    TRITON_TYPE,
    Decline,
    Descriptor,
    Device,
    Divisible,
    Launch,
    Op,
    Place,
    Scratch,
    Tensor,
)
from trimaran.kernels.sizes import Expression, Size, Trace, contiguous_strides, expression_of, python_source

# enable_fp_fusion is written out because its default differs between Triton releases
OPTIONS = {"num_warps": 4, "num_stages": 2, "enable_fp_fusion": True}


@dataclass(frozen=True)
class Param:
    """A run-time parameter of a kernel.

    type is Triton's ("*fp16", "i32", "fp32"); divisible: compiled as a multiple of 16. A pointer is the address of
    (place, index) plus `expression` elements, a number (place None) is `expression` itself. A descriptor ("tensordesc<
    fp16[128, 64]>") has the address of its first element; Triton's kernels have its shape and its strides as parameters
    of their own after it, `rank` numbers each, so what a launcher makes it of follows.
    """

    name: str
    type: str
    divisible: bool
    place: Place | None
    index: int
    expression: Any
    dtype: str = ""
    rank: int = 0  # of a descriptor


@dataclass(frozen=True, eq=False)
class PlannedLaunch:
    """A launch whose grid and parameters are expressions. `params` stand in the kernel's order, constexprs left out."""

    kernel: Any
    grid: tuple[Expression, Expression, Expression]
    params: tuple[Param, ...]
    constexprs: Mapping[str, Any]
    options: Mapping[str, Any]

    @property
    def variant(self) -> tuple[Any, ...]:
        """What the compiled binary depends on: equal variants are one binary, in every runtime."""
        signature = tuple((param.type, param.divisible) for param in self.params)
        return self.kernel.fn, signature, tuple(self.constexprs.items()), tuple(self.options.items())


@dataclass(frozen=True)
class Work:
    """A plan evaluated for today's sizes: shapes of the outputs, bytes of scratch, and for each launch its grid and the
    numbers (or pointer offsets in elements) of its parameters."""

    outputs: tuple[tuple[int, ...] | None, ...]
    scratch: tuple[int, ...]
    launches: tuple[tuple[tuple[int, int, int], tuple[float, ...]], ...]


class Plan:
    """One trace. `declined` is the reason where the plan leaves its sizes to the reference, else None."""

    def __init__(
        self,
        trace: Trace,
        outputs: Sequence[Tensor | None],
        scratch: Sequence[Scratch],
        launches: Sequence[PlannedLaunch],
        declined: str | None = None,
    ) -> None:
        self.sizes = len(trace.values)
        self.guards = dict(trace.guards)
        self.dtypes = tuple(None if t is None else t.dtype for t in outputs)
        self.shapes = tuple(None if t is None else tuple(map(expression_of, t.shape)) for t in outputs)
        self.scratch = tuple((expression_of(s.bytes), s.zero) for s in scratch)
        self.launches = tuple(launches)
        self.declined = declined
        self.holds = _compiled(_conjunction(self.guards))
        self._work = _compiled(
            _tuple(
                [
                    _tuple(["None" if s is None else _tuple(map(python_source, s)) for s in self.shapes]),
                    _tuple([python_source(size) for size, _ in self.scratch]),
                    _tuple([_launch_source(launch) for launch in self.launches]),
                ]
            )
        )

    def evaluate(self, values: Sequence[int]) -> Work:
        """`values`: shape, then strides, of each present input in turn, as `sizes_of` gives them."""
        return Work(*self._work(values))


def sizes_of(inputs: Sequence[Tensor | None]) -> tuple[int, ...]:
    """The traced sizes of these inputs, in the order in which `make_plan` numbers them."""
    return tuple(size for t in inputs if t is not None for size in (*t.shape, *t.strides))


def make_plan(
    op: Op,
    inputs: Sequence[Tensor | None],
    attrs: SimpleNamespace,
    device: Device,
    wanted: Sequence[bool],
    aligned_outputs: bool = True,
) -> Plan:
    """Traces `op.plan` for these inputs (ints throughout).

    wanted: for each output, whether it is to be computed. Raises ValueError or TypeError, naming the argument, for
    inputs that the op does not take or an output it cannot give.
    """
    trace = Trace()
    traced = [_traced_tensor(trace, tensor, index) for index, tensor in enumerate(inputs)]
    inferred = op.infer_outputs(traced, attrs)
    outputs: list[Tensor | None] = []
    for index, (port, tensor, want) in enumerate(zip(op.outputs, inferred, wanted, strict=True)):
        if want and tensor is None:
            raise ValueError(f"{op.name}: output {port.name} is asked for, but the inputs it needs are missing")
        outputs.append(_output_tensor(tensor, index, aligned_outputs) if want and tensor is not None else None)
    try:
        launches = op.plan(op.input_namespace(traced), op.output_namespace(outputs), attrs, device)
    except Decline as reason:
        return Plan(trace, outputs, (), (), declined=str(reason))
    scratch: list[Scratch] = []
    return Plan(trace, outputs, scratch, [_planned(launch, scratch) for launch in launches])


class PlanCache:
    """The plans of one op, by what a guard cannot say (presence, dtypes, ranks, alignment, constancy, attributes,
    device), then by guards. Bounded: the plans least recently used go first."""

    def __init__(self, op: Op, limit: int = 512) -> None:
        self.op, self.limit = op, limit
        self.misses = 0
        self._plans: OrderedDict[Any, list[Plan]] = OrderedDict()
        self._count = 0
        self._lock = threading.Lock()

    def find(
        self,
        inputs: Sequence[Tensor | None],
        attrs: SimpleNamespace,
        device: Device,
        wanted: tuple[bool, ...],
        aligned_outputs: bool = True,
    ) -> tuple[Plan, tuple[int, ...]]:
        """The plan for these inputs, made if there is none, and the sizes to evaluate it with."""
        values = sizes_of(inputs)
        facts = tuple(None if t is None else (t.dtype, len(t.shape), t.aligned, t.constant) for t in inputs)
        key = (facts, tuple(vars(attrs).values()), device, wanted, aligned_outputs)
        with self._lock:
            plans = self._plans.get(key)
            if plans is not None:
                self._plans.move_to_end(key)
                for plan in plans:
                    if plan.holds(values):
                        return plan, values
            plan = make_plan(self.op, inputs, attrs, device, wanted, aligned_outputs)
            self.misses += 1
            self._plans.setdefault(key, []).append(plan)
            self._count += 1
            while self._count > self.limit:
                oldest, plans = next(iter(self._plans.items()))
                plans.pop(0)
                self._count -= 1
                if not plans:
                    del self._plans[oldest]
            return plan, values


def _traced_tensor(trace: Trace, tensor: Tensor | None, index: int) -> Tensor | None:
    if tensor is None:
        return None
    shape = tuple(trace.size(size) for size in tensor.shape)
    strides = tuple(trace.size(stride) for stride in tensor.strides)
    return Tensor(tensor.dtype, shape, strides, tensor.aligned, "input", index, constant=tensor.constant)


def _output_tensor(tensor: Tensor, index: int, aligned: bool) -> Tensor:
    return Tensor(tensor.dtype, tensor.shape, contiguous_strides(tensor.shape), aligned, "output", index)


def _planned(launch: Launch, scratch: list[Scratch]) -> PlannedLaunch:
    name = launch.kernel.__name__
    if not 1 <= len(launch.grid) <= 3:
        raise ValueError(f"{name}: the grid has {len(launch.grid)} dimensions, expected 1 to 3")
    x, y, z = (*map(expression_of, launch.grid), 1, 1)[:3]
    params, constexprs = [], dict(launch.constexprs)
    for parameter in launch.kernel.arg_names:
        if parameter in launch.constexprs:
            continue
        value = launch.args[parameter]
        if value is None:  # an absent pointer: the kernel tests `ptr is not None` at compile time
            constexprs[parameter] = None
        elif isinstance(value, Descriptor):
            params += _descriptor(f"{name}: {parameter}", parameter, value)
        else:
            params.append(_param(f"{name}: {parameter}", parameter, value, scratch))
    return PlannedLaunch(launch.kernel, (x, y, z), tuple(params), constexprs, {**OPTIONS, **launch.options})


def _descriptor(where: str, name: str, value: Descriptor) -> list[Param]:
    """The descriptor, its shape and its strides."""
    tensor, block = value.tensor, ", ".join(map(str, value.block))
    if not (tensor.aligned and bool(tensor.offset * ITEMSIZE[tensor.dtype] % ALIGNMENT == 0)):
        raise ValueError(
            f"{where} describes a tensor that may start anywhere, expected a multiple of {ALIGNMENT} bytes"
        )
    type, rank = f"tensordesc<{TRITON_TYPE[tensor.dtype]}[{block}]>", len(value.shape)
    first = Param(name, type, False, tensor.place, tensor.index, expression_of(tensor.offset), tensor.dtype, rank=rank)
    sizes = [Param(f"{name}.shape", "i32", False, None, -1, expression_of(size)) for size in value.shape]
    steps = [Param(f"{name}.strides", "i64", False, None, -1, expression_of(stride)) for stride in value.strides]
    return [first, *sizes, *steps]


def _param(where: str, name: str, value: Any, scratch: list[Scratch]) -> Param:
    if isinstance(value, Scratch):
        if not any(value is known for known in scratch):
            scratch.append(value)
        index = next(i for i, known in enumerate(scratch) if known is value)
        value = Tensor(value.dtype, (value.elements,), place="scratch", index=index)
    if isinstance(value, Tensor):
        divisible = value.aligned and bool(value.offset * ITEMSIZE[value.dtype] % ALIGNMENT == 0)
        pointer = f"*{TRITON_TYPE[value.dtype]}"
        return Param(name, pointer, divisible, value.place, value.index, expression_of(value.offset), value.dtype)
    if isinstance(value, float):
        return Param(name, "fp32", False, None, -1, value)
    divisible = isinstance(value, Divisible) and bool(value.value % 16 == 0)
    number = value.value if isinstance(value, Divisible) else value
    if isinstance(number, bool) or not isinstance(number, (int, Size)):
        raise TypeError(f"{where} is {number!r}, expected a tensor, an int, a Size, a float or None")
    return Param(name, "i32" if number < 2**31 else "i64", divisible, None, -1, expression_of(number))


def _launch_source(launch: PlannedLaunch) -> str:
    numbers = [repr(p.expression) if p.type == "fp32" else python_source(p.expression) for p in launch.params]
    return _tuple([_tuple(map(python_source, launch.grid)), _tuple(numbers)])


def _conjunction(guards: Mapping[tuple[str, Expression, Expression], bool]) -> str:
    tests = [
        f"({python_source(left)} {comparison} {python_source(right)}) is {answer}"
        for (comparison, left, right), answer in guards.items()
    ]
    return " and ".join(tests) or "True"


def _tuple(items: Any) -> str:
    return "(" + "".join(f"{item}, " for item in items) + ")"


def _compiled(source: str) -> Any:
    """The expression as a function of `s`. The source is made of this module's own names and ints."""
    return eval(f"lambda s: {source}", {"min": min, "max": max, "__builtins__": {}})
