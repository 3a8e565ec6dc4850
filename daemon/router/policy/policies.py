"""Routing policies. Pure functions: candidates and the facts of a request in, the index of a candidate out.

docs/router-policies.md compares them, with figures of benchmarks/router_policies.py.
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
    """Choose the fewest requests in flight; among equals the least recently picked, which spreads a burst.

    The count includes this request and is divided by the replica's speed: an idle fast replica is chosen
    before an idle slow one, and a replica of half the speed gets half the requests.
    """
    return _argmin(_loads(candidates))


def round_robin(candidates: Candidates, facts: RequestFacts) -> int:
    """Choose the least recently picked. A counter of turns would be wrong when replicas come and go."""
    return _argmin(candidates.last_pick)


def random(candidates: Candidates, facts: RequestFacts) -> int:
    return facts.draw % len(candidates.in_flight)


def power_of_two(candidates: Candidates, facts: RequestFacts) -> int:
    """Choose the less loaded of two random candidates."""
    count = len(candidates.in_flight)
    if count == 1:
        return 0
    first = facts.draw % count
    second = (first + 1 + (facts.draw >> 32) % (count - 1)) % count
    return min(first, second, key=_loads(candidates).__getitem__)


def process_tokens(candidates: Candidates, facts: RequestFacts) -> int:
    """Choose the fewest prompt tokens in flight: a long document counts like many short questions."""
    more = facts.prompt_tokens
    fields = candidates.tokens, candidates.weight, candidates.in_flight, candidates.last_pick
    return _argmin(
        [((tokens + more) / weight, count, last) for tokens, weight, count, last in zip(*fields, strict=True)]
    )


def fd_metrics_score(candidates: Candidates, facts: RequestFacts) -> int:
    """Choose the fewest running and waiting requests by the replicas' metrics, which count all clients.

    The metrics are seconds old: used as they are, all requests until the next reading would go to the same
    replica. So only their excess over the requests that this router had there at that time is used, as the
    number of other clients' requests. The router's own requests are counted as of now.
    """
    reported = zip(candidates.running, candidates.waiting, candidates.in_flight_at_poll, strict=True)
    others = [max(0, running + WAITING_WEIGHT * waiting - ours) for running, waiting, ours in reported]
    total = [*map(add, candidates.in_flight, others)]
    return _argmin(_loads(candidates._replace(in_flight=total)))


def cache_aware(candidates: Candidates, facts: RequestFacts) -> int:
    """Choose the lowest cost: the work of this request there, times the number of requests that it delays.

    The work is the part of the prompt that is not cached there, and the response. It delays all requests in
    flight there, and this one. As a product, the cost needs no threshold between even and uneven load: half
    the work outweighs twice the requests. Without a prefix this is request_num.
    """
    prompt = facts.prompt_tokens + ANSWER_TOKENS
    fields = candidates.matched, candidates.in_flight, candidates.weight, candidates.last_pick
    return _argmin(
        [
            (max(prompt - _TOKENS[matched], ANSWER_TOKENS) * (count + 1) / weight, last)
            for matched, count, weight, last in zip(*fields, strict=True)
        ]
    )


def session(candidates: Candidates, facts: RequestFacts) -> int:
    """Choose the same replica for all requests of a session, by rendezvous hashing; else as request_num.

    Each session ranks all replicas in an order of its own and takes the first that is not overloaded. When a
    replica goes, only its own sessions move, and they come back with it; routers that share nothing agree.
    """
    if not facts.session:
        return request_num(candidates, facts)
    in_flight, weight = candidates.in_flight, candidates.weight
    share = sum(in_flight) / sum(weight)
    limit = OVERLOADED_TIMES * share + OVERLOADED_BY
    own = int.from_bytes(blake2b(facts.session, digest_size=8).digest(), "little")
    ranks = [splitmix64(own ^ key) for key in candidates.key]
    order = sorted(range(len(ranks)), key=ranks.__getitem__)
    # At least one candidate is not above the average, so there is always one below the limit.
    return next(i for i in order if in_flight[i] <= limit * weight[i])


def splitmix64(bits: int) -> int:
    """Return the finalizer of splitmix64: every bit of the result depends on all 64 bits."""
    bits = (bits ^ bits >> 30) * 0xBF58476D1CE4E5B9 & _64_BITS
    bits = (bits ^ bits >> 27) * 0x94D049BB133111EB & _64_BITS
    return bits ^ bits >> 31


#: Number of running requests that a waiting one counts for: FastDeploy's default.
WAITING_WEIGHT = 1
#: Assumed cost of a response, whose length is not known yet, in tokens of a prompt.
ANSWER_TOKENS = 1000
#: A replica is overloaded for sessions if it has more than this times its share, plus this number.
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
#: FastDeploy's policies that ask every replica before every request -> the policy that replaces each.
RENAMED = MappingProxyType(
    {"remote_cache_aware": "cache_aware", "fd_remote_metrics_score": "fd_metrics_score"}
)


def policy_named(name: str) -> Policy:
    policy = POLICIES.get(name)
    if policy is None:
        hint = f"; FastDeploy's {name} is {RENAMED[name]} here" if name in RENAMED else ""
        raise ConfigError(f"--policy is {name!r}; it must be one of {', '.join(POLICIES)}{hint}")
    return policy


#: Number of leading blocks -> tokens in them.
_TOKENS = (0, *(end // BYTES_PER_TOKEN for end in BLOCK_ENDS))
_64_BITS = (1 << 64) - 1


def _loads(candidates: Candidates) -> list[tuple[float, int]]:
    """Return sort keys: requests with this one, by speed; then the last pick."""
    if min(candidates.weight) == max(candidates.weight):
        # The usual case: the counts alone give the same order.
        return [*zip(candidates.in_flight, candidates.last_pick, strict=True)]
    fields = zip(candidates.in_flight, candidates.weight, candidates.last_pick, strict=True)
    return [((count + 1) / weight, last) for count, weight, last in fields]


def _argmin(scores: Sequence[Any]) -> int:
    """Return the index of the smallest score, of equal ones the first."""
    return scores.index(min(scores))
