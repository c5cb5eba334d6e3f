"""What is installed here and what trimaran can do with it. Whatever is missing or broken is told, never an error."""

import ctypes
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module, metadata
from types import ModuleType
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

import trimaran

# import name -> the distributions that may provide it
PACKAGES: dict[str, tuple[str, ...]] = {
    "torch": ("torch",),
    "triton": ("triton",),
    "transformers": ("transformers",),
    "onnx": ("onnx",),
    "onnxscript": ("onnxscript",),
    "onnxruntime": ("onnxruntime", "onnxruntime-gpu"),
    "cupy": ("cupy", "cupy-cuda12x", "cupy-cuda13x"),
}
MEASURED_CUDA = "13."  # what a GPU was seen to run with
TORCH_REGISTRATION = "trimaran.torch_path.ops"


@dataclass(frozen=True)
class Package:
    """A package; version is None where it is not installed, note says what else matters and why it does not import."""

    name: str
    version: str | None
    note: str = ""


@dataclass(frozen=True)
class Device:
    """A CUDA device; capability is (major, minor)."""

    index: int
    name: str
    capability: tuple[int, int]


@dataclass(frozen=True)
class Registration:
    """Whether a runtime has an op here, and in which sessions or why not."""

    runtime: str
    registered: bool
    reason: str


@dataclass(frozen=True)
class OpInfo:
    """A declared op: `types` maps each type variable to its dtypes; an optional input or output ends in a question
    mark."""

    name: str
    version: int
    types: dict[str, tuple[str, ...]]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    registrations: tuple[Registration, ...]


@dataclass(frozen=True)
class Info:
    """Everything `trimaran info` tells. A field `no_<things>` says why the list of things is empty, and is empty itself
    otherwise."""

    trimaran: str
    python: str
    platform: str
    packages: tuple[Package, ...]
    devices: tuple[Device, ...]
    no_devices: str
    providers: tuple[str, ...]
    no_providers: str
    ops: tuple[OpInfo, ...]
    no_ops: str
    hot_path: str


def collect() -> Info:
    """Look around; takes the seconds that importing torch, onnxruntime and the others takes."""
    devices, no_devices = _devices()
    providers, no_providers = _providers()
    ops, no_ops = _ops(providers, no_providers)
    return Info(
        trimaran=trimaran.__version__,
        python=platform.python_version(),
        platform=platform.platform(),
        packages=tuple(_package(name, distributions) for name, distributions in PACKAGES.items()),
        devices=devices,
        no_devices=no_devices,
        providers=providers,
        no_providers=no_providers,
        ops=ops,
        no_ops=no_ops,
        hot_path=_hot_path(),
    )


def _load(name: str) -> tuple[Any, str]:
    """The module, or None and why it cannot be imported."""
    try:
        return import_module(name), ""
    except ModuleNotFoundError as error:
        return None, f"{error.name} is not installed"
    except Exception as error:  # a broken package may raise anything
        return None, f"{name} cannot be imported: {_one_line(error)}"


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def _package(name: str, distributions: Sequence[str]) -> Package:
    found = {distribution: version for distribution in distributions if (version := _version(distribution))}
    module, reason = _load(name)
    if not found and module is None:
        return Package(name, None)
    notes = [f"from {distribution}" for distribution in found if distribution != name]
    if len(found) > 1:
        notes = [f"{' and '.join(found)} are both installed and overwrite each other: keep one"]
    if module is None:
        notes.append(reason)
    elif name == "torch":
        notes.append(_torch_build(module))
    version = next(iter(found.values()), None) or str(getattr(module, "__version__", "unknown"))
    return Package(name, version, "; ".join(notes))


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except Exception:  # not installed, or damaged metadata
        return None


def _torch_build(torch: ModuleType) -> str:
    cuda = getattr(getattr(torch, "version", None), "cuda", None)
    if not cuda:
        return "built without CUDA"
    return f"built for CUDA {cuda}" + ("" if cuda.startswith(MEASURED_CUDA) else ", which is unmeasured")


def _devices() -> tuple[tuple[Device, ...], str]:
    cuda, reason = _load("trimaran.kernels.cuda")
    if cuda is None:
        return (), reason
    try:
        count = ctypes.c_int()
        cuda.call("cuDeviceGetCount", ctypes.byref(count))
        devices = tuple(_device(cuda, index) for index in range(count.value))
        return devices, "" if devices else "the CUDA driver sees no device"
    except Exception as error:
        return (), str(error)


