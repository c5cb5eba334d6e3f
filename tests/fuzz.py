"""Mutants of valid ONNX files, and what `rewrite_onnx` makes of them; a process to itself, since native code may die.

    python fuzz.py FOLDER FIRST LAST

mutates the .onnx files of FOLDER with the seeds FIRST to LAST and prints two lines of JSON for each: its number before,
and what came of it after. What is written is compared with its source by running both.
"""

from __future__ import annotations

import json
import random
import resource
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
from onnx import TensorProto, numpy_helper

from trimaran.export.rewrite_onnx import rewrite_onnx
from trimaran.export.verify import LIMITS, CannotVerify, example_inputs, relative_error

REFUSALS = (ValueError, FileNotFoundError, PermissionError)
LARGEST = 1 << 20  # elements of an input; a mutant may ask for any number
MEMORY = 12 << 30
SECONDS = 60  # of one mutant, after which the process is killed
OP_TYPES = ("Add", "Sub", "Mul", "Div", "Pow", "MatMul", "Softmax", "Exp", "Sqrt", "Erf", "Tanh", "Neg", "Identity",
            "Where", "Max", "Reciprocal", "Transpose", "LayerNormalization", "ReduceMean", "Sigmoid", "Cast", "Gemm",
            "Relu")  # fmt: skip


# ---- mutations of bytes


def flip(data: bytearray, rng: random.Random) -> None:
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)


def cut(data: bytearray, rng: random.Random) -> None:
    start = rng.randrange(len(data))
    del data[start : start + rng.choice([1, 4, 64, len(data)])]


def repeat(data: bytearray, rng: random.Random) -> None:
    start = rng.randrange(len(data))
    data[start:start] = data[start : start + rng.choice([1, 8, 64, 512])]


def overwrite(data: bytearray, rng: random.Random) -> None:
    start, what = (
        rng.randrange(len(data)),
        rng.choice([b"\xff" * 10, b"\0" * 8, b"\x7f\xff\xff\xff", rng.randbytes(16)]),
    )
    data[start : start + len(what)] = what


# ---- mutations of graphs


def drop_node(model: Any, rng: random.Random) -> None:
    del model.graph.node[rng.randrange(len(model.graph.node))]


def double_node(model: Any, rng: random.Random) -> None:
    model.graph.node.append(rng.choice(model.graph.node))


def move_node(model: Any, rng: random.Random) -> None:
    node = model.graph.node.pop(rng.randrange(len(model.graph.node)))
    model.graph.node.insert(rng.randrange(len(model.graph.node) + 1), node)


def rewire(model: Any, rng: random.Random) -> None:
    node = rng.choice([node for node in model.graph.node if node.input])
    names = [name for other in model.graph.node for name in other.output] + [v.name for v in model.graph.input]
    node.input[rng.randrange(len(node.input))] = rng.choice([*names, *(t.name for t in model.graph.initializer), ""])


def exchange(model: Any, rng: random.Random) -> None:
    node = rng.choice([node for node in model.graph.node if len(node.input) > 1] or list(model.graph.node))
    if len(node.input) > 1:
        node.input[0], node.input[1] = node.input[1], node.input[0]


def other_op(model: Any, rng: random.Random) -> None:
    rng.choice(model.graph.node).op_type = rng.choice(OP_TYPES)


def other_domain(model: Any, rng: random.Random) -> None:
    rng.choice(model.graph.node).domain = rng.choice(["com.microsoft", "trimaran", "my"])


def change_attribute(model: Any, rng: random.Random) -> None:
    node = rng.choice([node for node in model.graph.node if node.attribute] or list(model.graph.node))
    if not node.attribute:
        return
    attribute = rng.choice(node.attribute)
    attribute.i, attribute.f = rng.choice([0, 1, -1, 2, 7, 1 << 40]), rng.choice([0.0, 1e-12, -1.0, float("nan"), 1e30])
    if attribute.ints:
        attribute.ints[rng.randrange(len(attribute.ints))] = rng.choice([0, 1, 2, 3, -1, 99])
    if rng.random() < 0.3:
        node.attribute.remove(attribute)


def change_weight(model: Any, rng: random.Random) -> None:
    """Another number, shape or type."""
    if not model.graph.initializer:
        return
    tensor = rng.choice(model.graph.initializer)
    kind = rng.randrange(4)
    if kind == 0:
        tensor.data_type = rng.choice([1, 6, 7, 9, 10, 11, 16, 0, 77])
    elif kind == 1 and tensor.dims:
        tensor.dims[rng.randrange(len(tensor.dims))] = rng.choice([0, 1, 3, -1, 1 << 40])
    elif kind == 2:
        tensor.dims.append(rng.choice([1, 2]))
    elif tensor.data_location != TensorProto.EXTERNAL:
        array = np.array(numpy_helper.to_array(tensor))
        if array.size:
            array.flat[rng.randrange(array.size)] = rng.choice([0, 1, 2, -1, 5])
            tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))


def change_size(model: Any, rng: random.Random) -> None:
    """Of an input, an output or a value in between."""
    value = rng.choice([*model.graph.input, *model.graph.output, *model.graph.value_info])
    dims = value.type.tensor_type.shape.dim
    if dims:
        dim = rng.choice(dims)
        rng.choice([lambda: setattr(dim, "dim_value", rng.choice([0, 1, 2, 5, 1 << 40])), lambda: dim.Clear(),
                    lambda: setattr(dim, "dim_param", rng.choice(["n", "batch", "s + 1"]))])()  # fmt: skip


