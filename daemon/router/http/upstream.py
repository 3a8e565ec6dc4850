"""Connections to replicas: one request at a time on each; they are kept and used again.

Strict about what is an answer: a head or a body that ends early is a failure, never an answer that only looks
complete. What has come is handed out without waiting for more.
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
#: A kept connection that nobody used for so long is closed.
_MAX_IDLE_SECONDS = 30.0
_MAX_IDLE_PER_REPLICA = 1024
_MAX_HEAD = 128 << 10
#: Bytes of a body that hold nothing: an endless chunk extension or trailer.
_MAX_NOTHING = 128 << 10
#: Interim heads before the answer. Our replicas send one every few seconds: this is half a day.
_MAX_INTERIM = 10_000
_FRAMING = frozenset({b"content-length", b"transfer-encoding"})


class Fault(enum.Enum):
    #: No connection: nothing was sent.
    UNREACHABLE = "unreachable"
    #: The connection ended before a whole head had come.
    UNANSWERED = "unanswered"
    #: The body ended before its end.
    CUT = "cut"
    #: What came is not HTTP.
    GARBLED = "garbled"
    #: Nothing came for too long.
    SILENT = "silent"


class Reply(Protocol):
    """Who gets the answer. Nothing is called any more once `failed` or `ended` was, or after `cancel`."""

    def informed(self, headers: RawHeaders) -> None:
        """An interim answer has come."""

    def began(self, connection: ReplicaConnection) -> None:
        """The head has come: `connection.status`, `.reason`, `.headers`."""

    def received(self, body: bytes) -> None:
        """A piece of the body, as it came."""

    def ended(self) -> None:
        """The answer is whole."""

    def failed(self, fault: Fault, why: str) -> None: ...


class ReplicaConnection(asyncio.Protocol):
    """A socket to a replica. Callbacks come from the event loop."""

    def __init__(self, pool: ConnectionPool, handle: ReplicaHandle) -> None:
        self.handle = handle
        self.idle_since = 0.0
        #: When bytes last came, or a request was sent.
        self.heard_at = 0.0
        self.status = 0
        self.reason = b""
        self.headers: RawHeaders = []
        #: Of the answer, by its head; None without a length.
        self.length: int | None = None
        self.content_type = b""
        self.has_retry_after = self.has_request_id = self.has_lost_engine = False
        #: Headers that a Connection header has named.
        self.dropped: frozenset[bytes] = frozenset()
        self._pool = pool
        self._transport: asyncio.Transport = cast(asyncio.Transport, None)
        self._parser = httptools.HttpResponseParser(self)
        self._reply: Reply | None = None
        self._is_head = False
        self._has_begun = False
        self._until_close = False
        self._head_bytes = 0
        self._interim_heads = 0
        self._nothing_bytes = 0
        self._pieces: list[bytes] = []
        self._complete = False
        self._extra = False
        self._is_reusable = False
        self._is_between_chunks = False

    # ---- for the one that has it

    def send(self, request: bytes, reply: Reply, is_head: bool = False) -> None:
        """`is_head`: the request is a HEAD, so that there is no body whatever the head says."""
        self._reply = reply
        self._is_head = is_head
        self._reset()
        self.heard_at = time.monotonic()
        self._pool.outbox.write(self._transport, request)

    def cancel(self) -> None:
        """Ends the connection, which cancels the request."""
        self._reply = None
        self._transport.abort()

    def pause(self) -> None:
        if not self._transport.is_closing():
            self._transport.pause_reading()

    def resume(self) -> None:
        if not self._transport.is_closing():
            # What came meanwhile has not been read, and is no silence.
            self.heard_at = time.monotonic()
            self._transport.resume_reading()

    @property
    def fast_transport(self) -> asyncio.Transport | None:
        """Its own, if the next byte begins a chunk, so that chunks can be read past the parser."""
        transport = self._transport
        is_at_chunk = self._is_between_chunks and not self._complete and self._reply is not None
        # A request that is still being written may fail at any time.
        is_written = not transport.is_closing() and transport.get_write_buffer_size() == 0
        return transport if is_at_chunk and is_written else None

    @property
    def is_closing(self) -> bool:
        return self._transport.is_closing()

    @property
    def is_fresh(self) -> bool:
        """No answer has come on it yet."""
        return self.idle_since == 0.0

    # ---- from the event loop

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        reply = self._reply
        if reply is None:
            # Bytes that nobody asked for: what comes next could be taken for another's answer.
            self._pool.forget(self)
            self._transport.abort()
            return
        self.heard_at = time.monotonic()
        if not self._has_begun:
            self._head_bytes += len(data)
        problem = None
        # Of a chunk's own head the parser says nothing before it is whole.
        self._is_between_chunks = False
        try:
            self._parser.feed_data(data)
            if not self._has_begun and self._head_bytes > _MAX_HEAD:
                problem = f"a head of more than {_MAX_HEAD} bytes"
        except httptools.HttpParserUpgrade:
            problem = "a switch of protocols"
        except httptools.HttpParserError as error:
            problem = f"{data[:40]!r} ({error.__context__ or error})"
        if self._reply is not reply:
            return  # the head made the request end
        self._is_between_chunks = self._is_between_chunks and data.endswith(b"\r\n")
        if self._pieces:
            self._nothing_bytes = 0
            pieces = self._pieces
            self._pieces = []
            reply.received(pieces[0] if len(pieces) == 1 else b"".join(pieces))
            if self._reply is not reply:
                return
        elif self._has_begun:
            self._nothing_bytes += len(data)
            if self._nothing_bytes > _MAX_NOTHING:
                problem = f"more than {_MAX_NOTHING} bytes between two pieces of the body"
        if self._complete:
            self._finish(reply)
        elif problem is not None:
            # In the middle of a body it is no better than a cut.
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
            raise ValueError(f"there is no status {status}")
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
            raise ValueError("an interim answer has no body")
        else:
            self._pieces.append(body)

    def on_message_complete(self) -> None:
        if self._has_begun:
            self._complete = True
            # The parser knows it only now.
            self._is_reusable = self._parser.should_keep_alive()

    # ---- the rest

    def _reset(self) -> None:
        self.status, self.reason, self.headers, self.length = 0, b"", [], None
        self.content_type, self.dropped = b"", frozenset()
        self.has_retry_after = self.has_request_id = self.has_lost_engine = False
        self._has_begun = self._complete = self._until_close = self._extra = self._is_reusable = False
        self._is_between_chunks = False
        self._head_bytes = self._interim_heads = self._nothing_bytes = 0
        self._pieces = []

    def _read_interim(self, status: int) -> None:
        """A sign of life. It has no body (RFC 9110, 15.2), and llhttp reads one if the head announces it."""
        if status == 101:
            raise ValueError("it switches protocols, which no request asks for")
        if any(name in _FRAMING for name, _ in self.headers):
            raise ValueError("an interim answer has no body")
        self._interim_heads += 1
        if self._interim_heads > _MAX_INTERIM:
            raise ValueError(f"more than {_MAX_INTERIM} interim answers")

    def _read_framing(self) -> None:
        chunked = False
        for name, value in self.headers:
            if name == b"content-length":
                self.length = int(value)
            elif name == b"transfer-encoding":
                chunked = True
                if value.lower() != b"chunked":
                    raise ValueError("the only transfer coding that is taken is chunked")
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
            # The parser waits for a body that does not come.
            self._complete = True
        self._until_close = not chunked and self.length is None and not bodiless

    def _finish(self, reply: Reply) -> None:
        self._reply = None
        keep = self._is_reusable and not self._extra
        self.idle_since = self.heard_at
        if keep and not self._transport.is_closing():
            # The client may have paused it with the very last piece, and is not the next one's.
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
    """All kept connections of one worker. Belongs to its event loop."""

    def __init__(self, outbox: WriteBatcher) -> None:
        self.outbox = outbox
        #: By the generation of the seat.
        self._idle: dict[int, deque[ReplicaConnection]] = {}
        self._connecting: set[asyncio.Task[None]] = set()

    def take(self, handle: ReplicaHandle) -> ReplicaConnection | None:
        """One that is kept, if there is."""
        idle = self._idle.get(handle.generation)
        return idle.pop() if idle else None

    def connect(self, handle: ReplicaHandle, then: Connecting) -> None:
        """Opens one and tells `then`."""
        task = asyncio.get_running_loop().create_task(self._connect(handle, then))
        # The loop itself holds tasks weakly.
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
        """Closes what nobody used for long, oldest first. Call now and then."""
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
            # For example, the system rejects the address. No caller awaits this task.
            logger.exception("a connection to %s cannot be opened", instance.authority)
            then.unreachable(f"no connection ({type(error).__name__})")
        else:
            if connection.is_closing:
                # By a replica that died with it still in its backlog. Nothing more would be heard.
                then.unreachable("closed the connection at once")
            else:
                then.connected(connection)


class Connecting(Protocol):
    """Who waits for a connection."""

    def connected(self, connection: ReplicaConnection) -> None: ...

    def unreachable(self, why: str) -> None: ...
