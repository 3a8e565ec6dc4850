"""Speeds of replicas and the rate of ended requests, from the counters of all workers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from ..policy.speed import StreamRate, decay, weights
from .memory import WORKERS, BoardMemory
from .rows import Rows

#: Seconds over which ended requests are averaged.
_RATE_SECONDS = 5.0


class _Counters(NamedTuple):
    """Counters of one worker."""

    pid: int
    ended: int
    tokens: Sequence[int]
    seconds: Sequence[float]


class RateMeter:
    """Compares the counters with their last values. All calls come under the board's lock."""

    def __init__(self, memory: BoardMemory, rows: Rows) -> None:
        self._memory = memory
        self._rows = rows
        self._at: float | None = None
        self._before: dict[int, _Counters] = {}

    def measure(self, now: float) -> None:
        """Update weights and rates. The first call only reads, so an earlier leader's values stay."""
        counters = {
            index: _Counters(cells.pid[0], cells.ended[0], cells.passed.tolist(), cells.seconds.tolist())
            for index, cells in enumerate(self._memory.counters[:WORKERS])
            if cells.pid[0]
        }
        if self._at is not None and now > self._at:
            self._update(now - self._at, counters)
        self._at, self._before = now, counters

    def _update(self, elapsed: float, counters: dict[int, _Counters]) -> None:
        memory = self._memory
        rows = self._rows.used()
        tokens = dict.fromkeys(rows, 0)
        seconds = dict.fromkeys(rows, 0.0)
        ended = 0
        for index, now in counters.items():
            before = self._before.get(index)
            if before is None or before.pid != now.pid:
                continue  # the worker is new
            ended += now.ended - before.ended
            for row in rows:
                # A replica that is new in its row gets the last second of its predecessor, which soon decays.
                tokens[row] += now.tokens[row] - before.tokens[row]
                seconds[row] += now.seconds[row] - before.seconds[row]
        keep = decay(elapsed, _RATE_SECONDS)
        memory.drain_rate[0] = memory.drain_rate[0] * keep + ended / elapsed * (1 - keep)
        rates = [
            StreamRate(memory.passed[row], memory.seconds[row]).after(elapsed, tokens[row], seconds[row])
            for row in rows
        ]
        old = [memory.weight[row] for row in rows]
        new = weights(rates, old)
        if new != old:
            self._rows.begin_change()
        for row, rate, weight in zip(rows, rates, new, strict=True):
            memory.passed[row], memory.seconds[row] = rate
            memory.weight[row] = weight
