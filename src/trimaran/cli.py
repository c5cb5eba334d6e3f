"""The command line: `trimaran demo` and `trimaran info`."""

import json
from dataclasses import asdict
from typing import Annotated

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


def main() -> None:
    """The console script."""
    app()
