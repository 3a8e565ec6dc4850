"""The replica for each attempt of one request: any, or one that is reserved for a suspect."""

from __future__ import annotations

import time
from collections.abc import Collection
from typing import TYPE_CHECKING

from ..board.board import Lease, PickFailure
from ..instance import ReplicaHandle
from ..policy.policy import RequestFacts
from .attempts import Attempts
from .suspicion import Verdict

if TYPE_CHECKING:
    from .data_plane import DataPlane


class Placement:
    """Belongs to the exchange, which must call `unreserve` when an attempt has ended."""

    __slots__ = ("_past", "_plane", "_reserved")

    def __init__(self, plane: DataPlane, past: Attempts) -> None:
        self._plane = plane
        self._past = past
        #: A replica that gets no other request until this one, a suspect, has been tried there.
        self._reserved: ReplicaHandle | None = None

    def pick(self, facts: RequestFacts, *, has_begun: bool) -> Lease | PickFailure | None:
        """Choose a replica and count the request on it; None if the request must not be tried again.

        A suspect that has to wait gets DOWN, never BUSY: those behind it in the wait queue are not affected.
        """
        past, board = self._past, self._plane.board
        verdict = past.verdict(board, time.monotonic(), self._plane.settings.ending_patience)
        if verdict is not Verdict.SUSPECT:
            self.unreserve()
        if verdict is Verdict.DEADLY:
            return None
        if verdict is Verdict.PENDING:
            return PickFailure.DOWN
        began = time.perf_counter()
        choose = self._alone if verdict is Verdict.SUSPECT else self._anywhere
        picked = choose(facts, past.to_avoid(board))
        if not picked and past.resumption is not None and not has_begun:
            # Begun again is better than not answered.
            picked = choose(facts, past.tried)
        self._plane.metrics.picked(time.perf_counter() - began)
        return picked

    def is_reserved(self, handle: ReplicaHandle) -> bool:
        """Return True if this request has the replica to itself."""
        return handle == self._reserved

    def unreserve(self) -> None:
        handle, self._reserved = self._reserved, None
        if handle is not None:
            self._plane.board.unreserve(handle)

    def _anywhere(self, facts: RequestFacts, avoid: Collection[ReplicaHandle]) -> Lease | PickFailure:
        return self._plane.board.pick(self._plane.settings.policy, facts, avoid)

    def _alone(self, facts: RequestFacts, avoid: Collection[ReplicaHandle]) -> Lease | PickFailure:
        board = self._plane.board
        if self._reserved is None:
            self._reserved = board.reserve(avoid)
        if self._reserved is None:
            return PickFailure.DOWN
        picked = board.pick_reserved(self._reserved, facts)
        if picked is PickFailure.DOWN:
            self._reserved = None
        return picked or PickFailure.DOWN
