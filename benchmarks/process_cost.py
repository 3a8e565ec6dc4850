"""CPU time and memory of a process and its descendants."""

from __future__ import annotations

import time
from pathlib import Path

import psutil


def cpu_seconds(pid: int) -> dict[int, float]:
    """Return user plus system time by process, with nanosecond resolution."""
    found = {}
    for member in _family(pid):
        try:
            # The CPU clock of a process, see clock_getcpuclockid(3); /proc has a resolution of 10 ms.
            found[member] = time.clock_gettime((~member << 3) | 2)
        except OSError:
            continue  # it has ended meanwhile
    return found


def spent(before: dict[int, float], after: dict[int, float]) -> float:
    """Return the seconds used between two readings, including processes started in between."""
    return sum(seconds - before.get(pid, 0.0) for pid, seconds in after.items())


def pss_bytes(pid: int) -> int:
    """Return the memory of all processes, with shared pages counted once."""
    total = 0
    for member in _family(pid):
        try:
            text = Path(f"/proc/{member}/smaps_rollup").read_text()
        except OSError:
            continue
        total += next((int(line.split()[1]) for line in text.splitlines() if line.startswith("Pss:")), 0)
    return total * 1024


def _family(pid: int) -> list[int]:
    try:
        process = psutil.Process(pid)
        return [pid, *(child.pid for child in process.children(recursive=True))]
    except psutil.NoSuchProcess:
        return []
