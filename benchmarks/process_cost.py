"""Processor time and memory of a process and of all below it."""

from __future__ import annotations

import time
from pathlib import Path

import psutil


def cpu_seconds(pid: int) -> dict[int, float]:
    """User and system time of each process of the family so far, to the nanosecond."""
    found = {}
    for member in _family(pid):
        try:
            # The CPU clock of another process, as clock_getcpuclockid(3) has it; /proc counts in 10 ms.
            found[member] = time.clock_gettime((~member << 3) | 2)
        except OSError:
            continue  # it has ended meanwhile
    return found


def spent(before: dict[int, float], after: dict[int, float]) -> float:
    """Seconds between two readings; of a process that began in between, all that it has used."""
    return sum(seconds - before.get(pid, 0.0) for pid, seconds in after.items())


def pss_bytes(pid: int) -> int:
    """Memory of the family, a page that several share counted once."""
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
