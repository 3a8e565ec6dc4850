"""Which replica takes a request. Pure: a snapshot of the board and the request's facts in, an index out.

docs/router-policies.md says which policy suits which traffic, from benchmarks/router_policies.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from hashlib import blake2b
from operator import add
from types import MappingProxyType
from typing import Any

from ....common.errors import ConfigError
from .policy import Candidates, Policy, RequestFacts
from .request_facts import BLOCK_ENDS, BYTES_PER_TOKEN


def request_num(candidates: Candidates, facts: RequestFacts) -> int:
    """Fewest in flight; among equals the one that was picked longest ago, so that a burst spreads evenly.

    Counted is what the replica would have with this request: so an idle slow one is no match for an idle
    fast one, and of two replicas the one of half the speed gets half the requests.
    """
    return _least(_loads(candidates))


def round_robin(candidates: Candidates, facts: RequestFacts) -> int:
    """The one picked longest ago: turns without a counter, so replicas may come and go between them."""
    return _least(candidates.last_pick)


def random(candidates: Candidates, facts: RequestFacts) -> int:
    return facts.draw % len(candidates.in_flight)


def power_of_two(candidates: Candidates, facts: RequestFacts) -> int:
    """The less loaded of two drawn at random."""
    count = len(candidates.in_flight)
    if count == 1:
        return 0
    first = facts.draw % count
    second = (first + 1 + (facts.draw >> 32) % (count - 1)) % count
    return min(first, second, key=_loads(candidates).__getitem__)


def process_tokens(candidates: Candidates, facts: RequestFacts) -> int:
    """Fewest prompt tokens in flight: a long document weighs as much as many short questions."""
    more = facts.prompt_tokens
    columns = candidates.tokens, candidates.weight, candidates.in_flight, candidates.last_pick
    return _least(
        [
            ((tokens + more) / weight, count, last)
            for tokens, weight, count, last in zip(*columns, strict=True)
        ]
    )


def fd_metrics_score(candidates: Candidates, facts: RequestFacts) -> int:
    """Fewest running and waiting, by the replicas' own account: for those that have other clients too.

    That account is seconds old. Taken as it is, everything that comes until the next one would go to the
    same replica. So only what it said beyond the requests we knew of then is taken from it: those are not
    ours. Our own are counted as they are now.
    """

    said = zip(candidates.running, candidates.waiting, candidates.in_flight_then, strict=True)
    others = [max(0, running + WAITING_WEIGHT * waiting - ours) for running, waiting, ours in said]
    everybody = [*map(add, candidates.in_flight, others)]
    return _least(_loads(candidates._replace(in_flight=everybody)))


def cache_aware(candidates: Candidates, facts: RequestFacts) -> int:
    """Where the request costs least: what must be computed there, times the requests that wait meanwhile.

    Computed are the part of the prompt that the replica has not cached, and the answer; that holds up all
    that it has in flight, and this request too. So there is no border between even and uneven load: half the
    work outweighs twice the requests. Without a prefix this is request_num.
    """
    prompt = facts.prompt_tokens + ANSWER_TOKENS
    columns = candidates.matched, candidates.in_flight, candidates.weight, candidates.last_pick
    return _least(
        [
            (max(prompt - _TOKENS[matched], ANSWER_TOKENS) * (count + 1) / weight, last)
            for matched, count, weight, last in zip(*columns, strict=True)
        ]
    )


def session(candidates: Candidates, facts: RequestFacts) -> int:
    """Always the same replica for a session, found by rendezvous hashing; without a session request_num.

    Each session ranks all replicas in an order of its own and takes the first that does not have far more
    than its share. A replica that goes moves only its own sessions, and they come back to it; routers that
    know nothing of each other agree.
    """
    if not facts.session:
        return request_num(candidates, facts)
    in_flight, weight = candidates.in_flight, candidates.weight
    share = sum(in_flight) / sum(weight)
    limit = OVERLOADED_TIMES * share + OVERLOADED_BY
    own = int.from_bytes(blake2b(facts.session, digest_size=8).digest(), "little")
    ranks = [mixed(own ^ key) for key in candidates.key]
    order = sorted(range(len(ranks)), key=ranks.__getitem__)
    # One of them is not above the average.
    return next(i for i in order if in_flight[i] <= limit * weight[i])


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


def _loads(candidates: Candidates) -> list[tuple[float, int]]:
    """What each would have with this request, by its speed; among equals, since when it was not picked."""
    if min(candidates.weight) == max(candidates.weight):
        # As nearly always: their order is that of the counts themselves.
        return [*zip(candidates.in_flight, candidates.last_pick, strict=True)]
    columns = zip(candidates.in_flight, candidates.weight, candidates.last_pick, strict=True)
    return [((count + 1) / weight, last) for count, weight, last in columns]


def _least(scores: Sequence[Any]) -> int:
    """Where the smallest is: of equal ones the first."""
    return scores.index(min(scores))
