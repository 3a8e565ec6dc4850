"""Fetches metrics of several programs in parallel, so that one that hangs does not delay the others."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any

from ...common.http_client import HttpError, request

#: Seconds. A healthy program on a busy machine needs less.
_TIMEOUT = 2.0
_MAX_BYTES = 16 << 20
#: Seconds over which rates are averaged.
_WINDOW = 10.0

Sample = tuple[Mapping[str, str], float]


@dataclass(frozen=True, slots=True)
class Scrape:
    """A program's /metrics. `at` is a time of the monotonic clock."""

    at: float
    samples: Mapping[str, list[Sample]]

    @classmethod
    def parse(cls, text: str, at: float) -> Scrape:
        """Parse the text format of Prometheus. Raises ValueError."""
        from prometheus_client.parser import text_string_to_metric_families

        samples: dict[str, list[Sample]] = {}
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                samples.setdefault(sample.name, []).append((sample.labels, sample.value))
        return cls(at, samples)

    def total(self, name: str, **labels: str) -> float | None:
        """Return the sum of all samples of a metric with these labels; None if there is no such metric."""
        found = self.samples.get(name)
        if found is None:
            return None
        return sum(value for own, value in found if labels.items() <= own.items())


@dataclass(slots=True)
class History:
    """Last scrapes of one process."""

    scrapes: deque[Scrape] = field(default_factory=deque)

    def add(self, scrape: Scrape) -> None:
        self.scrapes.append(scrape)
        while len(self.scrapes) > 2 and scrape.at - self.scrapes[1].at >= _WINDOW:
            self.scrapes.popleft()

    def rate(self, counter: str, **labels: str) -> float | None:
        """Return a counter's increase per second over the window; None before the second scrape."""
        if len(self.scrapes) < 2:
            return None
        first, last = self.scrapes[0], self.scrapes[-1]
        growth = _growth(first, last, counter, **labels)
        return None if growth is None or last.at <= first.at else growth / (last.at - first.at)

    def mean(self, sum_: str, count: str) -> float | None:
        """Return the mean of a histogram's observations within the window; None if there are none."""
        if len(self.scrapes) < 2:
            return None
        first, last = self.scrapes[0], self.scrapes[-1]
        growth, number = _growth(first, last, sum_), _growth(first, last, count)
        return growth / number if growth is not None and number else None


class BackgroundCalls:
    """Calls functions in threads. A call that hangs is not repeated until it has returned."""

    def __init__(self) -> None:
        self._running: set[Hashable] = set()
        self._results: dict[Hashable, Any] = {}
        self._changed = threading.Condition()

    def start(self, calls: Mapping[Hashable, Callable[[], Any]]) -> None:
        with self._changed:
            free = calls.keys() - self._running
            self._running |= free
        for key in free:
            # Daemon threads: fdctl exits without waiting for a call that hangs.
            threading.Thread(target=self._run, args=(key, calls[key]), daemon=True).start()

    def take(self, timeout: float) -> dict[Hashable, Any]:
        """Wait up to `timeout` seconds for all calls. Return the results or exceptions of finished calls."""
        with self._changed:
            self._changed.wait_for(lambda: not self._running, timeout)
            results, self._results = self._results, {}
        return results

    def _run(self, key: Hashable, call: Callable[[], Any]) -> None:
        try:
            result = call()
        except Exception as error:
            result = error
        with self._changed:
            self._results[key] = result
            self._running.discard(key)
            self._changed.notify_all()


def scrape(host: str, port: int) -> Scrape:
    """GET /metrics. Raises HttpError or ValueError."""
    response = request((host, port), "GET", "/metrics", timeout=_TIMEOUT, limit=_MAX_BYTES)
    if response.status != HTTPStatus.OK:
        raise HttpError(f"/metrics answered {response.status}")
    return Scrape.parse(response.body.decode(), time.monotonic())


def _growth(first: Scrape, last: Scrape, counter: str, **labels: str) -> float | None:
    """Return a counter's increase; None if it does not exist. A counter that decreased was reset to 0."""
    before, after = first.total(counter, **labels), last.total(counter, **labels)
    if after is None:
        return None
    return after if before is None or after < before else after - before
