"""A client's request to one replica: choose, send, pass the answer on, cancel. A WSGI application for /v1/.

Until the first bytes of an answer have come, a replica that cannot take the request, or dies over it, is
replaced by another, unseen by the client; each is tried once. After that the answer is passed on piece by
piece as it comes.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import logging
import secrets
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from ...entrypoints.client_watch import watch
from .answers import Answer, error, sse_error
from .board import Board, Lease, Seat
from .incoming import Environ, Refused, receive, request_id, without_hop_by_hop
from .keys import ApiKeys
from .metrics import Metrics
from .policies import Policy, RequestFacts
from .response import Cut, Garbled, Unanswered
from .upstream import Cancellation, Cancelled, Connections, Reply, Request, Silent, Unreachable

logger = logging.getLogger(__name__)

StartResponse = Callable[[str, list[tuple[str, str]]], Any]

#: Of an answer that is kept while another replica is tried.
_MAX_KEPT = 64 << 10
_RESET_ON_CLOSE = struct.pack("ii", 1, 0)


@dataclass(frozen=True, slots=True)
class Limits:
    max_body_bytes: int
    #: Requests under way at one time; more are told to come back.
    max_in_flight: int


class Relay:
    """Thread-safe; a request occupies its thread until its answer has ended."""

    def __init__(
        self,
        board: Board,
        policy: Policy,
        connections: Connections,
        keys: ApiKeys,
        limits: Limits,
        metrics: Metrics,
    ) -> None:
        self._board = board
        self._policy = policy
        self._connections = connections
        self._keys = keys
        self._limits = limits
        self._metrics = metrics
        self._slots = threading.BoundedSemaphore(limits.max_in_flight)

    def __call__(self, environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        call = _Call(environ, start_response, self._metrics)
        # What is held for the request passes to the body, whose close() the server calls on every path.
        with contextlib.ExitStack() as held:
            try:
                self._let_in(call, held)
                request = receive(environ, call.id, self._limits.max_body_bytes)
                cancellation = Cancellation()
                held.enter_context(watch(environ["gunicorn.socket"], cancellation.cancel))
                lease, reply, pieces = self._first_answer(call, request, cancellation, held)
            except Refused as refused:
                return call.give(refused.answer)
            except Cancelled:
                return call.give(Answer(499, b""))
            call.begin(lease, reply)
            return _Body(call, lease, reply, pieces, self._board, held.pop_all())

    def _let_in(self, call: _Call, held: contextlib.ExitStack) -> None:
        if call.method != "OPTIONS" and not self._keys.allow(call.environ.get("HTTP_AUTHORIZATION", "")):
            raise Refused(error(401, "no valid API key: send Authorization: Bearer KEY", "invalid_api_key"))
        if not self._slots.acquire(blocking=False):
            count = self._limits.max_in_flight
            raise Refused(
                error(429, f"Too many requests,current max concurrency is {count}", "too_many_requests", 1)
            )
        held.callback(self._slots.release)

    def _first_answer(
        self, call: _Call, request: Request, cancellation: Cancellation, held: contextlib.ExitStack
    ) -> tuple[Lease, Reply, Iterator[bytes]]:
        """The first answer that is worth passing on, begun. `held` gives back its lease and connection."""
        facts = RequestFacts(call.path, request.body, secrets.randbits(64))
        tried: list[Seat] = []
        problems: list[str] = []
        busy: Answer | None = None
        while lease := self._board.pick(self._policy, facts, tried):
            tried.append(lease.seat)
            with contextlib.ExitStack() as attempt:
                attempt.callback(lease.release)
                try:
                    reply = self._connections.send(lease.instance, request, cancellation)
                    attempt.callback(reply.close)
                    if reply.response.status != 503:
                        pieces = _begun(_pieces(reply))
                        held.push(attempt.pop_all())
                        return lease, reply, pieces
                    busy = _whole(lease, reply) or busy
                    problem = f"{lease.instance.authority} answered 503"
                except (Unreachable, Unanswered, Cut) as fault:
                    self._report(lease, fault)
                    problem = str(fault)
                except Garbled as fault:
                    self._board.failed(lease.seat, str(fault))
                    raise Refused(
                        error(502, f"replica {lease.instance.name}: {fault}", "bad_gateway")
                    ) from None
                except Silent as fault:
                    self._board.failed(lease.seat, str(fault))
                    raise Refused(
                        error(504, f"replica {lease.instance.name}: {fault}", "replica_timeout")
                    ) from None
            problems.append(f"replica {lease.instance.name}: {problem}")
            self._metrics.retried(lease.instance.name)
            logger.warning(
                "request=%s replica=%s did not take it: %s", call.short_id, lease.instance.name, problem
            )
        raise Refused(busy or _nobody(problems))

    def _report(self, lease: Lease, fault: Unreachable | Unanswered | Cut) -> None:
        if isinstance(fault, Unreachable):
            self._board.unreachable(lease.seat, str(fault))
        else:
            self._board.failed(lease.seat, str(fault))


class _Call:
    """The client's side of one request: its answer is begun once, and told to log and metrics once."""

    def __init__(self, environ: Environ, start_response: StartResponse, metrics: Metrics) -> None:
        self.environ = environ
        self.method: str = environ["REQUEST_METHOD"]
        self.path: str = environ["PATH_INFO"]
        self._written_path = environ["RAW_URI"].partition("?")[0]
        self.id = request_id(environ)
        self.short_id = self.id[:64]
        self._start_response = start_response
        self._metrics = metrics
        self._began = time.monotonic()

    def give(self, answer: Answer) -> list[bytes]:
        """An answer of the router's own, whole."""
        length = ("Content-Length", str(len(answer.body)))
        self._start_response(answer.status_line, [*answer.headers, length, ("X-Request-Id", self.id)])
        self.ended(answer.status, len(answer.body), None, "")
        return [answer.body]

    def begin(self, lease: Lease, reply: Reply) -> None:
        response = reply.response
        headers = [
            (name, value)
            for name, value in without_hop_by_hop(response.headers)
            if name.lower() != "x-fd-replica"
        ]
        headers.append(("X-FD-Replica", lease.instance.name))
        if not response.header("x-request-id"):
            headers.append(("X-Request-Id", self.id))
        self._start_response(f"{response.status} {response.reason}".strip(), headers)

    def ended(self, status: int, size: int, lease: Lease | None, remark: str) -> None:
        seconds = time.monotonic() - self._began
        self._metrics.answered(self.method, self.path, status, seconds)
        if lease is not None:
            self._metrics.inference(lease.instance.url, status)
        logger.info(
            "request=%s replica=%s %s %s status=%d bytes=%d seconds=%.3f%s",
            # The path as it was written: decoded, it could hold a line break.
            *(self.short_id, lease.instance.name if lease else "-", self.method, self._written_path),
            *(status, size, seconds, f" ({remark})" if remark else ""),
        )

    def abort(self) -> None:
        """Has the client's connection reset: nobody may take what it got for a whole answer."""
        sock: socket.socket = self.environ["gunicorn.socket"]
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
        raise ConnectionResetError(errno.ECONNRESET, "the answer was broken off")


