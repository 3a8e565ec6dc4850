"""Parser of client requests: bytes in, complete requests or error responses out. No I/O.

llhttp (httptools) parses the grammar. It rejects what request smuggling uses: two lengths, a length with
chunks, bare line feeds, whitespace before colons. This module adds limits and the semantic rules of HTTP.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from http import HTTPStatus

import httptools

from .request import ClientRequest, RawHeaders, named_in
from .responses import Response, error

#: With method and version, it must fit into gunicorn's limit of a request line, 8190 bytes.
_MAX_TARGET = 8000
_MAX_HEADERS = 128
_MAX_HEADER_BYTES = 64 << 10
#: Bytes of a request besides its body: a constant, and a multiple of the body for chunk framing. This also
#: bounds endless chunk extensions and trailers, which llhttp does not report.
_MAX_OVERHEAD = 96 << 10
_MAX_OVERHEAD_RATIO = 16
#: llhttp also accepts the methods of WebDAV and RTSP.
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_HOST = re.compile(rb"[A-Za-z0-9._~!$&'()*+,;=:%\[\]-]*")

_CHECKED = frozenset(
    {
        *(b"host", b"content-length", b"content-type", b"transfer-encoding", b"expect"),
        *(b"connection", b"authorization", b"x-request-id", b"x-fd-seed", b"traceparent"),
        *(b"origin", b"access-control-request-method", b"access-control-request-headers"),
    }
)

#: A request, and whether its connection may be kept alive.
Parsed = tuple[ClientRequest, bool]


class Rejected(Exception):
    """Invalid or unsupported input; the connection is closed after the response."""

    def __init__(self, status: HTTPStatus, message: str, code: str = "bad_http") -> None:
        super().__init__(message)
        self.response: Response = error(status, message, code)


class RequestParser:
    """The parser of one connection."""

    def __init__(self, peer: str, max_body_bytes: int) -> None:
        self.peer = peer
        self._max_body_bytes = max_body_bytes
        self._parser = httptools.HttpRequestParser(self)
        self._parsed: list[Parsed | Response] = []
        #: Bytes left of a body that is read here: after an Upgrade header, llhttp stops parsing HTTP.
        self._raw_left = 0
        self._raw_keep_alive = True
        #: Method and target of the request being received, as far as known.
        self.method = ""
        self.target = b""
        #: The client waits for "100 Continue".
        self.expects_continue = False
        self.is_receiving = False
        self.has_head = False
        #: Bytes of the body so far.
        self.size = 0
        #: Bytes of the current call of `feed`, and approximate bytes of the request so far.
        self._fed = self._received = 0
        self.on_message_begin()
        self.is_receiving = False

    @property
    def origin(self) -> bytes:
        """The Origin header of the request that is being received; empty if it has none."""
        return self._special.get(b"origin", b"")

    def feed(self, data: bytes) -> Sequence[Parsed | Response]:
        """Return the requests that `data` completes; a trailing `Response` rejects invalid input."""
        self._parsed = []
        self._fed = len(data)
        try:
            while data:
                data = self._feed(data)
            if self.is_receiving:
                self._count_overhead()
            if self._header_bytes > _MAX_HEADER_BYTES:
                raise self._too_much_head()
        except httptools.HttpParserError as fault:
            self._parsed.append(_rejected(fault, "bad_body" if self.has_head else "bad_http").response)
        except Rejected as rejected:
            self._parsed.append(rejected.response)
        return self._parsed

    def _feed(self, data: bytes) -> bytes:
        """Return the rest of `data` that a new parser must read."""
        if self._raw_left:
            return self._take_raw(data)
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            # A server may ignore an Upgrade (RFC 9110, 7.8), so HTTP follows.
            self._parser = httptools.HttpRequestParser(self)
            return data[upgrade.args[0] :]
        return b""

    # ---- from the parser

    def on_message_begin(self) -> None:
        self.is_receiving = True
        self.has_head = self.expects_continue = self._is_http_1_0 = False
        self.size = self._header_bytes = 0
        self.method = ""
        self.target = b""
        self._headers: RawHeaders = []
        self._special: dict[bytes, bytes] = {}
        self._dropped: frozenset[bytes] = frozenset()
        self._body: list[bytes] = []
        # The current bytes may belong to earlier requests too: count from the next call.
        self._received = -self._fed

    def on_url(self, url: bytes) -> None:
        self.target += url
        if len(self.target) > _MAX_TARGET:
            raise Rejected(
                HTTPStatus.REQUEST_URI_TOO_LONG, f"the request target is longer than {_MAX_TARGET} bytes"
            )

    def on_header(self, name: bytes, value: bytes) -> None:
        self._header_bytes += len(name) + len(value)
        # Drop trailers, and names with underscores: WSGI takes those for hyphens.
        if not self.has_head and b"_" not in name:
            self._headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        self.has_head = True
        version = self._parser.get_http_version()
        if version not in ("1.1", "1.0"):
            raise Rejected(HTTPStatus.HTTP_VERSION_NOT_SUPPORTED, f"HTTP/{version} is not supported")
        self._is_http_1_0 = version == "1.0"
        self.method = self._parser.get_method().decode()
        if len(self._headers) > _MAX_HEADERS or self._header_bytes > _MAX_HEADER_BYTES:
            raise self._too_much_head()
        length = self._check_headers()
        if length > self._max_body_bytes:
            raise self._too_large()
        if self._parser.should_upgrade():
            self._raw_left = length
            self._raw_keep_alive = self._parser.should_keep_alive()

    def on_body(self, body: bytes) -> None:
        self.size += len(body)
        if self.size > self._max_body_bytes:
            raise self._too_large()
        self._body.append(body)

    def on_message_complete(self) -> None:
        if not self._raw_left:
            self._complete(self._parser.should_keep_alive())

    # ---- the rest

    def _complete(self, keep_alive: bool) -> None:
        self.is_receiving = self.expects_continue = False
        body = self._body[0] if len(self._body) == 1 else b"".join(self._body)
        request = ClientRequest(
            self.method,
            self.target,
            self._headers,
            self._special,
            self._dropped,
            body,
            self._is_http_1_0,
            self.peer,
        )
        self._parsed.append((request, keep_alive))

    def _take_raw(self, data: bytes) -> bytes:
        body = data[: self._raw_left]
        self._raw_left -= len(body)
        self.on_body(body)
        if not self._raw_left:
            self._complete(self._raw_keep_alive)
        return data[len(body) :]

    def _check_headers(self) -> int:
        """Check the headers and return Content-Length, 0 without one."""
        length = hosts = types = 0
        is_chunked = False
        for name, value in self._headers:
            if name not in _CHECKED:
                continue
            if name == b"host":
                hosts += 1
                if not _is_host(value):
                    raise Rejected(HTTPStatus.BAD_REQUEST, "invalid Host header")
            elif name == b"content-length":
                length = int(value)
            elif name == b"content-type":
                types += 1
            elif name == b"transfer-encoding":
                is_chunked = True
                if value.strip().lower() != b"chunked":
                    message = "unsupported Transfer-Encoding; only chunked is accepted"
                    raise Rejected(HTTPStatus.NOT_IMPLEMENTED, message)
            elif name == b"expect":
                if value.lower() != b"100-continue":
                    raise Rejected(
                        HTTPStatus.EXPECTATION_FAILED,
                        "unsupported Expect header; only 100-continue is accepted",
                    )
                self.expects_continue = not self._is_http_1_0
            else:
                self._special.setdefault(name, value)
                if name == b"connection":
                    self._dropped |= named_in(value)
        if hosts > 1 or (hosts == 0 and not self._is_http_1_0):
            raise Rejected(HTTPStatus.BAD_REQUEST, f"exactly one Host header is required, got {hosts}")
        if types > 1:
            # Replicas might use different ones.
            raise Rejected(HTTPStatus.BAD_REQUEST, f"at most one Content-Type header is allowed, got {types}")
        if is_chunked and self._is_http_1_0:
            raise Rejected(HTTPStatus.BAD_REQUEST, "HTTP/1.0 has no Transfer-Encoding")
        if is_chunked and self._parser.should_upgrade():
            raise Rejected(HTTPStatus.BAD_REQUEST, "a request with Upgrade must have a Content-Length")
        if self.method not in _METHODS:
            raise Rejected(HTTPStatus.NOT_IMPLEMENTED, f"unsupported method {self.method}")
        return length

    def _count_overhead(self) -> None:
        self._received += self._fed
        if self._received > _MAX_OVERHEAD + _MAX_OVERHEAD_RATIO * self.size:
            if not self.has_head:
                raise self._too_much_head()
            message = "the chunk framing of the body exceeds the allowed overhead"
            raise Rejected(HTTPStatus.BAD_REQUEST, message, "bad_body")

    def _too_much_head(self) -> Rejected:
        return Rejected(
            HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE,
            f"the request has more than {_MAX_HEADERS} headers or {_MAX_HEADER_BYTES} bytes of headers",
        )

    def _too_large(self) -> Rejected:
        return Rejected(
            HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
            f"the request body is larger than {self._max_body_bytes} bytes (--max-body-bytes)",
            "body_too_large",
        )


# A client sends the same Host with each request.
@lru_cache(maxsize=256)
def _is_host(value: bytes) -> bool:
    return _HOST.fullmatch(value) is not None


def _rejected(fault: httptools.HttpParserError, code: str) -> Rejected:
    """Return the exception that a callback has raised, or one for the parser's error."""
    cause = fault.__context__
    if isinstance(cause, Rejected):
        return cause
    reason = str(fault) or type(fault).__name__
    if "nvalid `Transfer-Encoding`" in reason:
        return Rejected(HTTPStatus.NOT_IMPLEMENTED, reason)
    return Rejected(HTTPStatus.BAD_REQUEST, f"malformed HTTP request: {reason[:200]}", code)
