"""CUDA graphs of an optimized model: one for each kind of call, replayed before Dynamo's guards have been asked.

A call's key (`signature.Call`) finds the graph that answered the last call of its kind. It is launched at once; the
guards, and the Python that Dynamo compiled, run while the GPU works. They end in `Replayed`, which knows by then which
rewritten graph is right and with what arguments. If those are what was replayed, the work is done; if not (a flag, a
hook, a weight is another now), it is thrown away and done again. So no key can be wrong: it can only cost time.

Arguments of the call are copied into buffers of the graph. All other tensors (weights) are read where they lie, so a
change in place is live; a graph keeps them in memory, and goes when they have moved. Outputs are copied out.
"""

from __future__ import annotations

import contextvars
import operator
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.fx import GraphModule
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from trimaran.torch_path import ops
from trimaran.torch_path.graph import base, written
from trimaran.torch_path.recorder import Recorder, recorder_of
from trimaran.torch_path.report import Report
from trimaran.torch_path.results import Results
from trimaran.torch_path.signature import Call, strides_overlap

MAX_GRAPHS = 32
MAX_BYTES = 4 << 30
PATIENCE = 3  # graphs of one kind of call that may be outdated one after the other
_SEEN = 1024
MOVED = "the model, or a tensor that is no argument of the call, is another every time"

current: contextvars.ContextVar[Call | None] = contextvars.ContextVar("call", default=None)


class Unguarded(Exception):
    """The weights are of another kind than those that Dynamo compiled for, and its guards did not tell."""


