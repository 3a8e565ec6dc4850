"""Responses of the router itself, with error bodies like OpenAI's. Pure."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from http import HTTPStatus


@dataclass(frozen=True, slots=True)
class Response:
    """A complete response."""

    status: int
    body: bytes
    headers: tuple[tuple[str, str], ...] = field(default=())

    @property
    def status_line(self) -> str:
        try:
            return f"{self.status} {HTTPStatus(self.status).phrase}"
        except ValueError:
            return f"{self.status} Unknown"


def header_lines(headers: Iterable[tuple[str, str]]) -> bytes:
    """Return the headers as lines of a response head, each with its line end."""
    return "".join(f"{name}: {value}\r\n" for name, value in headers).encode("latin-1")


_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    429: "rate_limit_error",
    501: "invalid_request_error",
    505: "invalid_request_error",
}


def error_body(status: int, message: str, code: str | None = None) -> bytes:
    kind = _TYPES.get(status) or ("invalid_request_error" if status < 500 else "server_error")
    return json.dumps({"error": {"message": message, "type": kind, "param": None, "code": code}}).encode()


def error(status: int, message: str, code: str | None = None, retry_after: int | None = None) -> Response:
    """Return an OpenAI error response; `retry_after` is in seconds."""
    headers = [("Content-Type", "application/json")]
    if retry_after is not None:
        headers.append(("Retry-After", str(retry_after)))
    if status == 401:
        headers.append(("WWW-Authenticate", "Bearer"))
    return Response(status, error_body(status, message, code), tuple(headers))


def sse_error(message: str) -> bytes:
    """Return the end of an event stream that breaks off: an error event and [DONE].

    The leading newline terminates an event that the replica may have left incomplete.
    """
    return b"\ndata: " + error_body(502, message, "replica_lost") + b"\n\ndata: [DONE]\n\n"
