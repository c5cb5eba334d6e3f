"""ONNX Runtime sessions with Trimaran's ops.

Once a name is registered in a session, that session no longer uses the function body that the file has for it. The ops
are therefore registered only where their kernels can run: for CUDA on a GPU of compute capability 8.0 or newer, and for
the CPU while `trimaran.interpret()` is on. Elsewhere sessions run the function bodies.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from trimaran.kernels.contract import Op
from trimaran.kernels.cuda import CudaError, device
from trimaran.kernels.driver import driver
from trimaran.kernels.interpreter import interpreting
from trimaran.ort_ops.abi import CPU, CUDA
from trimaran.ort_ops.domain import TRIMARAN, Domain
from trimaran.ort_ops.model_file import require_bodies, what_is_wrong

if TYPE_CHECKING:
    import onnxruntime

Provider = str | tuple[str, Mapping[str, Any]]

OVERLOADS = (1, 27)  # the first onnxruntime that tells functions of one name apart by their overload
LEAST_CAPABILITY = 80


def ort_session(
    path: str | os.PathLike[str] | bytes,
    providers: Sequence[Provider] | None = None,
    cuda_graph: bool = False,
    *,
    domains: Sequence[Domain] = (),
    session_options: onnxruntime.SessionOptions | None = None,
    **kwargs: Any,
) -> onnxruntime.InferenceSession:
    """An ordinary `onnxruntime.InferenceSession` in which Trimaran's ops are registered.

    path: an ONNX file, or its bytes. providers: as onnxruntime takes them; by default CUDA where there is a device, and
    the CPU. cuda_graph: runs on CUDA are captured and replayed, see `Runner`. domains: of ops of your own, registered
    as well. session_options: the ops are registered on them, so they are this function's to change. kwargs: what else
    InferenceSession takes.

    Raises FileNotFoundError; ValueError for what is not an ONNX model, an unknown provider, a CUDA graph without CUDA,
    or a node of Trimaran's that has neither a registered op nor a function body; TypeError for arguments of the wrong
    type; RuntimeError for a file whose function bodies need a newer onnxruntime; ImportError without onnxruntime. Other
    errors are onnxruntime's own.
    """
    ort = _onnxruntime()
    model = _model(path)
    if providers is None:
        providers = default_providers()
    providers = _with_options(providers, kwargs.pop("provider_options", None))
    if cuda_graph:
        providers = _with_graphs(providers)
    options = ort.SessionOptions() if session_options is None else session_options
    registered = register(options, providers)
    for domain in domains:
        register(options, providers, domain)
    if not registered and _version(ort) < OVERLOADS:
        require_bodies(model, ort.__version__)
    try:
        return ort.InferenceSession(model, options, providers=list(providers), **kwargs)
    except Exception as error:
        if reason := what_is_wrong(model, registered):
            raise ValueError(reason) from error
        for op in TRIMARAN.ops:
            if op.name in registered and op.name in str(error):
                error.add_note(signature(op))
        raise


def register(
    options: onnxruntime.SessionOptions, providers: Sequence[Provider], domain: Domain = TRIMARAN
) -> tuple[str, ...]:
    """Register a domain's ops for sessions that are made with these options and execution providers.

    Returns the names of the ops; none where function bodies are to run, because no GPU can be used and
    `trimaran.interpret()` is off. May be called again with the same arguments. TypeError or ValueError for arguments
    that are none, and where the options already have the ops for other providers.
    """
    ort = _onnxruntime()
    if not isinstance(options, ort.SessionOptions):
        raise TypeError(f"options is {options!r}, expected an onnxruntime.SessionOptions")
    wanted = _checked(providers)
    kernels = set()
    if CUDA in wanted and usable(int(wanted[CUDA].get("device_id", 0))):
        kernels.add(CUDA)
    if interpreting():
        kernels.add(CPU)
    return domain.register(options, kernels) if kernels else ()


def signature(op: Op) -> str:
    """What an op takes, for error messages; ONNX Runtime's own do not say which types it knows."""
    inputs = ", ".join(f"{port.name}{'?' * port.optional}: {port.type}" for port in op.inputs)
    types = "; ".join(f"{name} is {' or '.join(dtypes)}" for name, dtypes in op.types.items())
    return f"{TRIMARAN.name}.{op.name} takes {inputs}; {types}, the same for all"


