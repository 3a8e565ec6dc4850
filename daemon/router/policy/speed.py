"""Relative speed of replicas, from the streams that they have produced. Pure.

The measure is the rate of a replica's streams: tokens that were passed on, divided by the seconds from a
stream's first token to its last. The time to the first token is left out: it depends on prompt and load.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median_high
from typing import NamedTuple

#: Seconds after which a measurement counts for 1/e.
_MEMORY_SECONDS = 20.0
#: Minimum (decayed) seconds of streaming for a speed to be known.
_MIN_SECONDS = 3.0
#: Fractions of normal speed below which a replica becomes slow, and above which it is normal again. Random
#: differences are smaller, so they change no weight: only replicas of exactly equal weight take turns.
_SLOW, _NORMAL = 0.75, 0.85
_MIN_WEIGHT = 0.1


class StreamRate(NamedTuple):
    """Decayed sums over a replica's streams."""

    tokens: float
    seconds: float

    def after(self, elapsed: float, tokens: float, seconds: float) -> StreamRate:
        keep = decay(elapsed, _MEMORY_SECONDS)
        return StreamRate(self.tokens * keep + tokens, self.seconds * keep + seconds)

    @property
    def speed(self) -> float | None:
        """Tokens per second of one stream; None if too little is known."""
        return self.tokens / self.seconds if self.seconds >= _MIN_SECONDS else None


def decay(elapsed: float, memory: float) -> float:
    """Return the factor by which a sum has decayed after `elapsed` seconds."""
    return math.exp(-max(0.0, elapsed) / memory)


def weights(rates: Sequence[StreamRate], before: Sequence[float]) -> list[float]:
    """Return 1.0 for replicas of normal speed, and their fraction of it for slow ones.

    Normal is the median of the known speeds, of two the faster one. A replica of unknown speed is normal, so
    that a slow one that got no requests is tried again.

    Args:
        before: the weights so far.
    """
    speeds = [rate.speed for rate in rates]
    known = [speed for speed in speeds if speed is not None]
    normal = median_high(known) if known else 0.0
    return [_weight(speed, normal, old) for speed, old in zip(speeds, before, strict=True)]


def _weight(speed: float | None, normal: float, before: float) -> float:
    if speed is None or normal <= 0.0:
        return 1.0
    ratio = speed / normal
    if ratio >= (_SLOW if before == 1.0 else _NORMAL):
        return 1.0
    return max(_MIN_WEIGHT, round(ratio, 2))
