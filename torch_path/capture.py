"""From a model's call to graphs in the one dialect that rules are written in: pre-dispatch ATen."""

from __future__ import annotations

import contextlib
import contextvars
import threading
from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
from torch._dynamo.callback import callback_handler
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import GraphModule, Interpreter
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.traceback import preserve_node_meta

# Numbers that a module holds (eps, a scale) are constants for rules, and hooks that are added later are seen.
_TRACING = {"specialize_float": True, "skip_nnmodule_hook_guards": False, "use_recursive_dict_tags_for_guards": True}
_ours: contextvars.ContextVar[bool] = contextvars.ContextVar("ours", default=False)
_before: dict[str, Any] = {}
_REFUSED = "using FX to symbolically trace a dynamo-optimized function"


def compiled(function: Callable[..., Any], backend: Callable[..., Any]) -> Callable[..., Any]:
    """`function` through Dynamo. It gets code of its own, since Dynamo counts recompilations by code, and all models
    share `nn.Module._call_impl`."""

    def call(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    own = FunctionType(call.__code__.replace(), call.__globals__, closure=call.__closure__)
    through: Any = torch.compile(own, backend=backend)

    def run(*args: Any, **kwargs: Any) -> Any:
        token = _ours.set(True)
        if _configure not in callback_handler.start_callbacks:  # not yet, or no longer: torch._dynamo.reset() forgets
            callback_handler.register_start_callback(_configure)
            callback_handler.register_end_callback(_put_back)
        try:
            with _written_out:
                return _between_traces(through, args, kwargs)
        finally:
            _ours.reset(token)

    return run


def _between_traces(through: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call what is compiled. While a thread traces, torch refuses that to all others, before anything is run: then it
    is called again once the trace has ended."""
    while True:
        traces = _tracing.count
        try:
            return through(*args, **kwargs)
        except RuntimeError as error:
            if _REFUSED not in str(error) or (traces == _tracing.count and not _tracing.elsewhere()):
                raise
        with _tracing:
            pass


class _Tracing:
    """Held by the thread that retraces a graph. count: how many traces there were."""

    def __init__(self) -> None:
        self.lock, self.owner, self.count = threading.RLock(), 0, 0

    def __enter__(self) -> None:
        self.lock.acquire()
        self.owner = threading.get_ident()

    def __exit__(self, *_: object) -> None:
        self.owner = 0
        self.count += 1
        self.lock.release()

    def elsewhere(self) -> bool:
        return self.owner not in (0, threading.get_ident())


class _WrittenOut:
    """Without the opaque nodes that torch has for nn.TransformerEncoderLayer and nn.MultiheadAttention, for all threads
    from the first that enters until the last has left: the setting is one."""

    def __init__(self) -> None:
        self.lock, self.inside, self.before = threading.Lock(), 0, True

    def __enter__(self) -> None:
        with self.lock:
            if not self.inside:
                self.before = torch.backends.mha.get_fastpath_enabled()
                torch.backends.mha.set_fastpath_enabled(False)
            self.inside += 1

    def __exit__(self, *_: object) -> None:
        with self.lock:
            self.inside -= 1
            if not self.inside:
                torch.backends.mha.set_fastpath_enabled(self.before)


_tracing, _written_out = _Tracing(), _WrittenOut()


def _configure(_: Any) -> None:
    if _ours.get() and not _before:
        _before.update({name: getattr(torch._dynamo.config, name) for name in _TRACING})
        for name, setting in _TRACING.items():
            setattr(torch._dynamo.config, name, setting)


def _put_back(_: Any) -> None:
    while _before:
        setattr(torch._dynamo.config, *_before.popitem())


def retrace(module: GraphModule) -> GraphModule:
    """Retrace a graph that Dynamo captured, on the fake values it was captured with.

    Those carry the symbols of dynamic sizes; tracing on the example inputs that a backend is handed would bake in
    today's sizes without a guard.
    """
    examples = [node.meta["example_value"] for node in module.graph.nodes if node.op == "placeholder"]
    fakes = [e for e in examples if isinstance(e, FakeTensor)]
    mode: Any = fakes[0].fake_mode if fakes else contextlib.nullcontext()
    with _tracing, preserve_node_meta(), mode:
        return make_fx(Interpreter(module).run, pre_dispatch=True)(*examples)
