"""Turns the counters of all workers into speeds and rates, once a second, in the worker that leads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from ..policy.speed import Pace, decay, weights
from .memory import WORKERS, BoardMemory
from .rows import Rows

#: Seconds over which ended requests are averaged.
_RATE_SECONDS = 5.0


class _Counters(NamedTuple):
    """Of one worker."""

    pid: int
    ended: int
    tokens: Sequence[int]
    seconds: Sequence[float]


class Measuring:
    """Remembers what the counters were last time. Calls come under the board's lock."""

    def __init__(self, memory: BoardMemory, rows: Rows) -> None:
        self._memory = memory
        self._rows = rows
        self._at: float | None = None
        self._before: dict[int, _Counters] = {}

    def measure(self, now: float) -> None:
        """The first call only takes note; what the one that led before has measured stays."""
        counters = {
            index: _Counters(column.pid[0], column.ended[0], column.passed.tolist(), column.seconds.tolist())
            for index, column in enumerate(self._memory.columns[:WORKERS])
            if column.pid[0]
        }
        if self._at is not None and now > self._at:
            self._note(now - self._at, counters)
        self._at, self._before = now, counters

    def _note(self, elapsed: float, counters: dict[int, _Counters]) -> None:
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
                # Where a row's replica is new, it gets the last second of the one before, and forgets it.
                tokens[row] += now.tokens[row] - before.tokens[row]
                seconds[row] += now.seconds[row] - before.seconds[row]
        keep = decay(elapsed, _RATE_SECONDS)
        memory.drain_rate[0] = memory.drain_rate[0] * keep + ended / elapsed * (1 - keep)
        paces = [
            Pace(memory.passed[row], memory.seconds[row]).after(elapsed, tokens[row], seconds[row])
            for row in rows
        ]
        old = [memory.weight[row] for row in rows]
        new = weights(paces, old)
        if new != old:
            self._rows.changing()
        for row, pace, weight in zip(rows, paces, new, strict=True):
            memory.passed[row], memory.seconds[row] = pace
            memory.weight[row] = weight