class Graphs:
    """All CUDA graphs of one model, at most `max_graphs` and about `max_bytes`. They share one memory pool, so they are
    replayed one after the other, from whatever thread or stream."""

    def __init__(
        self, model: torch.nn.Module, report: Report, max_graphs: int = MAX_GRAPHS, max_bytes: int = MAX_BYTES
    ) -> None:
        self.model = weakref.ref(model)
        self.report, self.max_graphs, self.max_bytes = report, max_graphs, max_bytes
        self.lock = threading.RLock()
        self.clear()

    def clear(self) -> None:
        """Drop all graphs and their memory."""
        with self.lock:
            self.recordings: OrderedDict[Any, Recording] = OrderedDict()
            self.answers: dict[Any, Recording] = {}
            self.failures: OrderedDict[Any, int] = OrderedDict()  # in a row: graphs that were outdated
            self.recorders: dict[torch.device, Recorder] = {}
            self._tell()

    def guess(self, call: Call) -> None:
        """Replay what answered the last call of this kind."""
        recording = self.answers.get(call.key)
        if recording is None or not recording.recorder.ready():
            return
        with self.lock:
            if self.answers.get(call.key) is recording:
                call.guess = (recording, recording.replay(call.tensors))

    def settle(self, call: Call) -> None:
        """A guess that nobody took was wrong. Its graph stays while its weights are the model's: it was another graph's
        turn, as where a flag goes back and forth, or where several fit these shapes."""
        if call.guess is not None:
            recording, call.guess = call.guess[0], None
            if self._outdated([recording]):
                with self.lock:
                    self._forget(recording)

    def sweep(self) -> None:
        """Drop graphs that keep weights in memory which the model no longer has."""
        with self.lock:
            for recording in self._outdated(list(self.recordings.values())):
                self._drop(recording)
            self._tell()

    def _outdated(self, recordings: Sequence[Recording]) -> list[Recording]:
        model = self.model()
        present = {p.data_ptr() for p in model.parameters()} if model is not None else set()
        return [recording for recording in recordings if not present.issuperset(recording.parameters)]

    def answer(self, replayed: Replayed, call: Call, args: tuple[Any, ...]) -> Any:
        """The outputs of a rewritten graph for these arguments: from the guess, by a replay, or without a graph."""
        name, first, call.ran = (replayed, call.key), not call.ran, True
        if call.guess is not None:
            recording, made = call.guess
            if recording.name == name and recording.holds(args, call.tensors):
                call.guess = None
                self._used(recording)
                return recording.results.of(args, made)
            self.settle(call)
        if not replayed.guarded(args) and first:
            call.ran = False
            raise Unguarded
        if (reason := self._obstacle(replayed, call, args)) is not None:
            if reason:
                self.report.without_graph[reason] += 1
            return replayed.run(*args)
        recorder, known = self._recorder(_device(args)), name in self.failures
        with self.lock:
            recording = self._found(recorder, name, call, args)
            if recording is not None:
                if first:
                    self.answers[call.key] = recording
                return recording.results.of(args, recording.replay(call.tensors))
        if not known:
            recorder.prepare(replayed.run, args)
        return replayed.run(*args)

    def _obstacle(self, replayed: Replayed, call: Call, args: tuple[Any, ...]) -> str | None:
        """Why no graph may answer; empty where that is no news."""
        devices = {a.device for a in args if isinstance(a, torch.Tensor)}
        if not self.max_graphs or all(recorder_of(device) is None for device in devices):
            return ""
        if len(devices) > 1:
            return f"tensors are on {' and '.join(sorted(map(str, devices)))}"
        if call.opaque:
            return f"an argument is a {call.opaque}, neither a tensor nor a plain value"
        if any(strides_overlap(t) for t in call.tensors):
            return "elements of an argument share memory"
        if self.failures.get((replayed, call.key), 0) >= PATIENCE:
            return MOVED
        return replayed.obstacle

    def _found(
        self, recorder: Recorder, name: tuple[Replayed, Any], call: Call, args: tuple[Any, ...]
    ) -> Recording | None:
        """A graph for these arguments, recorded where this kind of call comes for the second time."""
        recording = self.recordings.get(name)
        if recording is not None and not recording.holds(args, call.tensors):
            self._forget(recording)
            recording = None
            if self.failures[name] >= PATIENCE:
                return None
        if recording is None:
            if not self._known(name):
                return None
            recording = self._record(recorder, name, call, args)
        if recording is not None:
            self.recordings[name] = recording
            self.recordings.move_to_end(name)
            self._trim()
        return recording

    def _known(self, name: tuple[Replayed, Any]) -> bool:
        """Whether a call of this kind came to this graph before. One that came is remembered."""
        known = name in self.failures
        self.failures.setdefault(name, 0)
        self.failures.move_to_end(name)
        if len(self.failures) > _SEEN:
            self.failures.popitem(last=False)
        return known

    def _record(
        self, recorder: Recorder, name: tuple[Replayed, Any], call: Call, args: tuple[Any, ...]
    ) -> Recording | None:
        try:
            return Recording(recorder, name, call, args)
        except Exception as error:
            text = next(iter(str(error).strip().splitlines()), "")
            name[0].obstacle = f"it could not be captured: {type(error).__name__}: {text}"
            self.report.without_graph[name[0].obstacle] += 1
            return None

    def _recorder(self, device: torch.device) -> Recorder:
        with self.lock:
            if device not in self.recorders:
                made = recorder_of(device)
                assert made is not None
                self.recorders[device] = made()
            return self.recorders[device]

    def _used(self, recording: Recording) -> None:
        with self.lock:
            self.failures[recording.name] = 0
            if recording.name in self.recordings:
                self.recordings.move_to_end(recording.name)

    def _trim(self) -> None:
        """Keep to the limits; called with the newest graph in place."""
        newest = next(reversed(self.recordings))
        while len(self.recordings) > self.max_graphs:
            self._drop(next(iter(self.recordings.values())))
        if len(self.recordings) > 1 and sum(r.bytes for r in self.recorders.values()) > self.max_bytes:
            recording = self.recordings[newest]
            self.clear()  # memory comes back with the pool: this one stays alone with the old, which goes with it
            self.recordings[newest] = recording
        self._tell()

    def _forget(self, recording: Recording) -> None:
        self.failures[recording.name] = self.failures.get(recording.name, 0) + 1
        self._drop(recording)
        self._tell()

    def _drop(self, recording: Recording) -> None:
        self.recordings.pop(recording.name, None)
        key = recording.name[1]
        if self.answers.get(key) is recording:
            del self.answers[key]

    def _tell(self) -> None:
        self.report.cuda_graphs = len(self.recordings)
        self.report.graph_bytes = sum(recorder.bytes for recorder in self.recorders.values())


class Replayed:
    """A rewritten graph as Dynamo calls it: `run`, answered by a replay where there is one.

    complete: what makes of Dynamo's arguments those of `run`. obstacle: why it cannot be recorded, None where nothing
    is known against it."""

    def __init__(
        self,
        graphs: Graphs,
        run: Callable[..., Any],
        complete: Callable[[tuple[Any, ...]], tuple[Any, ...]],
        obstacle: str | None,
    ) -> None:
        self.graphs = weakref.ref(graphs)  # the model owns them; Dynamo may keep this for longer
        self.run, self.complete, self.obstacle = run, complete, obstacle
        self.forms: list[Any] | None = None

    def __call__(self, *args: Any) -> Any:
        call, graphs, args = current.get(), self.graphs(), self.complete(args)
        return self.run(*args) if call is None or graphs is None else graphs.answer(self, call, args)

    def guarded(self, args: tuple[Any, ...]) -> bool:
        """Whether the parameters are of the kind of the first call's, and all tensors of its dtypes and devices. Guards
        that look at dictionaries alone do not see what `model.half()` does."""
        tensors = [a for a in args if isinstance(a, torch.Tensor)]
        forms: list[Any] = [(t.dtype, t.device) for t in tensors]
        forms += [t.shape for t in tensors if type(t) is torch.nn.Parameter]
        if self.forms is None:
            self.forms = forms
        return forms == self.forms


