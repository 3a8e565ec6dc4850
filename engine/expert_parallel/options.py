"""Options of one rank in an expert-parallel group."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

#: Called before each new epoch with, for each layer, all experts that this rank holds from now on, and the
#: new ones among them.
OnPlacement = Callable[[Sequence[frozenset[int]], Sequence[frozenset[int]]], None]

#: Seconds without progress after which a rank that others wait for is reported, and killed.
STALL_AFTER, STALL_KILL = 10.0, 60.0


@dataclass(frozen=True, slots=True)
class GroupOptions:
    """Options that may differ between the ranks, except `redundant_experts`."""

    name: str
    rank: int
    #: Extra copies of the most used experts in each layer.
    redundant_experts: int = 0
    #: Move experts once a minute to balance their measured load.
    rebalance: bool = False
    #: Seconds without progress after which a rank that others wait for is reported in the log.
    stall_after: float = STALL_AFTER
    #: Seconds without progress after which it is killed.
    stall_kill: float = STALL_KILL
    #: Every rank has one CPU per thread, so short waits may spin.
    spin: bool = False
