"""An HTTP server for GET /metrics whose single thread no client can block.

Not `http.server`: its threads do not limit the total time of a client, and would call `render` concurrently.
"""

from __future__ import annotations

import logging
import os
import selectors
import socket
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from .addresses import listen

_log = logging.getLogger(__name__)

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
#: Seconds for a whole exchange: sending the request and reading the response.
_CLIENT_TIMEOUT = 5.0
#: Maximum concurrent clients; another one replaces the oldest.
_MAX_CLIENTS = 16
_MAX_REQUEST_BYTES = 8192
#: Seconds to wait if accept() fails, for example because no file descriptor is left.
_ACCEPT_PAUSE = 0.2


class MetricsServer:
    """Serves from its construction until `close`. Each connection carries one request.

    Args:
        addresses: IP addresses to listen on; ``::`` includes IPv4.
        render: returns the metrics as UTF-8 text; called in the server's thread for each request.

    Raises:
        OSError: it cannot listen on an address.
    """

    def __init__(self, addresses: Sequence[str], port: int, render: Callable[[], bytes]) -> None:
        self._render = render
        self._listeners = _listen(addresses, port)
        #: The given port, or the one that the kernel chose instead of 0.
        self.port = int(self._listeners[0].getsockname()[1])
        self._clients: dict[socket.socket, _Client] = {}
        self._closed = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._closed, selectors.EVENT_READ)
        for listener in self._listeners:
            self._selector.register(listener, selectors.EVENT_READ)
        self._thread = threading.Thread(target=self._run, name="metrics", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop serving and free the port, after a running `render`."""
        os.eventfd_write(self._closed, 1)
        self._thread.join()

    def _run(self) -> None:
        while True:
            for key, _ in self._selector.select(self._next_timeout()):
                if key.fileobj == self._closed:
                    self._end()
                    return
                if not isinstance(key.fileobj, socket.socket):
                    continue
                if key.fileobj in self._listeners:
                    self._accept(key.fileobj)
                elif key.fileobj in self._clients:
                    self._serve(key.fileobj)
            now = time.monotonic()
            for connection in [c for c, client in self._clients.items() if now >= client.deadline]:
                self._drop(connection)

    def _next_timeout(self) -> float | None:
        """Return the seconds until the first client times out; None without clients."""
        deadlines = [client.deadline for client in self._clients.values()]
        return max(0.0, min(deadlines) - time.monotonic()) if deadlines else None

    def _accept(self, listener: socket.socket) -> None:
        try:
            connection, _ = listener.accept()
        except OSError:
            # The client has disconnected, or no file descriptor is left.
            time.sleep(_ACCEPT_PAUSE)
            return
        connection.setblocking(False)
        if len(self._clients) == _MAX_CLIENTS:
            self._drop(next(iter(self._clients)))
        self._clients[connection] = _Client(time.monotonic() + _CLIENT_TIMEOUT)
        self._selector.register(connection, selectors.EVENT_READ)

    def _serve(self, connection: socket.socket) -> None:
        client = self._clients[connection]
        try:
            if not client.unsent:
                data = connection.recv(_MAX_REQUEST_BYTES)
                client.request += data
                complete = b"\r\n\r\n" in client.request or len(client.request) > _MAX_REQUEST_BYTES
                if complete:
                    client.unsent = self._answer(bytes(client.request))
                    self._selector.modify(connection, selectors.EVENT_WRITE)
                elif not data:
                    self._drop(connection)
            else:
                client.unsent = client.unsent[connection.send(client.unsent) :]
                if not client.unsent:
                    connection.shutdown(socket.SHUT_WR)
                    self._drop(connection)
        except BlockingIOError:
            return
        except OSError:
            self._drop(connection)

    def _answer(self, request: bytes) -> memoryview:
        method, _, rest = request.partition(b"\r\n")[0].partition(b" ")
        target, _, version = rest.partition(b" ")
        if not version.startswith(b"HTTP/1."):
            return _response("400 Bad Request", b"expected HTTP/1.1\n")
        if method not in (b"GET", b"HEAD"):
            return _response("405 Method Not Allowed", b"GET /metrics\n")
        if target.partition(b"?")[0] != b"/metrics":
            return _response("404 Not Found", b"GET /metrics\n")
        try:
            text = self._render()
        except Exception as error:
            # An error in a metric must not end the server.
            _log.error("/metrics: ERROR (%s: %s)", type(error).__name__, error)
            return _response("500 Internal Server Error", b"see the log\n")
        return _response("200 OK", text, head_only=method == b"HEAD")

    def _drop(self, connection: socket.socket) -> None:
        del self._clients[connection]
        self._selector.unregister(connection)
        connection.close()

    def _end(self) -> None:
        for connection in list(self._clients):
            self._drop(connection)
        self._selector.close()
        for listener in self._listeners:
            listener.close()
        os.close(self._closed)


def _listen(addresses: Sequence[str], port: int) -> list[socket.socket]:
    listeners: list[socket.socket] = []
    try:
        for address in addresses:
            listeners.append(listen(address, port))
            listeners[-1].setblocking(False)
    except OSError:
        for listener in listeners:
            listener.close()
        raise
    return listeners


@dataclass(slots=True)
class _Client:
    #: Monotonic clock.
    deadline: float
    request: bytearray = field(default_factory=bytearray)
    unsent: memoryview = field(default_factory=lambda: memoryview(b""))


def _response(status: str, body: bytes, *, head_only: bool = False) -> memoryview:
    head = (
        f"HTTP/1.1 {status}\r\nContent-Type: {CONTENT_TYPE}\r\n"
        f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    )
    return memoryview(head.encode() + (b"" if head_only else body))
