"""Events that wake the daemon's loop: sockets, signals, ends of processes, and other threads."""

from __future__ import annotations

import contextlib
import logging
import os
import selectors
import signal
import socket
from collections.abc import Callable

log = logging.getLogger("fd-dp")


class Wakeups:
    """The loop's selector. Signal handlers and threads only write a byte, which wakes the loop."""

    def __init__(self, signals: tuple[signal.Signals, ...]) -> None:
        self.selector = selectors.DefaultSelector()
        self.signals: list[signal.Signals] = []
        self._reader, self._writer = socket.socketpair()
        self._reader.setblocking(False)
        self._writer.setblocking(False)
        self.selector.register(self._reader, selectors.EVENT_READ, self._drain)
        for number in signals:
            signal.signal(number, self._signalled)
        signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)

    def wake(self) -> None:
        """Wake the loop, from any thread. If the buffer is full, the loop is about to wake anyway."""
        with contextlib.suppress(BlockingIOError):
            self._writer.send(b"\0")

    def watch(self, pid: int, ended: Callable[[int], None]) -> None:
        """Call `ended(pid)` in the loop when a process has ended. It need not be a child."""
        try:
            descriptor = os.pidfd_open(pid)
        except ProcessLookupError:
            ended(pid)
            return

        def readable() -> None:
            self.selector.unregister(descriptor)
            os.close(descriptor)
            ended(pid)

        self.selector.register(descriptor, selectors.EVENT_READ, readable)

    def wait(self, timeout: float) -> None:
        for key, _ in self.selector.select(timeout):
            try:
                key.data()
            except Exception:
                # An error in one handler must not affect the others.
                log.exception("the handler of a wake-up failed")

    def _signalled(self, number: int, frame: object) -> None:
        self.signals.append(signal.Signals(number))

    def _drain(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while self._reader.recv(4096):
                pass
