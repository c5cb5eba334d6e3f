"""`optimize_model`: a model's calls go through a graph rewritten onto the kernels, in place and undoable.

It uses the hook that `nn.Module.compile` uses, so the model's weights, hooks, state_dict, pickling and deep copies are
untouched: `model(...)` runs the rewritten graph, which reads the model's own parameters at every call. Dynamo's guards
see what changes in the model afterwards: attributes, hooks, parameters and submodules.
"""

from __future__ import annotations

import contextlib
import warnings
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch._C._dynamo.eval_frame import get_eval_frame_callback
from torch._dynamo.decorators import skip
from torch._dynamo.utils import graph_break_reasons
from torch.fx import GraphModule, Node
from torch.nn import Parameter

from trimaran.torch_path import autocast, ops
from trimaran.torch_path.buckets import Buckets
from trimaran.torch_path.capture import compiled, retrace
from trimaran.torch_path.graphs import MAX_GRAPHS, Graphs, Replayed, Unguarded, current, obstacle
from trimaran.torch_path.half import SideCopies, side_copies
from trimaran.torch_path.report import Report
from trimaran.torch_path.rewrite import RULES, Rule, rewrite
from trimaran.torch_path.signature import Call

HALVES = (torch.float16, torch.bfloat16)


def optimize_model(
    model: torch.nn.Module,
    *,
    dtype: torch.dtype | None = None,
    rules: Sequence[Rule] = RULES,
    max_graphs: int = MAX_GRAPHS,
    buckets: Sequence[int] | None = None,
) -> Report:
    """Let `model(...)` run on the kernels. Returns its live report, empty until the first call.

    The model stays what it is: same object, weights, dtype and outputs (within the tolerance of its dtype). A call in
    training mode, or with inputs that require a gradient, runs the untouched model, and the report says so; outputs of
    an optimized call carry no gradient. Optimizing twice gives the same report.

    dtype: torch.float16 or torch.bfloat16 to compute in it as autocast does (and to return what that returns), with
    copies of the weights kept on the side. In fp16, layers that their model keeps in fp32 (T5's `wo`) stay in fp32. The
    copies follow every change of a weight but one through `weight.data`; call `refresh(model)` after that.
    rules: the fusions, in order; `RULES` unless given.
    max_graphs: how many CUDA graphs are kept, those least recently used going first; 0 for none. A kind of call
    (shapes, dtypes, flags) is captured when it comes for the second time.
    buckets: lengths that calls are padded to, for a text model that obeys its attention mask, so that a few graphs
    answer calls of any length. Longer ones, and calls with other tensors than ids, mask and token types, stay as they
    are.

    Models inside it that are also called by themselves (the encoder, in `generate`; the transformer of a
    sentence-transformers object) are optimized with it, and tell the same report.

    Raises TypeError for anything but a `torch.nn.Module`, ValueError for one that is compiled already, another dtype, a
    negative max_graphs, or buckets that are no lengths.
    """
    model = inner_model(model)
    if dtype is not None and dtype not in HALVES:
        raise ValueError(f"dtype is {dtype}, expected torch.float16, torch.bfloat16 or None")
    if max_graphs < 0:
        raise ValueError(f"max_graphs is {max_graphs}, expected 0 or more")
    if (known := _call_of(model)) is not None:
        if known.dtype is not dtype:
            raise ValueError(f"dtype is {dtype}, the model is optimized with {known.dtype}: restore it first")
        return known.report
    if model._compiled_call_impl is not None:
        raise ValueError("model is compiled (model.compile() was called), expected a model that runs eagerly")
    graphs = Graphs(model, Report(type(model).__name__), max_graphs)
    bucketed = None if buckets is None else Buckets(buckets)
    optimized = OptimizedCall(model, rules, dtype, graphs, bucketed)
    model._compiled_call_impl = optimized
    for part in model.modules():
        if hasattr(part, "base_model_prefix") and part._compiled_call_impl is None:  # a model of transformers
            part._compiled_call_impl = OptimizedCall(part, rules, dtype, optimized.graphs, part_of=optimized)
    return optimized.report


