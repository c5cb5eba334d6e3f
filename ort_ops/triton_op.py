"""An operator from a Triton kernel and rules: `@triton_op(...)` above `@triton.jit`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from trimaran.kernels.contract import Attr, Decline, Input, Launch, Op, Output, Tensor
from trimaran.kernels.sizes import contiguous_strides

POINTER = "_ptr"
FLOATING = ("float32", "float16", "bfloat16")
_KINDS: dict[type, Any] = {float: "float", int: "int", bool: "bool", str: "string"}

Rule = Callable[[Any], Any]  # of a namespace with the input tensors by name, and the attributes


def triton_op(
    *,
    shapes: Mapping[str, Rule],
    grid: Rule,
    values: Mapping[str, Any] | None = None,
    attrs: Mapping[str, Any] | None = None,
    dtypes: Sequence[str] = FLOATING,
    types: Mapping[str, str] | None = None,
    options: Mapping[str, Any] | None = None,
    name: str | None = None,
    version: int = 1,
    reference: Callable[..., Any] | None = None,
    body: Callable[[Any, Any, Any], Any] | None = None,
) -> Callable[[Any], Op]:
    """Make a `@triton.jit` function an `Op`: for a `Domain` of your own, or with reference and body for `add_op`.

    A parameter `<name>_ptr` is an output where `shapes` has the name, and an input otherwise, in their order; all are
    contiguous, and the plan declines what torch may pass otherwise. Every other parameter is an attribute of the node
    or stands in `values`. A rule is a function of a namespace in which inputs are tensors with `shape` and `dtype`, and
    attributes their values. It may be called on sizes that are not known yet, so it computes with them
    (`kernels.sizes` has cdiv, product, minimum, maximum) and does not look at them.

    shapes: output -> rule for its shape. grid: rule for up to three sizes. values: a number, a constexpr, or a rule
    for one. attrs: name -> default, or float, int, bool or str for one without. dtypes: what `T` may be, which is the
    dtype of all tensors but those to which `types` gives one. options: Triton's own (num_warps, num_stages, ...).
    name, version: of the operator; its name is the kernel's unless given. reference, body: as of an Op (see
    `kernels.contract`); ONNX Runtime asks for neither.

    Raises TypeError for what is no jit function, ValueError for a parameter of which nothing is known, or a name that
    the kernel has not.
    """

    def declare(kernel: Any) -> Op:
        if not hasattr(kernel, "arg_names"):
            raise TypeError(f"triton_op stands above {kernel!r}, expected a function under @triton.jit")
        rules = _Rules(kernel, dict(shapes), grid, dict(values or {}), dict(types or {}), dict(options or {}))
        rules.check(attrs or {})
        return Op(
            name=name or kernel.__name__,
            version=version,
            inputs=tuple(Input(tensor, rules.types.get(tensor, "T")) for tensor in rules.inputs),
            outputs=tuple(Output(tensor, rules.types.get(tensor, "T")) for tensor in shapes),
            attrs=tuple(_attribute(kernel.__name__, key, default) for key, default in (attrs or {}).items()),
            types={"T": tuple(dtypes)},
            infer=rules.infer,
            plan=rules.plan,
            reference=reference,
            body=body,
        )

    return declare


@dataclass(frozen=True)
class _Rules:
    """What `triton_op` was told, as the functions of an Op."""

    kernel: Any
    shapes: dict[str, Rule]
    grid: Rule
    values: dict[str, Any]
    types: dict[str, str]
    options: dict[str, Any]

    @property
    def tensors(self) -> list[str]:
        return [arg.removesuffix(POINTER) for arg in self.kernel.arg_names if arg.endswith(POINTER)]

    @property
    def inputs(self) -> list[str]:
        return [tensor for tensor in self.tensors if tensor not in self.shapes]

    def infer(self, inputs: Any, attrs: Any) -> list[Tensor]:
        known = _scope(inputs, attrs)
        dtypes = [getattr(inputs, tensor).dtype for tensor in self.inputs if tensor not in self.types]
        return [Tensor(self.types.get(key) or dtypes[0], tuple(rule(known))) for key, rule in self.shapes.items()]

    def plan(self, inputs: Any, outputs: Any, attrs: Any, device: Any) -> list[Launch]:
        for key, tensor in vars(inputs).items():
            steps = zip(tensor.shape, tensor.strides, contiguous_strides(tensor.shape), strict=True)
            if any(stride != wanted and size > 1 for size, stride, wanted in steps):
                raise Decline(f"{key} is not contiguous")
        known = _scope(inputs, attrs)
        arguments = {f"{key}{POINTER}": tensor for key, tensor in (vars(inputs) | vars(outputs)).items()}
        arguments |= vars(attrs)
        arguments |= {key: value(known) if callable(value) else value for key, value in self.values.items()}
        constexprs = [parameter.name for parameter in self.kernel.params if parameter.is_constexpr]
        fixed = {key: _constant(arguments.pop(key)) for key in constexprs}
        return [Launch(self.kernel, tuple(self.grid(known)), arguments, fixed, self.options)]

    def check(self, attrs: Mapping[str, Any]) -> None:
        where = f"triton_op of {self.kernel.__name__}"
        numbers = [arg for arg in self.kernel.arg_names if not arg.endswith(POINTER)]
        for argument, names, allowed in (
            ("shapes", self.shapes, self.tensors),
            ("types", self.types, self.tensors),
            ("values", self.values, numbers),
            ("attrs", attrs, numbers),
        ):
            if unknown := [key for key in names if key not in allowed]:
                raise ValueError(f"{where}: {argument} has {unknown[0]}, expected some of {', '.join(allowed)}")
        for number in numbers:
            if (number in self.values) + (number in attrs) != 1:
                raise ValueError(f"{where}: {number} is a number, expected it in values or in attrs")
        if not self.inputs or not self.shapes:
            raise ValueError(
                f"{where}: tensors are {', '.join(self.tensors)}, expected an input and an output at least"
            )
        if {*self.inputs} <= {*self.types} and not {*self.shapes} <= {*self.types}:
            raise ValueError(f"{where}: no input has the dtype T of the outputs, expected their dtypes in types")


def _scope(inputs: Any, attrs: Any) -> SimpleNamespace:
    return SimpleNamespace(**vars(inputs), **vars(attrs))


def _attribute(kernel: str, name: str, default: Any) -> Attr:
    kind = default if isinstance(default, type) else type(default)
    if kind not in _KINDS:
        raise ValueError(
            f"triton_op of {kernel}: {name} is {default!r}, expected a float, int, bool or str, or its type"
        )
    return Attr(name, _KINDS[kind], None if default is kind else default)


def _constant(value: Any) -> Any:
    """A constexpr in its own type: a traced size is pinned to what it is."""
    return int(value) if hasattr(value, "expression") else value
