"""Counts that are made in passing, and told to Prometheus several times a second.

A count in prometheus_client's files costs two microseconds, and a request has ten of them; here it costs a
few tenths. Belongs to one thread, as does `flush`.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

from prometheus_client import Counter, Histogram


class CounterTally:
    """For one child of a counter."""

    __slots__ = ("_child", "count")

    def __init__(self, child: Counter) -> None:
        self._child = child
        self.count = 0

    def flush(self) -> None:
        if self.count:
            self._child.inc(self.count)
            self.count = 0


class HistogramTally:
    """For one child of a histogram with these buckets."""

    __slots__ = ("_bounds", "_child", "_counts", "_sum")

    def __init__(self, child: Histogram, bounds: Sequence[float]) -> None:
        self._child = child
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        self._sum += value
        self._counts[bisect_left(self._bounds, value)] += 1

    def flush(self) -> None:
        if not any(self._counts):
            return
        # There is no public way to add more than one observation at a time.
        self._child._sum.inc(self._sum)
        for bucket, count in zip(self._child._buckets, self._counts, strict=True):
            if count:
                bucket.inc(count)
        self._counts = [0] * (len(self._bounds) + 1)
        self._sum = 0.0
