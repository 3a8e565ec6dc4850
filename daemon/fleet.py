"""All programs and their states: the one place that decides what is started, stopped and tried again.

`step` looks at what is (supervisord's processes, the probes' readings), moves the replicas along their
arrows, and acts on where they stand. Whoever wants something else to happen (`want`, `stop`) only moves a
replica; the next step does it. So a step that supervisord's death interrupts can be run again.
"""

from __future__ import annotations

import logging
import os
import random
import time
from collections.abc import Callable, Collection, Iterable

from ..errors import FastDeployError
from ..ports import require_free
from . import processes, supervisor
from .adoption import Holds, running_programs
from .config import Config
from .metrics import Metrics
from .probes import Probes, Reading
from .programs import ROUTER, Program
from .replica import Replica, State
from .restart import Restarts
from .supervisor import Process, Supervisor, SupervisorLost

log = logging.getLogger("fd-dp")

HELD = "held by the operator"
#: Replicas wait so long for the router's first answer; it needs a second or two.
_ROUTER_HEAD_START = 10.0
_LOADING_PROBE_INTERVAL = 0.25
#: The router's readings say how many requests each replica has in flight: an operator looks at them.
_ROUTER_PROBE_INTERVAL = 1.0
#: A step that comes this late means that the daemon itself was stopped; nobody else is to blame for the time.
_OVERSLEPT = 5.0


