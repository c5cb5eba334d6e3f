"""Does a rewritten file compute what it did before? Run both and compare."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir

from trimaran.export.onnx_graph import made_by
from trimaran.export.twin import has_bfloat16, write_twin

# Largest RMS error, relative to the RMS of the output. fp32 outputs of deep models differ by 1e-6 to 1e-5 between
# runtimes.
LIMITS = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2, "float64": 1e-6}
LARGEST = 1 << 28  # elements of a generated input
FUNCTIONS_SINCE = (1, 27)  # the onnxruntime that can run function overloads
SIZES, OTHER_SIZE = (2, 7), 3  # of free axes in generated inputs: the batch, the second axis, and others


class VerificationError(RuntimeError):
    """Two files, or a file and its model, disagree."""


class CannotVerify(Exception):
    """There is no way to compare here; the text is the reason."""


def run(path: Path, inputs: Mapping[str, np.ndarray[Any, Any]]) -> dict[str, np.ndarray[Any, Any]]:
    """Outputs by name from a plain onnxruntime on the CPU, without our library. A bfloat16 file is run as float32, its
    outputs rounded. CannotVerify where there is no onnxruntime that can."""
    try:
        import onnxruntime
    except ImportError as error:
        raise CannotVerify(f"onnxruntime is not installed ({error})") from error
    if tuple(int(part) for part in onnxruntime.__version__.split(".")[:2]) < FUNCTIONS_SINCE:
        raise CannotVerify(f"onnxruntime {onnxruntime.__version__} cannot run function overloads, 1.27 can")
    model = ir.load(path)
    if not has_bfloat16(model):
        return _outputs(path, inputs)
    with tempfile.TemporaryDirectory() as folder:
        widened = {name: x.astype(np.float32) if x.dtype == ml_dtypes.bfloat16 else x for name, x in inputs.items()}
        found = _outputs(write_twin(path, Path(folder)), widened)
    rounded = {str(value.name) for value in model.graph.outputs if value.dtype == ir.DataType.BFLOAT16}
    return {name: x.astype(ml_dtypes.bfloat16) if name in rounded else x for name, x in found.items()}


def _outputs(path: Path, inputs: Mapping[str, np.ndarray[Any, Any]]) -> dict[str, np.ndarray[Any, Any]]:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, dict(inputs)), strict=True))


def check_run(path: Path, inputs: Mapping[str, Any], expected: Mapping[str, Any]) -> float:
    """Run an exported file on the inputs of its model, torch tensors by name as the outputs are. The largest relative
    RMS error; VerificationError where it is too large or the file does not run, CannotVerify as `run`."""
    try:
        got = run(path, {name: array(tensor) for name, tensor in inputs.items()})
    except CannotVerify:
        raise
    except Exception as error:
        raise VerificationError(f"the exported file does not run: {first_line(error)}") from error
    return compare(got, {name: array(tensor) for name, tensor in expected.items() if name in got})


def array(tensor: Any) -> np.ndarray[Any, Any]:
    """A torch tensor as a NumPy array, of ml_dtypes' kind where it is bfloat16."""
    import torch

    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype is torch.bfloat16:
        return np.asarray(tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16))
    return np.asarray(tensor.numpy())


def compare(got: Mapping[str, Any], expected: Mapping[str, Any], floor: float = 0.0) -> float:
    """The largest relative RMS error over the outputs. VerificationError where one is over its dtype's limit, which is
    `floor` at least for floats."""
    worst = 0.0
    for name, reference in expected.items():
        ours = got[name]
        if ours.shape != reference.shape or ours.dtype != reference.dtype:
            raise VerificationError(
                f"output {name} is {ours.dtype}{list(ours.shape)}, expected {reference.dtype}{list(reference.shape)}"
            )
        error = relative_error(ours, reference)
        limit = LIMITS.get(str(reference.dtype), 0.0)
        limit = max(limit, floor) if limit else limit
        if not error <= limit:
            raise VerificationError(f"output {name} differs by {error:.3g} (RMS, relative), allowed is {limit:g}")
        worst = max(worst, error)
    return worst


def relative_error(ours: np.ndarray[Any, Any], reference: np.ndarray[Any, Any]) -> float:
    """RMS of the difference over RMS of the reference; NaN and infinities must stand at the same places."""
    a, b = (np.asarray(x, np.float64) for x in (ours, reference))
    odd = ~np.isfinite(b)
    if not np.array_equal(a[odd], b[odd], equal_nan=True):
        return float("inf")
    a, b = a[~odd], b[~odd]
    if not b.size:
        return 0.0
    return float(np.sqrt(np.mean((a - b) ** 2)) / (np.sqrt(np.mean(b**2)) or 1.0))


