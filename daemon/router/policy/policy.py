"""Interface of routing policies: candidates and the facts of a request in, the index of a candidate out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple


class RequestFacts(NamedTuple):
    """Facts of a request that a policy may use."""

    #: 64 random bits: randomness comes from outside, so that a policy stays a pure function.
    draw: int
    #: Estimated number of prompt tokens.
    prompt_tokens: int = 0
    #: Hash of the prompt up to the end of each leading block.
    prefix: tuple[int, ...] = ()
    #: Id of the conversation or its user; empty if the request has neither.
    session: bytes = b""


class Candidates(NamedTuple):
    """Replicas that may be chosen, as arrays: element i of each belongs to candidate i."""

    #: Requests in flight that this board counts: exact and current.
    in_flight: Sequence[int]
    #: Number of the last pick that chose it; 0 if none did. A smaller number is longer ago.
    last_pick: Sequence[int]
    #: Prompt tokens of the requests in flight.
    tokens: Sequence[int]
    #: Relative speed: 1.0 is normal, 0.5 is half of that; never 0.
    weight: Sequence[float]
    #: Running and waiting requests by its own metrics when these were last read.
    running: Sequence[int]
    waiting: Sequence[int]
    #: Value of `in_flight` when `running` and `waiting` were read.
    in_flight_at_poll: Sequence[int]
    #: Hash of its URL, 64 bits: the same on every router.
    key: Sequence[int]
    #: Leading blocks of the request's prefix that are probably in its cache.
    matched: Sequence[int]


#: Returns the index of one of the candidates, of which there is at least one.
Choose = Callable[[Candidates, RequestFacts], int]


@dataclass(frozen=True, slots=True)
class Policy:
    """A policy, and the inputs it uses; others may be left at zero."""

    name: str
    choose: Choose
    #: Uses Candidates.tokens.
    needs_tokens: bool = False
    #: Uses RequestFacts.prefix and Candidates.matched.
    needs_prefix: bool = False
    #: Uses RequestFacts.session.
    needs_session: bool = False
    #: Uses Candidates.running and .waiting, so that the replicas' metrics have to be read.
    needs_load: bool = False
