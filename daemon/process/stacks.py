"""Where a program that hangs is: its processes are asked for the stacks of their threads, then it is killed.

A replica's processes write them to their output on SIGUSR2 (faulthandler), whatever their threads wait for.
One that is stopped does it when it is continued. Processes that do not catch the signal are not sent it: it
would end them, and an arbiter of gunicorn understands it as an order.
"""

from __future__ import annotations

import signal
from pathlib import Path

from . import proc
from .proc import Marked

_SIGNAL = signal.SIGUSR2
#: More than a process needs that gets a processor at all.
_PATIENCE = 3.0
#: From the signal to the first line in the output: a Python thread has to have its turn, and supervisord.
_FIRST_LINE = 1.0


class Dump:
    """Asks all processes of a program but `arbiter`, and has them go on if they are stopped."""

    def __init__(self, run: Path, program: str, arbiter: int, output: Path, now: float) -> None:
        family = proc.marked(run, program)
        self.asked: list[Marked] = []
        for process in family:
            if process.pid != arbiter and _has(process, "SigCgt"):
                proc.signal_if_still(run, process, _SIGNAL)
                self.asked.append(process)
        for process in family:
            proc.signal_if_still(run, process, signal.SIGCONT)
        self._output = output
        self._size = -1
        self._since = now

    def is_done(self, now: float) -> bool:
        """All is written, or they have had their time. To be asked every tenth of a second or so."""
        if not self.asked or now - self._since > _PATIENCE:
            return True
        if any(_has(process, "SigPnd", "ShdPnd") for process in self.asked):
            return False
        size, before = _size(self._output), self._size
        self._size = size
        return now - self._since > _FIRST_LINE and size == before


def _has(process: Marked, *fields: str) -> bool:
    """Whether the signal is in one of these sets of /proc/PID/status."""
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
