"""A client's request as WSGI gives it -> the request for a replica."""

from __future__ import annotations

import secrets
import uuid
from typing import Any

from gunicorn.http.errors import ParseException

from ...errors import FastDeployError
from .answers import Answer, error
from .response import Headers
from .upstream import Request

Environ = dict[str, Any]

_PIECE = 64 << 10
_HOP_BY_HOP = frozenset(
    {
        "connection",
        "keep-alive",
        "proxy-authenticate",
        "proxy-authorization",
        "proxy-connection",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
    }
)
#: Follow from the connection and the body that are used; the server has dealt with Expect already.
_MADE_ANEW = frozenset({"host", "content-length", "expect"})


class Refused(FastDeployError):
    """A request that goes to no replica; `answer` says why."""

    def __init__(self, answer: Answer) -> None:
        super().__init__(answer.status_line)
        self.answer = answer


def request_id(environ: Environ) -> str:
    return environ.get("HTTP_X_REQUEST_ID") or uuid.uuid4().hex


def receive(environ: Environ, identity: str, max_body_bytes: int) -> Request:
    """Reads the body and makes the request for a replica: as it came, but for what belongs to the connection.

    A request id and a seed are added where the client sent none, so that every replica that is tried draws
    the same tokens.

    Raises:
        Refused: too large, incomplete, or no path of ours.
    """
    if ".." in environ["PATH_INFO"].split("/"):
        raise Refused(error(404, f"no such path: {environ['PATH_INFO']}", "not_found"))
    headers = _headers(environ)
    names = {name.lower() for name, _ in headers}
    if "x-request-id" not in names:
        headers.append(("X-Request-Id", identity))
    if "x-fd-seed" not in names:
        # 53 bits: exact wherever JSON numbers are doubles.
        headers.append(("X-FD-Seed", str(secrets.randbits(53))))
    return Request(environ["REQUEST_METHOD"], _target(environ), headers, _body(environ, max_body_bytes))


def without_hop_by_hop(headers: Headers) -> Headers:
    """Leaves out what is about one connection only, the headers named in Connection included."""
    named = {
        word.strip().lower()
        for name, value in headers
        if name.lower() == "connection"
        for word in value.split(",")
    }
    return [(name, value) for name, value in headers if name.lower() not in _HOP_BY_HOP | named]


def _headers(environ: Environ) -> Headers:
    headers = [
        (key[5:].replace("_", "-").title(), value)
        for key, value in environ.items()
        if key.startswith("HTTP_")
    ]
    if environ.get("CONTENT_TYPE"):
        headers.append(("Content-Type", environ["CONTENT_TYPE"]))
    return [(name, value) for name, value in without_hop_by_hop(headers) if name.lower() not in _MADE_ANEW]


def _target(environ: Environ) -> str:
    """The path and query as they were written: decoding and encoding again could change them."""
    uri: str = environ["RAW_URI"]
    if not uri.startswith("/"):
        uri = "/" + uri.partition("://")[2].partition("/")[2]
    return uri.partition("#")[0]


def _body(environ: Environ, limit: int) -> bytes:
    announced = int(environ.get("CONTENT_LENGTH") or 0)
    source = environ["wsgi.input"]
    too_large = error(
        413, f"the request body is larger than {limit} bytes (--max-body-bytes)", "body_too_large"
    )
    pieces = []
    size = 0
    try:
        if announced > limit:
            _discard(source, 8 * limit)
            raise Refused(too_large)
        while piece := source.read(_PIECE):
            size += len(piece)
            if size > limit:
                _discard(source, 8 * limit)
                raise Refused(too_large)
            pieces.append(piece)
    except BlockingIOError:
        raise Refused(error(408, "the request body did not arrive in time", "request_timeout")) from None
    except (OSError, ParseException) as fault:
        raise Refused(error(400, f"the request body cannot be read: {fault}", "bad_body")) from None
    if size < announced:
        raise Refused(error(400, f"the request body ended after {size} of {announced} bytes", "bad_body"))
    return b"".join(pieces)


def _discard(source: Any, limit: int) -> None:
    """A client that is still sending would not see the answer before the connection breaks."""
    discarded = 0
    while discarded < limit and (piece := source.read(_PIECE)):
        discarded += len(piece)
