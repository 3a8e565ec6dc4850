"""Prometheus metrics of the daemon, with the prefix fd_dp_: counters, and the fleet after the last step.

The loop counts and publishes. A scrape runs in another thread, so it reads only what was published.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
    values,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from ... import __version__
from ..diagnosis.exit_cause import Cause
from ..process.usage import Usage, of_family
from .intents import Intent
from .program_state import FAILED, ProgramState, SupervisedProgram

# The creation times of counters would double the number of lines.
disable_created_metrics()
# Count in memory even if PROMETHEUS_MULTIPROC_DIR is set, as it often is for FastDeploy.
values.ValueClass = values.MutexValue

#: A small model loads in seconds, a large one in many minutes.
_LOADING_SECONDS = (0.5, 1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 1200)
_DRAIN_SECONDS = (0.1, 0.5, 1, 2, 5, 10, 20, 30, 60, 120, 300, 600)
_RELOAD_RESULTS = ("done", "rolled_back", "refused")


class Metrics:
    """The metrics. Counting and `publish` are for the loop; `exposition` is thread-safe.

    The label `program` is a program's name: "router", "replica3".
    """

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._restarts = Counter(
            "fd_dp_restarts", "Unexpected exits.", ("program", "cause"), registry=self.registry
        )
        self._ready = Histogram(
            "fd_dp_ready_seconds",
            "Time from a start to READY.",
            ("program",),
            buckets=_LOADING_SECONDS,
            registry=self.registry,
        )
        self._reloads = Counter("fd_dp_reloads", "Finished reloads.", ("result",), registry=self.registry)
        self._reload_seconds = Histogram(
            "fd_dp_reload_seconds", "Duration of reloads.", buckets=_LOADING_SECONDS, registry=self.registry
        )
        self._drain = Histogram(
            "fd_dp_drain_seconds",
            "Time from the start of a drain to the end of the last request, or to the drain timeout.",
            ("program",),
            buckets=_DRAIN_SECONDS,
            registry=self.registry,
        )
        for result in _RELOAD_RESULTS:
            self._reloads.labels(result)
        self._known: set[str] = set()
        self._fleet = _FleetCollector()
        self.registry.register(self._fleet)
        ProcessCollector(registry=self.registry)

    def ended(self, program: str, cause: str) -> None:
        """Count an exit or a kill of a program that should run; `cause` is a `Cause`."""
        self._restarts.labels(program, cause).inc()

    def ready(self, program: str, seconds: float) -> None:
        self._ready.labels(program).observe(seconds)

    def reloaded(self, result: str, seconds: float) -> None:
        """Count a reload; `result` is "done", "rolled_back" or "refused"."""
        self._reloads.labels(result).inc()
        self._reload_seconds.observe(seconds)

    def drained(self, program: str, seconds: float) -> None:
        self._drain.labels(program).observe(seconds)

    def publish(self, programs: Iterable[SupervisedProgram]) -> None:
        """Publish the state of the fleet for the scrapes until the next step."""
        samples = (_Sample(p.name, p.state, p.intent, p.draining, p.pid, p.next_try) for p in programs)
        snapshot = _Snapshot(time.time(), tuple(samples))
        for name in {sample.name for sample in snapshot.programs} - self._known:
            self._add_zeros(name)
        self._fleet.latest = snapshot

    def exposition(self) -> bytes:
        return generate_latest(self.registry)

    def _add_zeros(self, program: str) -> None:
        """Add all series with value 0: Prometheus sees no increase if a counter begins with 1."""
        self._known.add(program)
        for cause in Cause:
            self._restarts.labels(program, cause)
        self._ready.labels(program)
        self._drain.labels(program)


@dataclass(frozen=True, slots=True)
class _Sample:
    """State of one program after a step."""

    name: str
    state: ProgramState
    intent: Intent
    draining: bool
    pid: int
    next_try: float


@dataclass(frozen=True, slots=True)
class _Snapshot:
    """State of the fleet after a step."""

    #: Unix time.
    at: float
    programs: tuple[_Sample, ...]


class _FleetCollector(Collector):
    def __init__(self) -> None:
        #: Immutable and replaced as a whole, so that no lock is needed.
        self.latest: _Snapshot | None = None

    def collect(self) -> Iterator[Metric]:
        build = GaugeMetricFamily("fd_dp_build_info", "Always 1.", labels=("version",))
        build.add_metric((__version__,), 1)
        yield build
        snapshot = self.latest
        if snapshot is None:
            return
        yield GaugeMetricFamily(
            "fd_dp_last_turn_timestamp_seconds",
            "Unix time of the last turn of the daemon's loop, which turns at least once a second.",
            value=snapshot.at,
        )
        quarantined = sum(sample.state is ProgramState.QUARANTINED for sample in snapshot.programs)
        yield GaugeMetricFamily("fd_dp_quarantined", "Number of quarantined programs.", value=quarantined)
        yield from _state_metrics(snapshot)
        yield from _usage_metrics(snapshot)


def _state_metrics(snapshot: _Snapshot) -> Iterator[Metric]:
    states = GaugeMetricFamily("fd_dp_state", "1 for the current state, else 0.", labels=("program", "state"))
    intents = GaugeMetricFamily(
        "fd_dp_intent", "1 for the state that the operator wants, else 0.", labels=("program", "intent")
    )
    draining = GaugeMetricFamily(
        "fd_dp_draining", "1 if the operator drains the program, else 0.", labels=("program",)
    )
    next_try = GaugeMetricFamily(
        "fd_dp_next_try_seconds",
        "Time until a failed program is started again; 0 if it has not failed.",
        labels=("program",),
    )
    now = time.monotonic()
    for sample in snapshot.programs:
        for state in ProgramState:
            states.add_metric((sample.name, state), int(sample.state is state))
        for intent in Intent:
            intents.add_metric((sample.name, intent), int(sample.intent is intent))
        draining.add_metric((sample.name,), int(sample.draining))
        has_failed = sample.state in FAILED and math.isfinite(sample.next_try)
        next_try.add_metric((sample.name,), max(0.0, sample.next_try - now) if has_failed else 0.0)
    yield from (states, intents, draining, next_try)


def _usage_metrics(snapshot: _Snapshot) -> Iterator[Metric]:
    processes = GaugeMetricFamily("fd_dp_processes", "Number of processes of a program.", labels=("program",))
    memory = GaugeMetricFamily(
        "fd_dp_memory_bytes",
        "Resident memory of a program; `shared` (files, shared memory) counts once per process that uses it.",
        labels=("program", "kind"),
    )
    cpu = CounterMetricFamily(
        "fd_dp_cpu_seconds", "CPU time of a program since its start.", labels=("program",)
    )
    for sample in snapshot.programs:
        usage = of_family(sample.pid) if sample.pid else Usage()
        processes.add_metric((sample.name,), usage.processes)
        memory.add_metric((sample.name, "private"), usage.private)
        memory.add_metric((sample.name, "shared"), usage.shared)
        cpu.add_metric((sample.name,), usage.cpu)
    yield from (processes, memory, cpu)
