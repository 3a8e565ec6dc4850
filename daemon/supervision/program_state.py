"""State machine of one supervised program.

Replicas and the router have the same states; the router only has a simpler probe. All changes go through the
methods of `SupervisedProgram`, which do no I/O.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from ..config.programs import ROUTER, Program
from ..diagnosis.exit_cause import Cause
from ..process.stacks import Dump
from .hang_detection import ProgressTracker, WorkerProgress
from .intents import Intent


class ProgramState(StrEnum):
    #: Not running and not to be started: stopped by the operator, or waiting for a step of a reload.
    STOPPED = "STOPPED"
    #: In the start queue.
    WAITING = "WAITING"
    #: The process runs and loads, or has not generated its first token.
    STARTING = "STARTING"
    #: It has generated a token, and its health checks succeed.
    READY = "READY"
    #: The process runs and has been READY; its health checks fail.
    UNHEALTHY = "UNHEALTHY"
    #: Stop requested; it finishes its requests. Or it is being killed.
    STOPPING = "STOPPING"
    #: It failed and is retried at `next_try`.
    BACKOFF = "BACKOFF"
    #: It failed too often and is retried at `next_try`, much later; or it is paused.
    QUARANTINED = "QUARANTINED"


_S = ProgramState
#: States of a program that waits for its next try.
FAILED = frozenset({_S.BACKOFF, _S.QUARANTINED})
#: Allowed transitions. Any other is a programming error.
TRANSITIONS: dict[ProgramState, frozenset[ProgramState]] = {
    _S.STOPPED: frozenset({_S.WAITING, _S.STARTING}),  # start requested; found running by a new daemon
    _S.WAITING: frozenset({_S.STARTING, _S.STOPPED} | FAILED),  # started; stopped; its port is taken
    # WAITING: supervisord was restarted; STOPPED: the program failed while the operator held it.
    _S.STARTING: frozenset({_S.READY, _S.STOPPING, _S.WAITING, _S.STOPPED} | FAILED),
    _S.READY: frozenset({_S.UNHEALTHY, _S.STOPPING, _S.WAITING, _S.STOPPED} | FAILED),
    _S.UNHEALTHY: frozenset({_S.READY, _S.STOPPING, _S.WAITING, _S.STOPPED} | FAILED),
    _S.STOPPING: frozenset({_S.STOPPED, _S.WAITING} | FAILED),  # FAILED: it was killed because it hung
    _S.BACKOFF: frozenset({_S.WAITING, _S.STOPPED}),
    _S.QUARANTINED: frozenset({_S.WAITING, _S.STOPPED}),
}
#: States in which a process exists.
ALIVE = frozenset({_S.STARTING, _S.READY, _S.UNHEALTHY, _S.STOPPING})


@dataclass(frozen=True, slots=True)
class Retry:
    """When and why a failed program is tried again."""

    #: On the monotonic clock.
    at: float
    quarantined: bool = False
    #: Quarantined because too many replicas of this machine failed.
    paused: bool = False
    #: Reason of the quarantine, for people.
    why: str = ""


@dataclass(slots=True)
class SupervisedProgram:
    """One program and its state. Times are on the monotonic clock unless stated otherwise."""

    #: Command line, environment and files for its start.
    spec: Program
    state: ProgramState = ProgramState.STOPPED
    #: Time of the last transition.
    since: float = 0.0
    #: Reason of the state, for people.
    note: str = ""
    #: State that the operator has requested.
    intent: Intent = Intent.RUN
    #: True if the router must not send new requests.
    draining: bool = False
    pid: int = 0
    #: Start time of the process, Unix time.
    started: float = 0.0
    #: Number of restarts by the daemon.
    restarts: int = 0
    next_try: float = 0.0
    #: QUARANTINED because too many replicas failed. It starts again when the machine is calm.
    paused: bool = False
    #: Time of the last successful health check, or of the start.
    last_good: float = 0.0
    #: Body of the last response to GET /health.
    health: dict[str, Any] = field(default_factory=dict)
    progress: ProgressTracker = field(default_factory=ProgressTracker)
    #: Started by a previous daemon, so the time to READY is unknown.
    adopted: bool = False
    #: Last exit for `fdctl why`, its Unix time and its cause; None before the first failure.
    last_exit: str = ""
    last_exit_time: float = 0.0
    cause: Cause | None = None
    #: Reason of a kill by the daemon, which counts as a failure; and the stack dump that comes before it.
    kill_reason: str = ""
    dump: Dump | None = None

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def label(self) -> str:
        return self.spec.label

    @property
    def is_router(self) -> bool:
        return self.spec.name == ROUTER

    @property
    def port(self) -> int:
        """Port of the API."""
        return self.spec.ports[0]

    @property
    def alive(self) -> bool:
        return self.state in ALIVE

    @property
    def left_down(self) -> bool:
        """True if the daemon does not start it: the operator stopped it, or it ended while held."""
        ended = self.intent is Intent.HELD and self.state is ProgramState.STOPPED
        return ended or self.intent is Intent.STOPPED

    def move(self, to: ProgramState, note: str, now: float) -> None:
        assert to in TRANSITIONS[self.state], f"{self.label}: {self.state} -> {to} ({note})"
        self.state, self.note, self.since, self.paused = to, note, now, False
        if to not in ALIVE:
            self.pid, self.started = 0, 0.0
            self.health = {}
            self.progress = ProgressTracker()
            self.adopted = False
            self.kill_reason, self.dump = "", None

    def set_note(self, note: str) -> None:
        self.note = note

    def set_spec(self, spec: Program) -> None:
        self.spec = spec

    def set_desired(self, intent: Intent, draining: bool) -> None:
        self.intent, self.draining = intent, draining

    def adopt(self, pid: int, started: float, now: float) -> None:
        """Take over a process that a previous daemon started."""
        self.move(ProgramState.STARTING, "adopted", now)
        self.pid, self.started, self.last_good = pid, started, now
        self.adopted = True

    def starting(self, now: float) -> None:
        self.last_good = now
        self.move(ProgramState.STARTING, "loading", now)

    def has_process(self, pid: int, started: float) -> None:
        self.pid, self.started = pid, started

    def stop(self, why: str, now: float) -> None:
        """Begin to stop a running program. A kill under way no longer counts as a failure."""
        if self.state is not ProgramState.STOPPING:
            self.move(ProgramState.STOPPING, why, now)
        self.kill_reason = ""

    def killing(self, why: str, cause: Cause, dump: Dump | None, now: float) -> None:
        """Begin to kill a running program; `dump` delays the kill until its stacks are written."""
        self.move(ProgramState.STOPPING, why, now)
        self.kill_reason, self.cause, self.dump = why, cause, dump

    def exited(self, how: str) -> None:
        """Record how its process ended."""
        self.last_exit, self.last_exit_time = how, time.time()

    def failed(self, cause: Cause, note: str, retry: Retry | None, now: float) -> None:
        """Record a failure; without `retry` the program stays down."""
        self.cause = cause
        if retry is None:
            self.move(ProgramState.STOPPED, note, now)
            return
        self.move(ProgramState.QUARANTINED if retry.quarantined else ProgramState.BACKOFF, note, now)
        self.next_try, self.paused = retry.at, retry.paused

    def abandon(self, note: str, now: float) -> None:
        """Record an exit while the daemon ends; there is no next try."""
        is_stopped = self.state is ProgramState.STOPPING
        self.move(ProgramState.STOPPED if is_stopped else ProgramState.BACKOFF, note, now)
        self.next_try = float("inf")

    def retry(self, why: str, now: float) -> None:
        """Put it into the start queue again."""
        self.restarts += 1
        self.move(ProgramState.WAITING, why, now)

    def lost_with_supervisord(self, why: str, now: float) -> None:
        """Record that its process ended with supervisord. It restarts unless the operator holds it."""
        self.exited("ended with supervisord")
        self.cause = Cause.SUPERVISORD
        if self.intent is Intent.HELD:
            self.move(ProgramState.STOPPED, why, now)
        else:
            self.retry(why, now)

    def postpone_retry(self, at: float) -> None:
        self.next_try = at

    def health_reported(self, health: dict[str, Any], now: float) -> None:
        self.health = health
        self.progress.update(WorkerProgress.of(health), now)

    def probe_ok(self, now: float) -> None:
        self.last_good = now

    def compensate(self, seconds: float) -> None:
        """Ignore a time in which the daemon itself was suspended."""
        self.last_good += seconds
        self.since += seconds
        self.progress.compensate(seconds)
