"""Running a session on tensors of torch, CuPy or NumPy."""

from __future__ import annotations

import itertools
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from trimaran.kernels.driver import Driver, driver
from trimaran.ort_ops.abi import CUDA, DTYPE, ELEMENT_TYPE
from trimaran.ort_ops.calls import Call, Reader
from trimaran.ort_ops.dlpack import Memory, Spec
from trimaran.ort_ops.tensors import Library, allocated

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
    Calls take turns, as ONNX Runtime needs it there; it captures once more for each thread that calls, and meanwhile
    CUDA refuses to give memory to other threads. Without graphs a runner may be used by many threads at once.
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
        self._reader = Reader(self.inputs, self._index if self._driver else None)
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
        call, tensors = self._reader.read(inputs)
        if not self._captures:
            return self._plain(call, tensors)
        with self._lock:
            graph = self._graphs.get(call.shapes)
            if graph is None:
                if len(self._graphs) >= self.max_graphs:
                    return self._plain(call, tensors)
                graph = self._graphs[call.shapes] = _Graph(self, call, tensors)
            return self._replay(graph, call, tensors)

    def _plain(self, call: Call, tensors: list[Any]) -> dict[str, Any]:
        """One run without a graph."""
        for queue in call.queues():
            self._follow(queue)
        outputs = self._run(call.memories(tensors), call.device)
        return {name: call.library.tensor(memory) for name, memory in outputs.items()}

    def _follow(self, queue: int) -> None:
        """Let the session's work come after what is queued there; where nobody knows its stream, by waiting."""
        assert self._driver is not None
        if self._works_on_stream:
            self._driver.copy((), self._stream, after=(queue,))
        else:
            self._driver.synchronize(queue)

    def _run(self, memories: Sequence[Memory], device: str) -> dict[str, Memory]:
        """The outputs, which ONNX Runtime allocates on the device."""
        binding = self._binding(memories)
        for name in self.outputs:
            binding.bind_output(name, device, self._index if device == "cuda" else 0)
        self.session.run_with_iobinding(binding, self._run_options(NO_GRAPH) if self._captures else None)
        found = {}
        for name, value in zip(self.outputs, binding.get_outputs(), strict=True):
            place = ("cuda", self._index) if value.device_name().lower() == "cuda" else ("cpu", 0)
            spec = Spec(DTYPE[value.element_type()], tuple(value.shape()), *place)
            found[name] = Memory(value.data_ptr(), spec, value)
        return found

    def _binding(self, memories: Sequence[Memory]) -> Any:
        binding = self.session.io_binding()
        for name, (address, spec, _) in zip(self.inputs, memories, strict=True):
            element, shape = ELEMENT_TYPE[spec.dtype], list(spec.shape)
            binding.bind_input(name, spec.device, spec.device_index, element, shape, address or _SOMEWHERE)
        return binding

    def _run_options(self, graph: str) -> Any:
        import onnxruntime

        options = onnxruntime.RunOptions()
        options.add_run_config_entry("gpu_graph_id", graph)
        if graph != NO_GRAPH and self._works_on_stream:  # `_replay` synchronizes once, after its copies
            options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        return options

    def _replay(self, graph: _Graph, call: Call, tensors: list[Any]) -> dict[str, Any]:
        """One run by a graph. Targets are made before the inputs' queues are waited for, since the memory that a
        library hands out again may still be in use on its own queue."""
        assert self._driver is not None
        driver, stream = self._driver, self._stream
        own = call.device == "cuda" and not self.copy_outputs
        made = [] if own else [make() for make in graph.makers(call.library, call.device)]
        try:
            self._fetch(graph, call, tensors)
            self.session.run_with_iobinding(graph.binding, graph.options)
            if made:
                driver.copy(zip(map(call.library.address, made), *graph.written, strict=True), stream)
        finally:
            driver.synchronize(stream)
        return graph.tensors(call.library) if own else dict(zip(self.outputs, made, strict=True))

    def _fetch(self, graph: _Graph, call: Call, tensors: list[Any]) -> None:
        """Copy the inputs to where the graph reads."""
        assert self._driver is not None
        copies = zip(graph.read, call.addresses(tensors), call.sizes, strict=True)
        self._driver.copy(copies, self._stream, after=call.queues())
        if not self._works_on_stream:
            self._driver.synchronize(self._stream)


class _Graph:
    """The memory that one CUDA graph reads and writes, and what asks for its replay; the first run captures it.

    read: addresses; written: addresses, and sizes in bytes.
    """

    def __init__(self, runner: Runner, call: Call, tensors: list[Any]) -> None:
        inputs = [allocated(spec._replace(device="cuda", device_index=runner._index)) for spec in call.specs]
        self.read = [memory.address for memory in inputs]
        runner._fetch(self, call, tensors)
        # without a graph: the shapes of the outputs, and all that is made or loaded once
        self.outputs = runner._run(inputs, "cuda")
        self.written = ([m.address for m in self.outputs.values()], [m.spec.bytes for m in self.outputs.values()])
        self.binding = runner._binding(inputs)
        for name, memory in self.outputs.items():
            self.binding.bind_ortvalue_output(name, memory.owner)
        self.options = runner._run_options(str(next(_GRAPH_IDS)))
        self._inputs = inputs
        self._makers: dict[Any, list[Callable[[], Any]]] = {}
        self._tensors: dict[Library, dict[str, Any]] = {}

    def makers(self, of: Library, device: str) -> list[Callable[[], Any]]:
        """What makes a new tensor for each output."""
        if (of, device) not in self._makers:
            specs = (memory.spec for memory in self.outputs.values())
            places = (spec if device == "cuda" else spec._replace(device="cpu", device_index=0) for spec in specs)
            self._makers[of, device] = [of.maker(spec) for spec in places]
        return self._makers[of, device]

    def tensors(self, of: Library) -> dict[str, Any]:
        """What the graph writes, as tensors of a library that are made once."""
        if of not in self._tensors:
            self._tensors[of] = {name: of.tensor(memory) for name, memory in self.outputs.items()}
        return dict(self._tensors[of])


_SOMEWHERE = 256  # an address for tensors of no elements, which may have none


def _dtype(value: Any) -> str:
    if value.type not in ONNX_TYPE:
        raise ValueError(f"{value.name} is {value.type}, expected one of {', '.join(ONNX_TYPE)}")
    return ONNX_TYPE[value.type]
