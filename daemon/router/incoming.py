"""A client's request as it was parsed -> the request for a replica. Pure, but for the random seed."""

from __future__ import annotations

import random
import urllib.parse
from collections.abc import Mapping
from dataclasses import dataclass

from ...errors import FastDeployError
from .answers import Answer, error

#: In their order; names in lower case.
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
#: Follow from the connection and the body that are used, or are between the router and its replicas only.
_MADE_ANEW = frozenset(
    {b"host", b"content-length", b"expect", b"x-fd-marks", b"x-fd-progress", b"x-fd-token"}
)
_LONGEST_ID = 256


_NOT_FORWARDED = HOP_BY_HOP | _MADE_ANEW


class Refused(FastDeployError):
    """A request that goes to no replica; `answer` says why."""

    def __init__(self, answer: Answer) -> None:
        super().__init__(answer.status_line)
        self.answer = answer


class ClientRequest:
    """A whole request of a client."""

    __slots__ = ("body", "dropped", "headers", "is_old", "method", "peer", "raw_path", "special", "target")

    def __init__(
        self,
        method: str,
        target: bytes,
        headers: RawHeaders,
        special: Mapping[bytes, bytes],
        dropped: frozenset[bytes],
        body: bytes,
        is_old: bool,
        peer: str,
    ) -> None:
        self.method = method
        #: As it was written, with its query, but in origin form: /path?query.
        self.target = origin_form(target)
        #: The path without the query, encoded as it was.
        self.raw_path = self.target.partition(b"?")[0]
        self.headers = headers
        #: The first value of each header that the router itself looks at.
        self.special = special
        #: Headers that a Connection header has named.
        self.dropped = dropped
        self.body = body
        #: HTTP/1.0 knows no chunks.
        self.is_old = is_old
        #: IP address; empty on the unix socket.
        self.peer = peer

    @property
    def id(self) -> str:
        given = self.special.get(b"x-request-id")
        return given.decode("latin-1")[:_LONGEST_ID] if given else f"{random.getrandbits(128):032x}"

    @property
    def authorization(self) -> str:
        return self.special.get(b"authorization", b"").decode("latin-1")


@dataclass(frozen=True, slots=True)
class Forwarded:
    """What every replica that is tried gets, but for what differs between replicas."""

    method: str
    target: bytes
    #: Header lines, each with its end.
    lines: bytes
    body: bytes

    def to(self, authority: str, extra: bytes = b"") -> bytes:
        """The bytes of the request for the replica there; `extra` are more header lines."""
        return b"%b %b HTTP/1.1\r\nHost: %b\r\n%b%b%b\r\n%b" % (
            self.method.encode(),
            self.target,
            authority.encode(),
            self.lines,
            extra,
            _length_line(self.method, self.body),
            self.body,
        )


def forwarded(request: ClientRequest, identity: str) -> Forwarded:
    """The request as it came, but for what belongs to the connection.

    A request id and a seed are added where the client sent none, so that every replica that is tried draws
    the same tokens.

    Raises:
        Refused: no path of ours.
    """
    if _climbs(request.raw_path):
        raise Refused(error(404, f"no such path: {request.raw_path.decode('latin-1')}", "not_found"))
    dropped = _NOT_FORWARDED | request.dropped if request.dropped else _NOT_FORWARDED
    lines = [b"%b: %b\r\n" % header for header in request.headers if header[0] not in dropped]
    if b"x-request-id" not in request.special:
        lines.append(b"x-request-id: %b\r\n" % identity.encode("latin-1"))
    if b"x-fd-seed" not in request.special:
        # 53 bits: exact wherever JSON numbers are doubles. It need not be secret, only the same everywhere.
        lines.append(b"x-fd-seed: %d\r\n" % random.getrandbits(53))
    return Forwarded(request.method, request.target, b"".join(lines), request.body)


def without_hop_by_hop(headers: RawHeaders) -> RawHeaders:
    """Leaves out what is about one connection only, the headers named in Connection included."""
    dropped = with_named_in_connection(HOP_BY_HOP, headers)
    return [header for header in headers if header[0] not in dropped]


def with_named_in_connection(names: frozenset[bytes], headers: RawHeaders) -> frozenset[bytes]:
    """These names, and those that a Connection header has."""
    for name, value in headers:
        if name == b"connection":
            names = names | {word.strip().lower() for word in value.split(b",")}
    return names


def origin_form(target: bytes) -> bytes:
    """/path?query of an absolute target, too; decoding and encoding again could change it."""
    if target.startswith(b"/") and b"#" not in target:
        return target
    if not target.startswith(b"/"):
        target = b"/" + target.partition(b"://")[2].partition(b"/")[2]
    return target.partition(b"#")[0]


def _climbs(path: bytes) -> bool:
    """Out of /v1/: what a replica has besides is for its neighbours."""
    if b"." not in path and b"%" not in path:
        return False
    # Whoever is in between may have decoded it once more.
    while (plain := urllib.parse.unquote_to_bytes(path)) != path:
        path = plain
    return b".." in path.replace(b"\\", b"/").split(b"/")


def _length_line(method: str, body: bytes) -> bytes:
    if not body and method in ("GET", "HEAD", "OPTIONS", "DELETE"):
        return b""
    return b"Content-Length: %d\r\n" % len(body)
