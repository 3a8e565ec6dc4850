"""Responses of the router for requests that no replica answered. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from .request import CORS, without_hop_by_hop
from .responses import Response, error
from .upstream import ReplicaConnection

_DROPPED = CORS | {b"content-length", b"x-fd-replica", b"x-request-id"}


def no_key() -> Response:
    return error(401, "no valid API key: send Authorization: Bearer KEY", "invalid_api_key")


def too_many_in_flight(limit: int) -> Response:
    # FastDeploy's wording.
    return error(429, f"Too many requests,current max concurrency is {limit}", "too_many_requests", 1)


def queue_is_full(retry_after: int) -> Response:
    message = "all replicas are busy and the wait queue is full"
    return error(429, message, "too_many_requests", retry_after)


def no_replica(problems: Sequence[str]) -> Response:
    """Return the response for a request that no replica takes; `problems`: failure reason of each attempt."""
    message = "no replica can take the request now"
    if problems:
        message += f" ({'; '.join(problems)})"
    return error(503, message, "no_replica", retry_after=2)


def router_failed(why: str) -> Response:
    return error(500, why, "router_failed")


def poisonous(why: str, identity: str) -> Response:
    response = error(500, f"request {identity}: {why}", "replicas_lost")
    # OpenAI's clients retry after a 500 unless this header forbids it.
    return replace(response, headers=(*response.headers, ("X-Should-Retry", "false")))


def garbled(replica: str, problem: str) -> Response:
    return error(502, f"replica {replica}: {problem}", "bad_gateway")


def silent(replica: str, problem: str) -> Response:
    return error(504, f"replica {replica}: {problem}", "replica_timeout")


def not_now(connection: ReplicaConnection, replica: str, body: bytes) -> Response:
    """Return a replica's own refusal, passed on if no other replica does better."""
    headers = [
        (name.decode("latin-1"), value.decode("latin-1"))
        for name, value in without_hop_by_hop(connection.headers)
        if name not in _DROPPED
    ]
    return Response(connection.status, body, (*headers, ("X-FD-Replica", replica)))
