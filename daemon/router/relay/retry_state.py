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

    __slots__ = (
        *("numeric_version", "problems", "refusal", "resumed_by", "resumption", "suspicion", "tried"),
        "was_dispatched",
    )

    def __init__(self) -> None:
        #: Failure reason of each attempt.
        self.problems: list[str] = []
        #: Set once a replica died with the request or produced output: it is no longer turned away.
        self.was_dispatched = False
        #: Response for the client if no replica is left: the last refusal of a replica, or a 502.
        self.refusal: Response | None = None
        #: Where the next attempt resumes; None if it starts from the beginning.
        self.resumption: Resumption | None = None
        #: Numeric version of the replica that computed the end of `resumption`; empty if it is unknown.
        self.numeric_version = ""
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

    def rounds_differently(self, handle: ReplicaHandle) -> bool:
        """Return True if the replica would resume the response with another numeric version."""
        other = handle.instance.numeric_version
        is_known = self.resumption is not None and self.numeric_version and other
        return bool(is_known) and other != self.numeric_version

    def of_other_numeric_version(self, board: Board) -> list[ReplicaHandle]:
        """Return the replicas for which `rounds_differently` is true."""
        if self.resumption is None:
            return []
        return [handle for handle in board.handles() if self.rounds_differently(handle)]

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

    def on_failure(self, problem: str, resumption: Resumption | None, handle: ReplicaHandle) -> None:
        """Record a failed attempt; `resumption` is what is known of the response."""
        self.problems.append(problem)
        if resumption is not None and resumption != self.resumption:
            self.numeric_version = handle.instance.numeric_version
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
