"""How a rank reaches those that are in no collective with it: doorbells, and the kernel's word on deaths."""

from __future__ import annotations

import contextlib
import logging
import os
import select
import socket
import time
from collections.abc import Iterable
from pathlib import Path

from .layout import SeatState
from .memory import Memory, pidfd_of

_log = logging.getLogger(__name__)

#: Between two checks that this rank's doorbell exists.
_LOOK_SECONDS = 1.0


class Peers:
    """The other processes of a group, as one rank sees them.

    A doorbell is a datagram socket: a call that comes while its owner is about to fall asleep is still there
    afterwards.
    """

    def __init__(self, memory: Memory, seat: int) -> None:
        self._memory = memory
        self._seat = seat
        #: seat -> (pid, pidfd) of those that are followed.
        self._followed: dict[int, tuple[int, int]] = {}
        self._bell = _bind(Path(memory.doorbell(seat)))
        self._looked_at = time.monotonic()
        self._is_failing = False
        #: Readable when somebody calls, or one that is followed has died; for a poller of those who sleep.
        self.wakeups = select.epoll()
        self.wakeups.register(self._bell, select.EPOLLIN)

    @property
    def pidfds(self) -> list[int]:
        """By seat; -1 of those that are not followed."""
        return [self._followed.get(seat, (0, -1))[1] for seat in range(self._memory.layout.num_seats)]

    def follow(self, seats: Iterable[int]) -> None:
        """To learn of the deaths of these, and of no others."""
        wanted = {seat: self._memory.entries[seat].pid for seat in seats if seat != self._seat}
        for seat, (pid, pidfd) in list(self._followed.items()):
            # Another process may have the seat now.
            if wanted.get(seat) != pid:
                self.wakeups.unregister(pidfd)
                os.close(pidfd)
                del self._followed[seat]
        for seat, pid in wanted.items():
            if seat not in self._followed:
                self._followed[seat] = (pid, _open(pid, self._memory.entries[seat].start_time))
                self.wakeups.register(self._followed[seat][1], select.EPOLLIN)

    def call(self, seats: Iterable[int]) -> None:
        for seat in seats:
            if seat == self._seat:
                continue
            try:
                self._bell.sendto(b".", self._memory.doorbell(seat))
            except BlockingIOError:
                # So many calls are waiting there that one more changes nothing.
                continue
            except OSError as error:
                # Its death is for the kernel to tell.
                _log.debug("seat %d has no doorbell (%s)", seat, error.strerror)

    def call_all(self) -> None:
        """Also those who are no members yet."""
        self.call(
            seat
            for seat, entry in enumerate(self._memory.entries[: self._memory.layout.num_seats])
            if entry.state != SeatState.FREE
        )

    def wait(self, seconds: float) -> None:
        self.wakeups.poll(seconds)

    def answer(self) -> bool:
        """Takes all calls; true if somebody who is followed has died."""
        ready = {descriptor for descriptor, _ in self.wakeups.poll(0)}
        with contextlib.suppress(BlockingIOError):
            while self._bell.fileno() in ready:
                self._bell.recv(1)
        return any(pidfd in ready for _, pidfd in self._followed.values())

    def keep_doorbell(self) -> None:
        """Create a removed doorbell again. Without it this rank notices a call up to a second late."""
        now, path = time.monotonic(), Path(self._memory.doorbell(self._seat))
        if now < self._looked_at + _LOOK_SECONDS:
            return
        self._looked_at = now
        if os.path.exists(path):
            return
        try:
            with contextlib.suppress(FileExistsError):
                path.parent.mkdir(mode=0o700)
            bell = _bind(path)
        except OSError as error:
            if not self._is_failing:
                _log.warning("%s was removed and cannot be created again (%s)", path, error.strerror)
            self._is_failing = True
            return
        self.wakeups.unregister(self._bell)
        self._bell.close()
        self._bell, self._is_failing = bell, False
        self.wakeups.register(bell, select.EPOLLIN)
        _log.warning("%s was removed and has been created again; the group keeps its memory", path)

    def close(self) -> None:
        self.follow(())
        self.wakeups.close()
        self._bell.close()


def _bind(path: Path) -> socket.socket:
    bell = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
    try:
        # Left by the process that had the seat before.
        path.unlink(missing_ok=True)
        bell.bind(str(path))
    except OSError:
        bell.close()
        raise
    return bell


def _open(pid: int, started: int) -> int:
    """Readable when the process is dead; if it is already, an end of a pipe whose other end is closed."""
    pidfd = pidfd_of(pid, started)
    if pidfd is not None:
        return pidfd
    end, other = os.pipe2(os.O_CLOEXEC)
    os.close(other)
    return end
