"""Policies and settings of the study of routing policies."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from fastdeploy.daemon.router.policy.policies import POLICIES
from fastdeploy.daemon.router.policy.policy import Candidates, Policy, RequestFacts

from .router_traffic import Kind, bursts, chat, documents
from .simulated_routers import Setting, Sharing

_MIXTURE: Mapping[Kind, float] = {chat: 12.0, documents: 3.0, bursts: 5.0}
#: The highest load at which random routing is stable.
SETTINGS: Mapping[str, Setting] = MappingProxyType(
    {
        "chat": Setting({chat: 26.0}),
        "documents": Setting({documents: 9.0}),
        "bursts": Setting({bursts: 24.0}),
        "mixture": Setting(_MIXTURE),
        "one slow": Setting(_MIXTURE, one_is_slow=True),
        "others' clients": Setting(
            {kind: 0.8 * rate for kind, rate in _MIXTURE.items()}, past_the_routers=5.0
        ),
        "4 routers": Setting(_MIXTURE, routers=4),
        "4 routers, reports": Setting(_MIXTURE, routers=4, sharing=Sharing.REPORTS),
        "4 routers, guessing": Setting(_MIXTURE, routers=4, sharing=Sharing.GUESSING),
        "no cache": Setting({kind: 0.6 * rate for kind, rate in _MIXTURE.items()}, cache_blocks=0),
    }
)


def longest_prefix(candidates: Candidates, facts: RequestFacts) -> int:
    """cache_aware of other routers: longest prefix while the load is balanced, otherwise fewest tokens."""
    loads = candidates.in_flight
    if max(loads) - min(loads) > 8 and max(loads) > 1.5 * min(loads):
        return POLICIES["process_tokens"].choose(candidates, facts)
    columns = candidates.matched, candidates.tokens, candidates.weight, loads, candidates.last_pick
    scores = [
        (-matched, tokens / weight, count, last)
        for matched, tokens, weight, count, last in zip(*columns, strict=True)
    ]
    return scores.index(min(scores))


CONTENDERS = (
    *POLICIES.values(),
    Policy("longest_prefix", longest_prefix, needs_tokens=True, needs_prefix=True),
)
