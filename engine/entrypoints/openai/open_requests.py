"""The requests that a replica is answering, and their end from outside (/v1/abort_requests)."""

from __future__ import annotations

import threading
from collections.abc import Collection, Sequence
from typing import Protocol

from .answers import AbortedRequest, AbortResult


class OpenRequest(Protocol):
    """A request whose response is not complete."""

    @property
    def ids(self) -> Sequence[str]:
        """Return the ids by which clients name it: that of the response, then that of the request."""

    @property
    def num_tokens(self) -> int: ...

    def abort(self) -> None:
        """End all choices with the text that they have. For any thread."""


class OpenRequests:
    """All open requests of a replica. For any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._requests: set[OpenRequest] = set()

    def add(self, request: OpenRequest) -> None:
        with self._lock:
            self._requests.add(request)

    def discard(self, request: OpenRequest) -> None:
        with self._lock:
            self._requests.discard(request)

    def abort(self, ids: Collection[str] | None) -> AbortResult:
        """End the requests with these ids.

        Args:
            ids: with or without the prefix of the response's id; None for all requests.
        """
        wanted = None if ids is None else set(ids)
        with self._lock:
            found = [each for each in self._requests if wanted is None or not wanted.isdisjoint(each.ids)]
        for request in found:
            request.abort()
        known = {each for request in found for each in request.ids}
        return AbortResult(
            aborted=[
                AbortedRequest(request_id=request.ids[0], output_token_count=request.num_tokens)
                for request in found
            ],
            not_found=[each for each in dict.fromkeys(ids or ()) if each not in known],
        )
