"""Which replica takes a request. Pure: a snapshot of the board and the request's facts in, an index out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from ...errors import ConfigError


@dataclass(frozen=True, slots=True)
class Candidate:
    """A replica as a policy sees it."""

    in_flight: int
    #: Number of the board's pick that chose it last; 0 if none did. Smaller is longer ago.
    last_pick: int


@dataclass(frozen=True, slots=True)
class RequestFacts:
    """What a policy may know of a request."""

    path: str
    body: bytes
    #: 64 random bits: the chance in a policy comes from outside, so that the policy stays a function.
    draw: int


#: Gets at least one candidate and returns the index of one.
Policy = Callable[[Sequence[Candidate], RequestFacts], int]


def request_num(candidates: Sequence[Candidate], facts: RequestFacts) -> int:
    """Fewest in flight; among equals the one that was picked longest ago, so that a burst spreads evenly."""
    return min(range(len(candidates)), key=lambda i: (candidates[i].in_flight, candidates[i].last_pick))


def round_robin(candidates: Sequence[Candidate], facts: RequestFacts) -> int:
    """The one picked longest ago: turns without a counter, so replicas may come and go between them."""
    return min(range(len(candidates)), key=lambda i: candidates[i].last_pick)


def random(candidates: Sequence[Candidate], facts: RequestFacts) -> int:
    return facts.draw % len(candidates)


def power_of_two(candidates: Sequence[Candidate], facts: RequestFacts) -> int:
    """The less loaded of two drawn at random."""
    count = len(candidates)
    if count == 1:
        return 0
    first = facts.draw % count
    second = (first + 1 + (facts.draw >> 32) % (count - 1)) % count
    return min(first, second, key=lambda i: (candidates[i].in_flight, candidates[i].last_pick))


POLICIES: Mapping[str, Policy] = MappingProxyType(
    {
        "request_num": request_num,
        "round_robin": round_robin,
        "random": random,
        "power_of_two": power_of_two,
    }
)


def policy_named(name: str) -> Policy:
    policy = POLICIES.get(name)
    if policy is None:
        raise ConfigError(f"--policy is {name!r}; it must be one of {', '.join(POLICIES)}")
    return policy