def restore(model: torch.nn.Module) -> None:
    """Undo `optimize_model`: the model runs as before, bit for bit. ValueError where it is not optimized."""
    optimized = _optimized(model)
    for part, call in _calls(model):
        if call.report is optimized.report:
            del part._compiled_call_impl
    optimized.graphs.clear()


def report(model: torch.nn.Module) -> Report:
    """The live report of an optimized model. ValueError where it is not optimized."""
    return _optimized(model).report


def refresh(model: torch.nn.Module) -> None:
    """Forget everything derived from the model: captured graphs and half-precision copies. The next call makes them
    anew. Needed after an in-place edit that torch does not count (`weight.data.mul_(2)`) of a model optimized with a
    `dtype`; harmless otherwise. ValueError where it is not optimized."""
    _optimized(model)
    for _, call in _calls(model):
        call.start()


@contextlib.contextmanager
def untouched(model: torch.nn.Module) -> Iterator[None]:
    """Within it, calls of the model run as if it had not been optimized."""
    calls = _calls(model)
    for part, _ in calls:
        del part._compiled_call_impl
    try:
        yield
    finally:
        for part, call in calls:
            part._compiled_call_impl = call


def inner_model(model: Any) -> torch.nn.Module:
    """The module whose calls count: of a sentence-transformers object, which runs its parts by itself, the first part,
    which calls `forward` of the transformer in it. TypeError for what is no module."""
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model is a {type(model).__name__}, expected a torch.nn.Module")
    if isinstance(model, torch.nn.Sequential) and hasattr(model, "encode") and len(model):
        first: torch.nn.Module = model[0]
        return first if isinstance(getattr(first, "auto_model", None), torch.nn.Module) else model
    return model


def _optimized(model: Any) -> OptimizedCall:
    inner = inner_model(model)
    call = _call_of(inner)
    if call is None:
        raise ValueError(f"model ({type(model).__name__}) is not optimized, call trimaran.optimize_model(model) first")
    return call


def _call_of(model: torch.nn.Module) -> OptimizedCall | None:
    """None for a model that is not optimized, or only as a part of another."""
    call = vars(model).get("_compiled_call_impl")
    return call if isinstance(call, OptimizedCall) and call.part_of is None else None


def _calls(model: Any) -> list[tuple[torch.nn.Module, OptimizedCall]]:
    """The modules in a model whose calls are ours."""
    found = ((module, vars(module).get("_compiled_call_impl")) for module in model.modules())
    return [(module, call) for module, call in found if isinstance(call, OptimizedCall)]


