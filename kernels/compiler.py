"""Compiling a planned launch to a cubin: one binary for every runtime, with no GPU, torch or nvcc needed.

Triton would specialize a launch by the values of its arguments; here the plan has already said what is divisible by 16,
and everything else stays a run-time parameter. Binaries are kept in a folder of the user's own, named by all that they
depend on, so a new process compiles nothing that an earlier one did.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import threading
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource
from triton.experimental.gluon.language import NVMMASharedLayout
from triton.language import str_to_ty

from trimaran.kernels.folders import cache_folder, own_folder, write_whole
from trimaran.kernels.plans import Param, PlannedLaunch

FORMAT = 2  # of a kept file: a line of JSON (Binary without its cubin, and the cubin's digest), then the cubin
MAX_THREADS = 16
_LOCK = threading.Lock()
_BINARIES: dict[Any, Future[Binary]] = {}


@dataclass(frozen=True, eq=False)
class Binary:
    """A compiled kernel. shared: bytes of dynamic shared memory; global_scratch: bytes per program that the compiler
    wants for itself (tensor descriptors made on the device); the kernel's parameters are the launch's, then two
    pointers: that global scratch, and one for profiling (null). boxes: for each descriptor among the parameters, its
    CUtensorMapSwizzle and what one copy fetches: a block, or a part of it where rows are long."""

    name: str
    cubin: bytes
    shared: int
    threads: int
    num_ctas: int
    global_scratch: int
    launch_pdl: bool
    launch_cooperative_grid: bool
    boxes: tuple[tuple[int, tuple[int, ...]], ...] = ()


def compile_launch(launch: PlannedLaunch, capability: int) -> Binary:
    """The binary of this launch's variant for one architecture (90 for sm_90), made once per process: read from disk,
    or compiled and kept there. From any thread."""
    key = (launch.variant, capability)
    with _LOCK:
        found = _BINARIES.get(key)
        if mine := found is None:
            found = _BINARIES[key] = Future()
    if mine:
        try:
            found.set_result(_kept(launch, capability))
        except BaseException as error:
            with _LOCK:
                del _BINARIES[key]
            found.set_exception(error)
    return found.result()


def compile_all(launches: Iterable[PlannedLaunch], capability: int) -> int:
    """Make the binaries of these launches side by side: how many were not there in this process. What cannot be
    compiled is left to `compile_launch`, which says why."""
    missing = {launch.variant: launch for launch in launches if (launch.variant, capability) not in _BINARIES}
    if missing:
        with ThreadPoolExecutor(min(len(missing), os.cpu_count() or 1, MAX_THREADS)) as pool:
            for made in [pool.submit(compile_launch, launch, capability) for launch in missing.values()]:
                made.exception()
    return len(missing)


def _kept(launch: PlannedLaunch, capability: int) -> Binary:
    """From disk, or compiled now and put there. Without a folder to keep it in it is compiled for this process."""
    try:
        path = own_folder(cache_folder() / "kernels") / file_name(launch, capability)
    except OSError:
        return _compile(launch, capability)
    found = _read(path)
    if found is None:
        found = _compile(launch, capability)
        _write(path, found)
    return found


def file_name(launch: PlannedLaunch, capability: int) -> str:
    """The name of a kept binary: a digest of the kernel's source and that of all it calls, the variant, the options,
    the architecture, Triton's version and those of its settings that change what it makes."""
    _, signature, constexprs, options = launch.variant
    values = [(name, getattr(value, "cache_key", None) or repr(value)) for name, value in constexprs]
    facts = (FORMAT, _triton(), capability, launch.kernel.cache_key, signature, values, options)
    digest = hashlib.sha256(repr(facts).encode()).hexdigest()
    return f"{launch.kernel.__name__}-sm{capability}-{digest[:32]}"


@functools.cache
def _triton() -> str:
    from triton._C.libtriton import get_cache_invalidating_env_vars

    return f"{triton.__version__} {sorted(get_cache_invalidating_env_vars().items())}"


def _read(path: Path) -> Binary | None:
    """None for a file that is not there, or is not what was written."""
    try:
        head, cubin = path.read_bytes().split(b"\n", 1)
        facts = json.loads(head)
        if facts.pop("digest") != hashlib.sha256(cubin).hexdigest():
            return None
        facts["boxes"] = tuple((swizzle, tuple(box)) for swizzle, box in facts["boxes"])
        return Binary(cubin=cubin, **facts)
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _write(path: Path, binary: Binary) -> None:
    facts = asdict(binary)
    cubin = facts.pop("cubin")
    facts["digest"] = hashlib.sha256(cubin).hexdigest()
    try:
        write_whole(path, json.dumps(facts).encode() + b"\n" + cubin)
    except OSError:  # a full disk: it is compiled again another time
        return


def _compile(launch: PlannedLaunch, capability: int) -> Binary:
    names = launch.kernel.arg_names
    gluon = launch.kernel.is_gluon()
    types = {param.name: _gluon_type(param) if gluon else param.type for param in launch.params}
    language = GluonASTSource if gluon else ASTSource
    source = language(
        launch.kernel,
        {name: types.get(name, "constexpr") for name in names},
        dict(launch.constexprs),
        {(names.index(param.name),): [["tt.divisibility", 16]] for param in launch.params if param.divisible},
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=dict(launch.options))
    facts = compiled.metadata
    if getattr(facts, "profile_scratch_size", 0):
        raise RuntimeError(f"{facts.name} was compiled for profiling, which this launcher does not serve")
    return Binary(
        name=facts.name,
        cubin=compiled.asm["cubin"],
        shared=facts.shared,
        threads=32 * facts.num_warps,
        num_ctas=facts.num_ctas,
        global_scratch=facts.global_scratch_size,
        launch_pdl=facts.launch_pdl,
        launch_cooperative_grid=facts.launch_cooperative_grid,
        boxes=tuple((meta["swizzle"], tuple(meta["block_size"])) for meta in facts.tensordesc_meta or ()),
    )


def _gluon_type(param: Param) -> str:
    """A parameter's type in Gluon, where a descriptor also says how blocks lie in shared memory: as is usual there."""
    if not param.rank:
        return param.type
    element, block = param.type.removeprefix("tensordesc<").removesuffix("]>").split("[")
    sizes = [int(size) for size in block.split(",")]
    layout = NVMMASharedLayout.get_default_for(sizes, str_to_ty(element, None))
    return f"tensordesc<{element}[{block}],{layout!r}>"
