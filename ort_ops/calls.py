"""What a `Runner` is called with: inputs that are checked once for all calls of a kind."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from trimaran.ort_ops.dlpack import Memory, Spec
from trimaran.ort_ops.tensors import Library, library, library_of

KINDS = 256  # that are remembered


@dataclass(eq=False)
class Call:
    """What calls have in common whose inputs differ in address and content alone; lists are in the order of the
    session's inputs. library, device: of the outputs; scattered: the inputs that are not contiguous."""

    library: Library = field(default_factory=lambda: library("numpy"))
    device: str = "cpu"
    libraries: list[Library] = field(default_factory=list)
    specs: list[Spec] = field(default_factory=list)
    shapes: tuple[tuple[int, ...], ...] = ()
    sizes: list[int] = field(default_factory=list)  # in bytes
    scattered: list[int] = field(default_factory=list)
    waits: dict[Library, int] = field(default_factory=dict)  # with the device, where there are tensors on it

    def add(self, of: Library, spec: Spec, dense: bool) -> None:
        if not dense:
            self.scattered.append(len(self.specs))
        if spec.device == "cuda":
            self.waits[of] = spec.device_index
        self.libraries.append(of)
        self.specs.append(spec)
        self.sizes.append(spec.bytes)
        self.shapes += (spec.shape,)

    def addresses(self, tensors: list[Any]) -> list[int]:
        return [of.address(tensor) for of, tensor in zip(self.libraries, tensors, strict=True)]

    def memories(self, tensors: list[Any]) -> list[Memory]:
        return [Memory(*where) for where in zip(self.addresses(tensors), self.specs, tensors, strict=True)]

    def queues(self) -> list[int]:
        """The streams on which the inputs may still be computed."""
        return [of.queue(index) for of, index in self.waits.items()]


class Reader:
    """Reads the inputs of a session: dtypes by name, and the CUDA device that it works on, None for the CPU."""

    def __init__(self, dtypes: Mapping[str, str], device_index: int | None) -> None:
        self.dtypes, self.device_index = dtypes, device_index
        self.calls: dict[Any, Call] = {}

    def read(self, inputs: Mapping[str, Any]) -> tuple[Call, list[Any]]:
        """What kind of call this is, and its tensors in the order of the session's inputs, all of them contiguous.
        ValueError or TypeError, naming the input, for what the session does not take."""
        if inputs.keys() != self.dtypes.keys():
            missing, unknown = sorted(self.dtypes.keys() - inputs.keys()), sorted(inputs.keys() - self.dtypes.keys())
            raise ValueError(f"inputs: missing {missing}, unknown {unknown}, expected {list(self.dtypes)}")
        tensors: list[Any] = []
        kinds: list[Any] = [next(iter(inputs), None)]
        for name in self.dtypes:
            tensor = inputs[name]
            try:
                of = library_of(tensor.__class__)
                kinds += of, of.kind(tensor)
            except TypeError as error:
                raise TypeError(f"{name} {error}") from error
            tensors.append(tensor)
        call = self.calls.get(key := tuple(kinds)) or self._learn(key, inputs)
        for index in call.scattered:
            tensors[index] = call.libraries[index].contiguous(tensors[index])
        return call, tensors

    def _learn(self, key: Any, inputs: Mapping[str, Any]) -> Call:
        """A kind of call that was not seen before, or was forgotten."""
        call = Call()
        for name in self.dtypes:
            try:
                of, spec, dense = self._checked(name, inputs[name])
            except (TypeError, ValueError) as error:
                raise type(error)(f"{name} {error}") from error
            call.add(of, spec, dense)
            if name == next(iter(inputs)):
                call.library, call.device = of, spec.device
        if len(self.calls) >= KINDS:
            self.calls.clear()
        self.calls[key] = call
        return call

    def _checked(self, name: str, tensor: Any) -> tuple[Library, Spec, bool]:
        of = library_of(tensor.__class__)
        spec, dense = of.spec(tensor)
        if spec.dtype != self.dtypes[name]:
            raise TypeError(f"is {spec.dtype}, expected {self.dtypes[name]}")
        if spec.device == "cuda":
            if spec.device_index != self.device_index:
                place = "the CPU" if self.device_index is None else f"CUDA device {self.device_index}"
                raise ValueError(f"is on CUDA device {spec.device_index}, but the session works on {place}")
            of.queue(spec.device_index)
        return of, spec, dense
