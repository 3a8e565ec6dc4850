"""Requests to replicas: one blocking exchange at a time on connections that are kept and used again."""

from __future__ import annotations

import io
import select
import socket
import threading
import time
from dataclasses import dataclass
from typing import cast

from ...errors import FastDeployError
from .registration import Instance
from .response import PIECE, Cut, Headers, Response, ResponseError, Unanswered

_CONNECT_TIMEOUT = 5.0
#: A kept connection that nobody used for so long is closed.
_MAX_IDLE_SECONDS = 30.0
_MAX_IDLE_PER_REPLICA = 64
_BODILESS = ("GET", "HEAD", "OPTIONS", "DELETE")


class Unreachable(FastDeployError):
    """No connection: nothing was sent."""


class Silent(FastDeployError):
    """Nothing came for longer than the request timeout."""


class Cancelled(FastDeployError):
    """The client has gone; there is nobody to answer."""


#: Everything that can be wrong with a replica's answer. `Cancelled` is the client's doing.
UpstreamError = (Unreachable, Silent, ResponseError)


class Cancellation:
    """The socket that a request waits on just now, so that another thread can end the wait."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._socket: socket.socket | None = None
        self.cancelled = False

    def cancel(self) -> None:
        with self._lock:
            self.cancelled = True
            if self._socket is not None:
                _shutdown(self._socket)

    def attach(self, sock: socket.socket) -> None:
        """Raises Cancelled if it is too late."""
        with self._lock:
            if self.cancelled:
                raise Cancelled("the client has gone")
            self._socket = sock

    def detach(self) -> None:
        """Before the socket goes back to the others: a late cancel must not hit the next request on it."""
        with self._lock:
            self._socket = None


@dataclass(frozen=True, slots=True)
class Request:
    """What is sent. Host and Content-Length are not among the headers: they follow from the rest."""

    method: str
    target: str
    headers: Headers
    body: bytes = b""

    def head(self, authority: str) -> bytes:
        lines = [f"{self.method} {self.target} HTTP/1.1", f"Host: {authority}"]
        lines += [f"{name}: {value}" for name, value in self.headers]
        if self.body or self.method not in _BODILESS:
            lines.append(f"Content-Length: {len(self.body)}")
        return "\r\n".join([*lines, "", ""]).encode("latin-1")


class Connections:
    """Kept connections to all replicas. Thread-safe; each connection belongs to one request at a time."""

    def __init__(self, timeout: float) -> None:
        """`timeout`: seconds of silence after which a replica's answer is given up."""
        self._timeout = timeout
        self._lock = threading.Lock()
        self._idle: dict[str, list[tuple[socket.socket, float]]] = {}

    def send(self, instance: Instance, request: Request, cancellation: Cancellation) -> Reply:
        """Sends a request and waits for the head of the answer. The caller closes the reply.

        Raises:
            Unreachable, Silent, ResponseError: see there.
            Cancelled: `cancellation` ended the wait.
        """
        kept = self._take(instance)
        if kept is not None:
            try:
                return self._exchange(kept, instance, request, cancellation)
            except Unanswered:
                # A server may close a kept connection at the very moment it is used. Nothing was answered, so
                # a new connection to the same replica decides whether the replica is there.
                pass
        return self._exchange(self._connect(instance), instance, request, cancellation)

    def keep(self, sock: socket.socket, instance: Instance) -> None:
        """Takes back a connection whose last answer was read to its end."""
        with self._lock:
            idle = self._idle.setdefault(instance.authority, [])
            if len(idle) < _MAX_IDLE_PER_REPLICA:
                idle.append((sock, time.monotonic()))
                return
        sock.close()

    def sweep(self) -> None:
        """Closes kept connections which the other side closed or nobody used for long. Call now and then."""
        limit = time.monotonic() - _MAX_IDLE_SECONDS
        with self._lock:
            for authority in list(self._idle):
                fit = []
                for sock, since in self._idle.pop(authority):
                    if since > limit and _is_quiet(sock):
                        fit.append((sock, since))
                    else:
                        sock.close()
                if fit:
                    self._idle[authority] = fit

    def _take(self, instance: Instance) -> socket.socket | None:
        while True:
            with self._lock:
                idle = self._idle.get(instance.authority)
                if not idle:
                    return None
                sock, _ = idle.pop()
            if _is_quiet(sock):
                return sock
            sock.close()

    def _connect(self, instance: Instance) -> socket.socket:
        try:
            sock = socket.create_connection((instance.host, instance.port), timeout=_CONNECT_TIMEOUT)
        except OSError as error:
            raise Unreachable(f"no connection to {instance.authority} ({_reason(error)})") from None
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.settimeout(self._timeout)
        return sock

    def _exchange(
        self, sock: socket.socket, instance: Instance, request: Request, cancellation: Cancellation
    ) -> Reply:
        try:
            cancellation.attach(sock)
            try:
                head = request.head(instance.authority)
                if len(request.body) < PIECE:
                    sock.sendall(head + request.body)
                else:
                    sock.sendall(head)
                    sock.sendall(request.body)
            except (BrokenPipeError, ConnectionResetError):
                # It may have answered (too large, not authorised) and closed without reading the whole body.
                pass
            return Reply(sock, instance, request.method, cancellation, self)
        except BaseException as error:
            cancellation.detach()
            sock.close()
            if cancellation.cancelled:
                raise Cancelled("the client has gone") from None
            if isinstance(error, TimeoutError):
                raise Silent(f"{instance.authority} was silent for {self._timeout:.0f} s") from None
            if isinstance(error, OSError):
                raise Unanswered(f"{instance.authority} closed the connection ({_reason(error)})") from None
            if isinstance(error, ResponseError):
                raise type(error)(f"{instance.authority} did not answer: {error}") from None
            raise


