"""A parsed client request, and header functions for requests and responses. Pure."""

from __future__ import annotations

import random
import re
import urllib.parse
from collections.abc import Mapping
from functools import lru_cache

from ....common.errors import FastDeployError
from ....common.trace_context import TRACEPARENT, TraceContext, parse_traceparent
from .responses import Response

#: Headers in their order; names in lower case.
RawHeaders = list[tuple[bytes, bytes]]

HOP_BY_HOP = frozenset(
    {
        b"connection",
        b"keep-alive",
        b"proxy-authenticate",
        b"proxy-authorization",
        b"proxy-connection",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
        b"http2-settings",
    }
)
#: CORS response headers: the router decides about them, not a replica.
CORS = frozenset(
    b"access-control-" + name
    for name in (
        *(
            b"allow-origin",
            b"allow-credentials",
            b"allow-methods",
            b"allow-headers",
            b"allow-private-network",
        ),
        *(b"expose-headers", b"max-age"),
    )
)
_MAX_ID = 256
_TRACEPARENT = TRACEPARENT.encode()
#: Escapes of characters that need none, and of the slash, which WSGI and ASGI decode before routing.
_NEEDLESS_ESCAPE = re.compile(rb"%(?:2[DdEeFf]|3[0-9]|4[1-9A-Fa-f]|5[0-9AaFf]|6[1-9A-Fa-f]|7[0-9AaEe])")
_SLASHES = re.compile(rb"//+")


class Refused(FastDeployError):
    """A request that the router does not forward; `response` says why."""

    def __init__(self, response: Response) -> None:
        super().__init__(response.status_line)
        self.response = response


class ClientRequest:
    """A complete request of a client."""

    __slots__ = (
        *("body", "dropped", "headers", "is_http_1_0", "method", "path", "peer", "raw_path", "sent_target"),
        *("special", "target"),
    )

    def __init__(
        self,
        method: str,
        target: bytes,
        headers: RawHeaders,
        special: Mapping[bytes, bytes],
        dropped: frozenset[bytes],
        body: bytes,
        is_http_1_0: bool,
        peer: str,
    ) -> None:
        self.method = method
        #: As received, for error messages.
        self.sent_target = target
        #: In origin form, /path?query, the path in canonical form.
        self.target: bytes
        #: The path without the query in canonical form, and the same as text. Still percent-encoded, because
        #: a decoded path could contain a line break.
        self.raw_path: bytes
        self.path: str
        self.target, self.raw_path, self.path = _forms_of(target)
        self.headers = headers
        #: The first value of each header that the router itself reads.
        self.special = special
        #: Headers named in a Connection header.
        self.dropped = dropped
        self.body = body
        #: HTTP/1.0 has no chunked encoding.
        self.is_http_1_0 = is_http_1_0
        #: IP address; empty on the unix socket.
        self.peer = peer

    @property
    def id(self) -> str:
        given = self.special.get(b"x-request-id")
        return given.decode("latin-1")[:_MAX_ID] if given else f"{random.getrandbits(128):032x}"

    @property
    def trace_context(self) -> TraceContext | None:
        """The trace that the request belongs to; None without exactly one valid traceparent."""
        if _TRACEPARENT not in self.special:
            return None
        values = [value for name, value in self.headers if name == _TRACEPARENT]
        return parse_traceparent(values[0].decode("latin-1")) if len(values) == 1 else None

    @property
    def authorization(self) -> str:
        return self.special.get(b"authorization", b"").decode("latin-1")


def without_hop_by_hop(headers: RawHeaders) -> RawHeaders:
    """Return the headers without the hop-by-hop ones, which include those named in Connection."""
    dropped = HOP_BY_HOP.union(*(named_in(value) for name, value in headers if name == b"connection"))
    return [header for header in headers if header[0] not in dropped]


def lines_without(dropped: frozenset[bytes], headers: RawHeaders) -> bytes:
    """Return the headers, except those in `dropped`, as lines of a head with their line ends."""
    pieces: list[bytes] = []
    for name, value in headers:
        if name not in dropped:
            pieces += (name, b": ", value, b"\r\n")
    return b"".join(pieces)


def named_in(connection: bytes) -> frozenset[bytes]:
    """Return the header names in the value of a Connection header."""
    return frozenset(word.strip().lower() for word in connection.split(b","))


# Clients send the same few targets again and again.
@lru_cache(maxsize=256)
def _forms_of(target: bytes) -> tuple[bytes, bytes, str]:
    """Return the target in origin form, and its path as bytes and as text."""
    path, mark, query = origin_form(target).partition(b"?")
    path = canonical_path(path)
    return path + mark + query, path, path.decode("latin-1")


def canonical_path(path: bytes) -> bytes:
    """Return the canonical spelling of a path, which the router and every replica read alike.

    Repeated slashes are merged, and needless escapes decoded.
    """
    if b"%" in path:
        path = _NEEDLESS_ESCAPE.sub(lambda found: urllib.parse.unquote_to_bytes(found[0]), path)
    return _SLASHES.sub(b"/", path)


def origin_form(target: bytes) -> bytes:
    """Return /path?query of a target that may be absolute, without decoding it."""
    if target.startswith(b"/") and b"#" not in target:
        return target
    if not target.startswith(b"/"):
        target = b"/" + target.partition(b"://")[2].partition(b"/")[2]
    return target.partition(b"#")[0]
