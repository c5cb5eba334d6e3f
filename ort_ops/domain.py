"""Registering operators on an `onnxruntime.SessionOptions`.

`SessionOptions.register_custom_ops_library` loads a shared library and calls its `RegisterCustomOps`; ours (see
`stub_library`) jumps back into this module, which adds the structs of a domain. Nothing here is about Trimaran's own
ops: a `Domain` is made of any `Op`s.
"""

from __future__ import annotations

import ctypes
import threading
import weakref
from collections.abc import Iterable
from ctypes import c_void_p
from dataclasses import dataclass
from typing import Any

from trimaran.kernels.catalog import read
from trimaran.kernels.contract import Op
from trimaran.kernels.plans import PlanCache
from trimaran.ort_ops.abi import FAIL, REGISTER_CUSTOM_OPS, Api, immortalize
from trimaran.ort_ops.custom_op import variants
from trimaran.ort_ops.stub_library import elf, library_path

_LOCK = threading.RLock()
_registered: weakref.WeakKeyDictionary[Any, dict[str, _Request]] = weakref.WeakKeyDictionary()
_request: _Request | None = None  # what `RegisterCustomOps`, which takes no arguments of ours, is called for
_api: Api | None = None


class Domain:
    """Ops under one ONNX domain. ValueError where two have one name.

    plans: the plan cache of each op by name, shared by all nodes of all sessions.
    """

    def __init__(self, name: str, ops: Iterable[Op]) -> None:
        self.name, self.ops = name, tuple(ops)
        self.plans = {op.name: PlanCache(op) for op in self.ops}
        if len(self.plans) < len(self.ops):
            raise ValueError(f"domain {name} has two ops of one name: {', '.join(op.name for op in self.ops)}")
        self._pointers: dict[frozenset[str], int] = {}

    def add(self, op: Op) -> None:
        """One op more, for sessions whose options are registered from now on."""
        if op.name not in self.plans:
            self.ops += (op,)
            self.plans[op.name] = PlanCache(op)
            self._pointers.clear()

    def register(self, options: Any, providers: Iterable[str]) -> tuple[str, ...]:
        """Give sessions made with these SessionOptions the ops' kernels for these execution providers (CPU and CUDA).

        Returns the names of the ops. The same once more is no error. ValueError where the options already have this
        domain otherwise, OSError where the system loads no library that a process wrote itself.
        """
        global _request
        request = _Request(self, frozenset(providers))
        with _LOCK:
            known = _registered.setdefault(options, {})
            if self.name not in known:
                _request = request
                try:
                    with library_path(_stub()) as path:
                        options.register_custom_ops_library(path)
                finally:
                    _request = None
                if request.error is not None:
                    raise request.error
                known[self.name] = request
        before = known[self.name]
        if before.domain is not self or before.providers != request.providers:
            raise ValueError(f"these SessionOptions already have {before}; make new SessionOptions for {request}")
        return tuple(op.name for op in self.ops)

    def pointer(self, api: Api, providers: frozenset[str]) -> int:
        """The OrtCustomOpDomain* with the structs for these providers, made once per process."""
        if providers not in self._pointers:
            pointer = api.pointer(api.CreateCustomOpDomain, self.name.encode())
            for op in self.ops:
                for provider in sorted(providers):
                    for variant in variants(api, self.name, op, provider, self.plans[op.name]):
                        api.check(api.CustomOpDomain_Add(pointer, variant.address))
            self._pointers[providers] = pointer
        return self._pointers[providers]


TRIMARAN = Domain("trimaran", ())
read(TRIMARAN.add)


@dataclass
class _Request:
    domain: Domain
    providers: frozenset[str]
    error: BaseException | None = None

    def __str__(self) -> str:
        return f"the ops of domain {self.domain.name} for {' and '.join(sorted(self.providers))}"


def _register_custom_ops(options: int, base: int) -> int | None:
    """RegisterCustomOps(OrtSessionOptions*, const OrtApiBase*) -> OrtStatus*."""
    global _api
    request = _request
    try:
        if _api is None:
            _api = Api(base)
        if request is None:
            return _api.status(FAIL, "this library belongs to trimaran.ort_ops and cannot be registered by its path")
        _api.check(_api.AddCustomOpDomain(options, request.domain.pointer(_api, request.providers)))
    except BaseException as error:
        if request is not None:
            request.error = error  # raised again where Python can see it
    return None


_ENTRY = REGISTER_CUSTOM_OPS(_register_custom_ops)
immortalize(_ENTRY)


def _stub() -> bytes:
    return elf("RegisterCustomOps", ctypes.cast(_ENTRY, c_void_p).value or 0)