def change_type(model: Any, rng: random.Random) -> None:
    value = rng.choice([*model.graph.input, *model.graph.output, *model.graph.value_info])
    value.type.tensor_type.elem_type = rng.choice([0, 1, 7, 9, 10, 11, 16])


def more_outputs(model: Any, rng: random.Random) -> None:
    name = rng.choice([name for node in model.graph.node for name in node.output if name])
    model.graph.output.add(name=name)


def rename(model: Any, rng: random.Random) -> None:
    node = rng.choice(model.graph.node)
    if node.output:
        node.output[rng.randrange(len(node.output))] = rng.choice(["", "x", "renamed", node.output[0]])


def other_opset(model: Any, rng: random.Random) -> None:
    if model.opset_import:
        rng.choice(model.opset_import).version = rng.choice([1, 7, 11, 12, 13, 17, 18, 20, 23, 99])


def forget_shapes(model: Any, rng: random.Random) -> None:
    del model.graph.value_info[:]


def outside(model: Any, rng: random.Random) -> None:
    if model.graph.initializer:
        tensor = rng.choice(model.graph.initializer)
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value=rng.choice(["/etc/passwd", "../w", "", "gone", "."]))


def change_body(model: Any, rng: random.Random) -> None:
    if model.functions and model.functions[0].node:
        rng.choice(rng.choice(model.functions).node).op_type = rng.choice(OP_TYPES)


BYTES: list[Callable[[bytearray, random.Random], None]] = [flip, cut, repeat, overwrite]
GRAPHS: list[Callable[[Any, random.Random], None]] = [
    drop_node, double_node, move_node, rewire, rewire, rewire, exchange, exchange, other_op, other_op, other_domain,
    change_attribute, change_attribute, change_weight, change_weight, change_size, change_type, more_outputs, rename,
    other_opset, forget_shapes, outside, change_body,
]  # fmt: skip


def mutant(source: bytes, rng: random.Random) -> bytes:
    if rng.random() < 0.2:
        data = bytearray(source)
        for _ in range(rng.choice([1, 1, 2, 8])):
            rng.choice(BYTES)(data, rng)
            if not data:
                break
        return bytes(data)
    model = onnx.load_from_string(source)
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        if model.graph.node:
            rng.choice(GRAPHS)(model, rng)
    return model.SerializeToString()


# ---- what comes of them


def outcome(data: bytes, folder: Path) -> str:
    """refused, copied, unjudged (the source runs nowhere), right; or what is wrong, in words."""
    source, target = folder / "source.onnx", folder / "target.onnx"
    source.write_bytes(data)
    try:
        report = rewrite_onnx(source, target, verify=False)
    except REFUSALS as error:
        left = sorted(path.name for path in folder.iterdir())
        return "refused" if str(error) and left == ["source.onnx"] and source.read_bytes() == data else f"left {left}"
    except Exception:
        return f"raised {traceback.format_exc()}"
    if source.read_bytes() != data:
        return "the source was changed"
    if not report.replaced:
        return "copied" if target.read_bytes() == data else "nothing was replaced, and the copy is another"
    return judged(source, target)


def judged(source: Path, target: Path) -> str:
    try:
        feeds = small(example_inputs(ir.load(source)))
        expected = results(source, feeds)
    except (CannotVerify, ValueError, TypeError, RuntimeError, OverflowError):
        return "unjudged"
    except Exception as error:  # onnxruntime has kinds of its own
        return "unjudged" if "onnxruntime" in type(error).__module__ else f"raised {traceback.format_exc()}"
    try:
        got = results(target, feeds)
    except Exception as error:
        return f"does not run any more: {error}"
    for name, reference in expected.items():
        if got[name].shape != reference.shape or got[name].dtype != reference.dtype:
            return f"wrong: {name} is {got[name].dtype}{got[name].shape}, was {reference.dtype}{reference.shape}"
        error = relative_error(got[name], reference)
        if error > LIMITS.get(str(reference.dtype), 1e-4) and not error <= 100 * noise(source, feeds, name, reference):
            return f"wrong: {name} differs by {error:.3g}"
    return "right"


def small(feeds: dict[str, Any]) -> dict[str, Any]:
    if any(array.size > LARGEST for array in feeds.values()):
        raise CannotVerify("too large")
    return feeds


def results(path: Path, feeds: dict[str, Any]) -> dict[str, Any]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 4, 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, feeds), strict=True))


def noise(source: Path, feeds: dict[str, Any], name: str, reference: Any) -> float:
    """How far an output goes when its inputs change by a rounding: a mutant may have no stable result."""
    moved = {key: x * np.asarray(1 + 8 * np.finfo(x.dtype).eps, x.dtype) if x.dtype.kind == "f" else x
             for key, x in feeds.items()}  # fmt: skip
    error = relative_error(results(source, moved)[name], reference)
    return error if np.isfinite(error) else float("inf")


def main(folder: Path, first: int, last: int) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    sources = [path.read_bytes() for path in sorted(folder.glob("*.onnx"))]
    for number in range(first, last):
        print(json.dumps({"start": number}), flush=True)
        signal.alarm(SECONDS)
        rng = random.Random(number)
        data = mutant(sources[number % len(sources)], rng)
        with tempfile.TemporaryDirectory() as scratch:
            print(json.dumps({"end": number, "outcome": outcome(data, Path(scratch))}), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
