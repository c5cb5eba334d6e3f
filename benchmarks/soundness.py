"""Whether the compiled kernels are sound where a comparison with fp64 cannot tell: the same bits every time, also while
the GPU is busy with other work, and nothing that compute-sanitizer finds.

A variant is an op, a dtype, and inputs that choose another binary. Sizes are small: sanitizers are slow.
"""

from __future__ import annotations

import ast
import itertools
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress

import trimaran.torch_path.ops  # noqa: F401  (registers torch.ops.trimaran)
from trimaran.kernels import attention as kernels
from trimaran.kernels.attention import LONG

SANITIZERS = ("memcheck", "initcheck", "synccheck", "racecheck")
PER_GRAPH = 50  # runs
DONE = "variants ran"
FINDING = re.compile(r"^========= (\S.*)\n=========     at .*? in (\S+:\d+)$", re.M)
Call = Callable[[], Any]


def variants(device: torch.device, ops: Sequence[str] = ()) -> Iterator[tuple[str, Call]]:
    """Name and call of each variant, of these ops or of all. ValueError for an op that has none."""
    if unknown := sorted({*ops} - {op for made in FAMILIES.values() for op in made}):
        raise ValueError(f"no variants of {unknown[0]}, expected some of {', '.join(sum(FAMILIES.values(), ()))}")
    for dtype, (family, made) in itertools.product((torch.float32, torch.float16, torch.bfloat16), FAMILIES.items()):
        if ops and not {*ops} & {*made}:
            continue
        if family is _linears and dtype == torch.float32:  # which is left to the vendor
            continue
        yield from ((name, call) for name, call in family(device, dtype) if not ops or name.split()[0] in ops)


