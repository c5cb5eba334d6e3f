"""Compiling a planned launch to a cubin: one binary for every runtime, with no GPU, torch or nvcc needed.

Triton would specialize a launch by the values of its arguments; here the plan has already said what is divisible by 16,
and everything else stays a run-time parameter.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource

from trimaran.kernels.plans import PlannedLaunch

_LOCK = threading.Lock()
_BINARIES: dict[Any, Binary] = {}


@dataclass(frozen=True, eq=False)
class Binary:
    """A compiled kernel. shared: bytes of dynamic shared memory; global_scratch: bytes per program that the compiler
    wants for itself (tensor descriptors made on the device); the kernel's parameters are the launch's, then two
    pointers: that global scratch, and one for profiling (null)."""

    name: str
    cubin: bytes
    shared: int
    threads: int
    num_ctas: int
    global_scratch: int
    launch_pdl: bool
    launch_cooperative_grid: bool


def compile_launch(launch: PlannedLaunch, capability: int) -> Binary:
    """The binary of this launch's variant for one architecture (90 for sm_90), compiled once per process and kept in
    Triton's cache on disk."""
    key = (launch.variant, capability)
    with _LOCK:
        if key not in _BINARIES:
            _BINARIES[key] = _compile(launch, capability)
        return _BINARIES[key]


def _compile(launch: PlannedLaunch, capability: int) -> Binary:
    names = launch.kernel.arg_names
    types = {param.name: param.type for param in launch.params}
    language = GluonASTSource if launch.kernel.is_gluon() else ASTSource
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
    )
