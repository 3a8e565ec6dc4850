"""How fast each replica is beside the others. Pure.

Measured is how fast the streams of a replica go on: tokens that were passed on, by the seconds from a
stream's first token to its last. The wait for the first is left out: it depends on the prompt and the load.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median_high
from typing import NamedTuple

#: Seconds after which what was measured counts for 1/e.
_MEMORY_SECONDS = 20.0
#: With fewer seconds of streaming than this (decayed), nothing is known.
_ENOUGH_SECONDS = 3.0
#: Below so much of the usual speed a replica is slow, and until it is above the other it stays so. Above them
#: lies what chance does: replicas that are equal must be exactly equal, or they take no turns.
_SLOW, _NORMAL = 0.75, 0.85
_LEAST = 0.1


class Pace(NamedTuple):
    """Decayed sums over a replica's streams."""

    tokens: float
    seconds: float

    def after(self, elapsed: float, tokens: float, seconds: float) -> Pace:
        keep = decay(elapsed, _MEMORY_SECONDS)
        return Pace(self.tokens * keep + tokens, self.seconds * keep + seconds)

    @property
    def speed(self) -> float | None:
        """Tokens a second of one stream; None if too little is known."""
        return self.tokens / self.seconds if self.seconds >= _ENOUGH_SECONDS else None


def decay(elapsed: float, memory: float) -> float:
    """What is left of a sum after `elapsed` seconds."""
    return math.exp(-max(0.0, elapsed) / memory)


def weights(paces: Sequence[Pace], before: Sequence[float]) -> list[float]:
    """1.0 for replicas of normal speed, else their part of it; `before` is what it was.

    Normal is the median of those that are measured, of two the faster one. A replica of which nothing is
    known is normal: one that was slow and got no requests is tried again.
    """
    speeds = [pace.speed for pace in paces]
    known = [speed for speed in speeds if speed is not None]
    normal = median_high(known) if known else 0.0
    return [_weight(speed, normal, old) for speed, old in zip(speeds, before, strict=True)]


def _weight(speed: float | None, normal: float, before: float) -> float:
    if speed is None or normal <= 0.0:
        return 1.0
    ratio = speed / normal
    if ratio >= (_SLOW if before == 1.0 else _NORMAL):
        return 1.0
    return max(_LEAST, round(ratio, 2))
