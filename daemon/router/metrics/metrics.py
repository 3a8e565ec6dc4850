"""The router's metrics for Prometheus: FastDeploy's, by its names, and others that begin with fd_router_.

All workers count in shared memory (counter_memory.py), and any of them can report the sums.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator

import msgspec
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest, values
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from ....common.api_paths import ABORT_PATH, BESIDE_V1
from ..board.board import Board
from .counter_memory import CounterMemory, value_class
from .local_counters import LocalCounter, LocalHistogram

#: Values of the label `endpoint`; other paths, of which clients can invent any number, count as "other".
_ENDPOINTS = frozenset(
    {
        *BESIDE_V1,
        "/",
        "/deregister",
        "/health",
        "/health_generate",
        "/load",
        "/metrics",
        "/overview",
        "/ping",
        "/register",
        "/registered",
        "/registered_number",
        ABORT_PATH,
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/embeddings",
        "/v1/models",
        "/v1/responses",
        "/v1/reward",
        "/version",
    }
)
_METHODS = frozenset({"GET", "POST", "HEAD", "OPTIONS", "PUT", "DELETE"})
#: Buckets for whole requests, in seconds.
_SECONDS = (0.005, 0.02, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800)
#: Buckets for the router's own work.
_SHORT = (20e-6, 50e-6, 100e-6, 200e-6, 500e-6, 1e-3, 2e-3, 5e-3, 10e-3, 50e-3, 0.1, 1.0, 10.0)


class Metrics:
    """Metrics of one worker. `exposition` may be called by any thread, all else by the event loop's."""

    def __init__(self, board: Board, counters: CounterMemory) -> None:
        self._board = board
        self._counters = counters
        values.ValueClass = value_class(counters.own_section())
        # This registry is not exported: `exposition` adds up the counters of all workers.
        self._registry = CollectorRegistry()
        labels = ("method", "endpoint")
        self._requests = self._counter("http_requests", "Requests answered.", *labels, "status_code")
        self._seconds = self._histogram(
            "http_request_duration_seconds",
            "Time from a request to the end of its response.",
            _SECONDS,
            *labels,
        )
        self._inference = self._counter(
            "inference_requests",
            "Requests answered by a replica.",
            *("mixed_worker", "prefill_worker", "decode_worker", "status_code"),
        )
        self._retries = self._counter(
            "fd_router_retries", "Attempts retried on another replica, by failed replica.", "replica"
        )
        self._resumes = self._counter(
            "fd_router_resumes", "Streams resumed on another replica, by lost replica.", "replica"
        )
        self._broken = self._counter(
            "fd_router_broken_off", "Responses that began and could not be completed, by replica.", "replica"
        )
        waited = self._histogram(
            "fd_router_queue_seconds", "Time in the wait queue, for requests that had to wait.", _SECONDS
        )
        relay = self._histogram(
            "fd_router_relay_seconds",
            "Time from the receipt of a request to sending it to a replica, including the wait queue.",
            _SHORT,
        )
        pick = self._histogram(
            "fd_router_pick_seconds", "Time to choose a replica and count the request.", _SHORT
        )
        self._waited = LocalHistogram(waited, _SECONDS)
        self._relay = LocalHistogram(relay, _SHORT)
        self._pick = LocalHistogram(pick, _SHORT)
        self._answers: dict[tuple[str, str, int], tuple[LocalCounter, LocalHistogram]] = {}
        self._inferences: dict[tuple[str, int], LocalCounter] = {}
        #: Record seconds: from receiving a request to sending it, for choosing a replica, in the wait queue.
        self.relayed = self._relay.observe
        self.picked = self._pick.observe
        self.waited = self._waited.observe

    def answered(self, method: str, path: str, status: int, seconds: float) -> None:
        counters = self._answers.get((method, path, status)) or self._answer_counters(method, path, status)
        counters[0].count += 1
        counters[1].observe(seconds)

    def inference(self, url: str, status: int) -> None:
        counter = self._inferences.get((url, status))
        if counter is None:
            child = self._inference.labels(url, "", "", str(status))
            counter = self._inferences[url, status] = LocalCounter(child)
        counter.count += 1

    def retried(self, replica: str) -> None:
        self._retries.labels(replica).inc()

    def resumed(self, replica: str) -> None:
        self._resumes.labels(replica).inc()

    def broken_off(self, replica: str) -> None:
        self._broken.labels(replica).inc()

    def flush(self) -> None:
        """Publish what has been counted. Called several times a second."""
        for counter, histogram in self._answers.values():
            counter.flush()
            histogram.flush()
        for counter in self._inferences.values():
            counter.flush()
        for histogram in (self._waited, self._relay, self._pick):
            histogram.flush()

    def exposition(self) -> bytes:
        # Create counters with 0: Prometheus would not see the increase of one that begins with 1.
        for row in self._board.status():
            for counter in (self._retries, self._resumes, self._broken):
                counter.labels(row.instance.name)
        registry = CollectorRegistry()
        registry.register(_CounterCollector(self._counters))
        registry.register(_BoardCollector(self._board))
        return generate_latest(registry)

    def _answer_counters(self, method: str, path: str, status: int) -> tuple[LocalCounter, LocalHistogram]:
        key = (method if method in _METHODS else "other", path if path in _ENDPOINTS else "other", status)
        counters = self._answers.get(key)
        if counters is None:
            counters = self._answers[key] = (
                LocalCounter(self._requests.labels(key[0], key[1], str(status))),
                LocalHistogram(self._seconds.labels(key[0], key[1]), _SECONDS),
            )
        return counters

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(name, text, labels, registry=self._registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
        return Histogram(name, text, labels, buckets=buckets, registry=self._registry)


class _BoardCollector(Collector):
    """Metrics read from the board at each scrape, because a second set of counters could disagree with it."""

    def __init__(self, board: Board) -> None:
        self._board = board

    def collect(self) -> Iterator[Metric]:
        labels = ["replica", "url"]
        in_flight = GaugeMetricFamily("fd_router_in_flight", "Requests in flight.", labels=labels)
        up = GaugeMetricFamily("fd_router_replica_up", "1 if the replica may be chosen.", labels=labels)
        draining = GaugeMetricFamily(
            "fd_router_replica_draining", "1 if the replica gets no new requests.", labels=labels
        )
        weight = GaugeMetricFamily(
            "fd_router_replica_weight", "Relative speed of the replica; 1 is normal.", labels=labels
        )
        picks = CounterMetricFamily("fd_router_picks", "Times the replica was chosen.", labels=labels)
        for row in self._board.status():
            values = [row.instance.name, row.instance.url]
            in_flight.add_metric(values, row.in_flight)
            up.add_metric(values, int(row.up))
            draining.add_metric(values, int(row.draining or row.leaving))
            weight.add_metric(values, row.weight)
            picks.add_metric(values, row.pick_count)
        yield from (in_flight, up, draining, weight, picks)


class _CounterCollector(Collector):
    """Metrics that add up the counters of all workers."""

    def __init__(self, memory: CounterMemory) -> None:
        self._memory = memory

    def collect(self) -> Iterable[Metric]:
        metrics: dict[str, Metric] = {}
        sums: dict[tuple[str, str, tuple[tuple[str, str], ...]], float] = defaultdict(float)
        buckets: dict[tuple[str, tuple[tuple[str, str], ...]], list[tuple[str, float]]] = {}
        decode: Callable[[bytes], tuple[str, str, str, str, dict[str, str]]] = msgspec.json.decode
        for key, value in self._memory.read().items():
            kind, name, help_text, sample, labels = decode(key)
            metrics.setdefault(name, Metric(name, help_text, kind))
            # After an upgrade the workers of both versions count, and may differ in the help text.
            sums[name, sample, tuple(labels.items())] += value
        for (name, sample, items), value in sums.items():
            labels = dict(items)
            if (bound := labels.pop("le", None)) is None:
                metrics[name].add_sample(sample, labels, value)
            else:
                buckets.setdefault((name, tuple(labels.items())), []).append((bound, value))
        for (name, label_items), counts in buckets.items():
            total = 0.0
            for bound, value in sorted(counts, key=lambda count: float(count[0])):
                total += value
                metrics[name].add_sample(f"{name}_bucket", {**dict(label_items), "le": bound}, total)
            metrics[name].add_sample(f"{name}_count", dict(label_items), total)
        return metrics.values()
