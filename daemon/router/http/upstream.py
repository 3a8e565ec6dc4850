"""Connections to replicas, kept alive and reused, with one request at a time on each.

A head or a body that ends early is a failure, never a response that looks complete. Bytes are passed on as
they arrive, which `common/http_client.py` cannot do: it returns complete responses, and blocks.
"""

from __future__ import annotations

import asyncio
import enum
import logging
import time
from collections import deque
from typing import Protocol, cast

import httptools

from ....common.resumption import LOST_HEADER
from ..instance import ReplicaHandle
from .request import RawHeaders, named_in
from .write_batcher import WriteBatcher

logger = logging.getLogger(__name__)

_LOST = LOST_HEADER.lower().encode()
_CONNECT_TIMEOUT = 5.0
#: Seconds after which an idle connection is closed.
_MAX_IDLE_SECONDS = 30.0
_MAX_IDLE_PER_REPLICA = 1024
_MAX_HEAD = 128 << 10
#: Bytes of chunk extensions or trailers between two pieces of the body.
_MAX_OVERHEAD = 128 << 10
#: Interim responses before the final one. fd-dp's replicas send one every few seconds: this is half a day.
_MAX_INTERIM = 10_000
_FRAMING = frozenset({b"content-length", b"transfer-encoding"})


class Fault(enum.Enum):
    """How an attempt at a replica failed."""

    #: No connection was made.
    UNREACHABLE = "unreachable"
    #: The connection ended before a complete response head.
    UNANSWERED = "unanswered"
    #: The body ended early.
    CUT = "cut"
    #: The response is not HTTP.
    GARBLED = "garbled"
    #: Nothing arrived for too long.
    SILENT = "silent"


class Reply(Protocol):
    """Receives the response. No callback fires after `failed`, `ended` or `cancel`."""

    def informed(self, headers: RawHeaders) -> None:
        """Handle the headers of an interim response (1xx)."""

    def began(self, connection: ReplicaConnection) -> None:
        """Handle the head: see `connection.status`, `.reason`, `.headers`."""

    def received(self, body: bytes) -> None:
        """Handle a piece of the body."""

    def ended(self) -> None:
        """Handle the end of a complete response."""

    def failed(self, fault: Fault, why: str) -> None: ...


