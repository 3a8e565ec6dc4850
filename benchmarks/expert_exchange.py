"""Dispatch and combine between ranks against memcpy of the same bytes on the same cores."""

from __future__ import annotations

import sys
import uuid
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

from .contender import ContenderProcess, Timing
from .expert_rank import ELEMENT_BYTES, HIDDEN, TOP_K
from .rows import ROOT, Row

RANKS = (2, 4, 8)
TOKENS = (8, 64, 256, 1024)
#: Approximate bytes that all ranks send in one measurement.
_VOLUME = 2 << 30
_REPEATS = 5


def exchange_rows() -> Iterator[Row]:
    for count in RANKS:
        with _ranks(count) as ranks:
            for tokens in TOKENS:
                # Dispatch and combine.
                size = 2 * count * tokens * TOP_K * HIDDEN * ELEMENT_BYTES
                rounds = max(20, min(2000, _VOLUME // size))
                # Alternate, so that both run under the same conditions; take the best, as noise only slows.
                ours, limit = [], []
                for _ in range(_REPEATS):
                    ours.append(_seconds(ranks, "exchange", tokens, rounds))
                    limit.append(_seconds(ranks[:1], "copy", tokens, rounds))
                case = f"dispatch_combine_t{tokens}_{count}r"
                yield Row(
                    case, "GB/s", size * rounds / min(ours) / 1e9, limit=size * rounds / min(limit) / 1e9
                )
                yield Row(case, "us", min(ours) / rounds * 1e6, min(limit) / rounds * 1e6, "memcpy")


@contextmanager
def _ranks(count: int) -> Iterator[Sequence[ContenderProcess]]:
    command = [sys.executable, "-m", "benchmarks.expert_rank", "--group", f"bench-{uuid.uuid4().hex[:8]}"]
    command += ["--num-seats", str(count), "--max-tokens", str(max(TOKENS))]
    with ExitStack() as processes:
        ranks = [
            processes.enter_context(ContenderProcess(f"rank {seat}", [*command, "--seat", str(seat)], ROOT))
            for seat in range(count)
        ]
        for rank in ranks:
            rank.wait_ready()
        yield ranks


def _seconds(ranks: Sequence[ContenderProcess], what: str, tokens: int, rounds: int) -> float:
    for rank in ranks:
        rank.ask(what, tokens=tokens, rounds=rounds)
    timings = [Timing(**rank.result()) for rank in ranks]
    return max(timing.ended for timing in timings) - min(timing.started for timing in timings)
