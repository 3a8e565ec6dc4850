"""Samples of a replica's metrics, and rates from several of them."""

from __future__ import annotations

import re
import time
from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ..instance import Instance
from ..replica_metrics import read_metrics

#: Seconds for a response. A healthy replica on a busy machine needs less.
_TIMEOUT = 2.0
#: Seconds over which rates are averaged.
_WINDOW = 10.0
#: Seconds after which a sample no longer describes the replica.
_STALE = 4.0
_LINE = re.compile(
    rb"^fastdeploy:(num_requests_(?:running|waiting)|gpu_cache_usage_perc|generation_tokens_total|"
    rb"ep_(?:epoch|active_seats|joins_total|leaves_total|losses_total|steps_total|step_seconds_total|"
    rb'waited_seconds_total))(?:\{(?:seat="([0-9]{1,4})"|[^}\n]*)\})? ([0-9][0-9.eE+-]*)\r?$',
    re.MULTILINE,
)


@dataclass(frozen=True, slots=True)
class Sample:
    """A replica's metrics at one moment of the monotonic clock, without the prefix of their names."""

    at: float
    #: Sums over all labels, because an engine with several ranks has a line for each.
    sums: Mapping[str, float]
    #: Numbers of lines.
    counts: Mapping[str, int]
    #: Seconds that the replica has waited for each rank of its expert group.
    waited: Sequence[float] = ()

    @classmethod
    def parse(cls, exposition: bytes, at: float) -> Sample:
        sums: dict[str, float] = defaultdict(float)
        counts: dict[str, int] = defaultdict(int)
        waited = []
        for name, seat, text in _LINE.findall(exposition):
            try:
                value = float(text)
            except ValueError:
                continue
            sums[name.decode()] += value
            counts[name.decode()] += 1
            if seat:
                waited.append(value)
        return cls(at, sums, counts, waited)

    def total(self, name: str) -> float | None:
        return self.sums[name] if name in self.counts else None

    def mean(self, name: str) -> float | None:
        return self.sums[name] / self.counts[name] if name in self.counts else None

    def count(self, name: str) -> int | None:
        total = self.total(name)
        return None if total is None or total > 1 << 53 else int(total)


@dataclass(slots=True)
class History:
    """Samples of one process within the window, oldest first."""

    samples: deque[Sample] = field(default_factory=deque)

    def add(self, sample: Sample) -> None:
        self.samples.append(sample)
        while sample.at - self.samples[0].at > _WINDOW:
            self.samples.popleft()

    def latest(self, now: float) -> Sample | None:
        """Return the last sample, unless it is too old."""
        if not self.samples or now - self.samples[-1].at > _STALE:
            return None
        return self.samples[-1]

    @property
    def seconds(self) -> float:
        """Time from the first to the last sample."""
        return self.samples[-1].at - self.samples[0].at if self.samples else 0.0

    def growth(self, counter: str) -> float | None:
        """Return a counter's increase from the first to the last sample; None if it is unknown."""
        if self.seconds <= 0:
            return None
        before, after = self.samples[0].total(counter), self.samples[-1].total(counter)
        # A counter that decreased belongs to another process.
        return None if before is None or after is None or after < before else after - before

    def rate(self, counter: str) -> float | None:
        growth = self.growth(counter)
        return None if growth is None else growth / self.seconds

    def waited(self) -> list[float]:
        """Return the seconds that the replica has waited for each rank; empty if they are unknown."""
        if self.seconds <= 0 or len(self.samples[0].waited) != len(self.samples[-1].waited):
            return []
        pairs = zip(self.samples[0].waited, self.samples[-1].waited, strict=True)
        return [max(0.0, after - before) for before, after in pairs]


def take_sample(instance: Instance) -> Sample | None:
    """Ask a replica for its metrics; None if it does not return them."""
    exposition = read_metrics(instance, _TIMEOUT)
    return None if exposition is None else Sample.parse(exposition, time.monotonic())
