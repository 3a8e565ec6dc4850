"""Which replica takes a request. Pure: a snapshot of the board and the request's facts in, an index out.

docs/router-policies.md says which policy suits which traffic, from benchmarks/router_policies.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from types import MappingProxyType
from typing import Any, NamedTuple

from ...errors import ConfigError
from .request_facts import BLOCK_ENDS, BYTES_PER_TOKEN, RequestFacts

__all__ = ["POLICIES", "Candidate", "Policy", "RequestFacts", "policy_named"]


class Candidate(NamedTuple):
    """A replica as a policy sees it."""

    #: Requests that it has and that this board counts: exact, and of this moment.
    in_flight: int
    #: Number of the board's pick that chose it last; 0 if none did. Smaller is longer ago.
    last_pick: int
    #: Prompt tokens of the requests in flight.
    tokens: int = 0
    #: Its speed: 1.0 is normal, 0.5 half of that. Never 0.
    weight: float = 1.0
    #: What it said of itself when its metrics were read last.
    running: int = 0
    waiting: int = 0
    #: 64 bits that stand for it on every router, whatever its row is: a hash of its URL.
    key: int = 0
    #: Leading blocks of the request's prefix that it probably has in its cache.
    matched: int = 0
    #: What in_flight was when running and waiting were read.
    in_flight_then: int = 0


#: Gets at least one candidate and returns the index of one.
Choose = Callable[[Sequence[Candidate], RequestFacts], int]


@dataclass(frozen=True, slots=True)
class Policy:
    name: str
    choose: Choose
    #: Whether it looks at Candidate.tokens,
    needs_tokens: bool = False
    #: at RequestFacts.prefix and Candidate.matched,
    needs_prefix: bool = False
    #: at RequestFacts.session,
    needs_session: bool = False
    #: at Candidate.running and .waiting, for which somebody must read the replicas' metrics.
    needs_load: bool = False


def request_num(candidates: Sequence[Candidate], facts: RequestFacts) -> int:
    """Fewest in flight; among equals the one that was picked longest ago, so that a burst spreads evenly.

    Counted is what the replica would have with this request: so an idle slow one is no match for an idle
    fast one, and of two replicas the one of half the speed gets half the requests.
    """
    return _least([((c.in_flight + 1) / c.weight, c.last_pick) for c in candidates])


def round_robin(candidates: Sequence[Candidate], facts: RequestFacts) -> int:
    """The one picked longest ago: turns without a counter, so replicas may come and go between them."""
    return _least([candidate.last_pick for candidate in candidates])


def random(candidates: Sequence[Candidate], facts: RequestFacts) -> int:
    return facts.draw % len(candidates)


def power_of_two(candidates: Sequence[Candidate], facts: RequestFacts) -> int:
    """The less loaded of two drawn at random."""
    count = len(candidates)
    if count == 1:
        return 0
    first = facts.draw % count
    second = (first + 1 + (facts.draw >> 32) % (count - 1)) % count
    return min(first, second, key=lambda i: _requests(candidates[i]))


def process_tokens(candidates: Sequence[Candidate], facts: RequestFacts) -> int:
    """Fewest prompt tokens in flight: a long document weighs as much as many short questions."""
    more = facts.prompt_tokens
    return _least([((c.tokens + more) / c.weight, c.in_flight, c.last_pick) for c in candidates])


def fd_metrics_score(candidates: Sequence[Candidate], facts: RequestFacts) -> int:
    """Fewest running and waiting, by the replicas' own account: for those that have other clients too.

    That account is seconds old. Taken as it is, everything that comes until the next one would go to the
    same replica. So only what it said beyond the requests we knew of then is taken from it: those are not
    ours. Our own are counted as they are now.
    """

    def score(candidate: Candidate) -> tuple[float, int]:
        others = candidate.running + WAITING_WEIGHT * candidate.waiting - candidate.in_flight_then
        return (candidate.in_flight + max(0, others) + 1) / candidate.weight, candidate.last_pick

    return _least([score(candidate) for candidate in candidates])


def cache_aware(candidates: Sequence[Candidate], facts: RequestFacts) -> int:
    """Where the request costs least: what must be computed there, times the requests that wait meanwhile.

    Computed are the part of the prompt that the replica has not cached, and the answer; that holds up all
    that it has in flight, and this request too. So there is no border between even and uneven load: half the
    work outweighs twice the requests. Without a prefix this is request_num.
    """
    prompt = facts.prompt_tokens + ANSWER_TOKENS
    return _least(
        [
            (max(prompt - _TOKENS[c.matched], ANSWER_TOKENS) * (c.in_flight + 1) / c.weight, c.last_pick)
            for c in candidates
        ]
    )


def session(candidates: Sequence[Candidate], facts: RequestFacts) -> int:
    """Always the same replica for a session, found by rendezvous hashing; without a session request_num.

    Each session ranks all replicas in an order of its own and takes the first that does not have far more
    than its share. A replica that goes moves only its own sessions, and they come back to it; routers that
    know nothing of each other agree.
    """
    if not facts.session:
        return request_num(candidates, facts)
    share = sum(candidate.in_flight for candidate in candidates) / sum(c.weight for c in candidates)
    limit = OVERLOADED_TIMES * share + OVERLOADED_BY
    own = int.from_bytes(blake2b(facts.session, digest_size=8).digest(), "little")
    ranks = [mixed(own ^ candidate.key) for candidate in candidates]
    order = sorted(range(len(candidates)), key=ranks.__getitem__)
    # One of them is not above the average.
    return next(i for i in order if candidates[i].in_flight <= limit * candidates[i].weight)


def mixed(bits: int) -> int:
    """The finalizer of splitmix64: every bit of the result depends on all of the 64."""
    bits = (bits ^ bits >> 30) * 0xBF58476D1CE4E5B9 & _64_BITS
    bits = (bits ^ bits >> 27) * 0x94D049BB133111EB & _64_BITS
    return bits ^ bits >> 31


#: A waiting request counts as so many running ones: FastDeploy's default.
WAITING_WEIGHT = 1
#: An answer, whose length nobody knows yet, is taken to cost as much as so many tokens of a prompt.
ANSWER_TOKENS = 1000
#: A session goes elsewhere if its replica has more than this times its share, and so many more.
OVERLOADED_TIMES, OVERLOADED_BY = 1.5, 4

POLICIES: Mapping[str, Policy] = MappingProxyType(
    {
        policy.name: policy
        for policy in (
            Policy("request_num", request_num),
            Policy("round_robin", round_robin),
            Policy("random", random),
            Policy("power_of_two", power_of_two),
            Policy("process_tokens", process_tokens, needs_tokens=True),
            Policy("fd_metrics_score", fd_metrics_score, needs_load=True),
            Policy("cache_aware", cache_aware, needs_prefix=True),
            Policy("session", session, needs_session=True),
        )
    }
)
#: FastDeploy's policies that ask every replica before every request: ours know it already.
RENAMED = MappingProxyType(
    {"remote_cache_aware": "cache_aware", "fd_remote_metrics_score": "fd_metrics_score"}
)


def policy_named(name: str) -> Policy:
    policy = POLICIES.get(name)
    if policy is None:
        hint = f"; FastDeploy's {name} is {RENAMED[name]} here" if name in RENAMED else ""
        raise ConfigError(f"--policy is {name!r}; it must be one of {', '.join(POLICIES)}{hint}")
    return policy


#: Tokens in so many leading blocks of a prompt.
_TOKENS = (0, *(end // BYTES_PER_TOKEN for end in BLOCK_ENDS))
_64_BITS = (1 << 64) - 1


def _requests(candidate: Candidate) -> tuple[float, int]:
    return (candidate.in_flight + 1) / candidate.weight, candidate.last_pick


def _least(scores: Sequence[Any]) -> int:
    """Where the smallest is: of equal ones the first."""
    return scores.index(min(scores))
