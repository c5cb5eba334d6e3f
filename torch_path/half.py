"""Half-precision copies of parameters on the side, for `optimize_model(model, dtype=...)`.

The model keeps its fp32 parameters. Where the graph casts one, the cast is made once and kept: until the parameter is
another, or was written into (a version counter tells), or `refresh` is called. Writes through `.data` are not counted.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule

from trimaran.torch_path.graph import aten, base, called, written


class SideCopies:
    """Cast copies of some inputs of a graph, kept."""

    def __init__(self, casts: list[tuple[int, torch.dtype]]) -> None:
        self.casts = casts
        self.made: list[tuple[Any, int, torch.Tensor] | None] = [None] * len(casts)

    def __call__(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """The inputs, and the copies as further ones."""
        return (*args, *(self.copy(i, args[place]) for i, (place, _) in enumerate(self.casts)))

    def copy(self, index: int, source: torch.Tensor) -> torch.Tensor:
        known = self.made[index]
        if known is None or known[0] is not source or known[1] != source._version:
            with torch.no_grad():
                known = (source, source._version, source.detach().to(self.casts[index][1]))
            self.made[index] = known
        return known[2]


def side_copies(module: GraphModule, parameters: list[int]) -> SideCopies:
    """Let the graph take the casts of these inputs as further inputs, made once."""
    inputs = [node for node in module.graph.nodes if node.op == "placeholder"]
    casts: list[tuple[int, torch.dtype]] = []
    memory = {base(tensor) for node in module.graph.nodes for tensor in written(node)}
    for place in parameters:
        if inputs[place] in memory:  # the model itself writes into it
            continue
        for node in list(inputs[place].users):
            if not called(node, aten.to.dtype) or len(node.args) != 2 or node.kwargs:
                continue
            with module.graph.inserting_after([n for n in module.graph.nodes if n.op == "placeholder"][-1]):
                given = module.graph.placeholder(f"half_{len(casts)}")
            given.meta.update(node.meta)
            node.replace_all_uses_with(given)
            module.graph.erase_node(node)
            casts.append((place, given.meta["val"].dtype))
    module.recompile()
    return SideCopies(casts)
