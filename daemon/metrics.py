"""What the daemon has counted, for Prometheus. Its names begin with fd_dp_."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Histogram

#: Loading takes seconds for a small model, many minutes for a large one.
_LOADING_SECONDS = (0.5, 1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 1200)
_DRAIN_SECONDS = (0.1, 0.5, 1, 2, 5, 10, 20, 30, 60, 120, 300, 600)


class Metrics:
    """Counters of the daemon's own. `program` is a program's name: "router", "replica3"."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._restarts = Counter(
            "fd_dp_restarts", "Ends that nobody wanted.", ("program", "cause"), registry=self.registry
        )
        self._ready = Histogram(
            "fd_dp_ready_seconds",
            "From a start to READY.",
            ("program",),
            buckets=_LOADING_SECONDS,
            registry=self.registry,
        )
        self._reloads = Counter(
            "fd_dp_reloads", "Reloads that have ended.", ("result",), registry=self.registry
        )
        self._reload_seconds = Histogram(
            "fd_dp_reload_seconds", "Time of a reload.", buckets=_LOADING_SECONDS, registry=self.registry
        )
        self._drain = Histogram(
            "fd_dp_drain_seconds",
            "From the order to drain to the last request's end, or to the end of patience.",
            ("program",),
            buckets=_DRAIN_SECONDS,
            registry=self.registry,
        )

    def ended(self, program: str, cause: str) -> None:
        """A program has ended, or was killed, though it should run; `cause` is one of a fixed few."""
        self._restarts.labels(program, cause).inc()

    def ready(self, program: str, seconds: float) -> None:
        self._ready.labels(program).observe(seconds)

    def reloaded(self, result: str, seconds: float) -> None:
        """`result`: "done", "rolled_back" or "refused"."""
        self._reloads.labels(result).inc()
        self._reload_seconds.observe(seconds)

    def drained(self, program: str, seconds: float) -> None:
        self._drain.labels(program).observe(seconds)