class Fleet:
    """Owner of every `Replica`, the router's included.

    Args:
        watch: told each new pid; must call `gone` when that process has ended.
    """

    def __init__(
        self,
        config: Config,
        programs: Iterable[Program],
        client: Supervisor,
        probes: Probes,
        *,
        watch: Callable[[int], None],
        clock: Callable[[], float] = time.monotonic,
        dice: Callable[[], float] = random.random,
    ) -> None:
        self.config = config
        self.layout = client.layout
        self.metrics = Metrics()
        self.supervisor = client
        self.wanted = list(programs)
        self.replicas: dict[str, Replica] = {}
        #: `adopt` is through: what is in `replicas` is all there is.
        self.adopted = False
        self.stopping = False
        self._holds = Holds(config.paths.state)
        self._restarts: dict[str, Restarts] = {}
        self._watch = watch
        self._clock = clock
        self._dice = dice
        self._probes = probes
        self._asked: dict[str, float] = {}
        self._gone: set[int] = set()
        self._processes: dict[str, Process] = {}
        self._last_step = clock()

    def adopt(self) -> list[str]:
        """Takes over what supervisord runs; returns the names of programs that run an older configuration.

        What runs the wanted configuration goes on undisturbed. What runs an older one goes on as well, for a
        rollout to replace it. If it raises, it can be called again.
        """
        self.replicas = {}
        wanted = {program.name: program for program in self.wanted}
        running = running_programs(self.supervisor, self.wanted)
        held = self._holds.read()
        now = self._clock()
        for name in wanted.keys() | running.keys():
            replica = self._enlist(running[name][1] if name in running else wanted[name])
            if name in held:
                replica.held, replica.note = True, HELD
            if name in running:
                process = running[name][0]
                replica.pid, replica.started, replica.last_good = process.pid, process.started, now
                replica.move(State.STARTING, "adopted", now)
                self._watch(process.pid)
                log.info("%s: adopted pid %d", replica.label, process.pid)
                if replica.held:
                    # The last daemon was killed between the operator's wish and its fulfilment.
                    self.stop(replica, HELD)
        self._bring_up_to_date(leave=running.keys())
        for replica in self.replicas.values():
            if not replica.alive and not replica.held:
                self.want(replica, "start")
        self.adopted = True
        return [n for n, (_, program) in running.items() if n not in wanted or program.hash != wanted[n].hash]

    def want(self, replica: Replica, why: str) -> None:
        """It shall run, when its turn comes."""
        if replica.state in (State.STOPPED, State.BACKOFF, State.QUARANTINED):
            replica.move(State.WAITING, why, self._clock())

    def stop(self, replica: Replica, why: str) -> None:
        """It shall end. supervisord kills what is left after the stop timeout."""
        if replica.alive:
            if replica.state is not State.STOPPING:
                replica.move(State.STOPPING, why, self._clock())
            replica.failing = ""
        elif replica.state is not State.STOPPED:
            replica.move(State.STOPPED, why, self._clock())

    def hold(self, replica: Replica, held: bool) -> None:
        """The operator's wish, kept over restarts of the daemon. Raises OSError; then nothing is changed."""
        if replica.held != held:
            others = {name for name, other in self.replicas.items() if other.held and other is not replica}
            self._holds.write(others | {replica.name} if held else others)
            replica.held = held

    def put(self, name: str, program: Program | None) -> None:
        """Gives a replica that is down another program, or none.

        Raises SupervisorError, or OSError if the files cannot be written, and then nothing is changed.
        """
        known = self.replicas.get(name)
        assert known is None or not known.alive, name
        others = [replica.program for replica in self.replicas.values() if replica is not known]
        supervisor.write(self.layout, others if program is None else [*others, program])
        if program is None:
            self.replicas.pop(name, None)
            self._restarts.pop(name, None)
        else:
            self._enlist(program)
        self.supervisor.replace(name, add=program is not None)

    def write(self) -> None:
        """supervisord's files always say what runs now, not what a rollout has still to reach."""
        supervisor.write(self.layout, [replica.program for replica in self.replicas.values()])

    def configure(self, config: Config, programs: Iterable[Program]) -> None:
        """What is wanted from now on; the running programs change only by `put`."""
        self.config = config
        self.wanted = list(programs)
        for restarts in self._restarts.values():
            restarts.policy = config.supervise

    def begin_again(self) -> None:
        """A new supervisord answers; the old one is dead and so is everything that it had started."""
        now = self._clock()
        for replica in self.replicas.values():
            if replica.state is State.STOPPING and not replica.failing:
                replica.move(State.STOPPED, "supervisord ended", now)
            elif replica.alive:
                replica.last_exit, replica.last_exit_time = "ended with supervisord", time.time()
                replica.restarts += 1
                replica.move(State.WAITING, "supervisord ended", now)
        self._gone.clear()
        self._bring_up_to_date(leave=frozenset())

    def gone(self, pid: int) -> None:
        """The kernel says that this process has ended; supervisord will know within a second."""
        self._gone.add(pid)

    def in_flight(self, replica: Replica) -> int | None:
        """Requests that the router has given it, about a second ago; None if the router does not know it."""
        router = self.replicas.get(ROUTER)
        return router.health.get("in_flight", {}).get(replica.program.replica) if router else None

    def all_registered(self) -> bool:
        """The router knows every READY replica: their heartbeats come a few seconds apart."""
        ready = (
            r for r in self.replicas.values() if r.state is State.READY and r.program.replica is not None
        )
        return all(self.in_flight(replica) is not None for replica in ready)

    def step(self) -> None:
        """Raises SupervisorLost if supervisord does not answer."""
        now = self._clock()
        self._forgive(now)
        self._processes = self.supervisor.processes()
        for replica in self.replicas.values():
            self._observe(replica, self._processes.get(replica.name), now)
        for reading in self._probes.take():
            self._read(reading, now)
        for replica in self.replicas.values():
            self._check_deadlines(replica, now)
        self._start_those_whose_turn_it_is(now)
        self._ask(now)

    def interval(self) -> float:
        """How long the next step may wait, if nothing wakes the loop."""
        if self._gone & {replica.pid for replica in self.replicas.values()}:
            return 0.05
        states = {replica.state for replica in self.replicas.values()}
        if State.STOPPING in states:
            return 0.1
        return 0.25 if states & {State.WAITING, State.STARTING} else 1.0

    def _forgive(self, now: float) -> None:
        slept = now - self._last_step
        self._last_step = now
        if slept > _OVERSLEPT:
            for replica in self.replicas.values():
                replica.last_good += slept
                replica.since += slept

    def _observe(self, replica: Replica, process: Process | None, now: float) -> None:
        if process is None or process.state in supervisor.DOWN:
            if replica.alive:
                self._ended(replica, now)
        else:
            if not replica.alive:
                # Started behind our back, or by a call whose answer was lost: one decider, so it ends.
                if process.state in supervisor.UP:
                    log.warning(
                        "%s: pid %d runs though it should not; stopping it", replica.label, process.pid
                    )
                    self.supervisor.stop(replica.name)
                return
            if process.pid != replica.pid:
                replica.pid, replica.started = process.pid, process.started
                self._watch(process.pid)
                log.info("%s: started, pid %d", replica.label, process.pid)
            if replica.state is State.STOPPING and process.state in supervisor.UP and not replica.failing:
                self.supervisor.stop(replica.name)

    def _ended(self, replica: Replica, now: float) -> None:
        how = self.supervisor.how_it_ended(replica.name)
        self._gone.discard(replica.pid)
        replica.last_exit, replica.last_exit_time = how, time.time()
        if replica.state is State.STOPPING and not replica.failing:
            log.info("%s: stopped (%s)", replica.label, how)
            replica.move(State.STOPPED, replica.note, now)
            return
        reason = f"{replica.failing}; {how}" if replica.failing else how
        replica.last_exit = reason
        line = supervisor.last_error(self.layout.output(replica.name), replica.started)
        said = f"; its last error: {line}" if line else ""
        self._failed(replica, f"pid {replica.pid or '?'}: {reason}{said}", now)

    def _failed(self, replica: Replica, what: str, now: float) -> None:
        if self.stopping:
            replica.move(State.STOPPED if replica.state is State.STOPPING else State.BACKOFF, what, now)
            replica.next_try = float("inf")
            return
        decision = self._restarts[replica.name].failed(now)
        replica.move(State.QUARANTINED if decision.quarantined else State.BACKOFF, what, now)
        replica.next_try = now + decision.delay
        kind = "QUARANTINED, " if decision.quarantined else ""
        log.error("%s: ERROR (%s); %snext try in %.1f s", replica.label, what, kind, decision.delay)

    def _read(self, reading: Reading, now: float) -> None:
        replica = self.replicas.get(reading.name)
        if (
            replica is None
            or replica.pid != reading.pid
            or replica.state is State.STOPPING
            or not replica.alive
        ):
            return
        if reading.answered:
            replica.health = reading.health
        if not reading.ok:
            # A port that refuses is a program that is still starting: nothing that its note must say.
            if reading.answered or replica.state is not State.STARTING:
                replica.note = reading.problem
            return
        replica.last_good = now
        if replica.state is State.STARTING:
            log.info("%s: READY after %.1f s, pid %d", replica.label, now - replica.since, replica.pid)
            replica.move(State.READY, "", now)
        elif replica.state is State.UNHEALTHY:
            log.info("%s: READY again", replica.label)
            replica.move(State.READY, "", now)
        replica.note = ""

    def _check_deadlines(self, replica: Replica, now: float) -> None:
        supervise = self.config.supervise
        state, age = replica.state, now - replica.since
        if state is State.STARTING and age > supervise.startup_timeout:
            self._kill(replica, f"not READY within {supervise.startup_timeout:g} s: {replica.note}", now)
        elif state is State.READY and now - replica.last_good > supervise.stall_after:
            note = replica.note or "no answer to health checks"
            log.warning("%s: UNHEALTHY (%s)", replica.label, note)
            replica.move(State.UNHEALTHY, note, now)
        elif state is State.UNHEALTHY and now - replica.last_good > supervise.stall_kill:
            self._kill(replica, f"no good health check for {supervise.stall_kill:g} s: {replica.note}", now)
        elif state is State.READY and age > supervise.stable_after:
            self._restarts[replica.name].stable()
        elif state in (State.BACKOFF, State.QUARANTINED) and now >= replica.next_try:
            replica.restarts += 1
            replica.move(State.WAITING, f"try again after: {replica.note}", now)

    def _kill(self, replica: Replica, why: str, now: float) -> None:
        """A hang is not asked to finish what it has in hand."""
        log.error("%s: ERROR (%s); killing pid %d", replica.label, why, replica.pid)
        replica.move(State.STOPPING, why, now)
        replica.failing = why
        processes.kill_marked(self.layout.run, replica.name)

    def _start_those_whose_turn_it_is(self, now: float) -> None:
        if self.stopping:
            return
        supervise = self.config.supervise
        router = self.replicas.get(ROUTER)
        if router is not None:
            if router.state is State.WAITING:
                self._start(router, now)
            if router.state is State.STARTING and now - router.since < _ROUTER_HEAD_START:
                return
        loading = [
            replica
            for replica in self.replicas.values()
            if replica.state is State.STARTING
            and replica.name != ROUTER
            and now - replica.since < supervise.start_slot
        ]
        free = (supervise.parallel_starts or os.cpu_count() or 1) - len(loading)
        waiting = [r for r in self.replicas.values() if r.state is State.WAITING and r.name != ROUTER]
        for replica in waiting[: max(0, free)]:
            self._start(replica, now)

    def _start(self, replica: Replica, now: float) -> None:
        # Its worker may outlive its API process by a moment, and would hold ports and memory.
        if processes.kill_marked(self.layout.run, replica.name):
            return
        process = self._processes.get(replica.name)
        if process is not None and process.state not in supervisor.DOWN:
            return
        program = replica.program
        try:
            for port in program.ports:
                require_free(program.host, port, "dp.toml")
            self.supervisor.start(program.name)
        except SupervisorLost:
            raise
        except FastDeployError as error:
            self._failed(replica, str(error), now)
            return
        replica.last_good = now
        replica.move(State.STARTING, "loading", now)

    def _ask(self, now: float) -> None:
        for replica in self.replicas.values():
            if replica.state not in (State.STARTING, State.READY, State.UNHEALTHY) or not replica.pid:
                continue
            starting = replica.state is State.STARTING
            hurry = starting or (replica.name == ROUTER and not self.all_registered())
            interval = self.config.supervise.probe_interval
            if hurry:
                interval = _LOADING_PROBE_INTERVAL
            elif replica.name == ROUTER:
                interval = min(interval, _ROUTER_PROBE_INTERVAL)
            if now - self._asked.get(replica.name, 0.0) >= interval:
                self._asked[replica.name] = now
                self._probes.ask(replica.program, replica.pid, token=starting)

    def _bring_up_to_date(self, leave: Collection[str]) -> None:
        """supervisord may have started with files that somebody else wrote, or that are older than ours."""
        self.write()
        for name in self.supervisor.processes().keys() | self.replicas.keys():
            if name not in leave:
                self.supervisor.replace(name, add=name in self.replicas)

    def _enlist(self, program: Program) -> Replica:
        replica = self.replicas.get(program.name)
        if replica is None:
            replica = self.replicas[program.name] = Replica(program, since=self._clock())
            # Told to people in this order, and started in it.
            order = sorted(
                self.replicas.values(), key=lambda r: -1 if r.program.replica is None else r.program.replica
            )
            self.replicas = {r.name: r for r in order}
        replica.program = program
        self._restarts[program.name] = Restarts(self.config.supervise, self._dice)
        return replica
