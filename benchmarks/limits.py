"""What bounds a forward: bytes of weights, FLOP of real tokens, and what the vendor's GEMMs reach at these shapes."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from trimaran.benchmarks.engines.contract import Inputs, Subject
from trimaran.benchmarks.machine import noise
from trimaran.benchmarks.measure import copies_for, percentile, watch_for
from trimaran.benchmarks.models import parameters
from trimaran.benchmarks.workload import Case

ATTENTION = {torch.ops.aten.bmm, torch.ops.aten.baddbmm}  # of attention that is written out: pairs of positions
GEMM = {torch.ops.aten.mm: 0, torch.ops.aten.addmm: 1}  # and where its first factor stands
SAMPLES = 5


@dataclass
class Work:
    """What a forward over padded rows multiplies: FLOP that grow with the rows, FLOP that grow with pairs of positions,
    and how often a product of each shape (m, k, n) occurs."""

    rows: float = 0.0
    pairs: float = 0.0
    gemms: Counter[tuple[int, int, int]] = field(default_factory=Counter)

    def useful(self, case: Case, copies: int) -> float:
        """FLOP that the real tokens need."""
        sizes = torch.cat([case.sizes(copy) for copy in range(copies)]).double()
        tokens, pairs = sizes.mean() / case.seq, sizes.square().mean() / case.seq**2
        return float(self.rows * tokens + self.pairs * pairs)


class Counting(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.work: Work = Work()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        packet = func.overloadpacket
        if packet in flop_registry:
            flop = float(flop_registry[packet](*args, **(kwargs or {}), out_val=out))
            if packet in ATTENTION:
                self.work.pairs += flop
            else:
                self.work.rows += flop
        if packet in GEMM:
            a, b = args[GEMM[packet] : GEMM[packet] + 2]
            self.work.gemms[(a.shape[0], a.shape[1], b.shape[1])] += 1
        return out


def work_of(subject: Subject, inputs: Inputs) -> Work:
    """Of the model with its attention written out, so that every product is seen."""
    twin: Any = copy.copy(subject.model)
    if hasattr(twin, "set_attn_implementation"):
        twin = copy.deepcopy(subject.model)
        twin.set_attn_implementation("eager")
    counting = Counting()
    with counting:
        subject.forward(twin, inputs)
    return counting.work


def limit_ms(subject: Subject, useful: float, ceiling: dict[str, float]) -> float:
    """The larger of the time to read the weights once at the bandwidth of a copy, and of the useful FLOP at the rate of
    a large product, both as measured in this run."""
    read = parameters(subject.module)[1] * subject.dtype.itemsize
    return max(read / ceiling["copy"] / 1e9, useful / ceiling["matmul"] / 1e9)


class Gemms:
    """What torch's own products take in this run, each shape once; weights are rotated over, so that none is still in
    the L2 when it is read again."""

    def __init__(self, subject: Subject) -> None:
        self.subject = subject
        self.known: dict[tuple[int, int, int], float] = {}

    def __call__(self, work: Work) -> float:
        """ms of all products of one forward, one after the other: nothing between them, and no attention."""
        return sum(count * self.one(shape) for shape, count in work.gemms.items())

    def one(self, shape: tuple[int, int, int]) -> float:
        if shape not in self.known:
            self.known[shape] = self.timed(*shape)
        return self.known[shape]

    def timed(self, m: int, k: int, n: int) -> float:
        device, dtype = self.subject.device, self.subject.dtype
        x = noise((m, k), device, dtype)
        copies = copies_for([torch.empty(n, k, dtype=dtype, device="meta"), x], device)
        weights = [noise((n, k), device, dtype) for _ in range(copies)]

        def product(weight: torch.Tensor) -> Callable[[], Any]:
            return lambda: F.linear(x, weight)

        armed = watch_for(device).arm([product(weight) for weight in weights])
        return percentile([armed.sample() for _ in range(SAMPLES)], 50)
