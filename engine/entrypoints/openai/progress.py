"""Signs of life: a request that has nothing to say for a while says so, as long as its worker goes on.

The router that asks for them (`X-FD-Progress: SECONDS`) takes a replica without any for dead. So they tell of
the worker, not of this process: once a request is there, none is sent unless the worker has done a step
since the last one. (Before that it can only wait for a place to render its template; see chat.py.)
"""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Callable

from ...common.messages import Stats

_INTERIM_HEAD = b"HTTP/1.1 102 Processing\r\n%b\r\n"
#: So often is a worker looked at that lets others wait.
_LOOK_SECONDS = 0.5


class Progress:
    """Of one request; for the thread that serves it.

    Args:
        interval: seconds of silence after which a sign is due.
        read_stats: gives the worker's latest statistics, another object after each step.
        client: the connection; None where no interim heads may be sent, as HTTP/1.0 knows none.
    """

    def __init__(
        self, interval: float, read_stats: Callable[[], Stats | None], client: socket.socket | None
    ) -> None:
        self._interval = interval
        self._read_stats = read_stats
        self._client = client
        self.spoke()

    def spoke(self) -> None:
        """Something has been sent."""
        self._spoke_at = time.monotonic()
        self._seen = self._read_stats()

    def hasten(self, interval: float) -> None:
        """A sign is due after so many seconds already, if it is less."""
        self._interval = min(self._interval, interval)

    def patience(self) -> float:
        """How long to wait for tokens before it is worth asking whether a sign is due."""
        left = self._spoke_at + self._interval - time.monotonic()
        return left if left > 0 else min(self._interval, _LOOK_SECONDS)

    def is_due(self) -> bool:
        quiet = time.monotonic() - self._spoke_at
        return quiet >= self._interval and self._read_stats() is not self._seen

    def send_interim_head(self, lines: bytes = b"") -> None:
        """The sign of life before an answer; `lines` are its headers."""
        self.spoke()
        if self._client is not None:
            # A client that has gone is somebody else's business (client_watch.py).
            with contextlib.suppress(OSError):
                self._client.sendall(_INTERIM_HEAD % lines)