def default_providers() -> list[str]:
    """CUDA, then the CPU, where onnxruntime was built with CUDA and there is a device; else the CPU alone."""
    cuda = CUDA in _onnxruntime().get_available_providers() and _capability(0) > 0
    return [CUDA, CPU] if cuda else [CPU]


def usable(index: int) -> bool:
    """Whether the kernels run on the CUDA device of this index."""
    return _capability(index) >= LEAST_CAPABILITY


def _capability(index: int) -> int:
    try:
        return device(index).capability
    except CudaError:
        return 0


def _checked(providers: Sequence[Provider]) -> dict[str, Mapping[str, Any]]:
    """Names and options of the providers."""
    if isinstance(providers, str) or not isinstance(providers, Sequence):
        raise TypeError(f"providers is {providers!r}, expected a list, such as [{CPU!r}]")
    found: dict[str, Mapping[str, Any]] = {}
    available = _onnxruntime().get_available_providers()
    for provider in providers:
        name, options = provider if isinstance(provider, tuple) and len(provider) == 2 else (provider, {})
        if not isinstance(name, str) or not isinstance(options, Mapping):
            raise TypeError(f"a provider is {provider!r}, expected a name or a pair (name, options)")
        if name not in available:
            raise ValueError(f"this onnxruntime has no {name}, but {', '.join(available)}")
        found[name] = options
    return found


def _with_options(providers: Sequence[Provider], options: Any) -> Sequence[Provider]:
    """The providers with what InferenceSession's `provider_options` says of each."""
    if options is None:
        return providers
    if not isinstance(options, Sequence) or len(options) != len(providers):
        raise ValueError(f"provider_options is {options!r}, expected one mapping for each of {list(providers)!r}")
    return [(p, o) if isinstance(p, str) else p for p, o in zip(providers, options, strict=True)]


def _with_graphs(providers: Sequence[Provider]) -> Sequence[Provider]:
    """The providers, CUDA told to capture graphs, and to work on a stream that a `Runner` can copy on."""
    checked = _checked(providers)
    if CUDA not in checked:
        raise ValueError(f"cuda_graph is True, which takes {CUDA}; providers are {', '.join(checked)}")
    given = dict(checked[CUDA])
    stream = given.get("user_compute_stream") or driver(int(given.get("device_id", 0))).stream
    checked[CUDA] = given | {"enable_cuda_graph": "1", "user_compute_stream": str(stream)}
    return list(checked.items())


def _model(path: Any) -> str | bytes:
    """The path as a str, known to be a file, or the model's bytes."""
    if isinstance(path, bytes):
        return path
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"path is {path!r}, expected a str, a PathLike or the bytes of an ONNX model")
    name = os.fsdecode(path)
    if os.path.isdir(name):
        raise ValueError(f"{name} is a directory, expected an ONNX file")
    if not os.path.exists(name):
        raise FileNotFoundError(errno.ENOENT, "no such ONNX file", name)
    return name


def _onnxruntime() -> Any:
    try:
        import onnxruntime
    except ModuleNotFoundError as error:
        if error.name != "onnxruntime":
            raise
        raise ImportError(
            "onnxruntime is not installed: pip install trimaran[cpu], trimaran[cuda12] or trimaran[cuda13]"
        ) from error
    return onnxruntime


def _version(ort: Any) -> tuple[int, ...]:
    return tuple(int(part) for part in ort.__version__.split(".")[:2])
