"""`trimaran bench-nodes`: what a node costs in ONNX Runtime, ours against its own, in a chain of small norms, and what
a replay costs (see `replay`).

The chain is so small that the GPU waits for the host: in a plain run a node costs what enqueueing it costs, in a CUDA
graph what starting a kernel costs. A figure is a whole run, from the host's view and with its own fixed cost, divided
by the number of nodes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE
from rich.console import Console, Group, RenderableType
from rich.progress import Progress
from rich.table import Table
from rich.text import Text

from trimaran.benchmarks import replay
from trimaran.benchmarks.kernels import SEED, spread
from trimaran.benchmarks.machine import ceilings, drift, environment, unsteady
from trimaran.benchmarks.measure import Contender, HostWatch, Run, Timing, compare
from trimaran.benchmarks.report import OURS, PEERS, digest
from trimaran.kernels.interpreter import interpret
from trimaran.ort_ops.abi import CPU, CUDA
from trimaran.ort_ops.native import native
from trimaran.ort_ops.session import ort_session

VERSION = 1  # of the JSON, described in benchmarks/README.md
EPS = 1e-5
PEER = {"layer_norm": "LayerNormalization", "rms_norm": "SimplifiedLayerNormalization"}  # ONNX Runtime's own
TARGETS_US = {"plain run": 4.5, "CUDA graph": 2.2}


@dataclass(frozen=True)
class Chain:
    """`count` norms, each of the one before it, over [rows, columns]."""

    op: str
    count: int
    rows: int
    columns: int
    dtype: torch.dtype

    def model(self, ours: bool) -> bytes:
        from onnx import TensorProto, helper, numpy_helper

        element = TensorProto.FLOAT16 if self.dtype == torch.float16 else TensorProto.FLOAT
        names = list(self.parameters())
        values = ["x", *(f"y{index}" for index in range(1, self.count)), "y"]
        nodes = [
            helper.make_node(self.op, [before, *names], [after], domain="trimaran", eps=EPS)
            if ours
            else helper.make_node(PEER[self.op], [before, *names], [after], epsilon=EPS)
            for before, after in pairwise(values)
        ]
        graph = helper.make_graph(
            nodes,
            "chain",
            [helper.make_tensor_value_info("x", element, ["rows", self.columns])],
            [helper.make_tensor_value_info("y", element, ["rows", self.columns])],
            [numpy_helper.from_array(value.numpy(), key) for key, value in self.parameters().items()],
        )
        opsets = [helper.make_opsetid("", 17), helper.make_opsetid("trimaran", 1)]
        made: bytes = helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()
        return made

    def parameters(self) -> dict[str, torch.Tensor]:
        """Signs as weights and no bias: a normalized row stays as it is, so that a hundred roundings do not add up."""
        source = torch.Generator().manual_seed(SEED)
        weight = (torch.randint(0, 2, (self.columns,), generator=source) * 2 - 1).to(self.dtype)
        return {"weight": weight} | ({"bias": torch.zeros_like(weight)} if self.op == "layer_norm" else {})

    def input(self) -> torch.Tensor:
        source = torch.Generator().manual_seed(SEED + 1)
        return torch.randn(self.rows, self.columns, generator=source).to(self.dtype)

    def exact(self, device: torch.device) -> torch.Tensor:
        norm: Callable[..., torch.Tensor] = getattr(torch.nn.functional, self.op)
        x = self.input().to(device).double()
        parameters = [value.to(device).double() for value in self.parameters().values()]
        for _ in range(self.count):
            x = norm(x, x.shape[-1:], *parameters, EPS)
        return x


def contender(chain: Chain, ours: bool, graph: bool, device: torch.device) -> Contender:
    def prepare(copy: int) -> Run:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.add_session_config_entry("session.disable_cpu_ep_fallback", str(int(device.type == "cuda")))
        providers = [(CUDA, {"enable_cuda_graph": "1"} if graph else {})] if device.type == "cuda" else [CPU]
        with interpret(device.type == "cpu"):
            session = ort_session(chain.model(ours), providers, session_options=options)
        return replay.bound(session, {"x": chain.input().to(device)}, ["y"])

    return Contender("trimaran" if ours else f"onnxruntime's {PEER[chain.op]}", prepare, ours)


def bench(nodes: int, rounds: int, console: Console) -> dict[str, Any]:
    """The result as it is written to JSON. On a machine without a GPU a tiny chain is interpreted, which only shows
    that it runs."""
    import onnxruntime

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    cuda = device.type == "cuda"
    rows, columns, dtype = (128, 768, torch.float16) if cuda else (4, 16, torch.float32)
    modes = list(TARGETS_US) if cuda else ["plain run"]
    before = ceilings(device, dtype)
    cases = []
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("", total=len(PEER) * len(modes))
        for op in PEER:
            chain = Chain(op, nodes, rows, columns, dtype)
            for mode in modes:
                progress.update(task, description=f"{op}, {mode}")
                cases.append(measure(chain, mode, device, rounds))
                progress.advance(task)
    replays = replay.measure(rows, columns, dtype, device, rounds)
    reasons = unsteady(drifts := drift(before, ceilings(device, dtype)))
    found = {"version": VERSION, "valid": not reasons, "invalid_because": reasons, "drift_percent": drifts}
    found |= {"nodes": nodes, "rows": rows, "columns": columns, "dtype": str(dtype).removeprefix("torch.")}
    where = environment(device) | {"onnxruntime": onnxruntime.__version__, "hot_path": native().how.split(",")[0]}
    return found | {
        "rounds": rounds,
        "method": HostWatch.method,
        "environment": where,
        "cases": cases,
        "replay": replays,
    }


def measure(chain: Chain, mode: str, device: torch.device, rounds: int) -> dict[str, Any]:
    timings = compare(
        [contender(chain, ours, mode == "CUDA graph", device) for ours in (True, False)],
        exact=chain.exact(device),
        dtype=chain.dtype,
        watch=HostWatch(),
        rounds=rounds,
        seed=SEED,
    )
    ours, peer = timings
    ratios = [theirs / mine for theirs, mine in zip(peer.samples, ours.samples, strict=False)]
    target = TARGETS_US[mode] if device.type == "cuda" else None
    return {
        "op": chain.op,
        "mode": mode,
        "target_us": target,
        "ratio": spread(ratios) if ratios else None,
        "contenders": [row(timing, chain.count) for timing in timings],
    }


def row(timing: Timing, nodes: int) -> dict[str, Any]:
    found = {"name": timing.name, "ours": timing.ours, "reason": timing.reason, "error": timing.error}
    micro = [1e3 * sample / nodes for sample in timing.samples]
    return found | {"calls": timing.calls, "us_per_node": spread(micro) if micro else None, "samples_us": micro}


def failures(found: dict[str, Any]) -> list[str]:
    """What of ours could not be timed."""
    cases = [(f"{case['op']}, {case['mode']}", case["contenders"]) for case in found["cases"]]
    cases.append(("replay", found["replay"]["contenders"]))
    return [f"{name}: {row['reason']}" for name, rows in cases for row in rows if row["ours"] and row["reason"]]


def heading(found: dict[str, Any]) -> str:
    where = found["environment"]
    size = f"{found['nodes']} nodes of {found['rows']} x {found['columns']}, {found['dtype']}"
    return f"us per node; {size}; {where['device']}; {where['date'][:10]}"


def table(found: dict[str, Any]) -> RenderableType:
    shown = Table(box=SIMPLE, title=heading(found), title_justify="left", padding=0)
    shown.add_column("chain", no_wrap=True)
    for name in ("us", "p20-p80", "target", "ratio"):
        shown.add_column(name, justify="right", no_wrap=True)
    for case in found["cases"]:
        shown.add_row(f"{case['op']}, {case['mode']}", style="cyan")
        for contender in case["contenders"]:
            shown.add_row(f"  {contender['name']}", *cells(case, contender), style="bold" if contender["ours"] else "")
        shown.add_section()
    verdict = found["method"] if found["valid"] else "INVALID: " + "; ".join(found["invalid_because"])
    return Group(
        shown,
        replay.table(found["replay"]),
        *map(Text, refusals(found)),
        Text(verdict, style="dim" if found["valid"] else "bold red"),
    )


def cells(case: dict[str, Any], contender: dict[str, Any]) -> list[str]:
    if contender["reason"]:
        return ["", "not timed"]
    us = contender["us_per_node"]
    mine = [str(case["target_us"] or ""), f"{case['ratio']['median']:.2f}" if case["ratio"] else ""]
    return [f"{us['median']:.3g}", f"{us['p20']:.3g}-{us['p80']:.3g}", *(mine if contender["ours"] else [])]


def refusals(found: dict[str, Any]) -> Iterator[str]:
    for case in [*found["cases"], {"op": "layer_norm", "mode": "replay"} | found["replay"]]:
        for contender in case["contenders"]:
            if contender["reason"]:
                yield f"{case['op']}, {case['mode']}, {contender['name']}, not timed: {contender['reason']}"


def write(found: dict[str, Any], folder: Path) -> None:
    """`folder/nodes.json` and `folder/nodes.png`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "nodes.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    figure(found, folder / "nodes.png")


