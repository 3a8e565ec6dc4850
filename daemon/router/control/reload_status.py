"""What became of the last SIGHUP: the arbiter says it, whichever worker is asked can tell."""

from __future__ import annotations

import mmap
from enum import IntEnum


class Outcome(IntEnum):
    DONE = 0
    #: Workers of before are still asked.
    UNDER_WAY = 1
    #: What the files say now is wrong, or cannot change while the router runs.
    REFUSED = 2
    #: The new workers did not start.
    FAILED = 3


class Reloads:
    """A cell of memory that processes share which are forked later. The arbiter writes it, and whole."""

    def __init__(self) -> None:
        self._cell = memoryview(mmap.mmap(-1, mmap.PAGESIZE)).cast("q")[:1]

    @property
    def number(self) -> int:
        """Of the last reload; 0 if there was none."""
        return self._cell[0] >> 8

    @property
    def outcome(self) -> Outcome:
        return Outcome(self._cell[0] & 0xFF)

    def wire(self) -> dict[str, int | str]:
        """As GET /health shows it."""
        cell = self._cell[0]
        return {"number": cell >> 8, "outcome": Outcome(cell & 0xFF).name.lower().replace("_", " ")}

    def begin(self) -> int:
        """The number of the reload that begins."""
        self._cell[0] = (number := self.number + 1) << 8 | Outcome.UNDER_WAY
        return number

    def end(self, number: int, outcome: Outcome) -> None:
        """Unless another one has begun."""
        if number == self.number:
            self._cell[0] = number << 8 | outcome
