"""Comparison of routing policies by traffic: `make bench-router-policies` writes docs/router-policies.svg.

A simulation with the router's real board, policies and prefix table. The eight replicas
(simulated_replica.py) and their clients (router_traffic.py) are simulated. It prints the tables of
docs/router-policies.md and takes about two minutes on one core.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType

import matplotlib as mpl

mpl.use("svg")
import matplotlib.pyplot as plt

from .router_settings import CONTENDERS, SETTINGS
from .rows import ROOT, Row, report
from .simulated_routers import Figures, Scene, figures_of, simulate

PLOT = ROOT / "docs" / "router-policies.svg"
#: The policy of FastDeploy's Python router, regardless of its configuration.
PEER = "random"

#: Colour and marker. fd_metrics_score is omitted, because it coincides with request_num.
MARKS: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        "random": ("0.6", "x"),
        "round_robin": ("0.6", "+"),
        "power_of_two": ("0.6", "2"),
        "process_tokens": ("tab:olive", "s"),
        "request_num": ("tab:blue", "o"),
        "longest_prefix": ("tab:purple", "v"),
        "session": ("tab:green", "^"),
        "cache_aware": ("tab:red", "D"),
    }
)

#: Results by setting and policy.
Results = Mapping[tuple[str, str], Figures]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=300.0, help="duration of simulated arrivals")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--out", type=Path, default=PLOT)
    arguments = parser.parse_args()
    results: dict[tuple[str, str], Figures] = {}
    for name in arguments.settings:
        scene = Scene.of(SETTINGS[name], arguments.seed, arguments.seconds)
        for policy in CONTENDERS:
            jobs = simulate(scene, policy)
            # Exclude the start, in which conversations begin and caches fill.
            settled = [job for job in jobs if job.arrived > arguments.seconds / 4]
            results[name, policy.name] = figures_of(settled)
    report(rows_of(results), "router_policies")
    for title, cell in TABLES.items():
        print(f"\n{title}\n\n{table(results, cell)}")
    draw(results, arguments.out)


def rows_of(results: Results) -> list[Row]:
    return [
        Row(
            f"{setting.replace(' ', '_')}_{policy}_{figure}",
            "percent" if figure == "cached" else "ms",
            getattr(figures, figure),
            getattr(results[setting, PEER], figure),
            PEER,
        )
        for (setting, policy), figures in results.items()
        for figure in Figures.__dataclass_fields__
    ]


#: Column title -> content of a cell.
TABLES: Mapping[str, Callable[[Figures], str]] = MappingProxyType(
    {
        "Time to the first token, ms: mean / median / 99th percentile": lambda f: (
            f"{f.ttft_mean:.0f} / {f.ttft_p50:.0f} / {f.ttft_p99:.0f}"
        ),
        "Time to the last token, s: mean": lambda f: f"{f.e2e_mean / 1e3:.2f}",
        "Prompt tokens found in a cache, %": lambda f: f"{f.cached:.0f}",
    }
)


def table(results: Results, cell: Callable[[Figures], str]) -> str:
    """Return a Markdown table with one row per policy."""
    settings = list(dict.fromkeys(setting for setting, _ in results))
    lines = [["", *settings], ["---"] * (len(settings) + 1)]
    lines += [[policy.name, *[cell(results[s, policy.name]) for s in settings]] for policy in CONTENDERS]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def draw(results: Results, file: Path) -> None:
    """Plot two panels with a line per setting and a marker per policy."""
    settings = list(dict.fromkeys(setting for setting, _ in results))
    # Keep text as text, and make the file reproducible.
    mpl.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "router-policies", "font.size": 9})
    figure, axes = plt.subplots(1, 2, figsize=(9, 4.6), sharey=True, layout="constrained")
    lines = [len(settings) - 1 - place for place in range(len(settings))]
    for panel, value, label in zip(axes, ("ttft_mean", "ttft_p99"), ("mean", "99th percentile"), strict=True):
        for policy, (colour, marker) in MARKS.items():
            panel.plot(
                [getattr(results[setting, policy], value) for setting in settings],
                lines,
                color=colour,
                marker=marker,
                markersize=6,
                linestyle="none",
                label=policy,
                alpha=0.85,
            )
        panel.set(xscale="log", xlabel=f"time to the first token, ms: {label}")
        panel.xaxis.set_major_formatter("{x:.0f}")
        panel.grid(alpha=0.3)
    axes[0].set_yticks(lines, settings)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False)
    figure.savefig(file, metadata={"Date": None})


if __name__ == "__main__":
    main()
