"""Report of the router comparison: a table of all contenders, stored rows, and targets."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from .router_cases import Case, Figures, HeldCase
from .router_contenders import DIRECT
from .rows import CORES, Row

#: One core each for client, engines and two workers.
_CORES_FOR_TWO_WORKERS = 4
#: Metrics only for the table: they show whether the load could be sustained.
_UNTOLD = ("chunks_per_s", "gap_p99_ms")
#: Resolution of added latency in ms; smaller values are noise.
_MIN_MS = 0.01


class Findings:
    """Results by contender and case, one per repetition, and failures."""

    def __init__(self) -> None:
        self._found: dict[tuple[str, str], list[Figures]] = defaultdict(list)
        self.failures: dict[tuple[str, str], str] = {}

    def add(self, case: Case, contender: str, figures: Figures) -> None:
        self._found[case.name, contender].append(figures)

    def fail(self, case: Case, contender: str, why: str) -> None:
        """Record that a contender failed in a case; its results do not count."""
        self.failures[case.name, contender] = why

    def of(self, case: Case, contender: str) -> Figures | None:
        """Return the median of each metric; None without valid results."""
        key = case.name, contender
        if key in self.failures or key not in self._found:
            return None
        found = self._found[key]
        return {metric: statistics.median(figures[metric] for figures in found) for metric in found[0]}

    def added(self, case: Case, contender: str) -> Figures | None:
        """Return the medians with the latency of `direct` subtracted from times."""
        figures, direct = self.of(case, contender), self.of(case, DIRECT)
        if figures is None or direct is None:
            return figures
        return {
            metric: max(_MIN_MS, value - direct[metric]) if metric.endswith("_ms") else value
            for metric, value in figures.items()
        }


def print_table(cases: Sequence[Case], findings: Findings) -> None:
    """Print the table of all results as measured."""
    for case in cases:
        print(f"\n{case.name}")
        found = {name: figures for name in case.contenders if (figures := findings.of(case, name))}
        for figures in list(found.values())[:1]:
            print(" " * 15 + "".join(f"{metric:>14}" for metric in figures))
        for name, figures in found.items():
            # `direct` has no router processes.
            shown = (
                "-" if (name, metric) == (DIRECT, "cpu_us") else f"{value:.2f}"
                for metric, value in figures.items()
            )
            print(f"  {name:<13}" + "".join(f"{value:>14}" for value in shown))
        for name in case.contenders:
            if (case.name, name) in findings.failures:
                print(f"  {name:<13}failed: {findings.failures[case.name, name]}")
    print()


def rows_of(cases: Sequence[Case], findings: Findings) -> Iterator[Row]:
    """Return rows of our router against each peer. Times are added latency, limits those of `direct`."""
    for case in cases:
        ours = findings.added(case, "ours")
        if ours is None:
            continue
        if case.kind == "workers":
            if (two := findings.of(case, "ours2")) is not None:
                yield Row("two_workers_rps_ratio", "ratio", two["rps"] / ours["rps"])
            continue
        direct = findings.of(case, DIRECT)
        peers = [name for name in case.contenders if name not in (DIRECT, "ours") and findings.of(case, name)]
        for metric, value in ours.items():
            if metric in _UNTOLD:
                continue
            limit = direct["rps"] if direct and metric == "rps" else None
            name, unit = _name(case, metric), _unit(metric)
            if not peers:
                yield Row(name, unit, value, limit=limit)
            for peer in peers:
                figures = findings.added(case, peer)
                assert figures is not None
                yield Row(f"{name}_vs_{peer}", unit, value, figures[metric], peer, limit)


def _name(case: Case, metric: str) -> str:
    if isinstance(case, HeldCase):
        return f"{metric}_{case.size}_streams"
    return f"{case.kind}_{metric}_c{case.size}"


def _unit(metric: str) -> str:
    if metric.endswith("_ms"):
        return "ms added"
    return {"cpu_us": "us", "pss_mb": "MB", "rps": "requests/s"}[metric]


@dataclass(frozen=True, slots=True)
class Target:
    case: str
    #: Applies to our value divided by the peer's; None: to our value itself.
    ratio: float | None = None
    at_most: float | None = None
    at_least: float | None = None

    def line(self, row: Row) -> str:
        """Return one line that says whether the target was met."""
        if self.ratio is not None:
            assert row.peer
            found, bound, sign = row.ours / row.peer, self.ratio, "<="
        elif self.at_most is not None:
            found, bound, sign = row.ours, self.at_most, "<="
        else:
            assert self.at_least is not None
            found, bound, sign = row.ours, self.at_least, ">="
        met = found <= bound if sign == "<=" else found >= bound
        verdict = "met" if met else "MISSED"
        if self.case == "two_workers_rps_ratio" and CORES < _CORES_FOR_TWO_WORKERS:
            verdict = f"{CORES} cores: not measurable, as load and engines take theirs"
        return f"{self.case:<32} {found:8.2f} {sign} {bound:<6g} {verdict}"


TARGETS = (
    Target("unary_cpu_us_c64_vs_sglang", ratio=0.5),
    Target("unary_cpu_us_c64_vs_vllm", ratio=0.7),
    Target("sse_cpu_us_c256_vs_sglang", ratio=0.8),
    Target("sse_cpu_us_c256_vs_vllm", ratio=0.8),
    Target("sse_ttft_p99_ms_c256_vs_sglang", ratio=1.0),
    Target("sse_ttft_p99_ms_c256_vs_vllm", ratio=1.0),
    Target("pss_mb_4096_streams", at_most=300),
    Target("two_workers_rps_ratio", at_least=1.7),
)


def print_targets(rows: Sequence[Row]) -> None:
    print("\ntargets (ratios to the peer, megabytes, times as much)")
    for target in TARGETS:
        for row in rows:
            # Our value is the same in the rows of all peers.
            if row.case == target.case or (target.ratio is None and row.case.startswith(target.case)):
                print(target.line(row))
                break
