"""Locks between processes that the kernel releases when their holder dies, at whatever instruction."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import struct
import threading
import weakref
from collections.abc import Callable
from types import TracebackType

#: struct flock of 64-bit Linux: type, whence, start, length, pid.
_RECORD = struct.Struct("hhqqi4x")
# fcntl.flock releases the GIL and, if another thread is busy, gets it back only after 5 ms. Until then it
# holds the lock, and all other processes wait. This function keeps the GIL, so it is for calls that do not
# block. It has no argtypes, because ctypes would check them at each call: integers are passed as C's int
# anyway.
_flock = ctypes.PyDLL(None).flock
_LOCK, _UNLOCK = fcntl.LOCK_EX | fcntl.LOCK_NB, fcntl.LOCK_UN


class KernelLocks:
    """An exclusive lock between threads and processes (a with-statement), and numbered liveness locks.

    The exclusive lock is flock's. A liveness lock is an open file description lock on one byte. A process
    holds it until it dies, so that the lock shows whether the process lives, which a pid, once reused, would
    not. Classic record locks would not do: a process loses them when it closes any descriptor of the file.
    """

    def __init__(self, descriptor: int, after_fork: Callable[[], None]) -> None:
        """Open the file again: locks belong to an open file, which a fork shares.

        Args:
            after_fork: called in each child of this process, which has none of its parent's locks.
        """
        self._shared = descriptor
        self._after_fork = after_fork
        self._open()
        _instances.add(self)

    def _open(self) -> None:
        self._own = os.open(f"/proc/self/fd/{self._shared}", os.O_RDWR | os.O_CLOEXEC)
        self._threads = threading.Lock()

    def __enter__(self) -> None:
        self._threads.acquire()
        try:
            if _flock(self._own, _LOCK) != 0:
                fcntl.flock(self._own, fcntl.LOCK_EX)
        except BaseException:
            self._threads.release()
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _flock(self._own, _UNLOCK)
        self._threads.release()

    def take_liveness(self, number: int) -> bool:
        """Take a liveness lock until it is released or this process dies; False if another process has it."""
        try:
            fcntl.fcntl(self._own, fcntl.F_OFD_SETLK, _record(fcntl.F_WRLCK, number))
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES):
                return False
            raise
        return True

    def release_liveness(self, number: int) -> None:
        fcntl.fcntl(self._own, fcntl.F_OFD_SETLK, _record(fcntl.F_UNLCK, number))

    def is_held_elsewhere(self, number: int) -> bool:
        """Return True if another process holds that liveness lock, and is therefore alive."""
        answer = fcntl.fcntl(self._own, fcntl.F_OFD_GETLK, _record(fcntl.F_WRLCK, number))
        return bool(_RECORD.unpack(answer)[0] != fcntl.F_UNLCK)

    def close(self) -> None:
        """Release all locks."""
        _instances.discard(self)
        os.close(self._own)

    def leave_parent(self) -> None:
        """Open the file again in a forked child. Otherwise a parent's locks would outlive the parent."""
        os.close(self._own)
        self._open()
        self._after_fork()


_instances: weakref.WeakSet[KernelLocks] = weakref.WeakSet()


def _record(kind: int, number: int) -> bytes:
    return _RECORD.pack(kind, os.SEEK_SET, number, 1, 0)


def _leave_parent() -> None:
    for locks in _instances:
        locks.leave_parent()


os.register_at_fork(after_in_child=_leave_parent)
