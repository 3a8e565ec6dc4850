"""CPU time and memory of a program and its descendants, from /proc. Cheap enough for every scrape."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass

from .proc import stat_fields

_PAGE = os.sysconf("SC_PAGE_SIZE")
_TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class Usage:
    """Sums over processes. Shared memory counts once for each process that has touched it."""

    processes: int = 0
    #: Resident private memory, bytes.
    private: int = 0
    #: Resident pages of files and shared memory, bytes: libraries, packed weights.
    shared: int = 0
    #: CPU seconds, including those of children that have ended.
    cpu: float = 0.0

    def __add__(self, other: Usage) -> Usage:
        return Usage(
            self.processes + other.processes,
            self.private + other.private,
            self.shared + other.shared,
            self.cpu + other.cpu,
        )


def of_family(pid: int) -> Usage:
    """Return the usage of a process and its descendants. A process that ends meanwhile is not counted."""
    total = Usage()
    left = [pid]
    while left:
        pid = left.pop()
        try:
            total += _of(pid)
            left += _children(pid)
        except OSError:
            continue  # it has ended
    return total


def _of(pid: int) -> Usage:
    with open(f"/proc/{pid}/statm", "rb") as file:
        _, resident, shared, *_ = map(int, file.read().split())
    cpu = sum(map(int, stat_fields(pid)[11:15])) / _TICKS
    return Usage(1, (resident - shared) * _PAGE, shared * _PAGE, cpu)


def _children(pid: int) -> list[int]:
    """Return the children of all threads: the kernel lists a child at the thread that started it."""
    found: list[int] = []
    for thread in os.listdir(f"/proc/{pid}/task"):
        with (
            contextlib.suppress(FileNotFoundError),
            open(f"/proc/{pid}/task/{thread}/children", "rb") as file,
        ):
            found += map(int, file.read().split())
    return found
