"""From Dynamo's graph to the one dialect that rules are written in: pre-dispatch ATen."""

from __future__ import annotations

import contextlib
from typing import Any

from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import GraphModule, Interpreter
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.traceback import preserve_node_meta


def retrace(module: GraphModule) -> GraphModule:
    """Retrace a graph that Dynamo captured, on the fake values it was captured with.

    Those carry the symbols of dynamic sizes; tracing on the example inputs that a backend is handed would bake in
    today's sizes without a guard.
    """
    examples = [node.meta["example_value"] for node in module.graph.nodes if node.op == "placeholder"]
    fakes = [e for e in examples if isinstance(e, FakeTensor)]
    mode: Any = fakes[0].fake_mode if fakes else contextlib.nullcontext()
    with preserve_node_meta(), mode:
        return make_fx(Interpreter(module).run, pre_dispatch=True)(*examples)
