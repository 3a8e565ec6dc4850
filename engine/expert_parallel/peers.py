"""Signals between ranks outside of collectives: doorbells, and process deaths reported by the kernel."""

from __future__ import annotations

import contextlib
import logging
import os
import select
import socket
import time
from collections.abc import Iterable
from pathlib import Path

from .layout import RankSlotState
from .memory import Memory
from .processes import pidfd_of

_log = logging.getLogger(__name__)

#: Interval between checks that this rank's doorbell exists.
_CHECK_SECONDS = 1.0


class Peers:
    """The other processes of a group, as seen by one rank.

    A doorbell is a datagram socket, so a wake-up that arrives while its owner is falling asleep is not lost.
    """

    def __init__(self, memory: Memory, rank: int) -> None:
        self._memory = memory
        self._rank = rank
        #: Rank -> (pid, pidfd) of the watched processes.
        self._watched: dict[int, tuple[int, int]] = {}
        self._doorbell = _bind(Path(memory.doorbell(rank)))
        self._checked_at = time.monotonic()
        self._is_failing = False
        #: Readable after a wake-up or the death of a watched process.
        self.wakeups = select.epoll()
        self.wakeups.register(self._doorbell, select.EPOLLIN)

    @property
    def pidfds(self) -> list[int]:
        """Pidfd of each rank; -1 if it is not watched."""
        return [self._watched.get(rank, (0, -1))[1] for rank in range(self._memory.layout.num_ranks)]

    def watch(self, ranks: Iterable[int]) -> None:
        """Watch the processes of these ranks, and no others."""
        wanted = {rank: self._memory.rank_slots[rank].pid for rank in ranks if rank != self._rank}
        for rank, (pid, pidfd) in list(self._watched.items()):
            # Another process may have taken the rank.
            if wanted.get(rank) != pid:
                self.wakeups.unregister(pidfd)
                os.close(pidfd)
                del self._watched[rank]
        for rank, pid in wanted.items():
            if rank not in self._watched:
                self._watched[rank] = (pid, _open_pidfd(pid, self._memory.rank_slots[rank].start_time))
                self.wakeups.register(self._watched[rank][1], select.EPOLLIN)

    def wake(self, ranks: Iterable[int]) -> None:
        """Send a wake-up to other ranks."""
        for rank in ranks:
            if rank == self._rank:
                continue
            try:
                self._doorbell.sendto(b".", self._memory.doorbell(rank))
            except BlockingIOError:
                # The socket is full, so a wake-up is already pending.
                continue
            except OSError as error:
                # The kernel reports a dead process.
                _log.debug("rank %d has no doorbell (%s)", rank, error.strerror)

    def wake_all(self) -> None:
        """Send a wake-up to all ranks, including those that are not members yet."""
        self.wake(
            rank
            for rank, slot in enumerate(self._memory.rank_slots[: self._memory.layout.num_ranks])
            if slot.state != RankSlotState.FREE
        )

    def wait(self, seconds: float) -> None:
        """Wait for a wake-up or the death of a watched process, for at most `seconds`."""
        self.wakeups.poll(seconds)

    def drain(self) -> bool:
        """Read all wake-ups. Return True if a watched process has died."""
        ready = {descriptor for descriptor, _ in self.wakeups.poll(0)}
        with contextlib.suppress(BlockingIOError):
            while self._doorbell.fileno() in ready:
                self._doorbell.recv(1)
        return any(pidfd in ready for _, pidfd in self._watched.values())

    def ensure_doorbell(self) -> None:
        """Create the doorbell again if it was removed. Without it a wake-up takes up to a second."""
        now, path = time.monotonic(), Path(self._memory.doorbell(self._rank))
        if now < self._checked_at + _CHECK_SECONDS:
            return
        self._checked_at = now
        if os.path.exists(path):
            return
        try:
            doorbell = _bind(path)
        except OSError as error:
            if not self._is_failing:
                _log.warning("%s was removed and cannot be created again (%s)", path, error.strerror)
            self._is_failing = True
            return
        self.wakeups.unregister(self._doorbell)
        self._doorbell.close()
        self._doorbell, self._is_failing = doorbell, False
        self.wakeups.register(doorbell, select.EPOLLIN)
        _log.warning("%s was removed and has been created again; the group keeps its memory", path)

    def close(self) -> None:
        self.watch(())
        self.wakeups.close()
        self._doorbell.close()


def _bind(path: Path) -> socket.socket:
    doorbell = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
    try:
        # Another program may have removed the directory of a living group.
        with contextlib.suppress(FileExistsError):
            path.parent.mkdir(mode=0o700)
        # A previous process of this rank may have left it.
        path.unlink(missing_ok=True)
        doorbell.bind(str(path))
    except OSError:
        doorbell.close()
        raise
    return doorbell


def _open_pidfd(pid: int, started: int) -> int:
    """Return a pidfd. If the process is already dead, return a pipe that is readable like its pidfd."""
    pidfd = pidfd_of(pid, started)
    if pidfd is not None:
        return pidfd
    end, other = os.pipe2(os.O_CLOEXEC)
    os.close(other)
    return end
