"""Problems of the daemon that may go away, such as full disks and missing directories."""

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
    """Current problems for `fdctl status` and `why`. Logs the beginning and the end of each."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._current: dict[str, _Trouble] = {}

    def report(self, what: str, problem: str, fault: Exception | None = None) -> None:
        """Record the state of one part of the daemon.

        Args:
            what: name of the part, the same in each call.
            problem: a sentence without full stop, or "" if there is none.
            fault: an unexpected exception; its stack trace goes to the log.
        """
        known = self._current.get(what)
        if not problem:
            if known is not None:
                del self._current[what]
                log.info("resolved: %s", known.text)
        elif known is None or known.text != problem:
            since = known.since if known is not None else self._clock()
            self._current[what] = _Trouble(problem, since)
            log.error("ERROR (%s)", problem, exc_info=fault)

    def lines(self) -> list[str]:
        """Return lines like "cannot write /var/log/fd: No space left on device; since 12:03"."""
        return [f"{trouble.text}; since {self._when(trouble.since)}" for trouble in self._current.values()]

    def _when(self, since: float) -> str:
        pattern = "%H:%M" if self._clock() - since < _DAY else "%Y-%m-%d %H:%M"
        return time.strftime(pattern, time.localtime(since))
