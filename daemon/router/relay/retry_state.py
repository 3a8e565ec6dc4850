"""Retry state of one request: what failed, and what may be tried next. Does no I/O.

No replica is tried twice, unless it has been restarted since or the response has made progress.
"""

from __future__ import annotations

from collections.abc import Sequence

from ....common.resumption import Resumption
from ..board.board import Board
from ..http import refusals
from ..http.responses import Response
from ..instance import ReplicaHandle
from .suspicion import Death, Suspicion, Verdict


class RetryState:
    """Belongs to one exchange."""

    __slots__ = ("problems", "refusal", "resumed_by", "resumption", "suspicion", "tried", "was_dispatched")

    def __init__(self) -> None:
        #: Failure reason of each attempt.
        self.problems: list[str] = []
        #: Set once a replica died with the request or produced output: it is no longer turned away.
        self.was_dispatched = False
        #: Response for the client if no replica is left: the last refusal of a replica, or a 502.
        self.refusal: Response | None = None
        #: Where the next attempt resumes; None if it starts from the beginning.
        self.resumption: Resumption | None = None
        #: Replicas that have resumed the response, in order.
        self.resumed_by: list[ReplicaHandle] = []
        #: Replicas tried since the last progress, the current one included.
        self.tried: list[ReplicaHandle] = []
        self.suspicion = Suspicion()

    # ---- the next attempt

    def verdict(self, board: Board, now: float, patience: float) -> Verdict:
        """Return how the next attempt may be made.

        Args:
            patience: seconds to wait for fd-dp's report on the end of a replica.
        """
        return self.suspicion.verdict(board.ending_of, now, patience)

    def exclusions(self, board: Board) -> Sequence[ReplicaHandle]:
        """Return the replicas that were tried or cannot resume the response."""
        if self.resumption is None:
            return self.tried
        return [
            *self.tried,
            *(handle for handle in board.handles() if "resume" not in handle.instance.features),
        ]

    def restart(self) -> None:
        """Discard what is known of the response: the next attempt starts from the beginning."""
        self.resumption = None
        self.resumed_by.clear()

    # ---- progress

    def on_progress(self) -> None:
        # A stream that makes progress does not kill replicas, however many it outlives.
        self.suspicion.deaths.clear()
        del self.tried[:-1]

    def on_resumed(self, handle: ReplicaHandle) -> None:
        if handle not in self.resumed_by[-1:]:
            self.resumed_by.append(handle)

    # ---- failure

    def on_death(self, handle: ReplicaHandle, alone: bool, now: float, problem: str) -> None:
        """Record that the replica was lost with the request; `alone`: it had no other."""
        self.suspicion.deaths.append(Death(handle, alone, now, problem))

    def on_failure(self, problem: str, resumption: Resumption | None) -> None:
        """Record a failed attempt; `resumption` is what is known of the response."""
        self.problems.append(problem)
        self.resumption = resumption
        self.was_dispatched |= bool(self.suspicion.deaths) or resumption is not None

    def poison_reason(self) -> str:
        """Return why the request is not tried again, for the client."""
        deaths = self.suspicion.deaths
        return (
            f"{len(deaths)} replicas in a row were lost while serving this request, the last one while "
            "serving no other; the request is not tried again "
            f"({'; '.join(death.problem for death in deaths)})"
        )

    def final_response(self) -> Response:
        """Return the response for a request that no replica takes."""
        return self.refusal or refusals.no_replica(self.problems)
