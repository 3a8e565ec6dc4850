"""Problems of the daemon that end when their cause does: full disks, missing directories."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

log = logging.getLogger("fd-dp")

_DAY = 86400.0


@dataclass(frozen=True, slots=True)
class _Trouble:
    text: str
    #: Unix time.
    since: float


class Troubles:
    """Log of the beginning and the end of each, and list of those that last, for `fdctl status` and `why`."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._lasting: dict[str, _Trouble] = {}

    def report(self, what: str, problem: str, fault: Exception | None = None) -> None:
        """Record the state of one thing.

        Args:
            what: its name, the same each time.
            problem: a sentence without its full stop, or "" if there is none.
            fault: an unexpected exception; its stack trace goes to the log.
        """
        known = self._lasting.get(what)
        if not problem:
            if known is not None:
                del self._lasting[what]
                log.info("resolved: %s", known.text)
        elif known is None or known.text != problem:
            since = known.since if known is not None else self._clock()
            self._lasting[what] = _Trouble(problem, since)
            log.error("ERROR (%s)", problem, exc_info=fault)

    def lines(self) -> list[str]:
        """Return "cannot write /var/log/fd: No space left on device; since 12:03", one for each."""
        return [f"{trouble.text}; since {self._when(trouble.since)}" for trouble in self._lasting.values()]

    def _when(self, since: float) -> str:
        form = "%H:%M" if self._clock() - since < _DAY else "%Y-%m-%d %H:%M"
        return time.strftime(form, time.localtime(since))
