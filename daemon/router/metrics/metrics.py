"""The router's figures for Prometheus, under FastDeploy's names; those of our own begin with fd_router_.

Several workers count in memory that they share (counter_memory.py); whichever is asked adds them up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import msgspec
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest, values
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from ..board.board import Board
from .counter_memory import CounterMemory, value_class
from .local_counters import CounterTally, HistogramTally

#: Everything else is counted as "other": a label value for each path a client can invent would never end.
_ENDPOINTS = frozenset(
    {
        "/deregister",
        "/health",
        "/health_generate",
        "/metrics",
        "/register",
        "/registered",
        "/registered_number",
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/embeddings",
        "/v1/models",
        "/v1/reward",
    }
)
_METHODS = frozenset({"GET", "POST", "HEAD", "OPTIONS", "PUT", "DELETE"})
#: A request lasts as long as its answer is generated.
_SECONDS = (0.005, 0.02, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800)
#: The router's own work.
_SHORT = (20e-6, 50e-6, 100e-6, 200e-6, 500e-6, 1e-3, 2e-3, 5e-3, 10e-3, 50e-3, 0.1, 1.0, 10.0)


class Metrics:
    """Made after the fork. Counting and `flush` belong to the event loop's thread; `exposition` to any."""

    def __init__(self, board: Board, counters: CounterMemory) -> None:
        self._board = board
        self._counters = counters
        values.ValueClass = value_class(counters.own_section())
        # This registry is not exposed: `exposition` adds up the counters of all workers.
        self._registry = CollectorRegistry()
        labels = ("method", "endpoint")
        self._requests = self._counter("http_requests", "Requests answered.", *labels, "status_code")
        self._seconds = self._histogram(
            "http_request_duration_seconds", "From a request to the end of its answer.", _SECONDS, *labels
        )
        self._inference = self._counter(
            "inference_requests",
            "Requests answered by a replica.",
            *("mixed_worker", "prefill_worker", "decode_worker", "status_code"),
        )
        self._retries = self._counter(
            "fd_router_retries", "Attempts that were followed by one at another replica.", "replica"
        )
        self._resumes = self._counter(
            "fd_router_resumes", "Streams that were to go on at another replica, by the one lost.", "replica"
        )
        self._broken = self._counter(
            "fd_router_broken_off", "Answers that had begun and could not be finished, by replica.", "replica"
        )
        waited = self._histogram(
            "fd_router_queue_seconds", "Time in line, of those that had to wait.", _SECONDS
        )
        relay = self._histogram(
            "fd_router_relay_seconds",
            "From a whole request to its being sent, time in line included.",
            _SHORT,
        )
        pick = self._histogram(
            "fd_router_pick_seconds", "Choosing a replica and counting the request.", _SHORT
        )
        self._waited = HistogramTally(waited, _SECONDS)
        self._relay = HistogramTally(relay, _SHORT)
        self._pick = HistogramTally(pick, _SHORT)
        self._answers: dict[tuple[str, str, int], tuple[CounterTally, HistogramTally]] = {}
        self._inferences: dict[tuple[str, int], CounterTally] = {}
        #: Seconds to be counted: from a whole request to its being sent; and for choosing a replica.
        self.relayed = self._relay.observe
        self.picked = self._pick.observe
        self.waited = self._waited.observe

    def answered(self, method: str, path: str, status: int, seconds: float) -> None:
        tallies = self._answers.get((method, path, status)) or self._answer_tallies(method, path, status)
        tallies[0].count += 1
        tallies[1].observe(seconds)

    def inference(self, url: str, status: int) -> None:
        tally = self._inferences.get((url, status))
        if tally is None:
            child = self._inference.labels(url, "", "", str(status))
            tally = self._inferences[url, status] = CounterTally(child)
        tally.count += 1

    def retried(self, replica: str) -> None:
        self._retries.labels(replica).inc()

    def resumed(self, replica: str) -> None:
        self._resumes.labels(replica).inc()

    def broken_off(self, replica: str) -> None:
        self._broken.labels(replica).inc()

    def flush(self) -> None:
        """Shows what has been counted. Several times a second."""
        for counter, histogram in self._answers.values():
            counter.flush()
            histogram.flush()
        for counter in self._inferences.values():
            counter.flush()
        for tally in (self._waited, self._relay, self._pick):
            tally.flush()

    def exposition(self) -> bytes:
        # What has not happened yet is 0: of a counter that begins with 1, Prometheus sees no increase.
        for row in self._board.status():
            for counter in (self._retries, self._resumes, self._broken):
                counter.labels(row.instance.name)
        registry = CollectorRegistry()
        registry.register(_CounterCollector(self._counters))
        registry.register(_BoardCollector(self._board))
        return generate_latest(registry)

    def _answer_tallies(self, method: str, path: str, status: int) -> tuple[CounterTally, HistogramTally]:
        key = (method if method in _METHODS else "other", path if path in _ENDPOINTS else "other", status)
        tallies = self._answers.get(key)
        if tallies is None:
            tallies = self._answers[key] = (
                CounterTally(self._requests.labels(key[0], key[1], str(status))),
                HistogramTally(self._seconds.labels(key[0], key[1]), _SECONDS),
            )
        return tallies

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(name, text, labels, registry=self._registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
        return Histogram(name, text, labels, buckets=buckets, registry=self._registry)


class _BoardCollector(Collector):
    """Reads the board when it is asked: a second set of counters could disagree with it."""

    def __init__(self, board: Board) -> None:
        self._board = board

    def collect(self) -> Iterator[Metric]:
        labels = ["replica", "url"]
        in_flight = GaugeMetricFamily("fd_router_in_flight", "Requests in flight.", labels=labels)
        up = GaugeMetricFamily("fd_router_replica_up", "1 if the replica may be chosen.", labels=labels)
        draining = GaugeMetricFamily("fd_router_replica_draining", "1 if it gets nothing new.", labels=labels)
        weight = GaugeMetricFamily("fd_router_replica_weight", "Its speed; 1 is normal.", labels=labels)
        picks = CounterMetricFamily("fd_router_picks", "Times the replica was chosen.", labels=labels)
        for row in self._board.status():
            values = [row.instance.name, row.instance.url]
            in_flight.add_metric(values, row.in_flight)
            up.add_metric(values, int(row.up))
            draining.add_metric(values, int(row.draining or row.leaving))
            weight.add_metric(values, row.weight)
            picks.add_metric(values, row.picks)
        yield from (in_flight, up, draining, weight, picks)


class _CounterCollector(Collector):
    """Metrics made of the counters of all workers."""

    def __init__(self, memory: CounterMemory) -> None:
        self._memory = memory

    def collect(self) -> Iterable[Metric]:
        metrics: dict[str, Metric] = {}
        buckets: dict[tuple[str, tuple[tuple[str, str], ...]], list[tuple[str, float]]] = {}
        decode: Callable[[bytes], tuple[str, str, str, str, dict[str, str]]] = msgspec.json.decode
        for key, value in self._memory.read().items():
            kind, name, help_text, sample, labels = decode(key)
            metric = metrics.setdefault(name, Metric(name, help_text, kind))
            if (bound := labels.pop("le", None)) is None:
                metric.add_sample(sample, labels, value)
            else:
                buckets.setdefault((name, tuple(labels.items())), []).append((bound, value))
        for (name, label_items), counts in buckets.items():
            total = 0.0
            for bound, value in sorted(counts, key=lambda count: float(count[0])):
                total += value
                metrics[name].add_sample(f"{name}_bucket", {**dict(label_items), "le": bound}, total)
            metrics[name].add_sample(f"{name}_count", dict(label_items), total)
        return metrics.values()