def rounding(model: ir.Model) -> float:
    """The limit of the coarsest type that the model computes in: its outputs may be wider."""
    values = (value for node in ir.traversal.RecursiveGraphIterator(model.graph) for value in node.outputs)
    dtypes = {value.dtype for value in values} & {ir.DataType.FLOAT16, ir.DataType.BFLOAT16}
    return max((LIMITS[str(dtype.numpy())] for dtype in dtypes if dtype is not None), default=0.0)


def compare_files(source: Path, target: Path, inputs: Mapping[str, np.ndarray[Any, Any]], floor: float = 0.0) -> str:
    """Run both files on the inputs and say how far they are apart. VerificationError where they differ by more than
    their types and `floor` allow, CannotVerify where the source itself does not run here."""
    try:
        expected = run(source, inputs)
    except CannotVerify:
        raise
    except Exception as error:
        raise CannotVerify(f"the source file does not run on these inputs: {first_line(error)}") from error
    try:
        got = run(target, inputs)
    except Exception as error:
        raise VerificationError(f"the rewritten file does not run: {first_line(error)}") from error
    return f"verified against the source, largest relative RMS difference {compare(got, expected, floor):.1e}"


def example_inputs(model: ir.Model, seed: int = 0, sizes: tuple[int, int] = SIZES) -> dict[str, np.ndarray[Any, Any]]:
    """Random inputs that the model can take: indices within what they look up, masks with holes, floats from a normal
    distribution. sizes: the batch and the length that free axes get. CannotVerify where a rank or dtype is not
    known."""
    generator = np.random.default_rng(seed)
    wanted = [value for value in model.graph.inputs if value.name not in model.graph.initializers]
    for value in wanted:
        if value.shape is None or value.dtype is None:
            raise CannotVerify(f"the shape or type of input {value.name} is not known, give inputs=")
    shapes = known_sizes([_named(value) for value in wanted], sizes)
    if max(map(math.prod, shapes), default=0) > LARGEST:
        raise CannotVerify(f"the inputs would have the shapes {shapes}, give smaller ones by inputs=")
    return {str(value.name): _random(generator, value, shape) for value, shape in zip(wanted, shapes, strict=True)}


def known_sizes(shapes: Sequence[Sequence[int | str | None]], sizes: tuple[int, int]) -> list[list[int]]:
    """Numbers for shapes: one for each name, and for a sum of names (`past_sequence + sequence`) their sum."""
    by_axis = {0: sizes[0], 1: sizes[1]}
    table: dict[str, int] = {}
    for shape in shapes:
        for axis, dim in enumerate(shape):
            if isinstance(dim, str) and _sum(dim, table) is None and len(_terms(dim)) == 1:
                table.setdefault(dim, by_axis.get(axis, OTHER_SIZE))
    return [
        [
            dim if isinstance(dim, int) else (_sum(dim, table) if dim else None) or by_axis.get(axis, OTHER_SIZE)
            for axis, dim in enumerate(shape)
        ]
        for shape in shapes
    ]


def _named(value: ir.Value | None) -> list[int | str | None]:
    """The shape in numbers and names; empty where it is not known."""
    shape = value.shape if value is not None else None
    return [dim if isinstance(dim, int) else dim.value for dim in shape or ()]


def _terms(name: str) -> list[str]:
    return [term.strip() for term in name.split("+")]


def _sum(name: str, table: Mapping[str, int]) -> int | None:
    found = [int(term) if term.isdecimal() else table.get(term) for term in _terms(name)]
    return None if None in found else sum(size for size in found if size is not None)


def _random(generator: np.random.Generator, value: ir.Value, size: Sequence[int]) -> np.ndarray[Any, Any]:
    assert value.dtype is not None
    dtype = value.dtype.numpy()
    if np.issubdtype(dtype, np.floating) or value.dtype == ir.DataType.BFLOAT16:
        return np.asarray(generator.standard_normal(size)).astype(dtype)
    array = generator.integers(0, index_bound(value), size)
    if array.ndim > 1 and array.shape[-1]:
        array[..., 0] = 1  # so that a mask leaves something in each row
    return np.asarray(array).astype(dtype)


def index_bound(value: ir.Value, depth: int = 4) -> int:
    """How many different numbers an integer input may hold: the smallest table it looks up, 2 where it looks up
    none."""
    bounds = [2**31]
    for use in value.uses():
        node = use.node
        if node.op_type == "Gather" and use.idx == 1:
            table = _named(node.inputs[0])
            axis = node.attributes["axis"].value if "axis" in node.attributes else 0
            size = table[axis] if -len(table) <= axis < len(table) else None
            if isinstance(size, int):
                bounds.append(size)
        elif (
            depth
            and made_by(node.outputs[0], "Cast", "Identity", "Reshape", "Unsqueeze", "Squeeze", "Flatten")
            and use.idx == 0
        ):
            bounds.append(index_bound(node.outputs[0], depth - 1))
    smallest = min(bounds)
    return smallest if smallest < 2**31 else 2


def first_line(error: Exception) -> str:
    """Of what an error says; what kind it is where it says nothing."""
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
