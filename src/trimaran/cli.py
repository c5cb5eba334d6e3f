"""The command line: `trimaran demo`, `info`, `rewrite`, `verify`, `compare-fusions`, and what measures and checks."""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from trimaran.info import collect, render

app = typer.Typer(
    help="Triton kernels under PyTorch, ONNX Runtime and TensorRT.", no_args_is_help=True, add_completion=False
)

Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]


@app.command()
def info(as_json: Json = False) -> None:
    """What is installed here: packages, CUDA devices, providers, and where each op is registered."""
    found = collect()
    if as_json:
        print(json.dumps(asdict(found), indent=2))
    else:
        Console().print(render(found))


@app.command()
def demo(
    rounds: Annotated[int, typer.Option(min=1, help="How often each engine is timed.")] = 5,
    dtype: Annotated[str, typer.Option(help="float32 or float16.")] = "float32",
    as_json: Json = False,
) -> None:
    """Embed sentences with a real model by every route, and compare: PyTorch, ONNX Runtime, before and after.

    Fails where an embedding drifts or a node is not replaced.
    """
    from trimaran import demo as main_job  # everything is imported here, and only here

    errors = Console(stderr=True)
    try:
        found = main_job.run(rounds, dtype, errors)
    except (RuntimeError, ValueError) as error:
        errors.print(f"[red]{error}")
        raise typer.Exit(2) from error
    if as_json:
        print(json.dumps(found.as_dict(), indent=2))
    else:
        console = Console()
        console.print(main_job.table(found))
        for line in main_job.lines(found):
            console.print(line, markup=False, highlight=False, soft_wrap=True)
    for failure in found.failures:
        errors.print(f"[red]FAILED: {failure}")
    if found.failures:
        raise typer.Exit(1)


@app.command()
def rewrite(
    src: Annotated[Path, typer.Argument(help="Anybody's ONNX file.")],
    dst: Annotated[Path, typer.Argument(help="The file to write.")],
    html: Annotated[Path | None, typer.Option(help="Write the report, with both graphs, as a page.")] = None,
    verify: Annotated[bool, typer.Option(help="Run both files and compare.")] = True,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing file.")] = False,
    as_json: Json = False,
) -> None:
    """Make an ONNX file's attention, norm and linear nodes trimaran's, and say what was left and why."""
    from rich.progress import BarColumn, Progress, TextColumn

    from trimaran.export.rewrite_onnx import rewrite_onnx
    from trimaran.export.verify import VerificationError

    console, errors = Console(soft_wrap=True), Console(stderr=True, soft_wrap=True)
    try:
        with Progress(TextColumn("{task.description}"), BarColumn(), console=errors, transient=True) as bar:
            task = bar.add_task("reading", total=1.0)
            report = rewrite_onnx(
                src, dst, verify=verify, overwrite=overwrite,
                progress=lambda stage, done: bar.update(task, description=stage, completed=done),
            )  # fmt: skip
    except (OSError, ValueError, TypeError, VerificationError) as error:
        errors.print(str(error), style="red", markup=False)
        raise typer.Exit(2) from error
    if html is not None:
        html.write_text(report.page(), encoding="utf-8")
    console.print(json.dumps(report.as_dict(), indent=2) if as_json else str(report), markup=False, highlight=False)