class Recording:
    """One captured graph: where it reads and writes, and for which arguments it is right."""

    def __init__(self, recorder: Recorder, name: tuple[Replayed, Any], call: Call, args: tuple[Any, ...]) -> None:
        self.recorder, self.name = recorder, name
        given = {id(tensor): index for index, tensor in enumerate(call.tensors)}
        tensors = [place for place, arg in enumerate(args) if isinstance(arg, torch.Tensor)]
        self.copied = [(place, given[id(args[place])]) for place in tensors if id(args[place]) in given]
        self.held = [place for place in tensors if id(args[place]) not in given]
        self.weights = [args[place].detach() for place in self.held]  # their memory stays while it may be read
        self.parameters = [args[p].data_ptr() for p in self.held if isinstance(args[p], torch.nn.Parameter)]
        plain = [place for place in self.held if type(args[place]) is not torch.nn.Parameter]
        others = [place for place in range(len(args)) if not isinstance(args[place], torch.Tensor)]
        self._held, self._plain, self._others = map(picker, (self.held, plain, others))
        self.facts = self._facts(args)
        inputs = list(args)
        listener = ops.on_decline.set(None)
        try:
            with torch.inference_mode(False), torch.no_grad():
                for place, _ in self.copied:
                    inputs[place] = buffer_like(args[place])
                self.buffers = [dense(inputs[place]) for place, _ in self.copied]
                self._fill(call.tensors)
                self.launch, made = recorder.record(name[0].run, inputs)
        finally:
            ops.on_decline.reset(listener)
        self.results = Results(made, inputs, [place for place, _ in self.copied])

    def _facts(self, args: Sequence[Any]) -> tuple[Any, ...]:
        """Where the tensors lie that are read in place, the form of those that Dynamo may see as dynamic, and what is
        no tensor. Of which kind each argument is Dynamo's guards have said."""
        forms = [(t.shape, t.stride()) for t in self._plain(args)]
        return (*map(torch.Tensor.data_ptr, self._held(args)), *forms, *self._others(args))

    def holds(self, args: tuple[Any, ...], tensors: Sequence[torch.Tensor]) -> bool:
        """Whether a replay with these tensors answers a call with these arguments."""
        return all(args[place] is tensors[index] for place, index in self.copied) and self._facts(args) == self.facts

    def replay(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Launch the graph on copies of these tensors; fresh copies of what it computes. Under the lock."""
        self.recorder.begin()
        self._fill(tensors)
        self.launch()
        copies = self.results.copies()
        self.recorder.end()
        return copies

    def _fill(self, tensors: Sequence[torch.Tensor]) -> None:
        if self.buffers:
            torch._foreach_copy_(self.buffers, [dense(tensors[index]) for _, index in self.copied])


def picker(places: Sequence[int]) -> Callable[[Sequence[Any]], Sequence[Any]]:
    """What takes the items at these places: with hundreds of weights, comprehensions were half of a call's check."""
    if len(places) < 2:
        return lambda items: [items[place] for place in places]
    return operator.itemgetter(*places)


def _device(args: Sequence[Any]) -> torch.device:
    return next(arg.device for arg in args if isinstance(arg, torch.Tensor))


def buffer_like(tensor: torch.Tensor) -> torch.Tensor:
    """Memory of the tensor's shape and strides."""
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)


def dense(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor with each expanded axis once, so that it can be written."""
    if 0 not in tensor.stride():
        return tensor
    shape = [size if stride else min(size, 1) for size, stride in zip(tensor.shape, tensor.stride(), strict=True)]
    return tensor.as_strided(shape, tensor.stride())


def obstacle(module: GraphModule) -> str | None:
    """Why a rewritten graph cannot be replayed: it writes into what it is given, or draws random numbers."""
    for node in module.graph.nodes:
        if any(base(tensor).op in ("placeholder", "get_attr") for tensor in written(node)):
            return f"the model writes into its inputs or its state ({node.target})"
        tags = getattr(node.target, "tags", ())
        if torch.Tag.nondeterministic_seeded in tags:
            return f"the model draws random numbers ({node.target})"
        if free_unbacked_symbols(node.meta.get("val")):
            return f"the GPU is waited for ({node.target})"
    return None
