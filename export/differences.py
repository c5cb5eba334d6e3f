"""`trimaran verify`: do two ONNX files compute the same, and if not, from which node on?

Both run on the same inputs, in several shapes, on the CPU. Half precision is run as a GPU computes it (see `half`), so
that the nodes that have to stay in fp32 can be found.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import ShapeInferencePass

from trimaran.export import files
from trimaran.export.half import HALVES, SWITCHES, add_switches, as_float32, chosen, is_half, label
from trimaran.export.schemas import register_schemas
from trimaran.export.verify import LIMITS, CannotVerify, example_inputs, first_line, relative_error

SHAPES = ((2, 7), (1, 5), (7, 3))  # batch and length of generated inputs
FLOATS = {ir.DataType.FLOAT, ir.DataType.DOUBLE, *HALVES}
Arrays = Mapping[str, np.ndarray[Any, Any]]


@dataclass(frozen=True)
class Parting:
    """Where two files first differ by more than their types explain. node: of the second file; value: what it makes."""

    node: str
    value: str
    error: float


@dataclass
class Comparison:
    """runs: for each set of inputs, its shapes and the relative RMS error of each output. limits: what is allowed, by
    output. parting: the first node that differs, where outputs do. keep: nodes of the second file that have to be kept
    in fp32 for the two to agree, none of which can be left out; None where it is not half precision, or no such list
    helps."""

    runs: list[tuple[str, dict[str, float]]] = field(default_factory=list)
    limits: dict[str, float] = field(default_factory=dict)
    parting: Parting | None = None
    keep: list[str] | None = None
    half: bool = False

    @property
    def ok(self) -> bool:
        return all(error <= self.limits[name] for _, errors in self.runs for name, error in errors.items())

    def lines(self) -> list[str]:
        found = []
        for shapes, errors in self.runs:
            for name, error in errors.items():
                verdict = "ok" if error <= self.limits[name] else "DIFFERS"
                found.append(f"{shapes}: {name}: {error:.1e}, allowed is {self.limits[name]:g}: {verdict}")
        if self.parting is not None:
            found.append(f"they part at {self.parting.node}: {self.parting.value} differs by {self.parting.error:.1e}")
        if self.keep is not None:
            found.append(f"they agree with {len(self.keep)} nodes of the second file in fp32:")
            found += [f"  {name}" for name in self.keep]
        elif self.half and not self.ok:
            found.append("no list of nodes to keep in fp32 makes them agree")
        return found


def verify_files(first: files.Paths, second: files.Paths, inputs: Arrays | None = None, seed: int = 0) -> Comparison:
    """Compare two ONNX files that have the same inputs and outputs.

    inputs: arrays by name, else random ones in several shapes. Raises as `rewrite_onnx` does for bad files, ValueError
    where inputs or outputs are not the same, and CannotVerify where one of the files does not run here."""
    paths = [files.source_path(name, path) for name, path in (("first", first), ("second", second))]
    models = [files.load(name, path) for name, path in zip(("first", "second"), paths, strict=True)]
    _check_ports(*models)
    given = [inputs] if inputs is not None else [example_inputs(models[0], seed, shape) for shape in SHAPES]
    given = [_representable(feeds, models) for feeds in given]
    with tempfile.TemporaryDirectory() as folder:
        probes = [Probe(path, Path(folder)) for path in paths]
        found = Comparison(limits=_limits(*probes), half=probes[1].half)
        for feeds in given:
            found.runs.append((_shapes(feeds), _errors(*(probe.run(feeds) for probe in probes))))
        if not found.ok:
            failing = next(i for i, (_, errors) in enumerate(found.runs) if _over(errors, found.limits))
            found.parting = _parting(paths, given[failing], Path(folder))
            found.keep = _kept(probes, given, found.limits) if found.half else None
    return found


class Probe:
    """A file that can be run; where it is of half precision, in float32 with the rounding written out. extra: values
    of its graph that are wanted beside its outputs."""

    def __init__(self, path: Path, folder: Path, extra: Sequence[str] = ()) -> None:
        model = typed(path)
        self.half = is_half(model)
        self.types = {str(value.name): value.dtype for value in [*model.graph.inputs, *model.graph.outputs]}
        outputs = [str(value.name) for value in model.graph.outputs]
        self.switches, rounded = add_switches(model) if self.half else ([], {})
        self.names = {name: name for name in outputs} | {name: rounded.get(name, name) for name in extra}
        made = {str(value.name): value for node in model.graph for value in node.outputs}
        model.graph.outputs.extend(made[self.names[name]] for name in extra)
        written = Path(tempfile.mkdtemp(dir=folder)) / "model.onnx"
        ir.save(model, written, external_data="model.data")
        self.session = _session(written, self.half)

    def run(self, feeds: Arrays, kept: Sequence[str] = ()) -> dict[str, np.ndarray[Any, Any]]:
        """Outputs by name. kept: nodes that compute in fp32."""
        given = {name: _as(array, self.types[name]) for name, array in feeds.items()}
        if self.half:
            given = {**as_float32(given), SWITCHES: chosen(self.switches, kept)}
        try:
            results = self.session.run(list(self.names.values()), given)
        except Exception as error:
            raise CannotVerify(f"a file does not run on these inputs: {first_line(error)}") from error
        return dict(zip(self.names, results, strict=True))


def typed(path: Path) -> ir.Model:
    """The model, with the types of its values as far as they can be inferred."""
    register_schemas()
    model = ir.load(path)
    if any(value.dtype is None for node in model.graph for value in node.outputs):
        ShapeInferencePass()(model)
    return model


def smallest(items: Sequence[str], enough: Callable[[Sequence[str]], bool]) -> list[str] | None:
    """A part of the items that is enough and of which none can be left out, by delta debugging (Zeller and Hildebrandt,
    2002). None where all of them are not."""
    left, parts = list(items), 2
    if not enough(left):
        return None
    while len(left) > 1:
        size = -(-len(left) // parts)
        chunks = [left[start : start + size] for start in range(0, len(left), size)]
        rests = [[item for item in left if item not in {*chunk}] for chunk in chunks]
        found = next((part for part in [*chunks, *(rests if parts > 2 else [])] if enough(part)), None)
        if found is not None:
            parts = 2 if found in chunks else max(parts - 1, 2)
            left = found
        elif parts >= len(left):
            break
        else:
            parts = min(2 * parts, len(left))
    return left


def _kept(probes: Sequence[Probe], given: Sequence[Arrays], limits: Mapping[str, float]) -> list[str] | None:
    first, second = probes
    expected = [first.run(feeds) for feeds in given]

    def enough(kept: Sequence[str]) -> bool:
        return not any(
            _over(_errors(wanted, second.run(feeds, kept)), limits)
            for feeds, wanted in zip(given, expected, strict=True)
        )

    return smallest(second.switches, enough)


def _parting(paths: Sequence[Path], feeds: Arrays, folder: Path) -> Parting | None:
    """The first node of the second file, in its order, that makes a value which the first has too, and differs."""
    first, second = ({v.name: v for n in typed(path).graph for v in n.outputs if v.dtype in FLOATS} for path in paths)
    common = [str(name) for name in second if name in first]
    probes = [Probe(path, folder, common) for path in paths]
    expected, got = (probe.run(feeds) for probe in probes)
    for name in common:
        error = _error(got[name], expected[name])
        if error > _limit(first[name].dtype, second[name].dtype):
            maker = second[name].producer()
            assert maker is not None
            return Parting(label(maker), name, error)
    return None


def _check_ports(first: ir.Model, second: ir.Model) -> None:
    for what in ("inputs", "outputs"):
        names = [
            {str(value.name) for value in getattr(model.graph, what)} - {*model.graph.initializers}
            for model in (first, second)
        ]
        if names[0] != names[1]:
            raise ValueError(f"first has the {what} {sorted(names[0])}, second {sorted(names[1])}: expected the same")


def _representable(feeds: Arrays, models: Sequence[ir.Model]) -> dict[str, np.ndarray[Any, Any]]:
    """Rounded, where one of the files takes half precision, so that both get the same numbers."""
    found = dict(feeds)
    for value in (value for model in models for value in model.graph.inputs):
        if value.dtype in HALVES and value.name in found:
            found[value.name] = found[value.name].astype(HALVES[value.dtype])
    return found


def _as(array: np.ndarray[Any, Any], dtype: ir.DataType | None) -> np.ndarray[Any, Any]:
    return array.astype(dtype.numpy()) if dtype in FLOATS else array


def _session(path: Path, half: bool) -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise CannotVerify(f"onnxruntime is not installed ({error})") from error
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if half:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise CannotVerify(f"onnxruntime refuses a file: {first_line(error)}") from error


def _limits(first: Probe, second: Probe) -> dict[str, float]:
    names = first.names
    return {name: _limit(first.types[name], second.types[name]) for name in names}


def _limit(*dtypes: ir.DataType | None) -> float:
    """That of the coarser type; what is no float has to be the same."""
    return max(LIMITS.get(str(dtype.numpy()) if dtype is not None else "", 0.0) for dtype in dtypes)


def _errors(expected: Arrays, got: Arrays) -> dict[str, float]:
    return {name: _error(got[name], expected[name]) for name in expected}


def _error(ours: np.ndarray[Any, Any], reference: np.ndarray[Any, Any]) -> float:
    return relative_error(ours, reference) if ours.shape == reference.shape else float("inf")


def _over(errors: Mapping[str, float], limits: Mapping[str, float]) -> bool:
    return any(not error <= limits[name] for name, error in errors.items())


def _shapes(feeds: Arrays) -> str:
    return ", ".join(f"{name} {list(array.shape)}" for name, array in feeds.items())