class _Body:
    """A replica's answer on its way to the client. The server iterates it once and closes it always."""

    def __init__(
        self,
        call: _Call,
        lease: Lease,
        reply: Reply,
        pieces: Iterator[bytes],
        board: Board,
        held: contextlib.ExitStack,
    ) -> None:
        self._call = call
        self._lease = lease
        self._reply = reply
        self._pieces = pieces
        self._board = board
        self._held = held
        self._size = 0
        self._remark = "client gone"

    def __iter__(self) -> Iterator[bytes]:
        try:
            for piece in self._pieces:
                self._size += len(piece)
                yield piece
            self._remark = ""
        except Cancelled:
            self._call.abort()
        except (Cut, Silent) as fault:
            self._remark = str(fault)
            self._board.failed(self._lease.seat, str(fault))
            if not _is_events(self._reply):
                self._call.abort()
            yield sse_error(f"replica {self._lease.instance.name} was lost in the middle of the answer")

    def close(self) -> None:
        self._held.close()
        self._call.ended(self._reply.response.status, self._size, self._lease, self._remark)


def _is_events(reply: Reply) -> bool:
    # With a length announced, nothing can be added to a stream that breaks off.
    return reply.response.header("content-type").lower().startswith(
        "text/event-stream"
    ) and not reply.response.header("content-length")


def _pieces(reply: Reply) -> Iterator[bytes]:
    """The body as it is passed on."""
    return _lines(reply) if _is_events(reply) else iter(reply.read, b"")


def _lines(reply: Reply) -> Iterator[bytes]:
    """Whole lines of an event stream: where it breaks off, the client has no half line to choke on."""
    line: list[bytes] = []
    while piece := reply.read():
        end = max(piece.rfind(b"\n"), piece.rfind(b"\r")) + 1
        if end:
            yield b"".join([*line, piece[:end]])
            line = []
        if end < len(piece):
            line.append(piece[end:])
    if line:
        yield b"".join(line)


def _begun(pieces: Iterator[bytes]) -> Iterator[bytes]:
    """Waits for the first piece: a replica may send the head of a stream long before, and die meanwhile.

    Nothing may have gone to the client by then, not even that head: it binds the client to this replica.
    """
    first = next(pieces, b"")
    return itertools.chain([first], pieces)


def _whole(lease: Lease, reply: Reply) -> Answer | None:
    """A replica's "not now", to be passed on if no other replica says better."""
    body = b""
    try:
        while (piece := reply.read()) and len(body) <= _MAX_KEPT:
            body += piece
    except (Cut, Silent):
        return None
    if len(body) > _MAX_KEPT:
        return None
    headers = [
        (name, value)
        for name, value in without_hop_by_hop(reply.response.headers)
        if name.lower() not in ("content-length", "x-fd-replica", "x-request-id")
    ]
    return Answer(reply.response.status, body, (*headers, ("X-FD-Replica", lease.instance.name)))


def _nobody(problems: list[str]) -> Answer:
    message = "no replica can take the request now"
    if problems:
        message += f" ({'; '.join(problems)})"
    return error(503, message, "no_replica", retry_after=2)
