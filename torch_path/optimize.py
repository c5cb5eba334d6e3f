"""`optimize_model`: a model's calls go through a graph rewritten onto the kernels, in place and undoable.

It uses the hook that `nn.Module.compile` uses, so the model's weights, hooks, state_dict, pickling and deep copies are
untouched: `model(...)` runs the rewritten graph, which reads the model's own parameters at every call.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.fx import GraphModule

from trimaran.torch_path import ops
from trimaran.torch_path.capture import retrace
from trimaran.torch_path.report import Report
from trimaran.torch_path.rewrite import RULES, Rule, rewrite

_OPTIMIZED: weakref.WeakKeyDictionary[torch.nn.Module, OptimizedCall] = weakref.WeakKeyDictionary()


def optimize_model(model: torch.nn.Module, *, rules: Sequence[Rule] = RULES) -> Report:
    """Let `model(...)` run on the kernels. Returns its live report, empty until the first call.

    The model stays what it is: same object, weights, dtype and outputs (within the tolerance of its dtype). A call in
    training mode, or with inputs that require a gradient, runs the untouched model, and the report says so; outputs of
    an optimized call carry no gradient. Optimizing twice gives the same report.

    Raises TypeError for anything but a `torch.nn.Module`, ValueError for one that is compiled already.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model is a {type(model).__name__}, expected a torch.nn.Module")
    if model in _OPTIMIZED:
        return _OPTIMIZED[model].report
    if model._compiled_call_impl is not None:
        raise ValueError("model is compiled (model.compile() was called), expected a model that runs eagerly")
    optimized = OptimizedCall(model, rules)
    _OPTIMIZED[model] = optimized
    model._compiled_call_impl = optimized
    return optimized.report


def restore(model: torch.nn.Module) -> None:
    """Undo `optimize_model`: the model runs as before, bit for bit. ValueError where it is not optimized."""
    _optimized(model)
    del model._compiled_call_impl, _OPTIMIZED[model]


def report(model: torch.nn.Module) -> Report:
    """The live report of an optimized model. ValueError where it is not optimized."""
    return _optimized(model).report


@contextlib.contextmanager
def untouched(model: torch.nn.Module) -> Iterator[None]:
    """Within it, calls of the model run as if it had not been optimized."""
    before = vars(model).pop("_compiled_call_impl", None)
    try:
        yield
    finally:
        if before is not None:
            model._compiled_call_impl = before


def _optimized(model: torch.nn.Module) -> OptimizedCall:
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model is a {type(model).__name__}, expected a torch.nn.Module")
    if model not in _OPTIMIZED:
        raise ValueError(f"model ({type(model).__name__}) is not optimized, call trimaran.optimize_model(model) first")
    return _OPTIMIZED[model]


class OptimizedCall:
    """What `model.__call__` goes to while the model is optimized."""

    def __init__(self, model: torch.nn.Module, rules: Sequence[Rule]) -> None:
        self.model = weakref.ref(model)  # the model owns this object
        self.rules = rules
        self.report = Report(type(model).__name__)
        self.compiled = torch.compile(model._call_impl, backend=self.backend)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        model = self.model()
        assert model is not None
        reason = self.obstacle(model, args, kwargs)
        if reason is not None:
            self.report.fallbacks[reason] += 1
            return model._call_impl(*args, **kwargs)
        listener = ops.on_decline.set(self.declined)
        try:
            with torch.no_grad():
                return self.compiled(*args, **kwargs)
        finally:
            ops.on_decline.reset(listener)

    def obstacle(self, model: torch.nn.Module, args: Any, kwargs: Any) -> str | None:
        """The reason why this call must run the untouched model, None where there is none."""
        if model.training:
            return "the model is in training mode"
        if torch.is_grad_enabled():
            leaves = torch.utils._pytree.tree_leaves((args, kwargs))
            if any(isinstance(leaf, torch.Tensor) and leaf.requires_grad for leaf in leaves):
                return "an input requires a gradient"
        return None

    def backend(self, module: GraphModule, example_inputs: list[Any], **_: Any) -> Any:
        graph = retrace(module)
        self.report.graphs.append(rewrite(graph, self.rules))
        return graph.forward

    def declined(self, op: str, reason: str) -> None:
        self.report.fallbacks[f"{op}: {reason}"] += 1