def figure(found: dict[str, Any], path: Path) -> None:
    """Two bars per chain, ours in red, and the targets as ticks."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(12, 1.2 + 0.9 * len(found["cases"])), dpi=100, layout="constrained")
    FigureCanvasAgg(drawn)
    axes = drawn.add_subplot()
    for at, case in enumerate(found["cases"]):
        for offset, contender in zip((-0.2, 0.2), case["contenders"], strict=True):
            if contender["reason"]:
                continue
            us = contender["us_per_node"]["median"]
            axes.barh(at + offset, us, height=0.38, color=OURS if contender["ours"] else PEERS[0])
            weight = "bold" if contender["ours"] else "normal"
            axes.text(us, at + offset, f" {us:.3g}  {contender['name']}", va="center", fontsize=9, weight=weight)
        if case["target_us"]:
            axes.plot([case["target_us"]] * 2, [at - 0.42, at + 0.02], color="black", linewidth=1.5)
    labels = [f"{case['op']}\n{case['mode']}" for case in found["cases"]]
    axes.set_yticks(range(len(labels)), labels, fontsize=9)
    axes.invert_yaxis()
    axes.margins(x=0.35)
    axes.set_xlabel("us per node (less is better); black: the target")
    axes.set_title(heading(found) + ("" if found["valid"] else "\nINVALID"), fontsize=10, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    drawn.savefig(path, metadata={"Source": digest(found)})
