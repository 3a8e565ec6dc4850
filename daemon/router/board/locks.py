"""Locks between processes that the kernel takes back from whoever dies, at whatever instruction."""

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
# Python's own lets other threads run meanwhile, and gets its turn again after 5 ms if one of them is busy:
# all other processes would wait for that. This one is for calls that do not block. Without
# argument types, which would be checked at each call: integers are taken for C's int.
_flock = ctypes.PyDLL(None).flock
_LOCK, _UNLOCK = fcntl.LOCK_EX | fcntl.LOCK_NB, fcntl.LOCK_UN


class KernelLocks:
    """One lock that excludes threads and processes (a with-statement), and marks that outlive nobody.

    The exclusive lock is flock's. A mark is a record lock on one byte: it is held until its holder dies, so
    that "is it held?" answers "is its holder alive?", without pids that are used again. Record locks of the
    older kind will not do: a process loses all of them when it closes any descriptor of the file.
    """

    def __init__(self, descriptor: int, after_fork: Callable[[], None]) -> None:
        """Locks belong to an open file, and a fork shares that: so each process opens the file for itself.

        Args:
            after_fork: called in a child of this process, which has none of its parent's marks.
        """
        self._shared = descriptor
        self._after_fork = after_fork
        self._open()
        _everybody.add(self)

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

    def take_mark(self, number: int) -> bool:
        """Takes a mark until it is given back or this process dies; False if another process has it."""
        try:
            fcntl.fcntl(self._own, fcntl.F_OFD_SETLK, _record(fcntl.F_WRLCK, number))
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES):
                return False
            raise
        return True

    def give_back_mark(self, number: int) -> None:
        fcntl.fcntl(self._own, fcntl.F_OFD_SETLK, _record(fcntl.F_UNLCK, number))

    def is_marked(self, number: int) -> bool:
        """Whether another process has taken that mark and is alive."""
        answer = fcntl.fcntl(self._own, fcntl.F_OFD_GETLK, _record(fcntl.F_WRLCK, number))
        return bool(_RECORD.unpack(answer)[0] != fcntl.F_UNLCK)

    def close(self) -> None:
        """Gives everything back."""
        _everybody.discard(self)
        os.close(self._own)

    def leave_parent(self) -> None:
        """In the child of a fork: what it inherited would keep its parent's locks when the parent is dead."""
        os.close(self._own)
        self._open()
        self._after_fork()


_everybody: weakref.WeakSet[KernelLocks] = weakref.WeakSet()


def _record(kind: int, number: int) -> bytes:
    return _RECORD.pack(kind, os.SEEK_SET, number, 1, 0)


def _leave_parent() -> None:
    for locks in _everybody:
        locks.leave_parent()


os.register_at_fork(after_in_child=_leave_parent)
