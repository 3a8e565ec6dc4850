"""Results of benchmarks with their references, and how they are printed and stored."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
#: Cache of generated files: random models, compiled programs.
CACHE = ROOT / ".cache" / "bench"
CORES = len(os.sched_getaffinity(0))


@dataclass(frozen=True, slots=True)
class Row:
    case: str
    metric: str
    ours: float
    peer: float | None = None
    peer_name: str | None = None
    #: Hardware limit, measured in the same run.
    limit: float | None = None


def report(rows: Sequence[Row], name: str) -> None:
    """Print the table and write it to bench-results/NAME.json."""
    width = max(len(row.case) for row in rows)
    print(
        f"{'case':<{width}} {'metric':<10} {'ours':>10} {'peer':>10} {'ratio':>7} "
        f"{'limit':>10} {'of limit':>9}  peer"
    )
    for row in rows:
        peer = f"{row.peer:10.2f} {row.ours / row.peer:7.3f}" if row.peer else f"{'-':>10} {'-':>7}"
        limit = f"{row.limit:10.2f} {row.ours / row.limit:9.2f}" if row.limit else f"{'-':>10} {'-':>9}"
        print(f"{row.case:<{width}} {row.metric:<10} {row.ours:10.2f} {peer} {limit}  {row.peer_name or ''}")
    results = ROOT / "bench-results"
    results.mkdir(exist_ok=True)
    text = json.dumps([asdict(row) for row in rows], indent=1)
    (results / f"{name}.json").write_text(text + "\n", encoding="utf-8")