class OptimizedCall:
    """What `model.__call__` goes to while the model is optimized."""

    def __init__(
        self,
        model: torch.nn.Module,
        rules: Sequence[Rule],
        dtype: torch.dtype | None,
        graphs: Graphs,
        buckets: Buckets | None = None,
        part_of: OptimizedCall | None = None,
    ) -> None:
        self.model = weakref.ref(model)  # the model owns this object
        self.buckets, self.part_of = buckets, part_of
        self.rules, self.dtype, self.graphs, self.report = rules, dtype, graphs, graphs.report
        self.start()

    def start(self) -> None:
        model = self.model()
        assert model is not None
        self.graphs.clear()
        me = weakref.ref(self)  # Dynamo keeps backends for ever

        def backend(*args: Any, **kwargs: Any) -> Any:
            call = me()
            assert call is not None
            return call.backend(*args, **kwargs)

        self.compiled = compiled(model._call_impl, backend)

    @skip  # Dynamo calls it, and looks no further
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if get_eval_frame_callback() is not None:  # a model inside a compiled one stays ours
            return torch._dynamo.disable(self.called)(*args, **kwargs)
        return self.called(*args, **kwargs)

    def called(self, *args: Any, **kwargs: Any) -> Any:
        if self.buckets is None:
            return self.answered(*args, **kwargs)
        model = self.model()
        assert model is not None
        return self.buckets(model, self.answered, args, kwargs)

    def answered(self, *args: Any, **kwargs: Any) -> Any:
        model = self.model()
        assert model is not None
        call = Call(self, args, kwargs)
        reason = self.obstacle(model, call, args, kwargs)
        if reason is not None:
            self.report.fallbacks[reason] += 1
            return model._call_impl(*args, **kwargs)
        self.graphs.guess(call)  # first of all: what follows runs while the GPU works
        listener, outer = ops.on_decline.set(self.declined), current.set(call)
        breaks = len(graph_break_reasons)
        try:
            with torch.no_grad(), self.precision(model):
                try:
                    return self.compiled(*args, **kwargs)
                except Unguarded:  # before anything was computed
                    self.start()
                    return self.compiled(*args, **kwargs)
        finally:
            ops.on_decline.reset(listener)
            current.reset(outer)
            self.graphs.settle(call)
            if not call.ran:
                limit = torch._dynamo.config.recompile_limit
                self.report.fallbacks[f"Dynamo ran the untouched model (recompile_limit is {limit})"] += 1
            if len(graph_break_reasons) > breaks:
                self.report.add_graph_breaks(graph_break_reasons[breaks:])

    def precision(self, model: torch.nn.Module) -> Any:
        if self.dtype is None:
            return contextlib.nullcontext()
        device = next((parameter.device.type for parameter in model.parameters()), "cpu")
        return torch.autocast(device, dtype=self.dtype)

    def obstacle(self, model: torch.nn.Module, call: Call, args: Any, kwargs: Any) -> str | None:
        """The reason why this call must run the untouched model, None where there is none."""
        if model.training:
            return "the model is in training mode"
        if torch.is_grad_enabled():
            leaves = torch.utils._pytree.tree_leaves((args, kwargs)) if call.opaque else call.tensors
            if any(isinstance(leaf, torch.Tensor) and leaf.requires_grad for leaf in leaves):
                return "an input requires a gradient"
        return None

    def backend(self, module: GraphModule, example_inputs: list[Any], **_: Any) -> Any:
        graph = retrace(module)
        mixed = autocast.concerns(graph)
        if mixed:
            try:
                autocast.explicit_casts(graph, self.stays_in_fp32)
            except Exception as error:  # this release's dispatcher casts in a way that cannot be written out
                self.report.fallbacks[f"autocast's casts cannot be written out: {error}"] += 1
                return Replayed(self.graphs, module.forward, SideCopies([]), "autocast casts in it")
        with torch._C._DisableAutocast():  # its casts are in the graph by now
            try:
                self.report.graphs.append(rewrite(graph, self.rules))
            except Exception as error:  # a rule is wrong: the model is not
                reason = f"a rule failed, {type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
                warnings.warn(f"{self.report.model} runs without the kernels: {reason}", stacklevel=2)
                self.report.fallbacks[reason] += 1
                return Replayed(self.graphs, module.forward, SideCopies([]), reason)
        halves = SideCopies([])
        if self.dtype is not None:
            halves = side_copies(graph, [i for i, given in enumerate(example_inputs) if isinstance(given, Parameter)])
        self.graphs.sweep()
        run = autocast.without(graph.forward) if mixed else graph.forward
        return Replayed(self.graphs, run, halves, obstacle(graph))

    def stays_in_fp32(self, node: Node) -> bool:
        """Whether the node belongs to a layer that its model keeps in fp32 when all else is fp16."""
        model = self.model()
        kept = getattr(model, "_keep_in_fp32_modules", None) or ()
        modules = (node.meta.get("nn_module_stack") or {}).values()
        return self.dtype is torch.float16 and any(str(path).split(".")[-1] in kept for path, _ in modules)

    def declined(self, op: str, reason: str) -> None:
        self.report.fallbacks[f"{op}: {reason}"] += 1
