"""Bytes of a client's connection -> whole requests, or what is wrong with them. No I/O.

llhttp (httptools) parses. It is strict about what smuggling is made of: two lengths, a length and chunks,
bare line feeds, blanks before colons. Here are the limits, and what HTTP demands beyond its grammar.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from http import HTTPStatus

import httptools

from .request import ClientRequest, RawHeaders, named_in
from .responses import Response, error

#: With method and version it must fit into a replica's longest request line, which is gunicorn's: 8190 bytes.
_MOST_TARGET = 8000
_MOST_HEADERS = 128
_MOST_HEADER_BYTES = 64 << 10
#: Bytes of a request besides its body, and how many times as many as of the body: for what cuts it up.
#: What has no end shows up nowhere else.
_MOST_OVERHEAD = 96 << 10
_MOST_OVERHEAD_RATIO = 16
#: llhttp knows those of WebDAV and RTSP as well.
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_HOST = re.compile(rb"[A-Za-z0-9._~!$&'()*+,;=:%\[\]-]*")

_LOOKED_AT = frozenset(
    {
        *(b"host", b"content-length", b"content-type", b"transfer-encoding", b"expect"),
        *(b"connection", b"authorization", b"x-request-id", b"x-fd-seed"),
        *(b"origin", b"access-control-request-method", b"access-control-request-headers"),
    }
)

#: A request, and whether its connection may be used for another.
Parsed = tuple[ClientRequest, bool]


class Rejected(Exception):
    """What came cannot be served; the connection ends after the answer."""

    def __init__(self, status: HTTPStatus, message: str, code: str = "bad_http") -> None:
        super().__init__(message)
        self.answer: Response = error(status, message, code)


class RequestParser:
    """Of one connection."""

    def __init__(self, peer: str, max_body_bytes: int) -> None:
        self.peer = peer
        self._max_body_bytes = max_body_bytes
        self._parser = httptools.HttpRequestParser(self)
        self._whole: list[Parsed | Response] = []
        #: Bytes of a body that are read here: llhttp takes what follows an Upgrade for another protocol.
        self._raw_left = 0
        self._raw_keep_alive = True
        #: Of the request that comes just now, as far as it has come.
        self.method = ""
        self.target = b""
        #: The client waits for "100 Continue".
        self.expects_continue = False
        self.is_receiving = False
        self.has_head = False
        #: Bytes of the body so far.
        self.size = 0
        #: Bytes of the call of `feed` under way, and of the request so far, about.
        self._fed = self._came = 0
        self.on_message_begin()
        self.is_receiving = False

    @property
    def origin(self) -> bytes:
        """The Origin header of the request that is being received; empty if it has none."""
        return self._special.get(b"origin", b"")

    def feed(self, data: bytes) -> Sequence[Parsed | Response]:
        """The requests that these bytes make whole; an answer, the last, is to something that is none."""
        self._whole = []
        self._fed = len(data)
        try:
            while data:
                data = self._feed(data)
            if self.is_receiving:
                self._count_overhead()
            if self._header_bytes > _MOST_HEADER_BYTES:
                raise self._too_much_head()
        except httptools.HttpParserError as fault:
            self._whole.append(_rejected(fault, "bad_body" if self.has_head else "bad_http").answer)
        except Rejected as rejected:
            self._whole.append(rejected.answer)
        return self._whole

    def _feed(self, data: bytes) -> bytes:
        """What is left of it, if it is for another parser."""
        if self._raw_left:
            return self._take_raw(data)
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            # Nobody has to follow an Upgrade. What comes next is HTTP all the same.
            self._parser = httptools.HttpRequestParser(self)
            return data[upgrade.args[0] :]
        return b""

    # ---- from the parser

    def on_message_begin(self) -> None:
        self.is_receiving = True
        self.has_head = self.expects_continue = self._is_old = False
        self.size = self._header_bytes = 0
        self.method = ""
        self.target = b""
        self._headers: RawHeaders = []
        self._special: dict[bytes, bytes] = {}
        self._dropped: frozenset[bytes] = frozenset()
        self._body: list[bytes] = []
        # What belongs to the requests before is not told apart: the count begins with what comes next.
        self._came = -self._fed

    def on_url(self, url: bytes) -> None:
        self.target += url
        if len(self.target) > _MOST_TARGET:
            raise Rejected(
                HTTPStatus.REQUEST_URI_TOO_LONG, f"the request target is longer than {_MOST_TARGET} bytes"
            )

    def on_header(self, name: bytes, value: bytes) -> None:
        self._header_bytes += len(name) + len(value)
        # Else it is a trailer, or can pose as another: on WSGI an underscore is the same as a hyphen.
        if not self.has_head and b"_" not in name:
            self._headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        self.has_head = True
        version = self._parser.get_http_version()
        if version not in ("1.1", "1.0"):
            raise Rejected(HTTPStatus.HTTP_VERSION_NOT_SUPPORTED, f"HTTP/{version} is not spoken here")
        self._is_old = version == "1.0"
        self.method = self._parser.get_method().decode()
        if len(self._headers) > _MOST_HEADERS or self._header_bytes > _MOST_HEADER_BYTES:
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
            self._is_old,
            self.peer,
        )
        self._whole.append((request, keep_alive))

    def _take_raw(self, data: bytes) -> bytes:
        body = data[: self._raw_left]
        self._raw_left -= len(body)
        self.on_body(body)
        if not self._raw_left:
            self._complete(self._raw_keep_alive)
        return data[len(body) :]

    def _check_headers(self) -> int:
        """The length of the body as it is announced."""
        length = hosts = types = 0
        is_chunked = False
        for name, value in self._headers:
            if name not in _LOOKED_AT:
                continue
            if name == b"host":
                hosts += 1
                if not _is_host(value):
                    raise Rejected(HTTPStatus.BAD_REQUEST, "the Host header is no host")
            elif name == b"content-length":
                length = int(value)
            elif name == b"content-type":
                types += 1
            elif name == b"transfer-encoding":
                is_chunked = True
                if value.strip().lower() != b"chunked":
                    raise Rejected(
                        HTTPStatus.NOT_IMPLEMENTED, "the only transfer coding that is taken is chunked"
                    )
            elif name == b"expect":
                if value.lower() != b"100-continue":
                    raise Rejected(HTTPStatus.EXPECTATION_FAILED, "no such expectation is met here")
                self.expects_continue = not self._is_old
            else:
                self._special.setdefault(name, value)
                if name == b"connection":
                    self._dropped |= named_in(value)
        if hosts > 1 or (hosts == 0 and not self._is_old):
            raise Rejected(HTTPStatus.BAD_REQUEST, f"one Host header is needed, and there are {hosts}")
        if types > 1:
            # Replicas might choose different ones.
            raise Rejected(HTTPStatus.BAD_REQUEST, f"there are {types} Content-Type headers; send one")
        if is_chunked and self._is_old:
            raise Rejected(HTTPStatus.BAD_REQUEST, "HTTP/1.0 has no Transfer-Encoding")
        if is_chunked and self._parser.should_upgrade():
            raise Rejected(HTTPStatus.BAD_REQUEST, "a request with Upgrade must have a Content-Length")
        if self.method not in _METHODS:
            raise Rejected(HTTPStatus.NOT_IMPLEMENTED, f"the method {self.method} is not served here")
        return length

    def _count_overhead(self) -> None:
        self._came += self._fed
        if self._came > _MOST_OVERHEAD + _MOST_OVERHEAD_RATIO * self.size:
            if not self.has_head:
                raise self._too_much_head()
            raise Rejected(HTTPStatus.BAD_REQUEST, "the body is lost in what cuts it into chunks", "bad_body")

    def _too_much_head(self) -> Rejected:
        return Rejected(
            HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE,
            f"more than {_MOST_HEADERS} headers, or more than {_MOST_HEADER_BYTES} bytes of them",
        )

    def _too_large(self) -> Rejected:
        return Rejected(
            HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
            f"the request body is larger than {self._max_body_bytes} bytes (--max-body-bytes)",
            "body_too_large",
        )


# A client sends the same with each request.
@lru_cache(maxsize=256)
def _is_host(value: bytes) -> bool:
    return _HOST.fullmatch(value) is not None


def _rejected(fault: httptools.HttpParserError, code: str) -> Rejected:
    """What a callback has raised, or what the parser says."""
    cause = fault.__context__
    if isinstance(cause, Rejected):
        return cause
    reason = str(fault) or type(fault).__name__
    if "nvalid `Transfer-Encoding`" in reason:
        return Rejected(HTTPStatus.NOT_IMPLEMENTED, reason)
    return Rejected(HTTPStatus.BAD_REQUEST, f"this is not HTTP: {reason[:200]}", code)
