"""Callbacks for clients that disconnect while their handler waits for something else.

A thread that waits for tokens would notice a disconnect only at its next write, which may be minutes later.
Instead, one daemon thread per process polls all client sockets with epoll. It does not read from them. A
client that shuts down only its sending side counts as disconnected, as in nginx.
"""

from __future__ import annotations

import logging
import os
import select
import socket
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Self

_log = logging.getLogger(__name__)


def on_disconnect(sock: socket.socket | int, callback: Callable[[], object]) -> DisconnectCallback:
    """Call `callback` once, in the watching thread, when the peer of `sock` closes or resets.

    Leave the returned handle (``with``) or `close()` it when the request has ended. After `close()` has
    returned, the callback is not running and will not run. The callback must therefore be short and must not
    wait for a thread that calls `close()`.
    """
    return _current_watcher().add(sock if isinstance(sock, int) else sock.fileno(), callback)


class DisconnectCallback:
    """Registration of one client socket."""

    def __init__(self, watcher: _Watcher, fd: int, callback: Callable[[], object]) -> None:
        self._watcher = watcher
        # A duplicate: the server may close its descriptor at any time, and its number may be reused.
        self._fd = os.dup(fd)
        self._callback = callback
        # Held while the callback runs. Reentrant: the callback may call `close`.
        self._running = threading.RLock()

    def close(self) -> None:
        with self._running:
            self._watcher.remove(self._fd, self)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _Watcher:
    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._epoll = select.epoll()
        self._entries: dict[int, DisconnectCallback] = {}
        threading.Thread(target=self._run, name="client-watch", daemon=True).start()

    def add(self, fd: int, callback: Callable[[], object]) -> DisconnectCallback:
        entry = DisconnectCallback(self, fd, callback)
        with self._lock:
            self._entries[entry._fd] = entry
            # Takes effect at once, even while the thread waits on this epoll.
            self._epoll.register(entry._fd, select.EPOLLRDHUP)
        return entry

    def remove(self, fd: int, entry: DisconnectCallback) -> bool:
        """Remove a registration; return False if it was already removed."""
        with self._lock:
            if self._entries.get(fd) is not entry:
                return False
            del self._entries[fd]
            # Before the close: epoll keeps the registration while the server's descriptor is open.
            self._epoll.unregister(fd)
            os.close(fd)
            return True

    def _run(self) -> None:
        while True:
            for fd, _ in self._epoll.poll(maxevents=1):
                with self._lock:
                    entry = self._entries.get(fd)
                if entry is not None:
                    self._fire(fd, entry)

    def _fire(self, fd: int, entry: DisconnectCallback) -> None:
        with entry._running:
            # The event may belong to an earlier registration with the same descriptor number, closed since
            # the poll returned. Check again while this one cannot be closed.
            with self._lock:
                if self._entries.get(fd) is not entry or not _is_disconnected(fd):
                    return
            self.remove(fd, entry)
            try:
                entry._callback()
            except Exception as error:
                _log.error("disconnect callback failed: %s: %s", type(error).__name__, error)

    def discard(self) -> None:
        """Close the parent's descriptors in a forked child, without changing the parent's epoll."""
        self._epoll.close()
        for fd in self._entries:
            os.close(fd)


def _is_disconnected(fd: int) -> bool:
    poll = select.poll()
    poll.register(fd, select.POLLRDHUP)
    return any(events & (select.POLLRDHUP | select.POLLHUP | select.POLLERR) for _, events in poll.poll(0))


_watcher: _Watcher | None = None
_watcher_lock = threading.Lock()


def _current_watcher() -> _Watcher:
    global _watcher
    with _watcher_lock:
        if _watcher is None:
            _watcher = _Watcher()
        return _watcher


def _reset_after_fork() -> None:
    # A fork copies the epoll but not the thread: the child creates both at its first registration.
    global _watcher, _watcher_lock
    if _watcher is not None:
        _watcher.discard()
    _watcher, _watcher_lock = None, threading.Lock()


os.register_at_fork(after_in_child=_reset_after_fork)
