"""Lock of an expert-parallel group: flock on the group's file, with the holder's identity in the header.

The kernel releases the lock of a process that dies. A process that is stopped while it holds the lock is
killed after a while, because the others wait for it.
"""

from __future__ import annotations

import fcntl
import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress

from ..common.errors import FastDeployError
from .layout import GroupHeader
from .processes import own_start_time, pidfd_of

_POLL_SECONDS = 0.001
#: Seconds after the kill in which the holder must have died.
_KILL_SECONDS = 5

#: Pid and start time of the process that holds the lock.
Holder = tuple[int, int]


class LockStuck(FastDeployError):
    """The process that holds the group's lock neither releases it nor dies."""


def acquire(descriptor: int, patience: float, holder: Callable[[], Holder]) -> None:
    """Lock the file. Kill a process that holds the lock for more than `patience` seconds.

    Raises:
        LockStuck: the holder did not die, or is unknown.
    """
    suspect, since = (0, 0), time.monotonic()
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            time.sleep(_POLL_SECONDS)
        found, now = holder(), time.monotonic()
        if found != suspect:
            # The limit is for each holder.
            suspect, since = found, now
        if now > since + patience:
            # Another waiting process may have killed it. A holder that was stopped before it called `sign`
            # shows the pid of its predecessor, which may be any process by now.
            pidfd = pidfd_of(*found)
            if pidfd is not None:
                with suppress(ProcessLookupError):
                    signal.pidfd_send_signal(pidfd, signal.SIGKILL)
                os.close(pidfd)
            if now > since + patience + _KILL_SECONDS:
                if pidfd is None:
                    raise LockStuck(
                        "the lock of the expert group is held by an unknown process; "
                        "kill all ranks of the group"
                    )
                raise LockStuck(
                    f"the lock of the expert group is held by pid {found[0]}, which does not end; kill it"
                )


def release(descriptor: int) -> None:
    fcntl.flock(descriptor, fcntl.LOCK_UN)


def sign(header: GroupHeader) -> None:
    """Record this process as the holder. In this order a pid never stands beside an older start time."""
    started = own_start_time()
    header.holder_started = 0
    header.holder = os.getpid()
    header.holder_started = started


def unsign(header: GroupHeader) -> None:
    header.holder = 0


def holder_in(header: GroupHeader) -> Holder:
    return header.holder, header.holder_started
