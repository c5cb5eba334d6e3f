"""The declarations of `kernels/` as `torch.library` operators: `torch.ops.trimaran.<op>`.

Each op gets a schema (an optional output is asked for by a keyword `return_<output>`), a fake implementation that works
on symbolic shapes, and one implementation for CPU and CUDA tensors: the plan where there is one, the reference where
the plan declines, and on the CPU the reference unless `trimaran.interpret()` is on. Outputs are fresh and contiguous.
The ops have no gradient.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Sequence
from typing import Any

import torch

from trimaran.kernels.catalog import read
from trimaran.kernels.contract import INTERPRETER, Device, Op, Tensor
from trimaran.kernels.execute import Executor, execute
from trimaran.kernels.interpreter import Interpreter, interpreting
from trimaran.kernels.plans import PlanCache, PlannedLaunch

NAMESPACE = "trimaran"
_SCHEMA_TYPE = {"float": "float", "int": "int", "bool": "bool", "string": "str"}
_LIBRARY = torch.library.Library(NAMESPACE, "DEF")

# told (op name, reason) whenever a call is answered by the reference on a GPU; set by whoever keeps a report
on_decline: contextvars.ContextVar[Callable[[str, str], None] | None] = contextvars.ContextVar(
    "on_decline", default=None
)
# where it is set, calls on a GPU launch nothing: they note their launches here, and their outputs are zeros
rehearsal: contextvars.ContextVar[list[PlannedLaunch] | None] = contextvars.ContextVar("rehearsal", default=None)


def schema(op: Op) -> str:
    """The op's torch schema: inputs, then keyword attributes, then `return_<output>` for each optional output."""
    inputs = [f"Tensor? {port.name}=None" if port.optional else f"Tensor {port.name}" for port in op.inputs]
    keywords = []
    for attr in op.attrs:
        default = "" if attr.default is None else f"={attr.default!r}".replace("'", '"')
        keywords.append(f"{_SCHEMA_TYPE[attr.kind]} {attr.name}{default}")
    keywords += [f"bool return_{port.name}=False" for port in op.outputs if port.optional]
    outputs = ", ".join("Tensor?" if port.optional else "Tensor" for port in op.outputs)
    result = f"({outputs})" if len(op.outputs) > 1 else outputs
    return f"{op.name}({', '.join([*inputs, '*', *keywords])}) -> {result}"


def describe(tensor: torch.Tensor | None) -> Tensor | None:
    """A torch tensor's metadata, as plans take it. A fake tensor keeps its symbolic sizes. A parameter is constant:
    what writes it ends before a forward pass begins."""
    if tensor is None:
        return None
    dtype = str(tensor.dtype).removeprefix("torch.")
    constant = isinstance(tensor, torch.nn.Parameter)
    return Tensor(dtype, tuple(tensor.shape), tuple(tensor.stride()), tensor.data_ptr() % 16 == 0, constant=constant)