class Reply:
    """A replica's answer; its head has arrived."""

    def __init__(
        self,
        sock: socket.socket,
        instance: Instance,
        method: str,
        cancellation: Cancellation,
        connections: Connections,
    ) -> None:
        self._socket = sock
        self._instance = instance
        self._cancellation = cancellation
        self._connections = connections
        self._closed = False
        self._file = cast(io.BufferedReader, sock.makefile("rb", PIECE))
        try:
            self.response = Response(self._file, method)
        except BaseException:
            self._file.close()
            raise

    def read(self) -> bytes:
        """The next piece of the body as it came; b"" at the end.

        Raises:
            Cut: the connection ended too early.
            Silent: nothing came for too long.
            Cancelled: the client has gone.
        """
        try:
            return self.response.read()
        except (OSError, Cut) as error:
            if self._cancellation.cancelled:
                raise Cancelled("the client has gone") from None
            authority = self._instance.authority
            if isinstance(error, TimeoutError):
                raise Silent(f"{authority} fell silent in the middle of its answer") from None
            detail = _reason(error) if isinstance(error, OSError) else error
            raise Cut(f"{authority} did not finish its answer: {detail}") from None

    def close(self) -> None:
        """Keeps the connection if the answer was read to its end, else ends it: that cancels the request."""
        if self._closed:
            return
        self._closed = True
        self._cancellation.detach()
        self._file.close()
        if self.response.ended and self.response.reusable and not self._cancellation.cancelled:
            self._connections.keep(self._socket, self._instance)
        else:
            _shutdown(self._socket)
            self._socket.close()


def _is_quiet(sock: socket.socket) -> bool:
    """Nothing to read: neither a close nor bytes that nobody asked for."""
    poll = select.poll()
    poll.register(sock, select.POLLIN | select.POLLRDHUP)
    return not poll.poll(0)


def _shutdown(sock: socket.socket) -> None:
    try:
        sock.shutdown(socket.SHUT_RDWR)
    except OSError:
        return  # the other side was faster


def _reason(error: OSError) -> str:
    return (error.strerror or str(error) or type(error).__name__).lower()
