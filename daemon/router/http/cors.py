"""CORS: response headers for browsers, and preflight requests."""

from __future__ import annotations

import asyncio

from ....common.cors import CorsPolicy, refusal_of
from .protocols import Client
from .request import ClientRequest
from .responses import Response, error, header_lines


def cors_lines(policy: CorsPolicy, origin: bytes) -> bytes:
    """Return the CORS header lines of a response to a page of this origin."""
    return header_lines(policy.headers(_text(origin)))


class CorsClient:
    """A `Client` that adds CORS headers to the response of another."""

    __slots__ = ("_client", "_lines")

    def __init__(self, client: Client, lines: bytes) -> None:
        self._client = client
        self._lines = lines

    def respond(self, status: bytes, lines: bytes, body: bytes, length: int | None = None) -> None:
        self._client.respond(status, lines + self._lines, body, length)

    def begin(self, status: bytes, lines: bytes, length: int | None) -> None:
        self._client.begin(status, lines + self._lines, length)

    def send(self, piece: bytes) -> None:
        self._client.send(piece)

    @property
    def fast_transport(self) -> asyncio.Transport | None:
        return self._client.fast_transport

    def send_chunks(self, chunks: bytes) -> None:
        self._client.send_chunks(chunks)

    def end(self, trailer: bytes = b"") -> None:
        self._client.end(trailer)

    def abort(self) -> None:
        self._client.abort()


class Preflight:
    """The finished task of a preflight, which is answered at once."""

    def client_gone(self) -> None: ...

    def pause(self) -> None: ...

    def resume(self) -> None: ...


def is_preflight(request: ClientRequest) -> bool:
    """Return True for a preflight. The request has an Origin header."""
    return request.method == "OPTIONS" and b"access-control-request-method" in request.special


def preflight_answer(policy: CorsPolicy, request: ClientRequest) -> Response:
    """Return the response to a preflight. It needs no API key, because browsers send none."""
    origin = _text(request.special[b"origin"])
    wanted = _text(request.special.get(b"access-control-request-headers", b""))
    headers = policy.preflight_headers(origin, wanted)
    if policy.allows(origin):
        return Response(204, b"", headers)
    answer = error(403, refusal_of(origin), "origin_not_allowed")
    return Response(answer.status, answer.body, (*answer.headers, *headers))


def _text(value: bytes) -> str:
    return value.decode("latin-1")
