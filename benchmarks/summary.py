"""What a result says in a few lines: the best peer first, Kernl's baseline second, and where we lose."""

from __future__ import annotations

from dataclasses import dataclass

from trimaran.benchmarks.engines.ours import IN_PYTORCH
from trimaran.benchmarks.engines.transformers_eager import AUTOCAST
from trimaran.benchmarks.measure import percentile
from trimaran.benchmarks.result import CaseResult, Result, percent, ratio
from trimaran.benchmarks.sidebyside import Row

# of the table of headlines, wherever it stands; wall times in ms
COLUMNS = ("batch x seq", "best peer", "ms", "autocast fp16", "trimaran PyTorch", "trimaran ORT", "x best peer",
           "p20–p80", "x autocast", "% bound", "% GEMMs")  # fmt: skip


@dataclass(frozen=True)
class Headline:
    """One case. Wall times in ms, of ours in PyTorch and the best of ours in onnxruntime; `speedup` is the best peer's
    time over our best, `over_baseline` that of transformers under autocast. None where one was not timed."""

    case: str
    peer: str
    peer_ms: float | None
    baseline_ms: float | None
    pytorch_ms: float | None
    ort_ms: float | None
    ours_ms: float | None
    speedup: dict[str, float] | None
    over_baseline: float | None
    percent_of_limit: float | None
    percent_of_gemms: float | None

    @property
    def lost(self) -> bool:
        """Whether the best peer is faster than all of ours."""
        return self.speedup is not None and self.speedup["median"] < 1


def headline(result: Result, case: CaseResult) -> Headline:
    peer, mine, baseline = result.best_peer(case), result.best_of_ours(case), case.row(AUTOCAST)
    ours_ms, baseline_ms = wall(mine), wall(baseline)
    return Headline(
        case.name,
        peer.engine if peer else "",
        wall(peer),
        baseline_ms,
        wall(case.row(IN_PYTORCH)),
        best_ort(result, case),
        ours_ms,
        ratio(peer, mine) if mine else None,
        baseline_ms / ours_ms if baseline_ms and ours_ms else None,
        percent(case.limit_ms, mine) if mine else None,
        percent(case.gemms_ms, mine) if mine else None,
    )


def cells(line: Headline) -> list[str]:
    """Of `COLUMNS`."""
    over = line.speedup
    return [
        line.case, line.peer, number(line.peer_ms), number(line.baseline_ms), number(line.pytorch_ms),
        number(line.ort_ms), number(over["median"] if over else None, ".2f"),
        f"{over['p20']:.2f}–{over['p80']:.2f}" if over else "", number(line.over_baseline, ".1f"),
        number(line.percent_of_limit, ".0f"), number(line.percent_of_gemms, ".0f"),
    ]  # fmt: skip


def number(value: float | None, form: str = ".3g") -> str:
    return "" if value is None else f"{value:{form}}"


def best_ort(result: Result, case: CaseResult) -> float | None:
    mine = (row for row in case.timed() if result.is_ours(row.engine) and row.engine != IN_PYTORCH)
    return min(filter(None, map(wall, mine)), default=None)


def headlines(result: Result) -> list[Headline]:
    return [headline(result, case) for case in result.cases]


def wall(row: Row | None) -> float | None:
    return percentile(row.wall_ms, 50) if row is not None and row.wall_ms else None


def lost(result: Result) -> list[tuple[str, str, float, str, float]]:
    """(case, one of ours, its ms, the best peer, its ms) wherever one of ours is slower than the best peer."""
    found = []
    for case in result.cases:
        peer = result.best_peer(case)
        for row in case.timed():
            mine, best = wall(row), wall(peer)
            if peer and result.is_ours(row.engine) and mine and best and mine > best:
                found.append((case.name, row.engine, mine, peer.engine, best))
    return found


def memory(result: Result) -> list[tuple[str, float, float, int]]:
    """(engine, MiB of the device when it was built, MiB of all shapes, how many shapes), where it was measured."""
    found = []
    for state in result.engines:
        shapes = [row.prepare_mib for case in result.cases for row in case.timed() if row.engine == state.name]
        known = [mib for mib in shapes if mib is not None]
        if state.build_mib is not None and known:
            found.append((state.name, state.build_mib, sum(known), len(known)))
    return found


def sentence(result: Result) -> str:
    """All cases in words: the best peer first, transformers under autocast second."""
    found = headlines(result)
    factors = sorted(line.speedup["median"] for line in found if line.speedup)
    if not factors:
        return "There is no case in which both ours and a peer were timed."
    won = sum(factor >= 1 for factor in factors)
    text = (
        f"The best of ours against the best peer of each case: {factors[0]:.2f} to {factors[-1]:.2f} times as fast, "
        f"ahead in {won} of {len(factors)} cases."
    )
    over = sorted(line.over_baseline for line in found if line.over_baseline)
    return text + (
        f" Against transformers under autocast: {over[0]:.1f} to {over[-1]:.1f} times as fast." if over else ""
    )
