"""A client's connection: requests in, responses out, with time limits for slow clients.

One request is served at a time; pipelined requests wait.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import struct
from collections import deque
from typing import Protocol, cast

from .protocols import Client
from .request import ClientRequest
from .request_parser import Parsed, RequestParser
from .responses import Response, error, header_lines
from .write_batcher import WriteBatcher

logger = logging.getLogger(__name__)

#: Average bytes per second that a body must reach once it takes longer than `client_timeout`.
_MIN_BODY_RATE = 1000.0
#: Bytes of a response buffered for a slow client before reading from its replica is paused.
_WRITE_BUFFER = 256 << 10
#: Seconds and bytes for which a client may continue to send after the last response. A close while bytes are
#: unread would reset the connection, and the client would never see the response.
_LINGER_SECONDS = 5.0
_MAX_LINGER_BYTES = 80 << 20
#: The same in seconds while the server stops.
_STOP_LINGER_SECONDS = 1.0
_RESET_ON_CLOSE = struct.pack("ii", 1, 0)


class Task(Protocol):
    """Produces the response to a request."""

    def client_gone(self) -> None: ...

    def pause(self) -> None: ...

    def resume(self) -> None: ...


class Server(Protocol):
    """The part of the server that connections use."""

    max_body_bytes: int
    outbox: WriteBatcher
    #: Maximum seconds from the first byte of a head to its end, between bytes of a body, and without reading.
    client_timeout: float
    #: Maximum seconds between two requests.
    keep_alive: float
    #: Connections are closed after their current response.
    is_stopping: bool

    def now(self) -> float: ...

    def opened(self, connection: ClientConnection) -> None: ...

    def closed(self, connection: ClientConnection) -> None: ...

    def serve(self, client: Client, request: ClientRequest) -> Task: ...

    def refused(self, method: str, target: bytes, status: int) -> None:
        """Count a rejected request; method and target may be empty."""

    def cors_lines(self, target: bytes, origin: bytes) -> bytes:
        """Return the CORS header lines of a response to a page of this origin."""


class ClientConnection(asyncio.Protocol):
    """Implements `Client` for the current request."""

    def __init__(self, server: Server) -> None:
        #: Time since when it waits for the client.
        self.since = server.now()
        self._server = server
        self._outbox = server.outbox
        self._transport: asyncio.Transport = cast(asyncio.Transport, None)
        self._parser: RequestParser
        self._waiting: deque[Parsed | Response] = deque()
        self._task: Task | None = None
        self._is_busy = False
        #: Bytes discarded after the last response; -1 before it.
        self._lingering = -1
        self._receiving_since = 0.0
        self._blocked_since: float | None = None
        # State of the current response.
        self._head = b""
        self._is_chunked = False
        self._is_head_only = False
        self._is_http_1_0 = False
        self._keep_alive = True

    @property
    def waits_since(self) -> float | None:
        """Time since when it waits for a complete request; None while one is served."""
        if self._is_busy and self._lingering < 0:
            return None
        return self._receiving_since if self._parser.is_receiving else self.since

    # ---- Client

    def respond(self, status: bytes, lines: bytes, body: bytes, length: int | None = None) -> None:
        if not status.startswith((b"204", b"304")):
            lines += b"Content-Length: %d\r\n" % (len(body) if length is None else length)
        if self._is_head_only:
            body = b""
        parts = (b"HTTP/1.1 ", status, b"\r\n", lines, self._connection_line(), b"\r\n", body)
        self._outbox.write(self._transport, b"".join(parts))
        self._answered()

    def begin(self, status: bytes, lines: bytes, length: int | None) -> None:
        self._is_chunked = length is None and not self._is_http_1_0
        if length is not None:
            lines += b"Content-Length: %d\r\n" % length
        elif self._is_chunked:
            lines += b"Transfer-Encoding: chunked\r\n"
        else:
            self._keep_alive = False
        self._head = b"HTTP/1.1 %b\r\n%b%b\r\n" % (status, lines, self._connection_line())

    def send(self, piece: bytes) -> None:
        if self._is_chunked:
            piece = b"%b%x\r\n%b\r\n" % (self._head, len(piece), piece)
        elif self._head:
            piece = self._head + piece
        self._head = b""
        self._outbox.write_now(self._transport, piece)

    @property
    def fast_transport(self) -> asyncio.Transport | None:
        transport = self._transport
        is_bare = (
            self._is_chunked
            and not self._head
            # Reading is paused if the client pipelines requests; then the event loop must control it.
            and transport.is_reading()
            and transport.get_write_buffer_size() == 0
            and transport.get_extra_info("sslcontext") is None
        )
        return transport if is_bare else None

    def send_chunks(self, chunks: bytes) -> None:
        self._outbox.write(self._transport, chunks)

    def end(self, trailer: bytes = b"") -> None:
        last = self._head
        if self._is_chunked and not self._is_head_only:
            last += b"0\r\n%b\r\n" % trailer
        self._head = b""
        if last:
            self._outbox.write(self._transport, last)
        self._answered()

    def abort(self) -> None:
        """Reset the connection: a plain close could look like the end of the response."""
        self._task = None
        self._outbox.flush()
        sock: socket.socket | None = self._transport.get_extra_info("socket")
        if sock is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
        self._transport.abort()

    # ---- from the event loop

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._transport.set_write_buffer_limits(_WRITE_BUFFER)
        peer = transport.get_extra_info("peername")
        address = peer[0] if isinstance(peer, tuple) else ""
        self._parser = RequestParser(address, self._server.max_body_bytes)
        self._server.opened(self)

    def data_received(self, data: bytes) -> None:
        if self._lingering >= 0:
            self._lingering += len(data)
            if self._lingering > _MAX_LINGER_BYTES:
                self._transport.close()
            return
        now = self._server.now()
        if not self._parser.is_receiving:
            self._receiving_since = now
        self.since = now
        self._waiting.extend(self._parser.feed(data))
        if self._is_busy:
            if self._waiting:
                self._transport.pause_reading()
        elif self._waiting:
            self._next()
        elif self._parser.expects_continue:
            self._parser.expects_continue = False
            self._outbox.write(self._transport, b"HTTP/1.1 100 Continue\r\n\r\n")

    def eof_received(self) -> None:
        """Treat a client that shuts down its sending half as gone, as nginx does."""
        if self._task is not None:
            self._task.client_gone()
            # The client may still read: what it has must not look complete.
            self.abort()
        elif self._parser.is_receiving and not self._is_busy:
            part = "body" if self._parser.has_head else "head"
            self._reject(error(400, f"the request ended in the middle of its {part}", "bad_body"))

    def connection_lost(self, exc: Exception | None) -> None:
        self._server.closed(self)
        task, self._task = self._task, None
        self._is_busy = True
        if task is not None:
            task.client_gone()

    def pause_writing(self) -> None:
        self._blocked_since = self._server.now()
        if self._task is not None:
            self._task.pause()

    def resume_writing(self) -> None:
        self._blocked_since = None
        if self._task is not None:
            self._task.resume()

    def watch(self, now: float) -> None:
        """Close the connection if the client exceeds a time limit. Call periodically."""
        if self._blocked_since is not None:
            if now - self._blocked_since > self._server.client_timeout:
                self.abort_for("does not read its response")
        elif self._lingering >= 0:
            if now - self.since > (_STOP_LINGER_SECONDS if self._server.is_stopping else _LINGER_SECONDS):
                self._transport.close()
        elif self._is_busy:
            return
        elif not self._parser.is_receiving:
            if now - self.since > self._server.keep_alive:
                self._transport.close()
        elif self._is_late(now):
            part = "body" if self._parser.has_head else "head"
            self._reject(error(408, f"the request {part} did not arrive in time", "request_timeout"))

    def abort_for(self, why: str) -> None:
        logger.warning("closing a connection: its client %s", why)
        task, self._task = self._task, None
        if task is not None:
            task.client_gone()
        self.abort()

    def close(self) -> None:
        """Close the connection after sending what is buffered."""
        self._outbox.flush()
        self._transport.close()

    # ---- requests in turn

    def _next(self) -> None:
        parsed = self._waiting.popleft()
        self._is_busy = True
        if isinstance(parsed, Response):
            self._reject(parsed)
            return
        request, keep_alive = parsed
        self._keep_alive = keep_alive
        self._is_head_only = request.method == "HEAD"
        self._is_http_1_0 = request.is_http_1_0
        self._is_chunked = False
        try:
            task = self._server.serve(self, request)
        except Exception:
            # The event loop may be the caller, and would leave the client without a response.
            logger.exception("request=%s failed in the router before it began", request.id[:64])
            self.abort()
            return
        # The request may have been answered already.
        if self._is_busy and self._lingering < 0 and not self._transport.is_closing():
            self._task = task

    def _answered(self) -> None:
        self._task = None
        self._is_busy = False
        self.since = self._server.now()
        if not self._keep_alive:
            self._linger()
        elif self._waiting:
            # Deferred to the loop, so that many pipelined requests do not grow the stack.
            self._is_busy = True
            asyncio.get_running_loop().call_soon(self._serve_next)
        else:
            self._resume_reading()

    def _serve_next(self) -> None:
        if not self._transport.is_closing():
            self._resume_reading()
            self._next()

    def _resume_reading(self) -> None:
        if not self._transport.is_reading() and not self._transport.is_closing():
            self._transport.resume_reading()

    def _reject(self, response: Response) -> None:
        method, target = self._parser.method, self._parser.target
        self._server.refused(method, target, response.status)
        logger.warning(
            "rejected a request of %s: %s %s status=%d",
            *(
                self._parser.peer or "a client",
                method or "-",
                target[:200].decode("latin-1"),
                response.status,
            ),
        )
        self._is_busy = True
        self._keep_alive = self._is_head_only = False
        lines = header_lines(response.headers)
        if origin := self._parser.origin:
            lines += self._server.cors_lines(target, origin)
        self.respond(response.status_line.encode(), lines, response.body)

    def _linger(self) -> None:
        """Close after the last response: stop sending, and discard what the client still sends."""
        self._is_busy = True
        self._waiting.clear()
        self._lingering = 0
        self._resume_reading()
        self._outbox.flush()
        if self._transport.can_write_eof():
            self._transport.write_eof()
        else:
            self._transport.close()

    def _connection_line(self) -> bytes:
        if self._server.is_stopping:
            self._keep_alive = False
        if not self._keep_alive:
            return b"Connection: close\r\n"
        return b"Connection: keep-alive\r\n" if self._is_http_1_0 else b""

    def _is_late(self, now: float) -> bool:
        seconds, patience = now - self._receiving_since, self._server.client_timeout
        if not self._parser.has_head:
            return seconds > patience
        is_slow = seconds > patience and self._parser.size < seconds * _MIN_BODY_RATE
        return is_slow or now - self.since > patience
