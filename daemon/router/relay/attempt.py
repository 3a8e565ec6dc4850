"""One attempt at a request: a leased replica, the connection to it and the response as it arrives.

connect --> send --> receive, by the event loop or the fast path --> completed
   |         |          +-> refused: the replica sent a complete response that declines the request
   +---------+----------+-> failed: the replica was lost, was silent for too long or broke the protocol
"""

from __future__ import annotations

import asyncio
from typing import Protocol

from ..board.board import Lease
from ..http.fast_path import FastStream, Passed
from ..http.request import RawHeaders
from ..http.upstream import Fault, ReplicaConnection
from ..instance import ReplicaHandle
from .delivery import Delivery
from .guarded import entry
from .retry import is_busy
from .retry_state import RetryState
from .services import Services

#: Bytes of a refusal that are kept while another replica is tried.
_MAX_REFUSAL = 64 << 10


class Owner(Protocol):
    """The request that the attempt serves. After `completed`, `refused` or `failed` the attempt is over."""

    def request_bytes(self, attempt: Attempt) -> bytes:
        """Return what to send to the attempt's replica."""

    def on_progress(self) -> None:
        """Called once, when the attempt yields its first new tokens."""

    def completed(self) -> None:
        """End the request: all of the response has arrived."""

    def refused(self, attempt: Attempt, refusal: Refusal) -> None: ...

    def failed(self, attempt: Attempt, fault: Fault, why: str) -> None: ...

    def crash(self) -> None:
        """End the request after an exception. Called in the `except` clause."""


class Refusal:
    """A response with which a replica declines the request, held back while others are tried."""

    __slots__ = ("body", "connection")

    def __init__(self, connection: ReplicaConnection) -> None:
        self.connection = connection
        self.body = b""

    def add(self, piece: bytes) -> None:
        if len(self.body) + len(piece) <= _MAX_REFUSAL:
            self.body += piece


