"""Learns from the kernel that a client has gone, while its handler is busy with something else.

A thread that waits for tokens or for an upstream server finds out that its client left only when it next
writes, which may be minutes later. One daemon thread per process watches all client sockets instead.
Bytes that arrive are left alone; only the other side's closing counts. A client that shuts down just its
sending half is taken as gone, as nginx does.
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


def watch(sock: socket.socket | int, callback: Callable[[], object]) -> Watch:
    """Calls `callback` once, in the watching thread, when the peer of `sock` closes or resets.

    Returns a handle; leave it (``with``) or `close()` it when the request is over. Once `close()` has
    returned the callback is neither running nor going to run, so what it touches may be reused. For the
    same reason the callback must be short and must not wait for whoever calls `close()`.
    """
    return _current_watcher().add(sock if isinstance(sock, int) else sock.fileno(), callback)


class Watch:
    """One client being watched."""

    def __init__(self, watcher: _Watcher, fd: int, callback: Callable[[], object]) -> None:
        self._watcher = watcher
        # Our own descriptor: the number stays ours although the server closes its side, and may be given
        # to another connection, at any time.
        self._fd = os.dup(fd)
        self._callback = callback
        # Held while the callback runs. Reentrant: the callback may close its own watch.
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
        self._watches: dict[int, Watch] = {}
        threading.Thread(target=self._run, name="client-watch", daemon=True).start()

    def add(self, fd: int, callback: Callable[[], object]) -> Watch:
        watched = Watch(self, fd, callback)
        with self._lock:
            self._watches[watched._fd] = watched
            # Takes effect at once, although the thread is waiting on the same epoll.
            self._epoll.register(watched._fd, select.EPOLLRDHUP)
        return watched

    def remove(self, fd: int, watched: Watch) -> bool:
        """True for the one caller that took it out; nothing happens when it was out already."""
        with self._lock:
            if self._watches.get(fd) is not watched:
                return False
            del self._watches[fd]
            # Before the close: while the server's own descriptor is open, closing ours would leave the
            # registration behind.
            self._epoll.unregister(fd)
            os.close(fd)
            return True

    def _run(self) -> None:
        while True:
            for fd, _ in self._epoll.poll(maxevents=1):
                with self._lock:
                    watched = self._watches.get(fd)
                if watched is not None:
                    self._fire(fd, watched)

    def _fire(self, fd: int, watched: Watch) -> None:
        with watched._running:
            # The event may be about an earlier watch which had this descriptor number and was closed since
            # the poll returned; so ask again, now that nobody can close this one.
            with self._lock:
                if self._watches.get(fd) is not watched or not _peer_is_gone(fd):
                    return
            self.remove(fd, watched)
            try:
                watched._callback()
            except Exception as error:
                _log.error("callback for a client that has gone failed: %s: %s", type(error).__name__, error)

    def forget(self) -> None:
        """In a forked child: lets go of the parent's descriptors without touching the parent's epoll."""
        self._epoll.close()
        for fd in self._watches:
            os.close(fd)


def _peer_is_gone(fd: int) -> bool:
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
    # A fork copies the epoll but not the thread: the child starts afresh at its first watch.
    global _watcher, _watcher_lock
    if _watcher is not None:
        _watcher.forget()
    _watcher, _watcher_lock = None, threading.Lock()


os.register_at_fork(after_in_child=_reset_after_fork)
