"""The router's figures for Prometheus, under FastDeploy's names; those of our own begin with fd_router_."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from .board import Board

#: Everything else is counted as "other": a label value for each path a client can invent would never end.
_ENDPOINTS = frozenset(
    {
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


class Metrics:
    def __init__(self, board: Board) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_BoardCollector(board))
        labels = ("method", "endpoint")
        self._requests = Counter(
            "http_requests", "Requests answered.", (*labels, "status_code"), registry=self._registry
        )
        self._seconds = Histogram(
            "http_request_duration_seconds",
            "From a request to the end of its answer.",
            labels,
            buckets=_SECONDS,
            registry=self._registry,
        )
        self._inference = Counter(
            "inference_requests",
            "Requests answered by a replica.",
            ("mixed_worker", "prefill_worker", "decode_worker", "status_code"),
            registry=self._registry,
        )
        self._retries = Counter(
            "fd_router_retries",
            "Attempts that were followed by one at another replica.",
            ("replica",),
            registry=self._registry,
        )

    def answered(self, method: str, path: str, status: int, seconds: float) -> None:
        method = method if method in _METHODS else "other"
        endpoint = path if path in _ENDPOINTS else "other"
        self._requests.labels(method, endpoint, str(status)).inc()
        self._seconds.labels(method, endpoint).observe(seconds)

    def inference(self, url: str, status: int) -> None:
        self._inference.labels(url, "", "", str(status)).inc()

    def retried(self, replica: str) -> None:
        self._retries.labels(replica).inc()

    def exposition(self) -> bytes:
        return generate_latest(self._registry)


class _BoardCollector(Collector):
    """Reads the board when it is asked: a second set of counters could disagree with it."""

    def __init__(self, board: Board) -> None:
        self._board = board

    def collect(self) -> Iterator[Metric]:
        labels = ["replica", "url"]
        in_flight = GaugeMetricFamily("fd_router_in_flight", "Requests in flight.", labels=labels)
        up = GaugeMetricFamily("fd_router_replica_up", "1 if the replica may be chosen.", labels=labels)
        picks = CounterMetricFamily("fd_router_picks", "Times the replica was chosen.", labels=labels)
        for row in self._board.status():
            values = [row.instance.name, row.instance.url]
            in_flight.add_metric(values, row.in_flight)
            up.add_metric(values, int(row.up))
            picks.add_metric(values, row.picks)
        yield from (in_flight, up, picks)
