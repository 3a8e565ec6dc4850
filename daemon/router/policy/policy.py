"""Interface of routing policies: a snapshot of the board and the facts of a request in, an index out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple


class RequestFacts(NamedTuple):
    """What a policy may know of a request."""

    #: 64 random bits: the chance in a policy comes from outside, so that the policy stays a function.
    draw: int
    #: An estimate.
    prompt_tokens: int = 0
    #: A hash for each leading block of the prompt, each of all text up to the block's end.
    prefix: tuple[int, ...] = ()
    #: What stands for the conversation or its user; nothing if the request names neither.
    session: bytes = b""


class Candidates(NamedTuple):
    """The replicas as a policy sees them, column by column: element i of each is about candidate i."""

    #: Requests that it has and that this board counts: exact, and of this moment.
    in_flight: Sequence[int]
    #: Number of the board's pick that chose it last; 0 if none did. Smaller is longer ago.
    last_pick: Sequence[int]
    #: Prompt tokens of the requests in flight.
    tokens: Sequence[int]
    #: Its speed: 1.0 is normal, 0.5 half of that. Never 0.
    weight: Sequence[float]
    #: What it said of itself when its metrics were read last.
    running: Sequence[int]
    waiting: Sequence[int]
    #: What in_flight was when running and waiting were read.
    in_flight_then: Sequence[int]
    #: 64 bits that stand for it on every router, whatever its row is: a hash of its URL.
    key: Sequence[int]
    #: Leading blocks of the request's prefix that it probably has in its cache.
    matched: Sequence[int]


#: Gets at least one candidate and returns the index of one.
Choose = Callable[[Candidates, RequestFacts], int]


@dataclass(frozen=True, slots=True)
class Policy:
    name: str
    choose: Choose
    #: Whether it looks at Candidates.tokens,
    needs_tokens: bool = False
    #: at RequestFacts.prefix and Candidates.matched,
    needs_prefix: bool = False
    #: at RequestFacts.session,
    needs_session: bool = False
    #: at Candidates.running and .waiting, for which somebody must read the replicas' metrics.
    needs_load: bool = False
