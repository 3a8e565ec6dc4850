"""Keep-alives of one request: sent while it has no output, as long as its worker makes progress.

A router that asks for them (`X-FD-Progress: SECONDS`) takes a replica that sends none for dead. They
therefore depend on the worker, not on this process: once the worker has the request, no keep-alive is sent
unless the worker has finished a step since the last one. Before that the request can only wait to render its
template (chat.py).
"""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Callable

from ...common.messages import Stats

_INTERIM_RESPONSE = b"HTTP/1.1 102 Processing\r\n%b\r\n"
#: Interval between checks for a step of the worker once a keep-alive is overdue.
_CHECK_SECONDS = 0.5


class KeepAlive:
    """Keep-alive timer of one request, for the thread that serves it.

    Args:
        interval: seconds without output after which a keep-alive is due.
        read_stats: returns the worker's latest statistics, a new object after each step.
        client: the connection; None if no interim responses may be sent (HTTP/1.0).
    """

    def __init__(
        self, interval: float, read_stats: Callable[[], Stats | None], client: socket.socket | None
    ) -> None:
        self._interval = interval
        self._read_stats = read_stats
        self._client = client
        self.reset()

    def reset(self) -> None:
        """Restart the timer, because something has been sent."""
        self._sent_at = time.monotonic()
        self._stats = self._read_stats()

    def shorten_interval(self, interval: float) -> None:
        """Reduce the interval to `interval` seconds if it is longer."""
        self._interval = min(self._interval, interval)

    def wait_seconds(self) -> float:
        """Return how long to wait for output before the next call of `is_due`."""
        left = self._sent_at + self._interval - time.monotonic()
        return left if left > 0 else min(self._interval, _CHECK_SECONDS)

    def is_due(self) -> bool:
        """Return True if the interval is over and the worker has finished a step since the timer began."""
        silent = time.monotonic() - self._sent_at
        return silent >= self._interval and self._read_stats() is not self._stats

    def send_interim_response(self, lines: bytes = b"") -> None:
        """Send a keep-alive before the response begins; `lines` are its header lines."""
        self.reset()
        if self._client is not None:
            # client_watch.py handles a client that has disconnected.
            with contextlib.suppress(OSError):
                self._client.sendall(_INTERIM_RESPONSE % lines)
