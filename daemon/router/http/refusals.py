"""What a client is told whose request no replica answers. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from .request import CORS, without_hop_by_hop
from .responses import Response, error
from .upstream import ReplicaConnection

_BETWEEN_US = CORS | {b"content-length", b"x-fd-replica", b"x-request-id"}


def no_key() -> Response:
    return error(401, "no valid API key: send Authorization: Bearer KEY", "invalid_api_key")


def too_many_in_flight(most: int) -> Response:
    return error(429, f"Too many requests,current max concurrency is {most}", "too_many_requests", 1)


def line_is_full(retry_after: int) -> Response:
    message = "all replicas are full, and so is the line in front of them"
    return error(429, message, "too_many_requests", retry_after)


def nobody(problems: Sequence[str]) -> Response:
    """
    Args:
        problems: what was tried, and what became of it.
    """
    message = "no replica can take the request now"
    if problems:
        message += f" ({'; '.join(problems)})"
    return error(503, message, "no_replica", retry_after=2)


def router_failed(why: str) -> Response:
    return error(500, why, "router_failed")


def deadly(why: str, identity: str) -> Response:
    """OpenAI's clients send a request again after a 500 unless a header forbids it."""
    answer = error(500, f"request {identity}: {why}", "replicas_lost")
    return replace(answer, headers=(*answer.headers, ("X-Should-Retry", "false")))


def garbled(replica: str, problem: str) -> Response:
    return error(502, f"replica {replica}: {problem}", "bad_gateway")


def silent(replica: str, problem: str) -> Response:
    return error(504, f"replica {replica}: {problem}", "replica_timeout")


def not_now(connection: ReplicaConnection, replica: str, body: bytes) -> Response:
    """A replica's own, to be passed on if no other replica says better."""
    headers = [
        (name.decode("latin-1"), value.decode("latin-1"))
        for name, value in without_hop_by_hop(connection.headers)
        if name not in _BETWEEN_US
    ]
    return Response(connection.status, body, (*headers, ("X-FD-Replica", replica)))
