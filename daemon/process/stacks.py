"""Stack dump of a hung program before it is killed.

The processes of a replica write the stacks of their threads to their output on SIGUSR2 (faulthandler), even
if all threads are blocked. A suspended process does so once it is continued. Processes that do not catch the
signal would be killed by it, and a gunicorn arbiter uses it for something else; neither gets it.
"""

from __future__ import annotations

import signal
from pathlib import Path

from . import proc
from .proc import Marked

_SIGNAL = signal.SIGUSR2
#: Seconds for each process; enough for any that gets CPU time at all.
_TIMEOUT = 3.0
#: Seconds until the first line is in the output file: a Python thread and then supervisord have to run.
_FIRST_LINE = 1.0


class Dump:
    """Requests the stacks of all processes of a program but `arbiter`; continues suspended ones.

    One process writes at a time, parents first: their lines would be mixed in the output.
    """

    def __init__(self, run: Path, program: str, arbiter: int, output: Path, now: float) -> None:
        family = sorted(proc.marked(run, program), key=lambda process: process.pid)
        self._run = run
        self._output = output
        self._waiting = [each for each in family if each.pid != arbiter and _has(each, "SigCgt")]
        self.has_processes = bool(self._waiting)
        for process in family:
            if process not in self._waiting:
                proc.signal_if_still(run, process, signal.SIGCONT)
        self._ask_next(now)

    def is_done(self, now: float) -> bool:
        """Return whether the dump is complete or has timed out. Call it about ten times a second."""
        if not self._has_written(now):
            return False
        if not self._waiting:
            return True
        self._ask_next(now)
        return False

    def _ask_next(self, now: float) -> None:
        self._process = self._waiting.pop(0) if self._waiting else None
        self._size = -1
        self._since = now
        if self._process is not None:
            proc.signal_if_still(self._run, self._process, _SIGNAL)
            proc.signal_if_still(self._run, self._process, signal.SIGCONT)

    def _has_written(self, now: float) -> bool:
        if self._process is None or now - self._since > _TIMEOUT:
            return True
        if _has(self._process, "SigPnd", "ShdPnd"):
            return False
        size, before = _size(self._output), self._size
        self._size = size
        return now - self._since > _FIRST_LINE and size == before


def _has(process: Marked, *fields: str) -> bool:
    """Return whether the signal is in one of these signal sets of /proc/PID/status."""
    try:
        status = Path(f"/proc/{process.pid}/status").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    sets = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
    return any(int(sets.get(field, "0"), 16) >> (_SIGNAL - 1) & 1 for field in fields)


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError:
        return 0