class Attempt:
    """Driven by callbacks of the pool, the replica connection and the fast path.

    Holds the lease until `release`.
    """

    __slots__ = (
        *(
            "_connection",
            "_delivery",
            "_fast",
            "_has_progress",
            "_is_released",
            "_is_reused",
            "_lease",
            "_owner",
        ),
        *("_refusal", "_retry", "_services", "_stays_on_loop", "is_reconnect"),
    )

    def __init__(
        self, owner: Owner, services: Services, delivery: Delivery, retry: RetryState, lease: Lease
    ) -> None:
        #: A kept connection ended without a response, so a new one is made to the same replica.
        self.is_reconnect = False
        self._owner = owner
        self._services = services
        self._delivery = delivery
        self._retry = retry
        self._lease = lease
        self._is_released = False
        self._connection: ReplicaConnection | None = None
        #: The connection was kept from an earlier request and may be closed by now.
        self._is_reused = False
        self._refusal: Refusal | None = None
        self._has_progress = False
        #: Set while the fast path has both connections.
        self._fast: FastStream | None = None
        #: The fast path cannot serve this response.
        self._stays_on_loop = False

    @property
    def handle(self) -> ReplicaHandle:
        return self._lease.handle

    @property
    def has_connection(self) -> bool:
        return self._connection is not None

    def start(self) -> None:
        connection = self._services.pool.take(self._lease.handle)
        if connection is not None:
            self._send(connection)
        else:
            self._services.pool.connect(self._lease.handle, self)

    def cancel(self) -> None:
        """Drop the connection, which cancels the request at the replica."""
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.cancel()

    def release(self) -> None:
        """Give the lease back."""
        self._is_released = True
        self._lease.release()

    # ---- from the request

    def pause(self) -> None:
        if self._connection is not None:
            self._connection.pause()

    def resume(self) -> None:
        if self._connection is not None:
            self._connection.resume()

    def reset_silence_timer(self, now: float) -> None:
        if self._connection is not None:
            self._connection.heard_at = now

    def watch(self, now: float) -> None:
        connection = self._connection
        if connection is None or self._delivery.is_paused:
            return
        if self._fast is not None:
            connection.heard_at = max(connection.heard_at, self._fast.heard_at)
            self._count(self._fast.new_events())
        settings = self._services.settings
        has_keep_alive = "progress" in connection.handle.instance.features
        timeout = settings.progress_timeout if has_keep_alive else settings.request_timeout
        if now - connection.heard_at > timeout:
            connection.cancel()
            self.failed(Fault.SILENT, f"no data for {timeout:g} s")

    def crash(self) -> None:
        self._owner.crash()

    # ---- from the pool

    @entry
    def connected(self, connection: ReplicaConnection) -> None:
        if self._is_released:
            self._services.pool.keep(connection)
        else:
            self._send(connection)

    @entry
    def unreachable(self, why: str) -> None:
        if not self._is_released:
            self.failed(Fault.UNREACHABLE, why)

    # ---- from the replica connection

    @entry
    def informed(self, headers: RawHeaders) -> None:
        # The replica has the request, so the kept connection was still open.
        self._is_reused = False
        if "resume" in self._lease.instance.features:
            tokens = self._delivery.note_draft(headers)
            self._count(tokens)
            if tokens and self._retry.resumption is not None:
                self._retry.on_resumed(self._lease.handle)

    @entry
    def began(self, connection: ReplicaConnection) -> None:
        status, handle = connection.status, self._lease.handle
        delivery, retry = self._delivery, self._retry
        if retry.resumption is not None:
            is_stream = connection.content_type.startswith(b"text/event-stream")
            if status == 200 and (is_stream or not delivery.has_begun):
                retry.on_resumed(handle)
            else:
                self._refusal = Refusal(connection)
        elif is_busy(status, connection.has_retry_after):
            self._refusal = Refusal(connection)
        if self._refusal is None and not delivery.has_begun:
            has_marks = "resume" in handle.instance.features
            delivery.expect(connection, len(retry.problems), has_marks, retry.resumed_by)
        self._stays_on_loop = not delivery.has_marks

    @entry
    def received(self, body: bytes) -> None:
        if self._refusal is not None:
            self._refusal.add(body)
            return
        if self._delivery.receive(body):
            # Usually one event, which has one token.
            self._count(1)
            if not self._stays_on_loop:
                # Deferred: the write buffer is empty by then.
                asyncio.get_running_loop().call_soon(self._take_fast_path)
        if problem := self._delivery.problem:
            self.cancel()
            self.failed(Fault.CUT, problem)

    @entry
    def ended(self) -> None:
        self._connection = None
        if self._refusal is not None:
            self._owner.refused(self, self._refusal)
        elif self._delivery.is_open:
            self.failed(Fault.CUT, "the stream ended before its last event")
        else:
            self._services.board.succeeded(self._lease.handle)
            self._owner.completed()

    @entry
    def failed(self, fault: Fault, why: str) -> None:
        # A silent replica may be on the fast path.
        self.leave_fast_path()
        self._connection = None
        delivery = self._delivery
        if delivery.is_done:
            delivery.complete()
            self._owner.completed()
            return
        delivery.drop_partial()
        if fault is Fault.UNANSWERED and self._is_reused:
            # A server may close a kept connection just as it is used. A new one shows whether the replica
            # is still there.
            self._is_reused, self.is_reconnect = False, True
            self._services.pool.connect(self._lease.handle, self)
        else:
            self._owner.failed(self, fault, why)

    # ---- the fast path

    @entry
    def given_back(self) -> None:
        passed = self.leave_fast_path()
        if passed is None:
            return
        # If no event was passed on, the fast path cannot serve this stream.
        self._stays_on_loop = not passed.size
        self.parse_unread(passed)

    def parse_unread(self, passed: Passed | None) -> None:
        """Parse what the fast path had received but not passed on when the stream left it."""
        if self._connection is not None and passed is not None and passed.unread:
            self._connection.data_received(passed.unread)

    def leave_fast_path(self) -> Passed | None:
        """Return the stream to the event loop, if the fast path has it."""
        fast, connection = self._fast, self._connection
        if fast is None or connection is None:
            return None
        self._fast = None
        connection.heard_at = max(connection.heard_at, fast.heard_at)
        passed = fast.take_back()
        self._delivery.add_passed(passed)
        self._count(passed.new_events)
        return passed

    @entry
    def _take_fast_path(self) -> None:
        connection = self._connection
        if connection is None or self._fast is not None or self._delivery.is_paused:
            return
        replica, client = connection.fast_transport, self._delivery.fast_transport
        if replica is not None and client is not None:
            self._fast = self._services.fast_path.take(self, replica, client)
            self._stays_on_loop = self._fast is None

    # ---- internal

    def _send(self, connection: ReplicaConnection) -> None:
        self._connection = connection
        self._is_reused = not connection.is_fresh
        connection.send(self._owner.request_bytes(self), self, self._delivery.is_head)
        if self._delivery.is_paused:
            connection.pause()

    def _count(self, tokens: int) -> None:
        """Count tokens that were passed on, or drafted for a response that is sent whole."""
        if tokens:
            self._lease.count_tokens(tokens)
            if not self._has_progress:
                self._has_progress = True
                self._owner.on_progress()
