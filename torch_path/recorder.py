"""Capturing and replaying on one CUDA device: the few calls of torch.cuda that `graphs` rests on."""

from __future__ import annotations

import contextlib
import gc
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch

from trimaran.torch_path import ops

_CAPTURING = threading.Lock()  # torch's random generators can be in one capture at a time


class Recorder(Protocol):
    bytes: int

    def record(self, run: Callable[..., Any], inputs: Sequence[Any]) -> tuple[Callable[[], None], Any]:
        """Capture one call: what replays it, and what it returned, which each replay writes again."""

    def prepare(self, run: Callable[..., Any], inputs: Sequence[Any]) -> None:
        """Make what a call needs once, before the first."""

    def begin(self) -> None:
        """What is queued from now on comes after all that was queued before `end`, on whatever stream."""

    def end(self) -> None: ...

    def ready(self) -> bool:
        """Whether a graph may be replayed now."""


def recorder_of(device: torch.device) -> Callable[[], Recorder] | None:
    """What makes a recorder for the device; None for one without graphs, and while the user captures, whose graph then
    has all our kernels."""
    if device.type != "cuda" or torch._C._cuda_isCurrentStreamCapturing():
        return None
    return lambda: CudaRecorder(device)


class CudaRecorder:
    """bytes: by how much captures have made their memory pool grow."""

    def __init__(self, device: torch.device) -> None:
        self.device = torch.device("cuda", device.index or 0)
        self.bytes = 0
        with torch.cuda.device(self.device):
            self.pool = torch.cuda.graph_pool_handle()
            self.stream = torch.cuda.Stream(self.device)
            self.event = torch.cuda.Event()
        self.last: int | None = None
        with self._alone(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it is empty
            self.anchor, _ = self._capture(lambda: None, [])  # a pool lives as long as one graph of it does

    def ready(self) -> bool:
        return not torch._C._cuda_isCurrentStreamCapturing()

    def prepare(self, run: Callable[..., Any], inputs: Sequence[Any]) -> None:
        ops.compile_ahead(run, inputs, self.device)

    def begin(self) -> None:
        stream: int = torch._C._cuda_getCurrentRawStream(self.device.index)
        if self.last is not None and stream != self.last:
            torch.cuda.current_stream(self.device).wait_event(self.event)
        self.last = stream

    def end(self) -> None:
        self.event.record(torch.cuda.current_stream(self.device))

    def record(self, run: Callable[..., Any], inputs: Sequence[Any]) -> tuple[Callable[[], None], Any]:
        caller = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(caller)
        if self.last is not None:
            self.stream.wait_event(self.event)
        try:
            with self._alone():
                run(*inputs)  # kernels are loaded and libraries get their workspaces, outside the pool
                before = torch.cuda.memory_reserved(self.device)
                graph, outputs = self._capture(run, inputs)
                self.bytes += max(0, torch.cuda.memory_reserved(self.device) - before)
        finally:
            caller.wait_stream(self.stream)
        return graph.replay, outputs

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """On the stream of captures, without garbage collection, which may call what ends a capture."""
        with _CAPTURING, torch.cuda.device(self.device), torch.cuda.stream(self.stream):
            collects = gc.isenabled()
            gc.disable()
            try:
                yield
            finally:
                if collects:
                    gc.enable()

    def _capture(self, run: Callable[..., Any], inputs: Sequence[Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin(pool=self.pool, capture_error_mode="thread_local")
        try:
            outputs = run(*inputs)
        except BaseException:
            with contextlib.suppress(RuntimeError):
                graph.capture_end()
            raise
        graph.capture_end()
        return graph, outputs
