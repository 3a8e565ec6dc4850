"""Identity of processes: a pid with its start time, which tells it from a later process with the same pid."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from .layout import RankSlot, RankSlotState


def start_time(pid: int) -> int | None:
    """Return the start time in ticks since boot; None if the process does not exist or is a zombie."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    fields = text.rpartition(")")[2].split()
    return None if fields[0] in "ZX" else int(fields[19])


def own_start_time() -> int:
    started = start_time(os.getpid())
    assert started is not None, "this process runs"
    return started


def is_alive(slot: RankSlot) -> bool:
    """Return True if a living process holds the slot."""
    return slot.state != RankSlotState.FREE and start_time(slot.pid) == slot.start_time


def pidfd_of(pid: int, started: int) -> int | None:
    """Return a pidfd of the process with this pid and start time; None if there is none."""
    try:
        pidfd = os.pidfd_open(pid)
    # OverflowError: not a possible pid, because the memory is damaged.
    except (ProcessLookupError, OverflowError):
        return None
    except OSError as error:
        if error.errno == errno.EINVAL:
            return None
        raise
    # Compare after opening: from then on the pid cannot pass to another process.
    if start_time(pid) == started:
        return pidfd
    os.close(pidfd)
    return None
