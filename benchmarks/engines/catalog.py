"""All engines, in the order in which they are built and get ready for a case: those that take long come last."""

from __future__ import annotations

from trimaran.benchmarks.engines import (
    first_table,
    ort,
    other_kernels,
    ours,
    tensorrt_,
    torch_compile,
    transformers_eager,
    unpadded,
)
from trimaran.benchmarks.engines.contract import Engine
from trimaran.benchmarks.engines.transformers_eager import AUTOCAST, REFERENCE

ENGINES: tuple[Engine, ...] = (
    *transformers_eager.ENGINES,
    *unpadded.ENGINES,
    *other_kernels.ENGINES,
    *ort.ENGINES,
    *ours.ENGINES,
    *tensorrt_.ENGINES,
    *first_table.ENGINES,
    *torch_compile.ENGINES,
)


def chosen(names: list[str]) -> list[str]:
    """Engines by name, by group, or by a part of a name, in the order of the catalog; all where nothing is named. The
    reference is always among them. ValueError for a name that fits none."""
    found = {engine.name for engine in ENGINES if not names}
    for name in names:
        fits = {e.name for e in ENGINES if name.lower() in (e.name.lower(), e.group.lower())}
        fits = fits or {e.name for e in ENGINES if name.lower() in e.name.lower()}
        if not fits:
            raise ValueError(f"no engine {name!r}, expected a group ({', '.join(groups())}) or a part of a name of "
                             f"{[engine.name for engine in ENGINES]}")  # fmt: skip
        found |= fits
    return [engine.name for engine in ENGINES if engine.name in found | {REFERENCE}]


def groups() -> list[str]:
    return list(dict.fromkeys(engine.group for engine in ENGINES))


def by_name(name: str) -> Engine:
    return next(engine for engine in ENGINES if engine.name == name)


__all__ = ["AUTOCAST", "ENGINES", "REFERENCE", "by_name", "chosen", "groups"]
