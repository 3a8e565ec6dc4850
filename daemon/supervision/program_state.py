"""The life of one supervised program, as a table of arrows. Pure: who sees a fact calls `move`.

The router lives the same life as a replica; it only has a simpler probe.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from ..config.programs import Program
from ..diagnosis.exit_cause import Cause
from ..process.stacks import Dump
from .hang_detection import ProgressTracker
from .intents import Intent


class ProgramState(StrEnum):
    #: Not running, and not wanted: not its turn yet, or held by the operator.
    STOPPED = "STOPPED"
    #: Wanted; its turn to start has not come.
    WAITING = "WAITING"
    #: The process is up; it loads, or its first token is awaited.
    STARTING = "STARTING"
    #: It has generated a token, and it answers health checks.
    READY = "READY"
    #: The process is up and has been READY; it fails health checks.
    UNHEALTHY = "UNHEALTHY"
    #: It has been told to end and finishes what it has in hand.
    STOPPING = "STOPPING"
    #: It failed; it is tried again at `next_try`.
    BACKOFF = "BACKOFF"
    #: It failed too often and is tried again at `next_try`, much later; or it is paused.
    QUARANTINED = "QUARANTINED"


_S = ProgramState
#: States in which it waits to be tried again.
FAILED = frozenset({_S.BACKOFF, _S.QUARANTINED})
#: From -> to. Whatever is not here is a mistake in this program, and `move` says so.
ARROWS: dict[ProgramState, frozenset[ProgramState]] = {
    _S.STOPPED: frozenset({_S.WAITING, _S.STARTING}),  # wanted; found running by a new daemon
    _S.WAITING: frozenset({_S.STARTING, _S.STOPPED} | FAILED),  # its turn; held; its port is taken
    # WAITING: supervisord is gone; STOPPED: it failed while the operator held it.
    _S.STARTING: frozenset({_S.READY, _S.STOPPING, _S.WAITING, _S.STOPPED} | FAILED),
    _S.READY: frozenset({_S.UNHEALTHY, _S.STOPPING, _S.WAITING, _S.STOPPED} | FAILED),
    _S.UNHEALTHY: frozenset({_S.READY, _S.STOPPING, _S.WAITING, _S.STOPPED} | FAILED),
    _S.STOPPING: frozenset({_S.STOPPED, _S.WAITING} | FAILED),  # failed: it was stopped because it hung
    _S.BACKOFF: frozenset({_S.WAITING, _S.STOPPED}),
    _S.QUARANTINED: frozenset({_S.WAITING, _S.STOPPED}),
}
#: States in which a process exists.
ALIVE = frozenset({_S.STARTING, _S.READY, _S.UNHEALTHY, _S.STOPPING})


@dataclass(slots=True)
class SupervisedProgram:
    """What the daemon knows about one program. Times are of the monotonic clock unless they say otherwise."""

    program: Program
    state: ProgramState = ProgramState.STOPPED
    #: When it came into `state`.
    since: float = 0.0
    #: Why it came into `state`, for people.
    note: str = ""
    #: What the operator wants of it, and whether the router is to give it nothing new.
    intent: Intent = Intent.RUN
    draining: bool = False
    pid: int = 0
    #: Unix time at which its process started.
    started: float = 0.0
    #: How often the daemon has started it again.
    restarts: int = 0
    next_try: float = 0.0
    #: QUARANTINED because too many replicas failed; it starts again when the machine is calm.
    paused: bool = False
    #: When a health check was last good (or the process was started).
    last_good: float = 0.0
    #: The last words of its health check: progress, stage, worker.
    health: dict[str, Any] = field(default_factory=dict)
    #: Whether it gets on with its work.
    watch: ProgressTracker = field(default_factory=ProgressTracker)
    #: It was started by another daemon, and when it became READY then nobody knows.
    adopted: bool = False
    #: How it ended last, for `fdctl why`, and the reason in a word; None if it never ended by itself.
    last_exit: str = ""
    last_exit_time: float = 0.0
    cause: Cause | None = None
    #: Why it is being stopped, if that counts as a failure; and what it is given time for until it is killed.
    failing: str = ""
    dump: Dump | None = None

    @property
    def name(self) -> str:
        return self.program.name

    @property
    def label(self) -> str:
        return self.program.label

    @property
    def alive(self) -> bool:
        return self.state in ALIVE

    @property
    def left_down(self) -> bool:
        """Nobody starts it: the operator has stopped it, or it has ended while it was held."""
        ended = self.intent is Intent.HELD and self.state is ProgramState.STOPPED
        return ended or self.intent is Intent.STOPPED

    def move(self, to: ProgramState, note: str, now: float) -> None:
        assert to in ARROWS[self.state], f"{self.label}: {self.state} -> {to} ({note})"
        self.state, self.note, self.since, self.paused = to, note, now, False
        if to not in ALIVE:
            self.pid, self.started = 0, 0.0
            self.health = {}
            self.watch = ProgressTracker()
            self.adopted = False
            self.failing, self.dump = "", None
