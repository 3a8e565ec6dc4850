"""The replica for each attempt of one request: any, or one that is reserved for a suspect."""

from __future__ import annotations

import time
from collections.abc import Collection

from ..board.board import Lease, PickFailure
from ..instance import ReplicaHandle
from ..policy.policy import RequestFacts
from .retry_state import RetryState
from .services import Services
from .suspicion import Verdict


class Placement:
    """Belongs to one exchange, which must call `unreserve` when an attempt has ended."""

    __slots__ = ("_reserved", "_retry", "_services")

    def __init__(self, services: Services, retry: RetryState) -> None:
        self._services = services
        self._retry = retry
        #: A replica that gets no other request until this one, a suspect, has been tried there.
        self._reserved: ReplicaHandle | None = None

    def pick(self, facts: RequestFacts, *, has_begun: bool) -> Lease | PickFailure | None:
        """Choose a replica and count the request on it; None if the request must not be tried again.

        A suspect that has to wait gets DOWN, never BUSY, which would stop those behind it in the wait queue.
        """
        services, retry, board = self._services, self._retry, self._services.board
        verdict = retry.verdict(board, time.monotonic(), services.settings.ending_patience)
        if verdict is not Verdict.SUSPECT:
            self.unreserve()
        if verdict is Verdict.POISONOUS:
            return None
        if verdict is Verdict.PENDING:
            return PickFailure.DOWN
        started_at = time.perf_counter()
        choose = self._pick_alone if verdict is Verdict.SUSPECT else self._pick_any
        exclude = retry.exclusions(board)
        others = retry.of_other_numeric_version(board)
        picked = choose(facts, [*exclude, *others] if others else exclude)
        if not picked and others:
            # A text of two numeric versions is better than half a text. The exchange logs it.
            picked = choose(facts, exclude)
        if not picked and retry.resumption is not None and not has_begun:
            # The client has seen nothing yet, so a replica that cannot resume may start over.
            picked = choose(facts, retry.tried)
        services.metrics.picked(time.perf_counter() - started_at)
        return picked

    def is_reserved(self, handle: ReplicaHandle) -> bool:
        """Return True if this request has the replica to itself."""
        return handle == self._reserved

    def unreserve(self) -> None:
        handle, self._reserved = self._reserved, None
        if handle is not None:
            self._services.board.unreserve(handle)

    def _pick_any(self, facts: RequestFacts, exclude: Collection[ReplicaHandle]) -> Lease | PickFailure:
        return self._services.board.pick(self._services.settings.policy, facts, exclude)

    def _pick_alone(self, facts: RequestFacts, exclude: Collection[ReplicaHandle]) -> Lease | PickFailure:
        board = self._services.board
        if self._reserved is None:
            self._reserved = board.reserve(exclude)
        if self._reserved is None:
            return PickFailure.DOWN
        picked = board.pick_reserved(self._reserved, facts)
        if picked is PickFailure.DOWN:
            self._reserved = None
        return picked or PickFailure.DOWN
