"""What a replica is sent: the request, and what is between router and replica. Pure, but for the seed."""

from __future__ import annotations

import functools
import random
import urllib.parse
from typing import NamedTuple

from ....common.resumption import (
    MARKS_HEADER,
    PROGRESS_HEADER,
    RESUME_PATH,
    TOKEN_HEADER,
    Resumption,
    encode_resumption,
)
from .request import HOP_BY_HOP, ClientRequest, Refused, lines_without
from .responses import error, header_lines

#: Seconds between the signs of life that replicas are asked for.
_SIGN_OF_LIFE = 5
#: Follow from the connection and the body that are used, or are between the router and its replicas only. And
#: Origin: the router alone decides about web pages.
_MADE_ANEW = frozenset(
    name.lower().encode()
    for name in (
        *("Host", "Content-Length", "Expect", "Origin", "X-Request-Id", "X-FD-Seed"),
        *(MARKS_HEADER, PROGRESS_HEADER, TOKEN_HEADER),
    )
)
_NOT_FORWARDED = HOP_BY_HOP | _MADE_ANEW


class Forwarded(NamedTuple):
    """What every replica that is tried gets, but for what differs between replicas."""

    method: str
    target: bytes
    #: Header lines, each with its end.
    lines: bytes
    body: bytes

    def to(self, lines: bytes) -> bytes:
        """The bytes of the request for the replica of which `lines_for` says these."""
        method, target, own_lines, body = self
        return b"".join(
            (
                *(method.encode(), b" ", target, b" HTTP/1.1\r\n", lines, own_lines),
                *(_length_line(method, body), b"\r\n", body),
            )
        )


def forwarded(request: ClientRequest, identity: str) -> Forwarded:
    """The request as it came, but for what belongs to the connection.

    It has one request id and one seed: the client's first, or else one of the router, so that every replica
    that is tried draws the same tokens.

    Raises:
        Refused: no path of ours.
    """
    if _climbs(request.raw_path):
        raise Refused(error(404, f"no such path: {request.path}", "not_found"))
    dropped = _NOT_FORWARDED | request.dropped if request.dropped else _NOT_FORWARDED
    # The log names the request by this id, so it is kept even if a Connection header lists it.
    own = request.special.get(b"x-request-id") or identity.encode("latin-1")
    seed = None if b"x-fd-seed" in request.dropped else request.special.get(b"x-fd-seed")
    if seed is None:
        # 53 bits: exact wherever JSON numbers are doubles. It need not be secret, only the same everywhere.
        seed = b"%d" % random.getrandbits(53)
    added = b"x-request-id: %b\r\nx-fd-seed: %b\r\n" % (own, seed)
    lines = lines_without(dropped, request.headers) + added
    return Forwarded(request.method, request.target, lines, request.body)


# For more replicas than a board has rows.
@functools.lru_cache(maxsize=1024)
def lines_for(authority: str, features: tuple[str, ...]) -> bytes:
    """Which replica is meant, and what it is asked for of what it can do."""
    headers = [("Host", authority)]
    if "resume" in features:
        headers.append((MARKS_HEADER, "1"))
    if "progress" in features:
        headers.append((PROGRESS_HEADER, str(_SIGN_OF_LIFE)))
    return header_lines(headers)


def resuming(request: Forwarded, resumption: Resumption, token: str) -> Forwarded:
    """The request for the rest of a stream, to the replica with that token."""
    lines = b"".join(
        line + b"\r\n"
        for line in request.lines.split(b"\r\n")
        if line and not line.lower().startswith(b"content-type:")
    )
    return Forwarded(
        "POST",
        RESUME_PATH.encode(),
        lines + header_lines([("Content-Type", "application/msgpack"), (TOKEN_HEADER, token)]),
        encode_resumption(resumption),
    )


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
