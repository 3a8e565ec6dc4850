"""HTTP client for short requests, over TCP or a unix socket.

Each request has its own connection, a limit on its total time, and a limit on the size of its response.
Redirects are not followed. Proxies and `.netrc` have no effect.
"""

from __future__ import annotations

import functools
import http.client
import io
import json
import socket
import ssl
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import FastDeployError
from .foreign_text import parse_json, printable

#: Host and port, or path of a unix socket.
Server = tuple[str, int] | Path

_MAX_BODY = 1 << 20
#: Seconds between two attempts to connect to a unix socket whose backlog is full.
_RETRY_INTERVAL = 0.02


class HttpError(FastDeployError):
    """There is no usable response. The message is a phrase such as "connection refused"."""


class ConnectionRefused(HttpError):
    """No program listens on the port or socket."""


class TimedOut(HttpError):
    """The response was not complete in time."""


class NotJson(HttpError):
    """The body is not JSON."""


@dataclass(frozen=True, slots=True)
class Response:
    """A complete response with any status."""

    status: int
    body: bytes

    def json(self) -> Any:
        """Return the parsed body. Raises NotJson."""
        try:
            return parse_json(self.body)
        except ValueError as error:
            raise NotJson(f"response is not JSON: {printable(error)}") from None


def request(
    server: Server,
    method: str,
    path: str,
    *,
    timeout: float,
    limit: int = _MAX_BODY,
    body: bytes | None = None,
    fields: Mapping[str, Any] | None = None,
    headers: Mapping[str, str] | None = None,
    key: str = "",
    tls: bool = False,
) -> Response:
    """Send a request and return the response.

    Args:
        timeout: seconds from connecting to the last byte. Looking up a host name is not limited.
        limit: maximum bytes of the response's body; 0 to ignore the body.
        fields: JSON object to send, instead of `body`.
        key: API key.
        tls: encrypt, and verify the certificate with the authorities that the system trusts.

    Raises:
        HttpError: there is no complete response within the limits.
    """
    end = time.monotonic() + timeout
    lines = {"Connection": "close", **(headers or {})}
    if fields is not None:
        body = json.dumps(fields).encode()
        lines["Content-Type"] = "application/json"
    if key:
        lines["Authorization"] = f"Bearer {key}"
    host, port = server if isinstance(server, tuple) else ("localhost", None)
    connection = http.client.HTTPConnection(host, port)
    try:
        with _connect(server, end) as plain, _encrypt(plain, host, end) if tls else plain as sock:
            connection.sock = _Socket(sock, end)
            connection.request(method, path, body, lines)
            response = connection.getresponse()
            content = response.read(limit + 1) if limit else b""
            # `length` is the number of announced bytes that have not been read.
            is_cut = bool(limit and response.length)
    except TimeoutError:
        raise TimedOut(f"no complete response within {timeout:g} s") from None
    except ConnectionRefusedError:
        raise ConnectionRefused("connection refused") from None
    except http.client.RemoteDisconnected:
        raise HttpError("connection closed without a response") from None
    except OSError as error:
        raise HttpError(printable(error.strerror or error)) from None
    except http.client.IncompleteRead:
        raise HttpError("connection closed before the end of the response") from None
    # http.client raises ValueError for some malformed headers.
    except (http.client.HTTPException, ValueError) as error:
        raise HttpError(f"no valid HTTP response: {type(error).__name__} {printable(error, 80)}") from None
    finally:
        connection.close()
    if len(content) > limit:
        raise HttpError(f"response of more than {limit} bytes")
    if is_cut:
        raise HttpError("connection closed before the end of the response")
    return Response(response.status, content)


class _Socket:
    """The part of a socket that http.client uses, with one deadline for all operations."""

    def __init__(self, sock: socket.socket, end: float) -> None:
        self._sock = sock
        self._end = end

    def sendall(self, data: bytes) -> None:
        left = memoryview(data)
        while left:
            self._sock.settimeout(_left(self._end))
            left = left[self._sock.send(left) :]

    def makefile(self, _mode: str) -> io.BufferedReader:
        return io.BufferedReader(_Received(self._sock, self._end))

    def close(self) -> None:
        """Do nothing: http.client closes its connection before it has read the response."""


class _Received(io.RawIOBase):
    """Stream of the received bytes."""

    def __init__(self, sock: socket.socket, end: float) -> None:
        self._sock = sock
        self._end = end

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self._sock.settimeout(_left(self._end))
        return self._sock.recv_into(buffer)


def _connect(server: Server, end: float) -> socket.socket:
    """Return a connected socket. Raises OSError."""
    if isinstance(server, Path):
        return _connect_to(socket.AF_UNIX, str(server), end)
    try:
        found = socket.getaddrinfo(*server, type=socket.SOCK_STREAM)
    except UnicodeError:
        raise OSError(f"{server[0]!r} is not a host name") from None
    problem = OSError(f"{server[0]} has no address")
    for tried, (family, _, _, _, address) in enumerate(found):
        # An address that drops packets must not use the time of the next one.
        share = _left(end) / (len(found) - tried)
        try:
            return _connect_to(family, address, time.monotonic() + share)
        except OSError as error:
            problem = error
    raise problem


def _connect_to(family: int, address: Any, end: float) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        while True:
            sock.settimeout(_left(end))
            try:
                sock.connect(address)
                return sock
            except BlockingIOError:
                # The backlog of a unix socket is full.
                time.sleep(_RETRY_INTERVAL)
    except BaseException:
        sock.close()
        raise


def _encrypt(sock: socket.socket, host: str, end: float) -> ssl.SSLSocket:
    sock.settimeout(_left(end))
    return _tls_context().wrap_socket(sock, server_hostname=host)


@functools.cache
def _tls_context() -> ssl.SSLContext:
    return ssl.create_default_context()


def _left(end: float) -> float:
    """Return the seconds until `end`. Raises TimeoutError after it."""
    left = end - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left
