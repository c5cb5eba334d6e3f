"""Trimaran: one hull of Triton kernels under PyTorch, ONNX Runtime and TensorRT.

It optimizes PyTorch models in place and makes the attention and norm nodes of ONNX files the same kernels.

    optimize_model(model)                     optimize in place; `report(model)` tells what was done, `restore` undoes
    warm_up(model, [(8, 128)])                compile and capture for these shapes now, not at their first call
    export_onnx(model, inputs, "model.onnx")  export a PyTorch model with trimaran's ops
    rewrite_onnx("theirs.onnx", "ours.onnx")  rewrite any exporter's file
    ort_session("ours.onnx")                  an ordinary InferenceSession with the ops registered
    Runner(session)                           calls it with tensors of torch, CuPy or NumPy, without copies
    triton_op(...), Domain("mine", ops)       make operators of ONNX Runtime of Triton kernels of your own
    add_op(op), Rule, RULES                   kernels and rules of your own: docs/own_rule.md
    interpret()                               run the kernels' source on the CPU, to check it without a GPU

Importing this module loads neither torch, onnx, onnxruntime nor triton; using a name loads what that name needs.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trimaran.export.export_onnx import export_onnx as export_onnx
    from trimaran.export.rewrite_onnx import rewrite_onnx as rewrite_onnx
    from trimaran.kernels.catalog import add_op as add_op
    from trimaran.kernels.interpreter import interpret as interpret
    from trimaran.ort_ops.domain import Domain as Domain
    from trimaran.ort_ops.runner import Runner as Runner
    from trimaran.ort_ops.session import ort_session as ort_session
    from trimaran.ort_ops.triton_op import triton_op as triton_op
    from trimaran.torch_path.optimize import optimize_model as optimize_model
    from trimaran.torch_path.optimize import refresh as refresh
    from trimaran.torch_path.optimize import report as report
    from trimaran.torch_path.optimize import restore as restore
    from trimaran.torch_path.report import Report as Report
    from trimaran.torch_path.rewrite import RULES as RULES
    from trimaran.torch_path.rewrite import Rule as Rule
    from trimaran.torch_path.warm_up import warm_up as warm_up

    __version__: str

_HOMES = {
    "Domain": "trimaran.ort_ops.domain",
    "RULES": "trimaran.torch_path.rewrite",
    "Report": "trimaran.torch_path.report",
    "Rule": "trimaran.torch_path.rewrite",
    "Runner": "trimaran.ort_ops.runner",
    "add_op": "trimaran.kernels.catalog",
    "export_onnx": "trimaran.export.export_onnx",
    "interpret": "trimaran.kernels.interpreter",
    "optimize_model": "trimaran.torch_path.optimize",
    "ort_session": "trimaran.ort_ops.session",
    "refresh": "trimaran.torch_path.optimize",
    "report": "trimaran.torch_path.optimize",
    "restore": "trimaran.torch_path.optimize",
    "rewrite_onnx": "trimaran.export.rewrite_onnx",
    "triton_op": "trimaran.ort_ops.triton_op",
    "warm_up": "trimaran.torch_path.warm_up",
}


def _resolve(name: str) -> Any:
    if name == "__version__":
        value: Any = _version()
    elif name in _HOMES:
        value = getattr(import_module(_HOMES[name]), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value  # the next use does not come here
    return value


if not TYPE_CHECKING:  # a type checker that saw it would take any misspelt name for an attribute
    __getattr__ = _resolve


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES, "__version__"})


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("trimaran")
    except PackageNotFoundError:  # run from a checkout that is not installed
        return "0+unknown"
