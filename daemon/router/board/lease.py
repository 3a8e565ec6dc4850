"""A request's claim on a replica."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from ..instance import Instance, ReplicaHandle
from .memory import Column

logger = logging.getLogger(__name__)

#: A stream's tokens are counted at most this often: the board is not touched for each.
_COUNT_SECONDS = 0.25


class OwnCounters:
    """This process's counters. Nobody else writes them, so that they need no lock between processes."""

    def __init__(self, index: int, cells: Column, clock: Callable[[], float]) -> None:
        self.index = index
        self.clock = clock
        self._cells = cells
        #: Threads of this process.
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
        """`now`: 0 ends the reservation."""
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
                logger.error("replica=%s more requests ended than began", lease.instance.name)
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
    """Counted when the replica was picked, given back once."""

    __slots__ = ("_column", "_due", "_passed", "_since", "handle", "held", "probing", "tokens")

    def __init__(self, column: OwnCounters, handle: ReplicaHandle, tokens: int, probing: bool) -> None:
        self._column = column
        self.handle = handle
        #: Of the prompt.
        self.tokens = tokens
        #: It tries the replica out: what becomes of it decides whether others follow.
        self.probing = probing
        self.held = True
        self._passed = 0
        self._since = self._due = 0.0

    @property
    def instance(self) -> Instance:
        return self.handle.instance

    def count_tokens(self, count: int) -> None:
        """So many tokens of a stream were passed on, just now.

        The clock starts with the first call, and what that counts is left out: an answer that comes whole, in
        one call, says nothing about speed.
        """
        now = self._column.clock()
        if not self._since:
            self._since, self._due = now, now + _COUNT_SECONDS
            return
        self._passed += count
        if now >= self._due:
            self._note(now)

    def release(self) -> None:
        """May be called again; only the first call counts."""
        try:
            if self._passed:
                self._note(self._column.clock())
        finally:
            self._column.end(self)

    def _note(self, now: float) -> None:
        self._column.count(self, self._passed, now - self._since)
        self._passed, self._since, self._due = 0, now, now + _COUNT_SECONDS
