"""Mixed precision, written into the graph.

Under autocast the graph that Dynamo captures has no casts: the dispatcher adds them to every call. Rules need to see
dtypes as they are, and our ops are no part of autocast's lists, so the casts become nodes, and the graph runs with
autocast off. Which they are is asked of the dispatcher itself, call by call.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.amp.autocast_mode import _enter_autocast, _exit_autocast
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg
from torch.utils._python_dispatch import TorchDispatchMode

from trimaran.torch_path.graph import aten, base, call, value, written

_CASTS = (aten.to.dtype, aten.to.device, aten.to.dtype_layout, aten._to_copy.default, aten.type_as.default)
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
DEVICES = ("cpu", "cuda")


def in_use() -> bool:
    return any(torch.is_autocast_enabled(device) for device in DEVICES)


def concerns(module: GraphModule) -> bool:
    """Whether the graph runs under autocast, or enters it."""
    return in_use() or any(node.target is _enter_autocast for node in module.graph.nodes)


def without(run: Callable[..., Any]) -> Callable[..., Any]:
    """The function with autocast off: its casts are written out."""

    def plain(*args: Any) -> Any:
        with torch._C._DisableAutocast():
            return run(*args)

    return plain


def explicit_casts(module: GraphModule, keep: Callable[[Node], bool]) -> None:
    """Write the casts of the autocast that is on now, and of those that the graph itself enters, into a pre-dispatch
    graph. keep(node): whether a call is computed in fp32 whatever autocast says."""
    graph, entered = module.graph, []
    cached = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)  # a cached weight would be cast without being seen
    try:
        for node in list(graph.nodes):
            if node.target is _enter_autocast:
                entered.append(_enter_autocast(*node.args))
            elif node.target is _exit_autocast:
                _exit_autocast(entered.pop())
            elif node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload):
                _write_casts(graph, node, keep(node))
    finally:
        torch.set_autocast_cache_enabled(cached)
    for node in reversed(graph.nodes):
        if node.target in (_enter_autocast, _exit_autocast):
            graph.erase_node(node)


def _write_casts(graph: Graph, node: Node, keep: bool) -> None:
    """Cast the arguments of one call as autocast would, and bring its fake value up to date."""
    casts = {} if node.target in _CASTS or not in_use() else _casts(node)
    if keep and casts:
        casts = {source: torch.float32 for source in node.all_input_nodes if _is_half(source)}
    with torch._C._DisableAutocast():
        made = {source: _cast(graph, source, dtype, node) for source, dtype in casts.items()}
        node.args = map_arg(node.args, lambda n: made.get(n, n))
        node.kwargs = map_arg(node.kwargs, lambda n: made.get(n, n))
        node.meta["val"] = _run(node)


def _cast(graph: Graph, source: Node, dtype: torch.dtype, user: Node) -> Node:
    """The cast, before its user; of an input that nothing writes into before everything, so that layers can be joined
    whose weights' casts these are."""
    constant = source.op == "placeholder" and not any(base(t) is source for n in graph.nodes for t in written(n))
    first = next(node for node in graph.nodes if node.op != "placeholder")
    with graph.inserting_before(first if constant else user):
        return call(graph, aten.to.dtype, source, dtype)


def _is_half(node: Node) -> bool:
    return isinstance(value(node), torch.Tensor) and value(node).dtype in (torch.float16, torch.bfloat16)


def _casts(node: Node) -> dict[Node, torch.dtype]:
    """The dtypes that autocast casts tensors to before it makes the call: such that the call with autocast off gives
    what is of the same dtype. RuntimeError where there are none.

    What is seen first may be the call's own casts (scaled_dot_product_attention's, in half precision, to fp32), or none
    where the call is made of others that autocast knows (einsum's products); there it casts all to its dtype."""
    seen = _Seen()
    wanted = _dtypes(_run(node, seen))
    inputs = [n for n in node.all_input_nodes if isinstance(value(n), torch.Tensor)]
    noted = {n: seen.casts[id(value(n))] for n in inputs if id(value(n)) in seen.casts}
    low = {n: _autocast_dtype(value(n)) for n in inputs if value(n).dtype in _FLOATS}
    for casts in (noted, {n: dtype for n, dtype in low.items() if dtype not in (None, value(n).dtype)}):
        with contextlib.suppress(RuntimeError), torch._C._DisableAutocast():
            if _dtypes(_run(node, casts=casts)) == wanted:
                return casts
    raise RuntimeError(f"{node.target} gives {', '.join(map(str, wanted))} by none that are known")


def _autocast_dtype(tensor: torch.Tensor) -> Any:
    """That of the tensor's device, None where autocast is off."""
    device = tensor.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def _dtypes(result: Any) -> list[torch.dtype]:
    leaves = torch.utils._pytree.tree_leaves(result)
    return [leaf.dtype for leaf in leaves if isinstance(leaf, torch.Tensor)]


def _run(node: Node, within: Any = None, casts: Mapping[Node, torch.dtype] | None = None) -> Any:
    """The call on the fake values of its arguments, some of them cast before, within a dispatch mode."""
    values = [n.meta["val"] for n in node.all_input_nodes]
    fakes = [leaf for leaf in torch.utils._pytree.tree_leaves(values) if isinstance(leaf, FakeTensor)]
    target: Any = node.target
    if not fakes:
        return node.meta.get("val")
    with fakes[0].fake_mode:
        cast = {n: n.meta["val"].to(dtype) for n, dtype in (casts or {}).items()}
        args, kwargs = map_arg((node.args, node.kwargs), lambda n: cast.get(n, n.meta["val"]))
        with within or contextlib.nullcontext():
            return target(*args, **kwargs)


class _Seen(TorchDispatchMode):
    """Notes casts that come before anything else: those that the dispatcher makes."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.casts: dict[int, torch.dtype] = {}
        self.started = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        dtype = (kwargs or {}).get("dtype")
        if func is aten._to_copy.default and dtype is not None and not self.started:
            self.casts[id(args[0])] = dtype
        elif func.namespace != "prim":  # those only ask for a tensor's device
            self.started = True
        return func(*args, **(kwargs or {}))
