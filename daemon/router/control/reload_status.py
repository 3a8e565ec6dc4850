"""Outcome of the last reload (SIGHUP), written by the arbiter and read by all workers."""

from __future__ import annotations

import mmap
from enum import IntEnum


class Outcome(IntEnum):
    DONE = 0
    #: Old workers still serve.
    UNDER_WAY = 1
    #: The configuration is invalid, or changes what cannot change while the router runs.
    REFUSED = 2
    #: The new workers did not start.
    FAILED = 3


class ReloadStatus:
    """One cell of memory that processes forked later share. The arbiter is its only writer."""

    def __init__(self) -> None:
        self._cell = memoryview(mmap.mmap(-1, mmap.PAGESIZE)).cast("q")[:1]

    @property
    def number(self) -> int:
        """Number of the last reload; 0 if there was none."""
        return self._cell[0] >> 8

    @property
    def outcome(self) -> Outcome:
        return Outcome(self._cell[0] & 0xFF)

    def wire(self) -> dict[str, int | str]:
        """Return the fields that GET /health shows."""
        cell = self._cell[0]
        return {"number": cell >> 8, "outcome": Outcome(cell & 0xFF).name.lower().replace("_", " ")}

    def begin(self) -> int:
        """Record the start of a reload; return its number."""
        self._cell[0] = (number := self.number + 1) << 8 | Outcome.UNDER_WAY
        return number

    def end(self, number: int, outcome: Outcome) -> None:
        """Record the outcome of a reload, unless another one has begun."""
        if number == self.number:
            self._cell[0] = number << 8 | outcome
