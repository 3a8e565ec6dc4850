"""The workers' columns: who counts where, and what becomes of the counts of one that has died."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable

from .lease import OwnCounters
from .locks import KernelLocks
from .memory import WORKERS, BoardError, BoardMemory
from .rows import Rows

logger = logging.getLogger(__name__)


class Columns:
    """Of this process and as it sees the others. All calls come under the board's lock.

    The owner of a column has the mark with its number, which tells whether it is alive.
    """

    def __init__(
        self, memory: BoardMemory, rows: Rows, locks: KernelLocks, clock: Callable[[], float]
    ) -> None:
        self._memory = memory
        self._rows = rows
        self._locks = locks
        self._clock = clock
        self.own: OwnCounters | None = None

    def open(self) -> int:
        """Raises BoardError if all are taken."""
        if self.own is not None:
            return self.own.index
        self.drop_dead()
        for index, column in enumerate(self._memory.columns[:WORKERS]):
            if column.pid[0] == 0 and self._locks.take_mark(index):
                self._rows.changing()
                column.clear()
                column.pid[0] = os.getpid()
                self.own = OwnCounters(index, column, self._clock)
                return index
        raise BoardError(f"the board has room for {WORKERS} workers, and all of it is taken")

    def drop_dead(self) -> None:
        """The requests of a worker that has died have ended with it."""
        for index, column in enumerate(self._memory.columns[:WORKERS]):
            pid = column.pid[0]
            is_own = self.own is not None and self.own.index == index
            if pid and not is_own and not self._locks.is_marked(index):
                if lost := sum(column.in_flight):
                    logger.warning("worker %d has died with %d requests in flight", pid, lost)
                self._rows.changing()
                column.clear()
                column.pid[0] = 0
