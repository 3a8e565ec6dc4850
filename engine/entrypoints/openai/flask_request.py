"""Checked access to the headers and the body of Flask's current request."""

from __future__ import annotations

import hmac
import re
import socket
import uuid

from flask import request
from gunicorn.http.errors import ParseException
from werkzeug.exceptions import ClientDisconnected, RequestEntityTooLarge

from ...common.api_keys import ApiKeys
from ...common.api_paths import is_for_pages
from ...common.errors import RequestError
from ...common.resumption import MARKS_HEADER, PROGRESS_HEADER, TOKEN_HEADER
from ...common.trace_context import TRACEPARENT, TRACESTATE, TraceContext, parse_traceparent
from .engine_client import EngineClient
from .errors import ApiError
from .keep_alive import KeepAlive

REQUEST_ID = re.compile(r"[\w.:@/+=-]{1,128}", re.ASCII)
MAX_SEED = 2**63 - 1
#: At most 64 MiB of a body that is too large are read and discarded.
_CHUNK_BYTES, _MAX_DISCARDED_CHUNKS = 1 << 20, 64
_SECONDS = re.compile(r"\d{1,4}(\.\d{1,3})?", re.ASCII)


def read_body(media_type: str = "application/json") -> bytes:
    """Return the complete body.

    Raises:
        ApiError: it is compressed, of another type, larger than Flask's MAX_CONTENT_LENGTH, or too slow.
        RequestError: it is incomplete or cannot be read.
    """
    _check_encoding()
    if request.mimetype and request.mimetype != media_type:
        raise ApiError(
            415,
            f"Content-Type is {_shown(request.mimetype)}; it must be {media_type!r}",
            code="unsupported_media_type",
            headers={"Accept": media_type},
        )
    try:
        return request.get_data(cache=False)
    except RequestEntityTooLarge:
        # Most clients read the response only after they have sent the whole body.
        stream = request.environ["wsgi.input"]
        for _ in range(_MAX_DISCARDED_CHUNKS):
            if not stream.read(_CHUNK_BYTES):
                break
        limit = request.max_content_length
        raise ApiError(413, f"the body is larger than {limit} bytes (--max-body-bytes)") from None
    except ClientDisconnected as error:
        # Werkzeug raises this for any socket error, including the read timeout of http_worker.py.
        if isinstance(error.__context__, BlockingIOError):
            raise ApiError(408, "the body did not arrive in time") from None
        raise RequestError("the body ended before its Content-Length") from None
    except (OSError, ParseException) as error:
        raise RequestError(f"the body cannot be read: {error}") from None


def _check_encoding() -> None:
    given = request.headers.get("Content-Encoding", "")
    if any(coding.strip().lower() not in ("", "identity") for coding in given.split(",")):
        raise ApiError(
            415,
            f"Content-Encoding is {_shown(given)}; send the body uncompressed",
            code="unsupported_content_encoding",
            headers={"Accept-Encoding": "identity"},
        )


def _shown(header: str) -> str:
    return repr(header[:100])


def is_preflight() -> bool:
    """Return True for a CORS preflight of a path that is for web pages."""
    return (
        request.method == "OPTIONS"
        and is_for_pages(request.path)
        and "Origin" in request.headers
        and "Access-Control-Request-Method" in request.headers
    )


def request_id() -> str:
    """Return the id in X-Request-Id; a new one if the header is missing or invalid."""
    given = request.headers.get("X-Request-Id", "")
    return given if REQUEST_ID.fullmatch(given) else uuid.uuid4().hex


def trace_context() -> TraceContext | None:
    """Return the trace that the request belongs to; None without a valid traceparent."""
    return parse_traceparent(request.headers.get(TRACEPARENT, ""))


def trace_state() -> str:
    return request.headers.get(TRACESTATE, "")


def header_seed() -> int | None:
    """Return the seed that the router adds to requests without one. Raises RequestError."""
    given = request.headers.get("X-FD-Seed")
    if given is None:
        return None
    if not given.isascii() or not given.isdecimal() or len(given) > 19 or int(given) > MAX_SEED:
        raise RequestError(f"X-FD-Seed must be an integer between 0 and {MAX_SEED}", "X-FD-Seed")
    return int(given)


def wants_marks() -> bool:
    return request.headers.get(MARKS_HEADER) == "1"


def keep_alive(engine: EngineClient) -> KeepAlive | None:
    """Return the keep-alive timer that the router requests; None if it requests none."""
    given = request.headers.get(PROGRESS_HEADER)
    if given is None:
        return None
    if not _SECONDS.fullmatch(given) or float(given) == 0:
        raise RequestError(f"{PROGRESS_HEADER} must be a number of seconds", PROGRESS_HEADER)
    accepts_interim = request.environ.get("SERVER_PROTOCOL") == "HTTP/1.1"
    return KeepAlive(float(given), lambda: engine.stats, client_socket() if accepts_interim else None)


def client_socket() -> socket.socket | None:
    return request.environ.get("gunicorn.socket")


def authorize_client(keys: ApiKeys) -> None:
    """Raise ApiError (401) unless the request has one of the keys, or none is required."""
    if not keys.allow(request.headers.get("Authorization", "")):
        raise ApiError(401, "a valid API key is needed: Authorization: Bearer KEY", code="invalid_api_key")


def authorize_router(token: str) -> None:
    """Raise ApiError (401) unless the request has the token of this replica's registration."""
    given = request.headers.get(TOKEN_HEADER, "")
    if not hmac.compare_digest(given.encode(), token.encode()):
        raise ApiError(
            401, f"only the router may use this path: {TOKEN_HEADER} is not the token of this replica"
        )
