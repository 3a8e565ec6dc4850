"""Suspicion that a request kills the replicas that serve it. Pure, the clock is passed in.

    innocent   few replicas were lost with it: it is tried anywhere
    suspect    several in a row: it is tried alone, on a replica that gets no other request meanwhile
    poisonous  it was alone, and the replica was lost again: it is not tried again

Any progress of the response clears the suspicion: a request that kills its replica yields no token there.

A death that fd-dp reports as caused from outside (SIGKILL, a stop) counts less: otherwise, when someone kills
many replicas, innocent requests would become suspects and reserve those that are left. It does count, because
a memory watchdog kills from outside as well, each time for the same request. The limits are too high to be
reached by chance.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, auto

from ..board.memory import Ending
from ..instance import ReplicaHandle

#: Deaths in a row that make a suspect: those not caused from outside, and those of any kind.
SUSPECT_AFTER, SUSPECT_AFTER_ANY = 2, 20
#: Deaths of any kind while it was alone that make it poisonous; one not caused from outside is enough.
MAX_ALONE = 4


class Verdict(Enum):
    INNOCENT = auto()
    SUSPECT = auto()
    #: A replica was lost while the request was alone there, for a reason that is not known yet.
    PENDING = auto()
    POISONOUS = auto()


@dataclass(frozen=True, slots=True)
class Death:
    """The loss of a replica that had the request."""

    handle: ReplicaHandle
    #: The replica had no other request.
    alone: bool
    at: float
    #: Description for the client.
    problem: str


class Suspicion:
    """The deaths that one request has met since its last progress."""

    __slots__ = ("deaths",)

    def __init__(self) -> None:
        self.deaths: list[Death] = []

    def verdict(self, ending_of: Callable[[ReplicaHandle], Ending], now: float, patience: float) -> Verdict:
        """Return how the request may be tried next.

        Args:
            ending_of: returns how a replica ended, as fd-dp reports it.
            patience: seconds to wait for that report; 0 if there is no fd-dp.
        """
        if not self.deaths:
            return Verdict.INNOCENT
        endings = [(death, ending_of(death.handle)) for death in self.deaths]
        own = [(death, ending) for death, ending in endings if ending is not Ending.FROM_OUTSIDE]
        alone = [(death, ending) for death, ending in own if death.alone]
        if any(ending is Ending.ITS_OWN or now - death.at >= patience for death, ending in alone):
            return Verdict.POISONOUS
        if alone:
            return Verdict.PENDING
        if sum(death.alone for death in self.deaths) >= MAX_ALONE:
            return Verdict.POISONOUS
        if len(own) >= SUSPECT_AFTER or len(self.deaths) >= SUSPECT_AFTER_ANY:
            return Verdict.SUSPECT
        return Verdict.INNOCENT