@app.command()
def bench_kernels(
    ops: Annotated[list[str] | None, typer.Argument(help="The ops to measure; all that have cases if none.")] = None,
    dtype: Annotated[str, typer.Option(help="float16, bfloat16 or float32; float16 on a GPU unless given.")] = "",
    quick: Annotated[bool, typer.Option("--quick", help="5 rounds and small cases, on a CPU tiny ones.")] = False,
    out: Annotated[Path, typer.Option(help="The folder for <op>.json and <op>.png.")] = Path("build/bench-kernels"),
    as_json: Json = False,
) -> None:
    """Measure the kernels against what torch has for the same work. Fails where one of ours could not be timed."""
    from trimaran.benchmarks import kernels, report  # everything is imported here, and only here

    console, errors = Console(width=None if sys.stdout.isatty() else 100), Console(stderr=True)

    def done(found: dict[str, Any]) -> None:
        report.write(found, out)
        if not as_json:
            console.print(report.table(found))
            console.print(f"{out / found['op']}.json, {out / found['op']}.png", highlight=False, soft_wrap=True)

    try:
        found = kernels.bench(ops or [], dtype, quick, errors, done)
    except ValueError as error:
        errors.print(f"[red]{error}")
        raise typer.Exit(2) from error
    if as_json:
        print(json.dumps(found, indent=2))
    failures = kernels.failures(found)
    for failure in failures:
        errors.print(f"FAILED: {failure}", style="red", markup=False, highlight=False, soft_wrap=True)
    if failures:
        raise typer.Exit(1)


@app.command()
def check_kernels(
    ops: Annotated[list[str] | None, typer.Argument(help="Ops; all of them if none is named.")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="How often each variant runs under load.")] = 100,
    sanitizer: Annotated[list[str] | None, typer.Option(help="memcheck, initcheck, synccheck or racecheck.")] = None,
) -> None:
    """Run every compiled variant on a GPU again and again, and under compute-sanitizer. Fails where bits differ or a
    sanitizer finds something."""
    import torch
    from rich.progress import Progress

    from trimaran.benchmarks import soundness

    console, errors = Console(soft_wrap=True), Console(stderr=True, soft_wrap=True)
    if not torch.cuda.is_available():
        errors.print("[red]check-kernels needs a CUDA GPU; the tests interpret the kernels on the CPU")
        raise typer.Exit(2)
    failed = False
    with Progress(console=errors) as progress:
        try:
            soundness.compile_all(progress, ops or ())
        except ValueError as error:
            errors.print(str(error), style="red", markup=False)
            raise typer.Exit(2) from error
        for tool in sanitizer or []:
            try:
                wrong, explained = soundness.sanitize(tool, ops or ())
            except (ValueError, OSError, RuntimeError) as error:
                errors.print(str(error), style="red", markup=False)
                raise typer.Exit(2) from error
            console.print(f"{tool}: {wrong.total()} findings, {explained.total()} more are explained")
            for place, count in wrong.items():
                errors.print(f"FAILED: {tool}: {count} x {place}", style="red", markup=False)
            failed |= bool(wrong)
        found = soundness.repeat(repeats, progress, ops or ())
    for name, count in found.items():
        if count:
            errors.print(f"FAILED: {name}: {count} of {repeats} runs differ", style="red", markup=False)
    console.print(f"{len(found)} variants, {repeats} runs each: {sum(found.values())} differ")
    if failed or any(found.values()):
        raise typer.Exit(1)


@app.command()
def verify(
    first: Annotated[Path, typer.Argument(help="The ONNX file that is right.")],
    second: Annotated[Path, typer.Argument(help="The one to compare with it.")],
    inputs: Annotated[Path | None, typer.Option(help="An .npz file of inputs by name; random ones if none.")] = None,
    seed: Annotated[int, typer.Option(help="Of the random inputs.")] = 0,
    as_json: Json = False,
) -> None:
    """Run two ONNX files on the same inputs, on the CPU. Fails where they differ, and says from which node on; and in
    half precision, which nodes to keep in fp32 so that they do not."""
    import numpy as np

    from trimaran.export.differences import verify_files
    from trimaran.export.verify import CannotVerify

    try:
        given = None if inputs is None else dict(np.load(inputs))
        found = verify_files(first, second, given, seed)
    except (CannotVerify, OSError, ValueError) as error:
        Console(stderr=True).print(str(error), style="red", markup=False)
        raise typer.Exit(2) from error
    if as_json:
        print(json.dumps({"ok": found.ok, **asdict(found)}, indent=2))
    else:
        for line in found.lines():
            print(line)
    if not found.ok:
        raise typer.Exit(1)


