"""An HTTP server for GET /metrics and a few pages whose single thread no client can block.

Not `http.server`: its threads do not limit the total time of a client, and would call `render` concurrently.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import threading
from asyncio import StreamReader, StreamWriter
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

from .addresses import listen

_log = logging.getLogger(__name__)

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_JSON = "application/json"
#: Seconds for a whole exchange: sending the request and reading the response.
_CLIENT_TIMEOUT = 5.0
#: Maximum concurrent clients; another one replaces the oldest.
_MAX_CLIENTS = 16
_MAX_REQUEST_BYTES = 8192


class MetricsServer:
    """Serves from its construction until `close`. Each connection carries one request.

    Args:
        addresses: IP addresses to listen on; ``::`` includes IPv4.
        render: returns the metrics as UTF-8 text; called in the server's thread for each request.
        json_pages: other paths and functions that return their JSON.

    Raises:
        OSError: it cannot listen on an address.
    """

    def __init__(
        self,
        addresses: Sequence[str],
        port: int,
        render: Callable[[], bytes],
        json_pages: Mapping[bytes, Callable[[], bytes]] = MappingProxyType({}),
    ) -> None:
        self._pages = {b"/metrics": (CONTENT_TYPE, render)} | {
            path: (_JSON, page) for path, page in json_pages.items()
        }
        listeners = _listen(addresses, port)
        #: The given port, or the one that the kernel chose instead of 0.
        self.port = int(listeners[0].getsockname()[1])
        #: Oldest first.
        self._clients: list[StreamWriter] = []
        self._closed = asyncio.Event()
        self._runner = asyncio.Runner(loop_factory=asyncio.new_event_loop)
        self._loop = self._runner.get_loop()
        self._thread = threading.Thread(
            target=self._runner.run, args=(self._run(listeners),), name="metrics", daemon=True
        )
        self._thread.start()

    def close(self) -> None:
        """Stop serving and free the port, after a running `render`."""
        self._loop.call_soon_threadsafe(self._closed.set)
        self._thread.join()
        self._runner.close()

    async def _run(self, listeners: Sequence[socket.socket]) -> None:
        servers = [
            await asyncio.start_server(self._serve, sock=listener, limit=_MAX_REQUEST_BYTES)
            for listener in listeners
        ]
        await self._closed.wait()
        for server in servers:
            server.close()
        for client in self._clients:
            client.transport.abort()

    async def _serve(self, reader: StreamReader, writer: StreamWriter) -> None:
        if len(self._clients) == _MAX_CLIENTS:
            self._clients.pop(0).transport.abort()
        self._clients.append(writer)
        # drain() waits until all has been sent.
        writer.transport.set_write_buffer_limits(0)
        try:
            async with asyncio.timeout(_CLIENT_TIMEOUT):
                try:
                    request = await reader.readuntil(b"\r\n\r\n")
                except asyncio.LimitOverrunError:
                    request = await reader.read(_MAX_REQUEST_BYTES)
                writer.write(self._answer(request))
                await writer.drain()
        except (OSError, EOFError, TimeoutError):
            # The client has disconnected, took too long, or was dropped for another one.
            pass
        finally:
            writer.transport.abort()
            if writer in self._clients:
                self._clients.remove(writer)

    def _answer(self, request: bytes) -> bytes:
        method, _, rest = request.partition(b"\r\n")[0].partition(b" ")
        target, _, version = rest.partition(b" ")
        if not version.startswith(b"HTTP/1."):
            return _response("400 Bad Request", b"expected HTTP/1.1\n")
        if method not in (b"GET", b"HEAD"):
            return _response("405 Method Not Allowed", b"GET /metrics\n")
        path = target.partition(b"?")[0]
        if path not in self._pages:
            return _response("404 Not Found", b"GET /metrics\n")
        content_type, render = self._pages[path]
        try:
            text = render()
        except Exception as error:
            # An error in a metric must not end the server.
            _log.error("%s: ERROR (%s: %s)", path.decode(), type(error).__name__, error)
            return _response("500 Internal Server Error", b"see the log\n")
        return _response("200 OK", text, content_type, head_only=method == b"HEAD")


def _listen(addresses: Sequence[str], port: int) -> list[socket.socket]:
    listeners: list[socket.socket] = []
    try:
        for address in addresses:
            listeners.append(listen(address, port))
    except OSError:
        for listener in listeners:
            listener.close()
        raise
    return listeners


def _response(
    status: str, body: bytes, content_type: str = CONTENT_TYPE, *, head_only: bool = False
) -> bytes:
    head = (
        f"HTTP/1.1 {status}\r\nContent-Type: {content_type}\r\n"
        f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    )
    return head.encode() + (b"" if head_only else body)