class ReplicaConnection(asyncio.Protocol):
    """A socket to a replica. Callbacks come from the event loop."""

    def __init__(self, pool: ConnectionPool, handle: ReplicaHandle) -> None:
        self.handle = handle
        self.idle_since = 0.0
        #: time.monotonic() at which bytes last arrived, or a request was sent.
        self.heard_at = 0.0
        self.status = 0
        self.reason = b""
        self.headers: RawHeaders = []
        #: Content-Length of the response; None without one.
        self.length: int | None = None
        self.content_type = b""
        self.has_retry_after = self.has_request_id = self.has_lost_engine = False
        #: Headers named in a Connection header.
        self.dropped: frozenset[bytes] = frozenset()
        self._pool = pool
        self._transport: asyncio.Transport = cast(asyncio.Transport, None)
        self._parser = httptools.HttpResponseParser(self)
        self._reply: Reply | None = None
        self._is_head = False
        self._has_begun = False
        #: The body ends when the replica closes the connection.
        self._until_close = False
        self._head_bytes = 0
        self._interim_heads = 0
        self._overhead_bytes = 0
        self._pieces: list[bytes] = []
        self._complete = False
        #: Bytes have arrived after the end of the response.
        self._extra = False
        self._is_reusable = False
        self._is_between_chunks = False

    # ---- for the request that uses it

    def send(self, request: bytes, reply: Reply, is_head: bool = False) -> None:
        """Send a request; `is_head`: it is a HEAD, so the response has no body whatever its head says."""
        self._reply = reply
        self._is_head = is_head
        self._reset()
        self.heard_at = time.monotonic()
        self._pool.outbox.write(self._transport, request)

    def cancel(self) -> None:
        """Close the connection, which cancels the request."""
        self._reply = None
        self._transport.abort()

    def pause(self) -> None:
        if not self._transport.is_closing():
            self._transport.pause_reading()

    def resume(self) -> None:
        if not self._transport.is_closing():
            # The replica may have sent bytes that were not read, so it was not silent.
            self.heard_at = time.monotonic()
            self._transport.resume_reading()

    @property
    def fast_transport(self) -> asyncio.Transport | None:
        """The transport if the next byte begins a chunk, so that chunks can bypass the parser; else None."""
        transport = self._transport
        is_at_chunk = self._is_between_chunks and not self._complete and self._reply is not None
        # The write buffer must be empty: a request that is still being written may fail at any time.
        is_written = not transport.is_closing() and transport.get_write_buffer_size() == 0
        return transport if is_at_chunk and is_written else None

    @property
    def is_closing(self) -> bool:
        return self._transport.is_closing()

    @property
    def is_fresh(self) -> bool:
        """True if no response has arrived on it yet."""
        return self.idle_since == 0.0

    # ---- from the event loop

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        reply = self._reply
        if reply is None:
            # Unexpected bytes: they could be taken for the response to the next request.
            self._pool.forget(self)
            self._transport.abort()
            return
        self.heard_at = time.monotonic()
        if not self._has_begun:
            self._head_bytes += len(data)
        problem = None
        # The parser does not report an incomplete chunk header.
        self._is_between_chunks = False
        try:
            self._parser.feed_data(data)
            if not self._has_begun and self._head_bytes > _MAX_HEAD:
                problem = f"a response head of more than {_MAX_HEAD} bytes"
        except httptools.HttpParserUpgrade:
            problem = "a protocol switch"
        except httptools.HttpParserError as error:
            problem = f"{data[:40]!r} ({error.__context__ or error})"
        if self._reply is not reply:
            return  # a callback has ended the request
        self._is_between_chunks = self._is_between_chunks and data.endswith(b"\r\n")
        if self._pieces:
            self._overhead_bytes = 0
            pieces = self._pieces
            self._pieces = []
            reply.received(pieces[0] if len(pieces) == 1 else b"".join(pieces))
            if self._reply is not reply:
                return
        elif self._has_begun:
            self._overhead_bytes += len(data)
            if self._overhead_bytes > _MAX_OVERHEAD:
                problem = f"more than {_MAX_OVERHEAD} bytes of chunk framing between two pieces of the body"
        if self._complete:
            self._finish(reply)
        elif problem is not None:
            # Within a body, it is treated like a cut connection.
            fault = Fault.CUT if self._has_begun else Fault.GARBLED
            self._fail(fault, f"it sent {problem}")

    def eof_received(self) -> None:
        return None  # the transport closes itself

    def connection_lost(self, exc: Exception | None) -> None:
        self._pool.forget(self)
        reply = self._reply
        if reply is None:
            return
        why = "the connection was closed" if exc is None else str(exc).lower()
        if self._has_begun and self._until_close and exc is None:
            self._reply = None
            reply.ended()
        else:
            self._fail(Fault.CUT if self._has_begun else Fault.UNANSWERED, why)

    # ---- from the parser

    def on_message_begin(self) -> None:
        if self._complete:
            self._extra = True

    def on_status(self, status: bytes) -> None:
        self.reason += status

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._complete and not self._has_begun:
            self.headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        reply = self._reply
        if self._complete or reply is None:
            return
        status = self._parser.get_status_code()
        if status < 100:
            raise ValueError(f"invalid status {status}")
        if status < 200:
            self._read_interim(status)
            reply.informed(self.headers)
            self.reason, self.headers = b"", []
            self._head_bytes = 0
            return
        self.status = status
        self._read_framing()
        self._has_begun = True
        reply.began(self)

    def on_chunk_header(self) -> None:
        self._is_between_chunks = False

    def on_chunk_complete(self) -> None:
        self._is_between_chunks = True

    def on_body(self, body: bytes) -> None:
        if self._complete:
            self._extra = True
        elif not self._has_begun:
            raise ValueError("an interim response with a body")
        else:
            self._pieces.append(body)

    def on_message_complete(self) -> None:
        if self._has_begun:
            self._complete = True
            # The parser does not know this earlier.
            self._is_reusable = self._parser.should_keep_alive()

    # ---- the rest

    def _reset(self) -> None:
        self.status, self.reason, self.headers, self.length = 0, b"", [], None
        self.content_type, self.dropped = b"", frozenset()
        self.has_retry_after = self.has_request_id = self.has_lost_engine = False
        self._has_begun = self._complete = self._until_close = self._extra = self._is_reusable = False
        self._is_between_chunks = False
        self._head_bytes = self._interim_heads = self._overhead_bytes = 0
        self._pieces = []

    def _read_interim(self, status: int) -> None:
        """Check an interim response. It has no body (RFC 9110, 15.2), but llhttp reads one if announced."""
        if status == 101:
            raise ValueError("a protocol switch that was not requested")
        if any(name in _FRAMING for name, _ in self.headers):
            raise ValueError("an interim response with a body")
        self._interim_heads += 1
        if self._interim_heads > _MAX_INTERIM:
            raise ValueError(f"more than {_MAX_INTERIM} interim responses")

    def _read_framing(self) -> None:
        chunked = False
        for name, value in self.headers:
            if name == b"content-length":
                self.length = int(value)
            elif name == b"transfer-encoding":
                chunked = True
                if value.lower() != b"chunked":
                    raise ValueError("unsupported Transfer-Encoding; only chunked is accepted")
            elif name == b"content-type":
                self.content_type = value.lower()
            elif name == b"connection":
                self.dropped |= named_in(value)
            elif name == b"retry-after":
                self.has_retry_after = True
            elif name == b"x-request-id":
                self.has_request_id = True
            elif name == _LOST:
                self.has_lost_engine = True
        if chunked:
            # Chunking overrides a length.
            self.length = None
        bodiless = self._is_head or self.status in (204, 304)
        if self._is_head:
            # The parser would wait for a body that never arrives.
            self._complete = True
        self._until_close = not chunked and self.length is None and not bodiless

    def _finish(self, reply: Reply) -> None:
        self._reply = None
        keep = self._is_reusable and not self._extra
        self.idle_since = self.heard_at
        if keep and not self._transport.is_closing():
            # This client may have paused it with the last piece; the next one has not.
            self._transport.resume_reading()
            self._pool.keep(self)
        else:
            self._transport.abort()
        reply.ended()

    def _fail(self, fault: Fault, why: str) -> None:
        reply, self._reply = self._reply, None
        self._transport.abort()
        if reply is not None:
            reply.failed(fault, why)


