"""Figures of several programs, fetched at the same time; whoever does not answer holds back nobody."""

from __future__ import annotations

import http.client
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

#: Longer than a healthy program needs on a busy machine.
_TIMEOUT = 2.0
_MOST_BYTES = 16 << 20
#: Rates are means over so long.
_WINDOW = 10.0

Sample = tuple[Mapping[str, str], float]


@dataclass(frozen=True, slots=True)
class Scrape:
    """One program's /metrics. `at` is of the monotonic clock."""

    at: float
    samples: Mapping[str, list[Sample]]

    @classmethod
    def parse(cls, text: str, at: float) -> Scrape:
        """Raises ValueError."""
        samples: dict[str, list[Sample]] = {}
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                samples.setdefault(sample.name, []).append((sample.labels, sample.value))
        return cls(at, samples)

    def total(self, name: str, **labels: str) -> float | None:
        """The sum of a metric over all labels but these; None if there is none of that name."""
        found = self.samples.get(name)
        if found is None:
            return None
        return sum(value for own, value in found if labels.items() <= own.items())


@dataclass(slots=True)
class History:
    """The last scrapes of one process."""

    scrapes: deque[Scrape] = field(default_factory=deque)

    def add(self, scrape: Scrape) -> None:
        self.scrapes.append(scrape)
        while len(self.scrapes) > 2 and scrape.at - self.scrapes[1].at >= _WINDOW:
            self.scrapes.popleft()

    def rate(self, counter: str, **labels: str) -> float | None:
        """Per second, over the window; None before the second scrape."""
        if len(self.scrapes) < 2:
            return None
        first, last = self.scrapes[0], self.scrapes[-1]
        growth = _growth(first, last, counter, **labels)
        return None if growth is None or last.at <= first.at else growth / (last.at - first.at)

    def mean(self, sum_: str, count: str) -> float | None:
        """What one of those that were counted within the window had on average; None if there was none."""
        if len(self.scrapes) < 2:
            return None
        first, last = self.scrapes[0], self.scrapes[-1]
        growth, number = _growth(first, last, sum_), _growth(first, last, count)
        return growth / number if growth is not None and number else None


class Errands:
    """Calls in threads of their own. One that does not return is not sent again until it has."""

    def __init__(self) -> None:
        self._under_way: set[Hashable] = set()
        self._results: dict[Hashable, Any] = {}
        self._changed = threading.Condition()

    def send(self, errands: Mapping[Hashable, Callable[[], Any]]) -> None:
        with self._changed:
            free = errands.keys() - self._under_way
            self._under_way |= free
        for key in free:
            # Not joined at exit: whoever looks at the screen does not wait for one that hangs.
            threading.Thread(target=self._run, args=(key, errands[key]), daemon=True).start()

    def take(self, patience: float) -> dict[Hashable, Any]:
        """What has come back: a result, or the exception. Waits up to so many seconds for all of them."""
        with self._changed:
            self._changed.wait_for(lambda: not self._under_way, patience)
            results, self._results = self._results, {}
        return results

    def _run(self, key: Hashable, errand: Callable[[], Any]) -> None:
        try:
            result = errand()
        except Exception as error:
            result = error
        with self._changed:
            self._results[key] = result
            self._under_way.discard(key)
            self._changed.notify_all()


def scrape(host: str, port: int) -> Scrape:
    """GET /metrics. Raises OSError, ValueError or HTTPException."""
    connection = http.client.HTTPConnection(host, port, timeout=_TIMEOUT)
    try:
        connection.request("GET", "/metrics")
        response = connection.getresponse()
        text = response.read(_MOST_BYTES).decode()
        if response.status != http.HTTPStatus.OK:
            raise ValueError(f"/metrics answered {response.status}")
    finally:
        connection.close()
    return Scrape.parse(text, time.monotonic())


def _growth(first: Scrape, last: Scrape, counter: str, **labels: str) -> float | None:
    """None if it is not there; a counter that is smaller than before has begun anew."""
    before, after = first.total(counter, **labels), last.total(counter, **labels)
    if after is None:
        return None
    return after if before is None or after < before else after - before