class TorchOp:
    """One declaration bound to torch."""

    def __init__(self, op: Op) -> None:
        self.op = op
        self.plans = PlanCache(op)
        self.optional = [port.name for port in op.outputs if port.optional]
        _LIBRARY.define(schema(op))
        _LIBRARY.impl(op.name, self.compute, "CPU")
        _LIBRARY.impl(op.name, self.compute, "CUDA")
        torch.library.register_fake(f"{NAMESPACE}::{op.name}", self.fake, lib=_LIBRARY)
        self.overload = getattr(getattr(torch.ops, NAMESPACE), op.name).default

    def arguments(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[Any], Any, tuple[bool, ...]]:
        """(inputs, attributes, which outputs are wanted) of a call."""
        inputs = [*args, *(kwargs.pop(port.name, None) for port in self.op.inputs[len(args) :])]
        wanted = tuple(not port.optional or kwargs.pop(f"return_{port.name}", False) for port in self.op.outputs)
        return inputs, self.op.attributes(kwargs), wanted

    def result(self, outputs: list[Any]) -> Any:
        return tuple(outputs) if len(outputs) > 1 else outputs[0]

    def fake(self, *args: Any, **kwargs: Any) -> Any:
        inputs, attrs, wanted = self.arguments(args, kwargs)
        known = [t if t is None else Tensor(str(t.dtype).removeprefix("torch."), tuple(t.shape)) for t in inputs]
        inferred = self.op.infer_outputs(known, attrs)
        first = next(t for t in inputs if t is not None)
        return self.result(
            [self.empty(t, first.device) if want and t else None for t, want in zip(inferred, wanted, strict=True)]
        )

    def empty(self, tensor: Tensor, device: torch.device) -> torch.Tensor:
        return torch.empty(tensor.shape, dtype=getattr(torch, tensor.dtype), device=device)

    def compute(self, *args: Any, **kwargs: Any) -> Any:
        inputs, attrs, wanted = self.arguments(args, kwargs)
        device = self.device_of(inputs)
        if device.type == "cpu" and not interpreting():
            return self.reference(inputs, attrs, wanted)
        where, executor = self.executor(device)
        plan, values = self.plans.find([describe(t) for t in inputs], attrs, where, wanted)
        if plan.declined is not None:
            if (listener := on_decline.get()) is not None:
                listener(self.op.name, plan.declined)
            return self.reference(inputs, attrs, wanted)
        work = plan.evaluate(values)
        noted = rehearsal.get() if device.type == "cuda" else None
        make = torch.empty if noted is None else torch.zeros
        outputs = [
            None if shape is None else make(shape, dtype=getattr(torch, str(dtype)), device=device)
            for shape, dtype in zip(work.outputs, plan.dtypes, strict=True)
        ]
        if noted is not None:
            noted.extend(plan.launches)
            return self.result(outputs)
        scratch: list[torch.Tensor] = []

        def allocate(count: int) -> int:
            scratch.append(torch.empty(count, dtype=torch.uint8, device=device))
            return scratch[-1].data_ptr()

        given, made = ([0 if t is None else t.data_ptr() for t in tensors] for tensors in (inputs, outputs))
        if device.type == "cpu":
            execute(plan, work, given, made, executor, allocate)
        else:
            with torch.cuda.device(device):  # scratch freed here is reused on this stream only, after the launches
                stream = torch.cuda.current_stream(device).cuda_stream
                execute(plan, work, given, made, executor, allocate, stream)
        return self.result(outputs)

    def device_of(self, inputs: list[torch.Tensor | None]) -> torch.device:
        present = [(port.name, t.device) for port, t in zip(self.op.inputs, inputs, strict=True) if t is not None]
        first, device = present[0]
        for name, other in present:
            if other != device:
                raise ValueError(f"{self.op.name}: {name} is on {other}, expected {device} as {first} is")
        return device

    def executor(self, device: torch.device) -> tuple[Device, Executor]:
        if device.type == "cpu":
            return INTERPRETER, Interpreter()
        from trimaran.kernels.driver import driver

        found = driver(device.index or 0)
        return found.device, found

    def reference(self, inputs: list[Any], attrs: Any, wanted: tuple[bool, ...]) -> Any:
        self.op.infer_outputs([None if t is None else Tensor(str(t.dtype)[6:], tuple(t.shape)) for t in inputs], attrs)
        assert self.op.reference is not None  # as `add_op` asks
        with torch.no_grad():
            outputs = self.op.reference(*inputs, **vars(attrs))
        return self.result(
            [t.contiguous() if want and t is not None else None for t, want in zip(outputs, wanted, strict=True)]
        )


def compile_ahead(run: Callable[..., Any], args: Sequence[Any], device: torch.device) -> None:
    """Compile all that `run(*args)` is going to launch, side by side instead of one after the other. `run` must change
    nothing but what it makes."""
    from trimaran.kernels import compiler, driver

    launches: list[PlannedLaunch] = []
    noted, declined = rehearsal.set(launches), on_decline.set(None)
    try:
        with torch.no_grad(), contextlib.suppress(Exception):  # on zeros; the call itself will say what is wrong
            run(*args)
    finally:
        rehearsal.reset(noted)
        on_decline.reset(declined)
    compiler.compile_all(launches, driver.driver(device.index or 0).device.capability)


TORCH_OPS: dict[str, TorchOp] = {}
read(lambda op: TORCH_OPS.__setitem__(op.name, TorchOp(op)))