class ConnectionPool:
    """The connections of one worker to replicas. Belongs to its event loop."""

    def __init__(self, outbox: WriteBatcher) -> None:
        self.outbox = outbox
        #: Idle connections by generation of the replica's handle, the longest idle first.
        self._idle: dict[int, deque[ReplicaConnection]] = {}
        self._connecting: set[asyncio.Task[None]] = set()

    def take(self, handle: ReplicaHandle) -> ReplicaConnection | None:
        """Return an idle connection, or None."""
        idle = self._idle.get(handle.generation)
        return idle.pop() if idle else None

    def connect(self, handle: ReplicaHandle, then: Connecting) -> None:
        """Open a connection and pass it to `then`."""
        task = asyncio.get_running_loop().create_task(self._connect(handle, then))
        # The event loop holds only weak references to tasks.
        self._connecting.add(task)
        task.add_done_callback(self._connecting.discard)

    def keep(self, connection: ReplicaConnection) -> None:
        generation = connection.handle.generation
        idle = self._idle.get(generation)
        if idle is None:
            idle = self._idle[generation] = deque()
        idle.append(connection)
        if len(idle) > _MAX_IDLE_PER_REPLICA:
            idle.popleft().cancel()

    def forget(self, connection: ReplicaConnection) -> None:
        idle = self._idle.get(connection.handle.generation)
        if idle and connection in idle:
            idle.remove(connection)

    def sweep(self, now: float) -> None:
        """Close connections that have been idle for too long. Call periodically."""
        for generation, idle in list(self._idle.items()):
            while idle and idle[0].idle_since < now - _MAX_IDLE_SECONDS:
                idle.popleft().cancel()
            if not idle:
                del self._idle[generation]

    async def _connect(self, handle: ReplicaHandle, then: Connecting) -> None:
        instance = handle.instance
        try:
            async with asyncio.timeout(_CONNECT_TIMEOUT):
                _, connection = await asyncio.get_running_loop().create_connection(
                    lambda: ReplicaConnection(self, handle), instance.host, instance.port
                )
        except TimeoutError:
            then.unreachable(f"no connection within {_CONNECT_TIMEOUT:.0f} s")
        except OSError as error:
            reason = (error.strerror or str(error)).lower()
            then.unreachable(f"no connection ({reason})")
        except Exception as error:
            # For example, the system rejects the address. Nothing awaits this task, so report it here.
            logger.exception("cannot connect to %s", instance.authority)
            then.unreachable(f"no connection ({type(error).__name__})")
        else:
            if connection.is_closing:
                # The replica died with the connection in its backlog; no further callback would come.
                then.unreachable("closed the connection at once")
            else:
                then.connected(connection)


class Connecting(Protocol):
    """Waits for a connection."""

    def connected(self, connection: ReplicaConnection) -> None: ...

    def unreachable(self, why: str) -> None: ...
