"""Slots of the board in which workers count: taken by a live worker, cleared after its death."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable

from .lease import WorkerCounters
from .locks import KernelLocks
from .memory import WORKERS, BoardError, BoardMemory
from .rows import Rows

logger = logging.getLogger(__name__)


class WorkerSlots:
    """Slots of all workers, as one process uses them. All calls come under the board's lock.

    A worker holds the liveness lock with the number of its slot.
    """

    def __init__(
        self, memory: BoardMemory, rows: Rows, locks: KernelLocks, clock: Callable[[], float]
    ) -> None:
        self._memory = memory
        self._rows = rows
        self._locks = locks
        self._clock = clock
        self.own: WorkerCounters | None = None

    def open(self) -> int:
        """Take a slot for this process and return its number. Raises BoardError if all are taken."""
        if self.own is not None:
            return self.own.index
        self.drop_dead()
        for index, cells in enumerate(self._memory.counters[:WORKERS]):
            if cells.pid[0] == 0 and self._locks.take_liveness(index):
                self._rows.begin_change()
                cells.clear()
                cells.pid[0] = os.getpid()
                self.own = WorkerCounters(index, cells, self._clock)
                return index
        raise BoardError(f"the board has room for {WORKERS} workers, and there are as many")

    def drop_dead(self) -> None:
        """Clear the slots of dead workers, whose requests have ended with them."""
        for index, cells in enumerate(self._memory.counters[:WORKERS]):
            pid = cells.pid[0]
            is_own = self.own is not None and self.own.index == index
            if pid and not is_own and not self._locks.is_held_elsewhere(index):
                if lost := sum(cells.in_flight):
                    logger.warning("worker %d has died with %d requests in flight", pid, lost)
                self._rows.begin_change()
                cells.clear()
                cells.pid[0] = 0
