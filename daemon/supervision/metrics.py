"""What the daemon tells Prometheus: what it has counted, and how the fleet was at the end of its last turn.

Its names begin with fd_dp_. The loop counts and publishes; whoever scrapes reads in a thread of his own, so
nothing of the fleet is looked at there, only what was published.
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

# Half of the lines would be times at which counters were made.
disable_created_metrics()
# Count in memory even if PROMETHEUS_MULTIPROC_DIR is set, as it often is for FastDeploy.
values.ValueClass = values.MutexValue

#: Loading takes seconds for a small model, many minutes for a large one.
_LOADING_SECONDS = (0.5, 1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 1200)
_DRAIN_SECONDS = (0.1, 0.5, 1, 2, 5, 10, 20, 30, 60, 120, 300, 600)
_RELOAD_RESULTS = ("done", "rolled_back", "refused")


class Metrics:
    """Counting and `publish` belong to the loop, `exposition` to any thread.

    `program` is a program's name: "router", "replica3".
    """

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
        for result in _RELOAD_RESULTS:
            self._reloads.labels(result)
        self._known: set[str] = set()
        self._fleet = _FleetCollector()
        self.registry.register(self._fleet)
        ProcessCollector(registry=self.registry)

    def ended(self, program: str, cause: str) -> None:
        """A program has ended, or was killed, though it should run; `cause` is a `Cause`."""
        self._restarts.labels(program, cause).inc()

    def ready(self, program: str, seconds: float) -> None:
        self._ready.labels(program).observe(seconds)

    def reloaded(self, result: str, seconds: float) -> None:
        """`result`: "done", "rolled_back" or "refused"."""
        self._reloads.labels(result).inc()
        self._reload_seconds.observe(seconds)

    def drained(self, program: str, seconds: float) -> None:
        self._drain.labels(program).observe(seconds)

    def publish(self, replicas: Iterable[SupervisedProgram]) -> None:
        """How the fleet is now, for whoever scrapes before the next turn."""
        programs = (_Seen(r.name, r.state, r.intent, r.draining, r.pid, r.next_try) for r in replicas)
        turn = _Turn(time.time(), tuple(programs))
        for name in {seen.program for seen in turn.programs} - self._known:
            self._begin_with_nothing(name)
        self._fleet.latest = turn

    def exposition(self) -> bytes:
        return generate_latest(self.registry)

    def _begin_with_nothing(self, program: str) -> None:
        """Of a counter that begins with 1, Prometheus sees no increase."""
        self._known.add(program)
        for cause in Cause:
            self._restarts.labels(program, cause)
        self._ready.labels(program)
        self._drain.labels(program)


@dataclass(frozen=True, slots=True)
class _Seen:
    """One program, as it was at the end of a turn."""

    program: str
    state: ProgramState
    intent: Intent
    draining: bool
    pid: int
    next_try: float


@dataclass(frozen=True, slots=True)
class _Turn:
    #: Unix time.
    at: float
    programs: tuple[_Seen, ...]


class _FleetCollector(Collector):
    def __init__(self) -> None:
        #: Replaced as a whole, so that it can be read without a lock.
        self.latest: _Turn | None = None

    def collect(self) -> Iterator[Metric]:
        build = GaugeMetricFamily("fd_dp_build_info", "Always 1.", labels=("version",))
        build.add_metric((__version__,), 1)
        yield build
        turn = self.latest
        if turn is None:
            return
        yield GaugeMetricFamily(
            "fd_dp_last_turn_timestamp_seconds",
            "When the loop last looked at everything; it does so at least once a second.",
            value=turn.at,
        )
        quarantined = sum(seen.state is ProgramState.QUARANTINED for seen in turn.programs)
        yield GaugeMetricFamily("fd_dp_quarantined", "Programs that failed too often.", value=quarantined)
        yield from _of_states(turn)
        yield from _of_usage(turn)


def _of_states(turn: _Turn) -> Iterator[Metric]:
    states = GaugeMetricFamily("fd_dp_state", "1 for the state that it is in.", labels=("program", "state"))
    intents = GaugeMetricFamily(
        "fd_dp_intent", "1 for what the operator wants of it.", labels=("program", "intent")
    )
    draining = GaugeMetricFamily(
        "fd_dp_draining", "1 if the operator lets it have nothing new.", labels=("program",)
    )
    next_try = GaugeMetricFamily(
        "fd_dp_next_try_seconds", "Until a failed program is tried again; else 0.", labels=("program",)
    )
    now = time.monotonic()
    for seen in turn.programs:
        for state in ProgramState:
            states.add_metric((seen.program, state), int(seen.state is state))
        for intent in Intent:
            intents.add_metric((seen.program, intent), int(seen.intent is intent))
        draining.add_metric((seen.program,), int(seen.draining))
        has_failed = seen.state in FAILED and math.isfinite(seen.next_try)
        next_try.add_metric((seen.program,), max(0.0, seen.next_try - now) if has_failed else 0.0)
    yield from (states, intents, draining, next_try)


def _of_usage(turn: _Turn) -> Iterator[Metric]:
    processes = GaugeMetricFamily("fd_dp_processes", "Processes of a program.", labels=("program",))
    memory = GaugeMetricFamily(
        "fd_dp_memory_bytes",
        "Resident memory of a program; `shared` (files, shared memory) counts in each process that uses it.",
        labels=("program", "kind"),
    )
    cpu = CounterMetricFamily(
        "fd_dp_cpu_seconds", "CPU time that a program has used since it was started.", labels=("program",)
    )
    for seen in turn.programs:
        usage = of_family(seen.pid) if seen.pid else Usage()
        processes.add_metric((seen.program,), usage.processes)
        memory.add_metric((seen.program, "private"), usage.private)
        memory.add_metric((seen.program, "shared"), usage.shared)
        cpu.add_metric((seen.program,), usage.cpu)
    yield from (processes, memory, cpu)
