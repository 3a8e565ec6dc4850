"""What the attempts at one request have come to, and what follows from it for the next. Does no I/O.

No replica is tried twice, unless it has been started anew meanwhile, or the answer has come further.
"""

from __future__ import annotations

from collections.abc import Sequence

from ....common.resumption import Resumption
from ..board.board import Board
from ..http import refusals
from ..http.responses import Response
from ..instance import ReplicaHandle
from .suspicion import Death, Suspicion, Verdict


class Attempts:
    """Belongs to the exchange."""

    __slots__ = ("has_been_taken", "problems", "refusal", "resumed_by", "resumption", "suspicion", "tried")

    def __init__(self) -> None:
        #: What each one failed of, in words.
        self.problems: list[str] = []
        #: A replica has died with the request, or there was a part of its answer: it is not turned away any
        #: more.
        self.has_been_taken = False
        #: What the client is told if there is nobody left: a replica's own words, or that there was garbage.
        self.refusal: Response | None = None
        #: Where the next one goes on; None if the answer is begun (anew).
        self.resumption: Resumption | None = None
        #: Who has gone on with the answer, one after the other.
        self.resumed_by: list[ReplicaHandle] = []
        #: Since the answer came further.
        self.tried: list[ReplicaHandle] = []
        self.suspicion = Suspicion()

    # ---- the next one

    def verdict(self, board: Board, now: float, patience: float) -> Verdict:
        """Return whether it may be tried, and where. `patience`: seconds to wait for fd-dp's report."""
        return self.suspicion.verdict(board.ending_of, now, patience)

    def to_avoid(self, board: Board) -> Sequence[ReplicaHandle]:
        if self.resumption is None:
            return self.tried
        return [
            *self.tried,
            *(handle for handle in board.handles() if "resume" not in handle.instance.features),
        ]

    def begin_anew(self) -> None:
        self.resumption = None
        self.resumed_by.clear()

    # ---- how it goes

    def came_further(self) -> None:
        # A stream that goes on is not what kills replicas, however many it outlives.
        self.suspicion.deaths.clear()
        del self.tried[:-1]

    def has_gone_on(self, handle: ReplicaHandle) -> None:
        if handle not in self.resumed_by[-1:]:
            self.resumed_by.append(handle)

    # ---- when it fails

    def died(self, handle: ReplicaHandle, alone: bool, now: float, problem: str) -> None:
        """The replica was lost with the request. `alone`: it had nothing else."""
        self.suspicion.deaths.append(Death(handle, alone, now, problem))

    def failed(self, problem: str, resumption: Resumption | None) -> None:
        """
        Args:
            resumption: what is known of the answer.
        """
        self.problems.append(problem)
        self.resumption = resumption
        self.has_been_taken |= bool(self.suspicion.deaths) or resumption is not None

    def forgive(self, handle: ReplicaHandle | None = None) -> None:
        """It, or all, may be tried again."""
        if handle is None:
            self.tried.clear()
        else:
            self.tried.remove(handle)

    def deadly(self) -> str:
        """Return why the request is not tried again, for the client."""
        deaths = self.suspicion.deaths
        return (
            f"{len(deaths)} replicas in a row were lost while serving this request, the last one while "
            "serving no other; the request is not tried again "
            f"({'; '.join(death.problem for death in deaths)})"
        )

    def nobody(self) -> Response:
        return self.refusal or refusals.nobody(self.problems)
