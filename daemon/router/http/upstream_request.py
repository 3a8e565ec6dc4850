"""The request as it is sent to a replica. Pure, except for a random seed."""

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

#: Seconds between the keep-alive messages requested from replicas.
_KEEP_ALIVE = 5
#: Headers that the router sets itself: those of the connection and the body, and those of its protocol with
#: the replicas. Origin is dropped, because the router alone decides about CORS.
_REPLACED = frozenset(
    name.lower().encode()
    for name in (
        *("Host", "Content-Length", "Expect", "Origin", "X-Request-Id", "X-FD-Seed"),
        *(MARKS_HEADER, PROGRESS_HEADER, TOKEN_HEADER),
    )
)
_NOT_FORWARDED = HOP_BY_HOP | _REPLACED


class Forwarded(NamedTuple):
    """The part of a request that is the same for every replica."""

    method: str
    target: bytes
    #: Header lines, each with its line end.
    lines: bytes
    body: bytes

    def to(self, lines: bytes) -> bytes:
        """Return the bytes for one replica, whose own header lines `lines_for` returns."""
        method, target, own_lines, body = self
        return b"".join(
            (
                *(method.encode(), b" ", target, b" HTTP/1.1\r\n", lines, own_lines),
                *(_length_line(method, body), b"\r\n", body),
            )
        )


def forwarded(request: ClientRequest, identity: str, replaced: frozenset[bytes] = frozenset()) -> Forwarded:
    """Return the client's request without the headers of its connection.

    It has one request id and one seed, the client's or a generated one, so that every replica that is tried
    samples the same tokens.

    Args:
        replaced: names of further headers that are left out, because each attempt has its own.

    Raises:
        Refused: the path leads out of /v1/.
    """
    if _climbs(request.raw_path):
        raise Refused(error(404, f"no such path: {request.path}", "not_found"))
    dropped = _NOT_FORWARDED | request.dropped if request.dropped else _NOT_FORWARDED
    if replaced:
        dropped |= replaced
    # The log identifies the request by this id, so it is kept even if a Connection header names it.
    own = request.special.get(b"x-request-id") or identity.encode("latin-1")
    seed = None if b"x-fd-seed" in request.dropped else request.special.get(b"x-fd-seed")
    if seed is None:
        # 53 bits are exact where JSON numbers are doubles. It need not be secret.
        seed = b"%d" % random.getrandbits(53)
    added = b"x-request-id: %b\r\nx-fd-seed: %b\r\n" % (own, seed)
    lines = lines_without(dropped, request.headers) + added
    return Forwarded(request.method, request.target, lines, request.body)


# More entries than a board has rows.
@functools.lru_cache(maxsize=1024)
def lines_for(authority: str, features: tuple[str, ...]) -> bytes:
    """Return the header lines for one replica: Host and the optional features to enable."""
    headers = [("Host", authority)]
    if "resume" in features:
        headers.append((MARKS_HEADER, "1"))
    if "progress" in features:
        headers.append((PROGRESS_HEADER, str(_KEEP_ALIVE)))
    return header_lines(headers)


def resuming(request: Forwarded, resumption: Resumption, token: str) -> Forwarded:
    """Return the request to resume a response at the replica with this token."""
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
    """Return True if the path leads out of /v1/: other paths of a replica are not for clients."""
    if b"." not in path and b"%" not in path:
        return False
    # A proxy in front of the replica may decode the path again.
    while (plain := urllib.parse.unquote_to_bytes(path)) != path:
        path = plain
    return b".." in path.replace(b"\\", b"/").split(b"/")


def _length_line(method: str, body: bytes) -> bytes:
    if not body and method in ("GET", "HEAD", "OPTIONS", "DELETE"):
        return b""
    return b"Content-Length: %d\r\n" % len(body)