@app.command()
def compare_fusions(
    files: Annotated[list[Path], typer.Argument(help="ONNX files.")],
    out: Annotated[Path, typer.Option(help="The folder for fusions.json and fusions.md.")] = Path("build/fusions"),
) -> None:
    """Count what each optimizer of ONNX files finds in these: attention, norms, residual norms, rotary embeddings,
    gated and activated linear layers. Ours against ONNX Runtime's two, onnxscript's and transformers'."""
    from trimaran.benchmarks import fusions as job

    errors = Console(stderr=True, soft_wrap=True)
    missing = [str(file) for file in files if not file.is_file()]
    if missing:
        errors.print(f"files has {', '.join(missing)}, expected ONNX files", style="red", markup=False)
        raise typer.Exit(2)
    found = job.compare(files, lambda text: errors.print(text, markup=False, highlight=False))
    job.write(found, out)
    fewer = [f"{file}: {', '.join(kinds)}" for file, row in found["files"].items() if (kinds := job.fewer(row))]
    print(f"{len(found['files'])} files, somebody finds more than we in {len(fewer)}; {out / 'fusions.md'}")
    for text in fewer:
        print(f"  {text}")


@app.command()
def bench_nodes(
    nodes: Annotated[int, typer.Option(min=1, help="How many nodes the chain has.")] = 100,
    rounds: Annotated[int, typer.Option(min=1, help="How often each chain is timed.")] = 30,
    out: Annotated[Path, typer.Option(help="The folder for nodes.json and nodes.png.")] = Path("build/bench-nodes"),
    as_json: Json = False,
) -> None:
    """Measure what a node costs in ONNX Runtime, ours against its own. Fails where one of ours could not be timed."""
    from trimaran.benchmarks import nodes as job  # everything is imported here, and only here

    console, errors = Console(width=None if sys.stdout.isatty() else 100), Console(stderr=True)
    found = job.bench(nodes, rounds, errors)
    job.write(found, out)
    if as_json:
        print(json.dumps(found, indent=2))
    else:
        console.print(job.table(found))
        console.print(f"{out / 'nodes.json'}, {out / 'nodes.png'}", highlight=False, soft_wrap=True)
    if failures := job.failures(found):
        for failure in failures:
            errors.print(f"FAILED: {failure}", style="red", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(1)


class RunsByDefault(typer.core.TyperGroup):
    """`trimaran bench MODEL` is `trimaran bench run MODEL`."""

    def parse_args(self, context: Any, arguments: list[str]) -> list[str]:
        if arguments and arguments[0] not in (*self.commands, "--help"):
            arguments = ["run", *arguments]
        return super().parse_args(context, arguments)


bench = typer.Typer(cls=RunsByDefault, no_args_is_help=True)
app.add_typer(bench, name="bench", help="Measure models by every engine, side by side, or compare two such results.")


@bench.command("run")
def bench_run(
    models: Annotated[list[str], typer.Argument(help="Presets, folders that transformers loads, or ONNX files.")],
    batch: Annotated[str, typer.Option(help="Batches, as 1,8,32; crossed with --seq.")] = "",
    seq: Annotated[str, typer.Option(help="Lengths, as 128,512.")] = "",
    shapes: Annotated[str, typer.Option(help="Single shapes, as 1x16,32x512.")] = "",
    engines: Annotated[str, typer.Option(help="Groups or parts of names, as trimaran,onnxruntime; all if none.")] = "",
    dtype: Annotated[str, typer.Option(help="float16, bfloat16 or float32; float16 on a GPU unless given.")] = "",
    lengths: Annotated[str, typer.Option(help="dense, uniform, lee; dense,uniform unless given.")] = "",
    rounds: Annotated[int, typer.Option(min=1, help="How often each engine is timed in a case, at most.")] = 30,
    budget: Annotated[float, typer.Option(min=0, help="Seconds for each model; what does not fit is listed.")] = 0,
    cold: Annotated[bool, typer.Option("--cold", help="Also the first output of a new process.")] = False,
    open_loop: Annotated[float, typer.Option(min=0, help="Seconds of requests by chance for each engine.")] = 0,
    out: Annotated[Path, typer.Option(help="The folder for <model>.json, .csv, .png, .svg, .html.")] = Path(
        "build/bench"
    ),
    as_json: Json = False,
) -> None:
    """Measure models by every engine, side by side. Fails where one of ours could not be timed."""
    from trimaran.benchmarks import bench as job  # everything is imported here, and only here
    from trimaran.benchmarks import tables

    console, errors = Console(width=None if sys.stdout.isatty() else 140), Console(stderr=True)

    def listed(text: str) -> list[str]:
        return [part.strip() for part in text.split(",") if part.strip()]

    def numbers(name: str, text: str) -> list[int]:
        if not all(part.isdecimal() for part in listed(text)):
            raise ValueError(f"{name} is {text!r}, expected numbers, as 1,8,32")
        return [int(part) for part in listed(text)]

    try:
        pairs = [numbers("shapes", shape.replace("x", ",")) for shape in listed(shapes)]
        if any(len(pair) != 2 for pair in pairs):
            raise ValueError(f"shapes is {shapes!r}, expected batches and lengths, as 1x16,32x512")
        plans = [
            job.plan_of(
                model, dtype=dtype, batch=numbers("batch", batch), seq=numbers("seq", seq),
                shapes=[(pair[0], pair[1]) for pair in pairs], lengths=listed(lengths), engines=listed(engines),
                rounds=rounds, stream_s=open_loop,
            )
            for model in models
        ]  # fmt: skip
    except ValueError as error:
        errors.print(str(error), style="red", markup=False)
        raise typer.Exit(2) from error
    failures = []
    for number, plan in enumerate(plans):
        found = job.bench(plan.starting_now(budget, idle=number == 0), out, errors, cold)
        console.print(json.dumps(found.as_dict(), indent=2) if as_json else tables.report(found), markup=False)
        failures += [f"{found.model}: {failure}" for failure in job.failures(found)]
    for failure in failures:
        errors.print(f"FAILED: {failure}", style="red", markup=False, highlight=False, soft_wrap=True)
    if failures:
        raise typer.Exit(1)


@bench.command("compare")
def bench_compare(
    old: Annotated[Path, typer.Argument(help="A result of trimaran bench.")],
    new: Annotated[Path, typer.Argument(help="A later one of the same model.")],
    as_json: Json = False,
) -> None:
    """Say what changed between two results beyond noise. Fails where one of ours became slower."""
    from trimaran.benchmarks import changes

    try:
        found = changes.compare(old, new)
    except (OSError, ValueError) as error:
        Console(stderr=True).print(str(error), style="red", markup=False)
        raise typer.Exit(2) from error
    if as_json:
        print(json.dumps(asdict(found), indent=2))
    else:
        Console(width=None if sys.stdout.isatty() else 140).print(changes.table(found))
    if found.slower_ours():
        raise typer.Exit(1)


@app.command()
def soak(
    scale: Annotated[float, typer.Option(help="What part of the full counts is run.")] = 1.0,
    out: Annotated[Path, typer.Option(help="The JSON file.")] = Path("build/soak.json"),
    as_json: Json = False,
) -> None:
    """Run the ops of ONNX Runtime many times, in many threads and sessions. Fails where anything is wrong or grows."""
    from trimaran.benchmarks import soak as job  # everything is imported here, and only here

    console, errors = Console(width=None if sys.stdout.isatty() else 100), Console(stderr=True)
    found = job.soak(scale, errors, lambda check: errors.print(f"{check.name}: {'ok' if check.ok else 'FAILED'}"))
    job.write(found, out)
    if as_json:
        print(json.dumps(found, indent=2))
    else:
        console.print(job.table(found))
    if not all(check["ok"] for check in found["checks"]):
        raise typer.Exit(1)


def main() -> None:
    """The console script."""
    app()
