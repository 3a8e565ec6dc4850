"""Ties a process to its parent, so that a replica is up or down, never half."""

from __future__ import annotations

import ctypes
import os
import signal

_PR_SET_PDEATHSIG = 1


def die_with_parent(parent_pid: int) -> None:
    """The kernel kills this process as soon as `parent_pid` is dead, whatever kills the parent.

    Call it in the child, in its main thread, before any work. It holds for the thread that forked: that
    must be one that lives as long as the parent.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    # The parent may have died before the call; then nothing would ever kill us.
    if os.getppid() != parent_pid:
        os.kill(os.getpid(), signal.SIGKILL)
