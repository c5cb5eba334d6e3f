"""What a kernel file declares, once, for every runtime.

`kernels/<op>.py` ends in one `Op`. Its parts speak of tensors by metadata alone (`Tensor`: dtype, shape, strides,
alignment), never of torch's or ONNX Runtime's own types, so each runtime is a small reader of the same declaration:

    infer(inputs, attrs) -> outputs               shapes and dtypes; on ints, Sizes, torch's SymInts, ONNX's symbols
    plan(inputs, outputs, attrs, device) -> list  the launches; a pure function of metadata, made of traced Sizes
    reference(*inputs, **attrs) -> tuple          plain PyTorch, one value an output; on fp64 inputs it is the oracle
    body(g, inputs, attrs) -> tuple               the op in standard ONNX ops, one value an output

`inputs` and `outputs` are namespaces with a field for each declared name, None where an optional one is absent;
`attrs` is a namespace of attribute values.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, Literal

from trimaran.kernels.sizes import differ

ITEMSIZE = {
    "float32": 4,
    "float16": 2,
    "bfloat16": 2,
    "float64": 8,
    "int64": 8,
    "int32": 4,
    "int8": 1,
    "uint8": 1,
    "bool": 1,
}
TRITON_TYPE = {
    "float32": "fp32",
    "float16": "fp16",
    "bfloat16": "bf16",
    "float64": "fp64",
    "int64": "i64",
    "int32": "i32",
    "int8": "i8",
    "uint8": "u8",
    "bool": "i1",
}
ALIGNMENT = 16  # bytes; what a vector load of 128 bits needs, and the only divisibility Triton uses

AttrKind = Literal["float", "int", "bool", "string"]
Place = Literal["input", "output", "scratch"]


class Decline(Exception):
    """Raised by a plan that leaves this shape or device to the reference. Its text is the reason, for the report."""


@dataclass(frozen=True)
class Device:
    """What a plan may know of where it runs.

    capability is 90 for sm_90 and 0 where the kernels are interpreted; shared_memory is in bytes per program. fallback:
    what a plan declines is computed by somebody else; where nobody is there, a plan that is only slower is better.
    """

    type: Literal["cuda", "cpu"]
    index: int = 0
    capability: int = 0
    sm_count: int = 1
    shared_memory: int = 0
    fallback: bool = True


INTERPRETER = Device("cpu")


@dataclass(frozen=True)
class Tensor:
    """Metadata of one tensor, or of a view into one. Sizes, strides (in elements) and offset are ints, Sizes, SymInts
    or Symbols. As a kernel argument it is the address of its first element.

    constant: no work that is in flight when a kernel starts writes it (a parameter, an initializer), so a dependent
    launch may read it before it waits."""

    dtype: str
    shape: tuple[Any, ...]
    strides: tuple[Any, ...] = ()
    aligned: bool = True  # the buffer starts on a multiple of ALIGNMENT bytes
    place: Place = "input"
    index: int = -1  # which input, output or scratch buffer
    offset: Any = 0  # elements from the start of the buffer
    constant: bool = False

    @property
    def rank(self) -> int:
        return len(self.shape)


@dataclass(eq=False)
class Scratch:
    """Device memory that lives for one call: `elements` of `dtype`, zeroed before the first launch where asked."""

    dtype: str
    elements: Any
    zero: bool = False

    @property
    def bytes(self) -> Any:
        return self.elements * ITEMSIZE[self.dtype]


@dataclass(frozen=True)
class Divisible:
    """An integer kernel argument that is compiled as a multiple of 16 where it is one today (recorded as a guard)."""

    value: Any


@dataclass(frozen=True)
class Descriptor:
    """A tensor descriptor as a kernel argument: what Hopper's copy engine has to know to fetch a block by its
    coordinates. The launcher makes it, so a kernel has it at once.

    tensor: the first element; it and each row start on ALIGNMENT bytes. shape, strides (in elements, the last is 1):
    the view that blocks are taken from, which has elements; beyond it they are zero. block: the sizes of a block.
    """

    tensor: Tensor
    shape: tuple[Any, ...]
    strides: tuple[Any, ...]
    block: tuple[int, ...]


@dataclass(frozen=True)
class Launch:
    """One kernel launch.

    kernel: a `@triton.jit` function. grid: up to three sizes; a launch with a zero in it is left out.
    args: by parameter name, a Tensor or Scratch, a `Descriptor`, an int or Size (i32, or i64 where it needs it), a
    `Divisible`, a float (fp32), or None for an absent pointer or descriptor. constexprs: by parameter name. options:
    Triton's own (num_warps, num_stages, num_ctas, maxnreg, launch_pdl, launch_cooperative_grid, enable_fp_fusion).
    Raises ValueError for an argument that the kernel has not, or one that it lacks.
    """

    kernel: Any
    grid: tuple[Any, ...]
    args: Mapping[str, Any]
    constexprs: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        given, wanted = {*self.args, *self.constexprs}, {*self.kernel.arg_names}
        if given != wanted:
            missing, unknown = sorted(wanted - given), sorted(given - wanted)
            raise ValueError(f"{self.kernel.__name__}: missing arguments {missing}, unknown arguments {unknown}")


@dataclass(frozen=True)
class Input:
    """`type` is a name of Op.types (all inputs and outputs of one name agree) or one fixed dtype."""

    name: str
    type: str = "T"
    optional: bool = False


@dataclass(frozen=True)
class Output:
    """An optional output is computed only where the caller wants it."""

    name: str
    type: str = "T"
    optional: bool = False


@dataclass(frozen=True)
class Attr:
    """An attribute; required where `default` is None."""

    name: str
    kind: AttrKind
    default: float | int | bool | str | None = None
    choices: tuple[str, ...] = ()

    def check(self, op: str, value: Any) -> Any:
        """The value in its own Python type; TypeError or ValueError naming the attribute otherwise."""
        allowed = {"float": (int, float), "int": (int,), "bool": (bool, int), "string": (str,)}[self.kind]
        if not isinstance(value, allowed):
            raise TypeError(f"{op}: {self.name} is {value!r}, expected a {self.kind}")
        if self.choices and value not in self.choices:
            raise ValueError(f"{op}: {self.name} is {value!r}, expected one of {', '.join(self.choices)}")
        return {"float": float, "int": int, "bool": bool, "string": str}[self.kind](value)


@dataclass(frozen=True, eq=False)
class Op:
    """One operator. `types` gives the dtypes of each type name; see the module's docstring for the four functions.

    Without `reference` and `body` it is one for nodes of ONNX Runtime alone: there is no second way to compute it.
    """

    name: str
    version: int
    inputs: tuple[Input, ...]
    outputs: tuple[Output, ...]
    attrs: tuple[Attr, ...]
    types: Mapping[str, tuple[str, ...]]
    infer: Callable[[Any, Any], Sequence[Tensor | None]]
    plan: Callable[[Any, Any, Any, Device], Sequence[Launch]]
    reference: Callable[..., Any] | None = None
    body: Callable[[Any, Any, Any], Any] | None = None

    def input_namespace(self, values: Sequence[Any]) -> SimpleNamespace:
        """The inputs by name; missing trailing ones are None."""
        padded = [*values, *[None] * (len(self.inputs) - len(values))]
        return SimpleNamespace(**{port.name: value for port, value in zip(self.inputs, padded, strict=True)})

    def output_namespace(self, values: Sequence[Any]) -> SimpleNamespace:
        return SimpleNamespace(**{port.name: value for port, value in zip(self.outputs, values, strict=True)})

    def attributes(self, given: Mapping[str, Any]) -> SimpleNamespace:
        """The attributes, checked and with defaults. TypeError or ValueError names the attribute."""
        known = {attr.name for attr in self.attrs}
        if unknown := sorted({*given} - known):
            raise ValueError(f"{self.name}: unknown attribute {unknown[0]}, expected {', '.join(sorted(known))}")
        values = {}
        for attr in self.attrs:
            value = given.get(attr.name, attr.default)
            if value is None:
                raise ValueError(f"{self.name}: attribute {attr.name} is missing, expected a {attr.kind}")
            values[attr.name] = attr.check(self.name, value)
        return SimpleNamespace(**values)

    def check_inputs(self, inputs: Sequence[Tensor | None]) -> None:
        """Presence and dtypes, for every op alike; what else must hold is `infer`'s to say."""
        bound: dict[str, tuple[str, str]] = {}
        for port, tensor in zip(self.inputs, [*inputs, *[None] * (len(self.inputs) - len(inputs))], strict=True):
            if tensor is None:
                if not port.optional:
                    raise ValueError(f"{self.name}: {port.name} is missing")
                continue
            allowed = self.types.get(port.type, (port.type,))
            if tensor.dtype not in allowed:
                raise TypeError(f"{self.name}: {port.name} is {tensor.dtype}, expected {' or '.join(allowed)}")
            if port.type in self.types:
                first, dtype = bound.setdefault(port.type, (port.name, tensor.dtype))
                if dtype != tensor.dtype:
                    raise TypeError(f"{self.name}: {port.name} is {tensor.dtype}, expected {dtype} as {first} is")

    def infer_outputs(self, inputs: Sequence[Tensor | None], attrs: SimpleNamespace) -> tuple[Tensor | None, ...]:
        """Checked shape inference; an output that cannot be (an optional one without its input) is None."""
        self.check_inputs(inputs)
        outputs = tuple(self.infer(self.input_namespace(inputs), attrs))
        assert len(outputs) == len(self.outputs), f"{self.name}: infer gave {len(outputs)} outputs"
        return outputs


def expect_shape(op: str, name: str, tensor: Tensor | None, expected: Sequence[Any], meaning: str) -> None:
    """ValueError unless the tensor is absent or of this shape, as far as both are known."""
    if tensor is None:
        return
    if len(tensor.shape) != len(expected) or any(differ(a, b) for a, b in zip(tensor.shape, expected, strict=True)):
        raise ValueError(f"{op}: {name} has shape {readable(tensor.shape)}, expected {meaning} = {readable(expected)}")


def readable(shape: Sequence[Any]) -> list[Any]:
    """A shape for messages: today's values of traced sizes."""
    return [getattr(size, "value", size) for size in shape]