def _draw(device: torch.device, dtype: torch.dtype, *shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def _attention(device: torch.device, dtype: torch.dtype) -> Iterator[tuple[str, Call]]:
    batch, heads, queries = 2, 2, 130
    lengths = torch.tensor([77, 0], dtype=torch.int32, device=device)
    for head_dim, keys in itertools.product((40, 64, 128, 256), (200, 600, 1160)):  # a kernel each on Hopper
        q = _draw(device, dtype, batch, heads, queries, head_dim)
        k, v = (_draw(device, dtype, batch, heads, keys, head_dim, seed=seed) for seed in (1, 2))
        given: dict[str, dict[str, Any]] = {
            "full": {},
            "causal": {"causal": True},
            "lengths": {"key_lengths": lengths},
            "lengths, causal": {"key_lengths": lengths, "causal": True},
        }
        if keys < LONG:
            holes = torch.arange(keys, device=device) % 7 != torch.tensor([[3], [5]], device=device)
            given |= {
                "key mask": {"key_mask": holes, "masked_row": "mean"},
                "bias": {"bias": _draw(device, dtype, 1, heads, queries, keys)},
                "window": {"window_left": 30, "window_right": 5, "softcap": 4.0},
            }
        for name, options in given.items():
            title = f"attention {dtype} d{head_dim} k{keys} {name}".replace("torch.", "")
            yield title, _call("attention", q=q, k=k, v=v, scale=head_dim**-0.5, **options)


def _norms(device: torch.device, dtype: torch.dtype) -> Iterator[tuple[str, Call]]:
    for columns in (40, 768, 1024, 4096, 16384, 20000):
        x, residual = (_draw(device, dtype, 3, columns, seed=seed) for seed in (1, 2))
        weight, bias = (_draw(device, dtype, columns, seed=seed) for seed in (3, 4))
        title = f"{dtype} {columns}".replace("torch.", "")
        both = {"x": x, "weight": weight, "residual": residual, "eps": 1e-5, "return_sum": True}
        yield f"layer_norm {title}", _call("layer_norm", bias=bias, **both)
        yield f"layer_norm {title} bare", _call("layer_norm", x=x, eps=1e-5)
        yield f"rms_norm {title}", _call("rms_norm", **both)


# [rows, depth, columns] of linear layers: each row of the tables is chosen by one, and each kernel has edges.
LINEARS = [
    (5, 72, 1036),
    (200, 72, 1036),
    (300, 72, 1036),
    (5, 768, 1040),
    (200, 768, 1040),
    (100, 768, 2320),
    (5, 1024, 1040),
    (200, 1024, 1040),
    (5, 3072, 1040),
    (5, 4096, 1040),
    (5, 4112, 1040),
    (5, 4112, 2320),
    (100, 3072, 336),
    (100, 4096, 336),
    (200, 3072, 976),
    (60, 4112, 1040),
    (60, 4112, 2320),
    (200, 4112, 1040),
    (200, 1024, 2320),
    (300, 256, 2320),
    (300, 2048, 1040),
    (2816, 64, 1152),
    (1408, 64, 1152),
    (1408, 64, 1536),
    (1408, 64, 2320),
    (1408, 256, 3072),
    (1100, 64, 1040),
    (2100, 256, 1040),
]


def _linears(device: torch.device, dtype: torch.dtype) -> Iterator[tuple[str, Call]]:
    def parameter(*shape: int, seed: int) -> torch.nn.Parameter:
        return torch.nn.Parameter(_draw(device, dtype, *shape, seed=seed) * 0.1, requires_grad=False)

    for rows, depth, columns in LINEARS:
        x, residual = _draw(device, dtype, rows, depth), _draw(device, dtype, rows, columns, seed=1)
        weight, bias = parameter(columns, depth, seed=2), parameter(columns, seed=3)
        third, third_bias = (part[: columns // 48 * 16] for part in (weight, bias))
        title = f"{dtype} {rows} x {depth} x {columns}".replace("torch.", "")
        layer = {"x": x, "weight": weight, "bias": bias}
        turned = {"weight": parameter(depth, columns, seed=2), "transpose_weight": True}
        parts = {"weight": third, "bias": third_bias, "weight_1": third, "bias_1": third_bias, "weight_2": third}
        yield f"linear {title}", _call("linear", **layer, activation="gelu")
        yield f"linear {title} residual", _call("linear", **layer, residual=residual)
        yield f"linear {title} three", _call("linear", **layer | parts)
        yield f"linear {title} transposed", _call("linear", **layer | turned)
        gated = {"x": x, "gate_weight": weight, "up_weight": weight, "activation": "silu"}
        yield f"gated_linear {title}", _call("gated_linear", **gated)
        turned = dict.fromkeys(("gate_weight", "up_weight"), turned["weight"]) | {"transpose_weight": True}
        yield f"gated_linear {title} transposed", _call("gated_linear", **gated | turned)
        end = {**layer, "residual": residual, "norm_weight": bias, "eps": 1e-5, "return_sum": True}
        yield f"linear_norm {title}", _call("linear_norm", **end, norm="layer")


def _rotary(device: torch.device, dtype: torch.dtype) -> Iterator[tuple[str, Call]]:
    positions = torch.arange(130, device=device).flip(0)[None]
    for head_dim, interleaved in itertools.product((64, 80), (False, True)):
        q, k = _draw(device, dtype, 2, 4, 130, head_dim), _draw(device, dtype, 2, 1, 130, head_dim, seed=1)
        cos, sin = (_draw(device, torch.float32, 200, 32, seed=seed) for seed in (2, 3))
        given = {"q": q, "cos": cos, "sin": sin, "k": k, "positions": positions, "return_k_out": True}
        title = f"rotary_embedding {dtype} d{head_dim}{' interleaved' if interleaved else ''}".replace("torch.", "")
        yield title, _call("rotary_embedding", **given, rotary_dim=64, interleaved=interleaved)


def _call(op: str, **given: Any) -> Call:
    return partial(getattr(torch.ops.trimaran, op), **given)


FAMILIES: dict[Callable[[torch.device, torch.dtype], Iterator[tuple[str, Call]]], tuple[str, ...]] = {
    _attention: ("attention",),
    _norms: ("layer_norm", "rms_norm"),
    _rotary: ("rotary_embedding",),
    _linears: ("linear", "gated_linear", "linear_norm"),
}


def run_once(ops: Sequence[str] = (), part: int = 0, parts: int = 1) -> int:
    """Launches every `parts`-th variant from `part` on once, and waits for it; how many. What a sanitizer watches."""
    count = 0
    for _, call in itertools.islice(variants(torch.device("cuda"), ops), part, None, parts):
        call()
        torch.cuda.synchronize()
        count += 1
    return count


def compile_all(progress: Progress, ops: Sequence[str] = ()) -> None:
    """Fills Triton's cache on disk, in as many processes as there are cores."""
    parts = os.cpu_count() or 1
    task = progress.add_task("compiling", total=parts)
    with ProcessPoolExecutor(parts, multiprocessing.get_context("spawn")) as pool:
        for running in as_completed([pool.submit(run_once, ops, part, parts) for part in range(parts)]):
            running.result()
            progress.advance(task)


def sanitize(tool: str, ops: Sequence[str] = ()) -> tuple[Counter[str], Counter[str]]:
    """`run_once` under compute-sanitizer, with each tensor an allocation of its own: what it found, counted by place,
    and what of it is explained.

    A descriptor made on the device is composed in shared memory, and a warp's tensormap.cp_fenceproxy writes it out to
    the compiler's scratch, which initcheck takes for a read of that scratch. Raises RuntimeError where nothing ran.
    """
    if tool not in SANITIZERS:
        raise ValueError(f"sanitizer is {tool!r}, expected one of {', '.join(SANITIZERS)}")
    program = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    script = f"from trimaran.benchmarks import soundness; print(soundness.run_once({[*ops]!r}), {DONE!r})"
    command = [program, "--tool", tool, "--print-limit", "1000000", "--kernel-name-exclude", "kns=at::"]
    ran = subprocess.run(
        [*command, sys.executable, "-c", script],
        env={**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    if DONE not in ran.stdout:
        raise RuntimeError(f"{tool}: {(ran.stdout + ran.stderr).strip()[-2000:]}")
    found, explained = Counter[str](), Counter[str]()
    for what, place in FINDING.findall(ran.stdout):
        expected = tool == "initcheck" and makes_descriptor(place)
        (explained if expected else found)[f"{what} {place}"] += 1
    total = sum(map(int, re.findall(r"ERROR SUMMARY: (\d+) error", ran.stdout)[:1]))
    if total != found.total() + explained.total():
        found[f"{total} errors, of which this many are located"] = found.total() + explained.total()
    return found, explained


def makes_descriptor(place: str) -> bool:
    """Whether `file.py:number` is within a call of make_tensor_descriptor in one of our kernels."""
    name, number = place.split(":")
    file = Path(kernels.__file__ or "").parent / name
    calls = [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Call)]
    return any(
        ast.unparse(call.func).endswith("make_tensor_descriptor")
        and call.lineno <= int(number) <= (call.end_lineno or call.lineno)
        for call in calls
    )


def repeat(times: int, progress: Progress, ops: Sequence[str] = ()) -> dict[str, int]:
    """How many of `times` runs of each variant (rounded up to whole graphs of 50) give other bits than the first, while
    a second stream keeps the GPU busy. Runs and comparisons are captured together, so that nothing waits between."""
    device = torch.device("cuda")
    calls = list(variants(device, ops))
    task = progress.add_task("repeating", total=len(calls))
    load, work = torch.cuda.Stream(device), _draw(device, torch.float16, 2048, 2048)
    differing = {}
    for name, call in calls:
        first = [tensor.clone() for tensor in _tensors(call())]
        wrong = torch.zeros((), dtype=torch.int64, device=device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(PER_GRAPH):
                wrong += _differs(_tensors(call()), first)
        for _ in range(-(-times // PER_GRAPH)):
            with torch.cuda.stream(load):
                work @ work
            graph.replay()
        differing[name] = int(wrong)
        progress.advance(task)
    return differing


def _differs(got: list[torch.Tensor], first: list[torch.Tensor]) -> torch.Tensor:
    same = [((a == b) | (a.isnan() & b.isnan())).all() for a, b in zip(got, first, strict=True)]
    return ~torch.stack(same).all()


def _tensors(result: Any) -> list[torch.Tensor]:
    found = (result,) if isinstance(result, torch.Tensor) else result
    return [tensor for tensor in found if tensor is not None]