def _device(cuda: Any, index: int) -> Device:
    handle, name = ctypes.c_int(), ctypes.create_string_buffer(256)
    cuda.call("cuDeviceGet", ctypes.byref(handle), index)
    cuda.call("cuDeviceGetName", name, len(name), handle)
    return Device(index, name.value.decode(), divmod(cuda.device(index).capability, 10))


def _providers() -> tuple[tuple[str, ...], str]:
    onnxruntime, reason = _load("onnxruntime")
    if onnxruntime is None:
        return (), reason
    try:
        return tuple(onnxruntime.get_available_providers()), ""
    except Exception as error:
        return (), _one_line(error)


def _ops(providers: Sequence[str], no_providers: str) -> tuple[tuple[OpInfo, ...], str]:
    catalog, reason = _load("trimaran.kernels.catalog")
    if catalog is None:
        return (), reason
    onnxruntime = _onnxruntime_registration(providers, no_providers)
    return tuple(_op(op, (_torch_registration(op.name), onnxruntime)) for op in catalog.OPS.values()), ""


def _op(op: Any, registrations: tuple[Registration, ...]) -> OpInfo:
    return OpInfo(
        name=op.name,
        version=op.version,
        types={variable: tuple(dtypes) for variable, dtypes in op.types.items()},
        inputs=tuple(port.name + "?" * port.optional for port in op.inputs),
        outputs=tuple(port.name + "?" * port.optional for port in op.outputs),
        registrations=registrations,
    )


def _torch_registration(op: str) -> Registration:
    torch, reason = _load("torch")
    if torch is not None:
        _, reason = _load(TORCH_REGISTRATION)
    if reason:
        return Registration("torch", False, reason)
    if not hasattr(torch.ops.trimaran, op):
        return Registration("torch", False, f"{TORCH_REGISTRATION} does not register it")
    return Registration("torch", True, "CUDA tensors: the kernel; CPU tensors: the reference")


def _onnxruntime_registration(providers: Sequence[str], no_providers: str) -> Registration:
    """ort_session registers the ops only where their kernels can run; elsewhere the function bodies serve."""
    if no_providers:
        return Registration("onnxruntime", False, no_providers)
    session, reason = _load("trimaran.ort_ops.session")
    if session is None:
        return Registration("onnxruntime", False, reason)
    if "CUDAExecutionProvider" in providers:
        return Registration("onnxruntime", True, "in sessions that ask for CUDAExecutionProvider")
    reason = "no CUDAExecutionProvider here: function bodies run, or the kernels' source under trimaran.interpret()"
    return Registration("onnxruntime", False, reason)


def _hot_path() -> str:
    native, reason = _load("trimaran.ort_ops.native")
    return reason if native is None else str(native.native().how)


def render(info: Info) -> RenderableType:
    """The same for a terminal."""
    parts: list[RenderableType] = [_package_table(info), Text()]
    parts += [Text(f"CUDA device {d.index}: {d.name}, compute capability {_dotted(d)}") for d in info.devices]
    if info.no_devices:
        parts.append(Text(f"CUDA devices: none ({info.no_devices})"))
    providers = ", ".join(info.providers) or f"none ({info.no_providers})"
    parts += [Text(f"ONNX Runtime's providers: {providers}"), Text(f"C hot path: {info.hot_path}"), Text()]
    parts.append(_op_table(info) if info.ops else Text(f"Ops: none ({info.no_ops})"))
    for registration in dict.fromkeys(r for op in info.ops for r in op.registrations):
        answer = "yes" if registration.registered else "no"
        parts.append(Text(f"{registration.runtime} {answer}: {registration.reason}"))
    return Group(*parts)


def _dotted(device: Device) -> str:
    return ".".join(map(str, device.capability))


def _package_table(info: Info) -> Table:
    table = Table("package", "version", "", title=f"trimaran {info.trimaran}", title_justify="left")
    table.add_row("python", info.python, Text(info.platform))
    for package in info.packages:
        table.add_row(package.name, package.version or Text("not installed", style="dim"), Text(package.note))
    return table


def _op_table(info: Info) -> Table:
    runtimes = [registration.runtime for registration in info.ops[0].registrations]
    table = Table("op", "version", "dtypes", "inputs -> outputs", *runtimes)
    for op in info.ops:
        dtypes = "\n".join(f"{variable}: {', '.join(types)}" for variable, types in op.types.items())
        signature = f"{', '.join(op.inputs)} -> {', '.join(op.outputs)}"
        registered = ["yes" if registration.registered else "no" for registration in op.registrations]
        table.add_row(op.name, str(op.version), Text(dtypes), Text(signature), *registered)
    return table
