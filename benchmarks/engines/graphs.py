"""One CUDA graph for each kind of inputs, around anything that can be captured: the harness of every torch engine."""

from __future__ import annotations

from typing import Any

import torch

from trimaran.benchmarks.engines.contract import Call, Inputs

WARM = 2  # calls before the capture: what is made lazily may not be made while capturing


def kind_of(inputs: Inputs) -> tuple[Any, ...]:
    return tuple((name, tensor.shape, tensor.dtype) for name, tensor in inputs.items())


class Graphed:
    """`function`, replayed. In each call the inputs are copied to where the graph reads, and the output from where it
    writes. The graphs share one memory pool, as they are never replayed at once."""

    def __init__(self, function: Call) -> None:
        self.function = function
        self.graphs: dict[Any, tuple[torch.cuda.CUDAGraph, list[torch.Tensor], torch.Tensor]] = {}
        self.pool = torch.cuda.graph_pool_handle()

    def __call__(self, inputs: Inputs) -> torch.Tensor:
        kind = kind_of(inputs)
        if kind not in self.graphs:
            self.graphs[kind] = self.captured(inputs)
        graph, read, written = self.graphs[kind]
        torch._foreach_copy_(read, list(inputs.values()))
        graph.replay()
        return written.clone()

    def captured(self, inputs: Inputs) -> tuple[torch.cuda.CUDAGraph, list[torch.Tensor], torch.Tensor]:
        buffers = {name: tensor.clone() for name, tensor in inputs.items()}
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM):
                self.function(buffers)
        torch.cuda.synchronize()
        graph, own = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        try:
            with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
                written = self.function(buffers)
        finally:  # a capture that fails leaves its own stream the current one, where nobody waits for the others
            torch.cuda.set_stream(own)
        return graph, list(buffers.values()), written
