"""A request's claim on a replica, and the counters of the worker that made it."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from ..instance import Instance, ReplicaHandle
from .memory import CounterCells

logger = logging.getLogger(__name__)

#: Minimum seconds between two counts of a stream's tokens, so that not every token touches the board.
_COUNT_SECONDS = 0.25


class WorkerCounters:
    """Counters of this process. No other process writes them, so they need no lock between processes."""

    def __init__(self, index: int, cells: CounterCells, clock: Callable[[], float]) -> None:
        self.index = index
        self.clock = clock
        self._cells = cells
        #: Between threads of this process.
        self._lock = threading.Lock()

    def begin(self, handle: ReplicaHandle, tokens: int, probing: bool) -> Lease:
        row, cells = handle.row, self._cells
        with self._lock:
            cells.in_flight[row] += 1
            cells.tokens[row] += tokens
            if probing:
                cells.probes[row] += 1
        return Lease(self, handle, tokens, probing)

    def reserve(self, row: int, now: float) -> None:
        """Reserve a row; with `now` 0, end the reservation."""
        self._cells.reserved[row] = now

    def has_reserved(self, row: int) -> bool:
        return self._cells.reserved[row] != 0.0

    def end(self, lease: Lease) -> None:
        row, cells = lease.handle.row, self._cells
        with self._lock:
            if not lease.held:
                return
            lease.held = False
            # A row is not given to another replica before the last of its requests has ended.
            left = cells.in_flight[row] - 1
            if left < 0:
                # A count below zero would draw every request to this replica.
                logger.error("replica=%s: more requests have ended than begun", lease.instance.name)
            cells.in_flight[row] = max(0, left)
            cells.tokens[row] -= lease.tokens
            if lease.probing:
                cells.probes[row] -= 1
            cells.ended[0] += 1

    def count(self, lease: Lease, tokens: int, seconds: float) -> None:
        row, cells = lease.handle.row, self._cells
        with self._lock:
            if lease.held:
                cells.passed[row] += tokens
                cells.seconds[row] += seconds


class Lease:
    """One request in flight at a replica: counted when the replica is picked, released once."""

    __slots__ = ("_counters", "_due", "_passed", "_since", "handle", "held", "probing", "tokens")

    def __init__(self, counters: WorkerCounters, handle: ReplicaHandle, tokens: int, probing: bool) -> None:
        self._counters = counters
        self.handle = handle
        #: Tokens of the prompt.
        self.tokens = tokens
        #: True if this request probes the replica: its outcome decides whether others follow.
        self.probing = probing
        self.held = True
        self._passed = 0
        self._since = self._due = 0.0

    @property
    def instance(self) -> Instance:
        return self.handle.instance

    def count_tokens(self, count: int) -> None:
        """Record that `count` tokens of the response have just been passed on.

        The first call only starts the clock, because a complete response that comes in one call says nothing
        about speed.
        """
        now = self._counters.clock()
        if not self._since:
            self._since, self._due = now, now + _COUNT_SECONDS
            return
        self._passed += count
        if now >= self._due:
            self._flush(now)

    def release(self) -> None:
        """Release the claim; further calls have no effect."""
        try:
            if self._passed:
                self._flush(self._counters.clock())
        finally:
            self._counters.end(self)

    def _flush(self, now: float) -> None:
        self._counters.count(self, self._passed, now - self._since)
        self._passed, self._since, self._due = 0, now, now + _COUNT_SECONDS
