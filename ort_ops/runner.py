"""Running a session on tensors of torch, CuPy or NumPy."""

from __future__ import annotations

import itertools
import threading
import weakref
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from trimaran.kernels.driver import Driver, driver
from trimaran.ort_ops.abi import CUDA, DTYPE, ELEMENT_TYPE
from trimaran.ort_ops.dlpack import Memory, library_of, memory_of, queue_of, to_library

if TYPE_CHECKING:
    import onnxruntime

ONNX_TYPE = {  # as a session names them
    "tensor(float)": "float32",
    "tensor(double)": "float64",
    **{f"tensor({name})": name for name in ELEMENT_TYPE if name not in ("float32", "float64")},
}
_GRAPH_IDS = itertools.count(1)  # no two runners of one session may replay each other's
_LOCKS: weakref.WeakKeyDictionary[Any, threading.Lock] = weakref.WeakKeyDictionary()  # of sessions
NO_GRAPH = "-1"  # the gpu_graph_id of a run that is neither captured nor replayed


class Runner:
    """Calls a session with tensors of torch, CuPy or NumPy and gets such tensors back.

        run = trimaran.Runner(trimaran.ort_session("model.onnx"))
        hidden = run({"input_ids": ids})["last_hidden_state"]  # ids of torch: so is hidden, on the same device

    Inputs are read where they lie and outputs stay where ONNX Runtime wrote them; nothing is copied, but an input that
    is not contiguous, or what lies on the host while the session works on a GPU. What is queued on the current streams
    of the inputs' libraries is waited for, and outputs are complete when the call returns. They are of the library that
    the first input is of, and lie where it does.

    With `ort_session(..., cuda_graph=True)` each combination of input shapes gets a CUDA graph of its own, which is
    captured at its first call and replayed later; after `max_graphs` of them further shapes run without. Inputs are
    then copied to where the graph reads, and outputs from where it writes, on the device. With `copy_outputs=False`
    outputs on the device are the graph's own memory instead, which the next call with the same shapes overwrites.
    Calls take turns, as ONNX Runtime needs it there; it captures once more for each thread that calls. Without graphs
    a runner may be used by many threads at once.
    """

    def __init__(self, session: onnxruntime.InferenceSession, max_graphs: int = 16, copy_outputs: bool = True) -> None:
        """ValueError for a session with inputs or outputs that are no tensors of numbers."""
        self.session, self.max_graphs, self.copy_outputs = session, max_graphs, copy_outputs
        self.inputs = {value.name: _dtype(value) for value in session.get_inputs()}
        self.outputs = {value.name: _dtype(value) for value in session.get_outputs()}
        options = session.get_provider_options().get(CUDA) if CUDA in session.get_providers() else None
        self._driver: Driver | None = None if options is None else driver(int(options.get("device_id", 0)))
        self._index = self._driver.device.index if self._driver else 0
        self._captures = options is not None and options.get("enable_cuda_graph") == "1"
        stream = int((options or {}).get("user_compute_stream") or 0)
        self._works_on_stream = stream != 0
        self._stream = stream or (self._driver.stream if self._driver else 0)
        self._graphs: dict[Any, _Graph] = {}
        self._lock = _LOCKS.setdefault(session, threading.Lock())

    @property
    def graphs(self) -> int:
        """How many graphs were captured."""
        return len(self._graphs)

    def __call__(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Run the session; all its outputs by name.

        ValueError or TypeError, naming the input, for one that is missing, unknown, no tensor, of another dtype than
        the model's or on another device than the session's.
        """
        memories = self._memories(inputs)
        first = next(iter(inputs), None)
        library = library_of(inputs[first]) if first is not None else _numpy()
        device = memories[first].device if first is not None else "cpu"
        if self._captures:
            with self._lock:
                return self._captured(memories, device, library)
        if any(memory.device == "cuda" for memory in memories.values()):
            self._order()
        return _tensors(self._plain(memories, device), library)

    def _memories(self, inputs: Mapping[str, Any]) -> dict[str, Memory]:
        """Where the inputs lie, checked; the stream waits for what makes them."""
        if inputs.keys() != self.inputs.keys():
            missing, unknown = sorted(self.inputs.keys() - inputs.keys()), sorted(inputs.keys() - self.inputs.keys())
            raise ValueError(f"inputs: missing {missing}, unknown {unknown}, expected {list(self.inputs)}")
        found: dict[str, Memory] = {}
        streams: set[int] = set()
        for name, tensor in inputs.items():
            try:
                memory = found[name] = memory_of(tensor)
            except TypeError as error:
                raise TypeError(f"{name} {error}") from error
            if memory.dtype != self.inputs[name]:
                raise TypeError(f"{name} is {memory.dtype}, expected {self.inputs[name]}")
            if memory.device == "cuda":
                if self._driver is None or memory.device_index != self._index:
                    place = "the CPU" if self._driver is None else f"CUDA device {self._index}"
                    raise ValueError(
                        f"{name} is on CUDA device {memory.device_index}, but the session works on {place}"
                    )
                streams.add(self._queue(name, tensor))
        for stream in streams:
            assert self._driver is not None
            self._driver.wait(self._stream, stream)
        return found

    def _queue(self, name: str, tensor: Any) -> int:
        try:
            return queue_of(tensor)
        except TypeError as error:
            raise TypeError(f"{name} {error}") from error

    def _plain(self, memories: Mapping[str, Memory], device: str) -> dict[str, Memory]:
        """One run, its outputs allocated by ONNX Runtime."""
        binding = self._binding(memories)
        for name in self.outputs:
            binding.bind_output(name, device, self._index if device == "cuda" else 0)
        self.session.run_with_iobinding(binding, self._run_options(NO_GRAPH) if self._captures else None)
        return self._results(binding.get_outputs())

    def _binding(self, memories: Mapping[str, Memory]) -> Any:
        binding = self.session.io_binding()
        for name, memory in memories.items():
            element, shape = ELEMENT_TYPE[memory.dtype], list(memory.shape)
            binding.bind_input(name, memory.device, memory.device_index, element, shape, memory.address or _SOMEWHERE)
        return binding

    def _results(self, values: Sequence[Any]) -> dict[str, Memory]:
        found = {}
        for name, value in zip(self.outputs, values, strict=True):
            device = "cuda" if value.device_name().lower() == "cuda" else "cpu"
            dtype, shape = DTYPE[value.element_type()], tuple(value.shape())
            index = self._index if device == "cuda" else 0
            found[name] = Memory(value.data_ptr(), dtype, shape, device, index, value)
        return found

    def _run_options(self, graph: str) -> Any:
        import onnxruntime

        options = onnxruntime.RunOptions()
        options.add_run_config_entry("gpu_graph_id", graph)
        return options

    def _captured(self, memories: Mapping[str, Memory], device: str, library: Any) -> dict[str, Any]:
        """One run by the graph of these shapes, or without one where there are too many."""
        assert self._driver is not None
        shapes = tuple(memory.shape for memory in memories.values())
        key = (tuple(memories), shapes)
        graph = self._graphs.get(key)
        if graph is None:
            if len(self._graphs) >= self.max_graphs:
                self._order()
                return _tensors(self._plain(memories, device), library)
            graph = _Graph(self, memories)
            self._graphs[key] = graph
        self._copy(memories, graph.inputs)
        self._order()
        self.session.run_with_iobinding(graph.binding, graph.options)
        if device == "cuda" and not self.copy_outputs:
            self._driver.synchronize(self._stream)
            return graph.tensors(library)
        made = {name: self._allocated(memory, device) for name, memory in graph.outputs.items()}
        self._copy(graph.outputs, made)
        self._driver.synchronize(self._stream)
        return _tensors(made, library)

    def _order(self) -> None:
        """Let the session's work come after what `_stream` has queued: it is the session's own, or is waited for."""
        if self._driver and not self._works_on_stream:
            self._driver.synchronize(self._stream)

    def _copy(self, sources: Mapping[str, Memory], targets: Mapping[str, Memory]) -> None:
        assert self._driver is not None
        copies = ((targets[name].address, source.address, source.bytes) for name, source in sources.items())
        self._driver.copy(copies, self._stream)

    def _allocated(self, like: Memory, device: str) -> Memory:
        """New memory of the dtype and shape."""
        import onnxruntime

        index = self._index if device == "cuda" else 0
        element, shape = ELEMENT_TYPE[like.dtype], list(like.shape)
        value = onnxruntime.OrtValue.ortvalue_from_shape_and_type(shape, element, device, index)
        return Memory(value.data_ptr(), like.dtype, like.shape, device, index, value)


class _Graph:
    """The memory that one CUDA graph reads and writes, and what asks for its replay; the first run captures it."""

    def __init__(self, runner: Runner, memories: Mapping[str, Memory]) -> None:
        self.inputs = {name: runner._allocated(memory, "cuda") for name, memory in memories.items()}
        runner._copy(memories, self.inputs)
        runner._order()
        # without a graph: the shapes of the outputs, and all that is made or loaded once
        self.outputs = runner._plain(self.inputs, "cuda")
        self.binding = runner._binding(self.inputs)
        for name, memory in self.outputs.items():
            self.binding.bind_ortvalue_output(name, memory.owner)
        self.options = runner._run_options(str(next(_GRAPH_IDS)))
        self._tensors: dict[str, dict[str, Any]] = {}

    def tensors(self, library: Any) -> dict[str, Any]:
        """What the graph writes, as tensors of a library that are made once."""
        if library.__name__ not in self._tensors:
            self._tensors[library.__name__] = _tensors(self.outputs, library)
        return dict(self._tensors[library.__name__])


def _tensors(memories: Mapping[str, Memory], library: Any) -> dict[str, Any]:
    return {name: to_library(library, memory) for name, memory in memories.items()}


_SOMEWHERE = 256  # an address for tensors of no elements, which may have none


def _dtype(value: Any) -> str:
    if value.type not in ONNX_TYPE:
        raise ValueError(f"{value.name} is {value.type}, expected one of {', '.join(ONNX_TYPE)}")
    return ONNX_TYPE[value.type]


def _numpy() -> Any:
    import numpy

    return numpy
