"""All programs and their states: the one place that decides what is started, stopped and tried again.

`step` looks at what is (supervisord's processes, the probes' readings), moves the replicas along their
arrows, and acts on where they stand. Whoever wants something else to happen (`want`, `stop`) only moves a
replica; the next step does it. So a step that supervisord's death interrupts can be run again.
"""

from __future__ import annotations

import logging
import math
import os
import random
import time
from collections.abc import Callable, Collection, Iterable

from ...common.errors import FastDeployError
from ...common.ports import require_free
from ...expert_parallel.snapshot import Snapshot, read_snapshot
from ..config.loader import Config
from ..config.programs import ROUTER, Program, admin_socket
from ..diagnosis import exit_cause
from ..diagnosis.exit_cause import Cause, End
from ..diagnosis.exit_diagnosis import ExitDiagnosis
from ..process import proc, supervisor_client
from ..process.restart_policy import HostFailureBudget, Restarts
from ..process.supervisor_client import Process, Supervisor, SupervisorLost
from .adoption import running_programs
from .health import Health
from .intents import Intent, Intents, Wish
from .metrics import Metrics
from .probes import Probes
from .program_state import FAILED, ProgramState, SupervisedProgram
from .router_client import Row
from .router_sync import RouterSnapshot, RouterSync

log = logging.getLogger("fd-dp")

#: Notes of replicas that nobody starts.
STOPPED = "stopped by the operator"
HELD = "held by the operator"
#: Replicas wait so long for the router's first answer; it needs a second or two.
_ROUTER_HEAD_START = 10.0
#: The router says how many requests each replica has in flight: an operator looks at it, an operation waits.
_ROUTER_INTERVAL, _REGISTRATION_INTERVAL, _WAITED_FOR_INTERVAL = 1.0, 0.25, 0.1
#: A step that comes this late means that the daemon itself was stopped; nobody else is to blame for the time.
_OVERSLEPT = 5.0


class Fleet:
    """Owner of every `SupervisedProgram`, the router's included.

    Args:
        watch: told each new pid; must call `gone` when that process has ended.
        look: at an expert-parallel group.
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
        look: Callable[[str], Snapshot | None] = read_snapshot,
    ) -> None:
        self.config = config
        self.layout = client.layout
        self.metrics = Metrics()
        self.supervisor = client
        self.wanted = list(programs)
        self.replicas: dict[str, SupervisedProgram] = {}
        #: `adopt` is through: what is in `replicas` is all there is.
        self.adopted = False
        self.stopping = False
        self.intents = Intents(config.paths.state)
        #: Names of replicas that the router gives nothing new because of an operation that is under way.
        self.set_aside: set[str] = set()
        self._link = RouterSync(admin_socket(config.paths.run))
        self._restarts: dict[str, Restarts] = {}
        self._box = HostFailureBudget(config.supervise)
        self._inquest = ExitDiagnosis(client.layout)
        self._health = Health(client.layout, probes, self.metrics, look)
        self._watch = watch
        self._clock = clock
        self._dice = dice
        self._gone: set[int] = set()
        #: By replica and what failed: the fault that was logged last.
        self._faults: dict[tuple[str, str], str] = {}
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
        now = self._clock()
        for name in wanted.keys() | running.keys():
            replica = self._enlist(running[name][1] if name in running else wanted[name])
            if name in running:
                process = running[name][0]
                replica.pid, replica.last_good = process.pid, now
                replica.started = proc.started_at(process.pid) or process.started
                replica.move(ProgramState.STARTING, "adopted", now)
                replica.adopted = True
                self._watch(process.pid)
                log.info("%s: adopted pid %d", replica.label, process.pid)
                if replica.intent is Intent.STOPPED:
                    # The last daemon was killed between the operator's wish and its fulfillment.
                    self.stop(replica, STOPPED)
            elif replica.left_down:
                replica.note = STOPPED if replica.intent is Intent.STOPPED else HELD
        self._bring_up_to_date(leave=running.keys())
        for replica in self.replicas.values():
            if not replica.alive and not replica.left_down:
                self.want(replica, "start")
        self.adopted = True
        return [n for n, (_, program) in running.items() if n not in wanted or not program.runs_as(wanted[n])]

    def want(self, replica: SupervisedProgram, why: str) -> None:
        """It shall run, when its turn comes."""
        if replica.state in {ProgramState.STOPPED, *FAILED}:
            replica.move(ProgramState.WAITING, why, self._clock())

    def stop(self, replica: SupervisedProgram, why: str) -> None:
        """It shall end. supervisord kills what is left after the stop timeout."""
        if replica.alive:
            if replica.state is not ProgramState.STOPPING:
                replica.move(ProgramState.STOPPING, why, self._clock())
            replica.failing = ""
        elif replica.state is not ProgramState.STOPPED:
            replica.move(ProgramState.STOPPED, why, self._clock())

    def wish(self, replica: SupervisedProgram, wish: Wish) -> str:
        """Record what the operator wants of a replica. Return why it could not be saved, or ""."""
        problem = self.intents.set(replica.name, wish)
        replica.intent, replica.draining = wish.intent, wish.draining
        return problem

    def put(self, name: str, program: Program | None) -> None:
        """Gives a replica that is down another program, or none.

        Raises SupervisorError, or OSError if the files cannot be written, and then nothing is changed.
        """
        known = self.replicas.get(name)
        assert known is None or not known.alive, name
        others = [replica.program for replica in self.replicas.values() if replica is not known]
        supervisor_client.write(self.layout, others if program is None else [*others, program])
        if program is None:
            self.replicas.pop(name, None)
            self._restarts.pop(name, None)
        else:
            self._enlist(program)
        self.supervisor.replace(name, add=program is not None)

    def give_flags(self, program: Program) -> None:
        """Lets a program that may be running read other flags: they are written, and it is told.

        Raises SupervisorError, or OSError if they cannot be written, and then nothing is changed.
        """
        replica = self.replicas[program.name]
        others = [other.program for other in self.replicas.values() if other is not replica]
        supervisor_client.write(self.layout, [*others, program])
        replica.program = program
        self.supervisor.send_signal(program.name, "HUP")

    def write(self) -> None:
        """supervisord's files always say what runs now, not what a rollout has still to reach."""
        supervisor_client.write(self.layout, [replica.program for replica in self.replicas.values()])

    def configure(self, config: Config, programs: Iterable[Program]) -> None:
        """What is wanted from now on; the running programs change only by `put`."""
        self.config = config
        self.wanted = list(programs)
        self._box.policy = config.supervise
        for restarts in self._restarts.values():
            restarts.policy = config.supervise

    def begin_again(self) -> None:
        """A new supervisord answers; the old one is dead and so is everything that it had started."""
        now = self._clock()
        for replica in self.replicas.values():
            if replica.state is ProgramState.STOPPING and not replica.failing:
                replica.move(ProgramState.STOPPED, "supervisord ended", now)
            elif replica.alive:
                replica.last_exit, replica.last_exit_time = "ended with supervisord", time.time()
                replica.cause = Cause.SUPERVISORD
                self.metrics.ended(replica.name, replica.cause)
                if replica.intent is Intent.HELD:
                    replica.move(
                        ProgramState.STOPPED, f"supervisord ended; {HELD}, so not started again", now
                    )
                    continue
                replica.restarts += 1
                replica.move(ProgramState.WAITING, "supervisord ended", now)
        self._gone.clear()
        self._bring_up_to_date(leave=frozenset())

    def gone(self, pid: int) -> None:
        """The kernel says that this process has ended; supervisord will know within a second."""
        self._gone.add(pid)

    @property
    def now(self) -> float:
        """On the clock of all times in here."""
        return self._clock()

    @property
    def routed(self) -> RouterSnapshot:
        """What the router said last of the replicas: a second ago, while an operation waits for it sooner."""
        return self._link.look

    def router_has_been_up(self, seconds: float) -> bool:
        """Return whether the router has been READY, as its health checks say, for that long."""
        router = self.replicas.get(ROUTER)
        return router is not None and router.state is ProgramState.READY and self.now - router.since > seconds

    def row(self, replica: SupervisedProgram) -> Row | None:
        """None if the router does not know it, or does not answer."""
        return self.routed.rows.get(replica.program.ports[0]) if replica.program.replica is not None else None

    def in_flight(self, replica: SupervisedProgram) -> int | None:
        """Requests that the router has given it; None if the router does not know it, or not as healthy."""
        row = self.row(replica)
        return row.in_flight if row and row.up else None

    def all_registered(self) -> bool:
        """The router knows every READY replica: their heartbeats come a few seconds apart."""
        ready = (
            r
            for r in self.replicas.values()
            if r.state is ProgramState.READY and r.program.replica is not None
        )
        return all((row := self.row(replica)) and row.is_there for replica in ready)

    def drains(self, replica: SupervisedProgram) -> bool:
        """Whether the router is to give it nothing new."""
        return replica.draining or replica.name in self.set_aside

    def step(self) -> None:
        """Raises SupervisorLost if supervisord does not answer."""
        now = self._clock()
        self._forgive(now)
        self._processes = self.supervisor.processes()
        self._for_each("observe", lambda replica: self._observe(replica, now))
        self._inquest.look((r.pid for r in self.replicas.values() if r.pid), now)
        self._health.step(self.replicas, self.config.supervise, now)
        self._for_each("check", lambda replica: self._check_times(replica, now))
        self._start_those_whose_turn_it_is(now)
        self._health.ask(self.replicas.values(), self.config.supervise, now)
        self._ask_the_router(now)

    def _for_each(
        self,
        what: str,
        act: Callable[[SupervisedProgram], None],
        replicas: Iterable[SupervisedProgram] | None = None,
    ) -> None:
        """Call `act` for each replica. An error is logged once and does not affect the other replicas."""
        for replica in list(self.replicas.values() if replicas is None else replicas):
            try:
                act(replica)
                self._faults.pop((replica.name, what), None)
            except SupervisorLost:
                raise
            except Exception as fault:
                if self._faults.get((replica.name, what)) != repr(fault):
                    self._faults[replica.name, what] = repr(fault)
                    is_expected = isinstance(fault, FastDeployError | OSError)
                    log.error(
                        "%s: fd-dp cannot %s it (%s); trying again",
                        replica.label,
                        what,
                        fault if is_expected else repr(fault),
                        exc_info=None if is_expected else fault,
                    )

    def interval(self) -> float:
        """How long the next step may wait, if nothing wakes the loop."""
        if self._gone & {replica.pid for replica in self.replicas.values()}:
            return 0.05
        if self._link.has_news:
            return _WAITED_FOR_INTERVAL
        states = {replica.state for replica in self.replicas.values()}
        if ProgramState.STOPPING in states:
            return 0.1
        if states & {ProgramState.WAITING, ProgramState.STARTING}:
            return 0.25
        failed = (r for r in self.replicas.values() if r.state in FAILED)
        next_try = min((replica.next_try for replica in failed), default=math.inf)
        return min(1.0, max(0.05, next_try - self._clock()))

    def _forgive(self, now: float) -> None:
        slept = now - self._last_step
        self._last_step = now
        if slept > _OVERSLEPT:
            for replica in self.replicas.values():
                replica.last_good += slept
                replica.since += slept
                replica.watch.forgive(slept)

    def _observe(self, replica: SupervisedProgram, now: float) -> None:
        process = self._processes.get(replica.name)
        if process is None or process.state in supervisor_client.DOWN:
            if replica.alive:
                self._ended(replica, now)
        else:
            if not replica.alive:
                # Started behind our back, or by a call whose answer was lost: one decider, so it ends.
                if process.state in supervisor_client.UP:
                    log.warning(
                        "%s: pid %d runs though it should not; stopping it", replica.label, process.pid
                    )
                    self.supervisor.stop(replica.name)
                return
            if process.pid != replica.pid:
                replica.pid = process.pid
                replica.started = proc.started_at(process.pid) or process.started
                self._watch(process.pid)
                log.info("%s: started, pid %d", replica.label, process.pid)
            if (
                replica.state is ProgramState.STOPPING
                and process.state in supervisor_client.UP
                and not replica.failing
            ):
                self.supervisor.stop(replica.name)

    def _ended(self, replica: SupervisedProgram, now: float) -> None:
        how = self.supervisor.how_it_ended(replica.name)
        self._gone.discard(replica.pid)
        replica.last_exit, replica.last_exit_time = how, time.time()
        if replica.state is ProgramState.STOPPING and not replica.failing:
            self._tell_of_end(replica, from_outside=True)
            log.info("%s: stopped (%s)", replica.label, how)
            replica.move(ProgramState.STOPPED, replica.note, now)
            return
        if replica.failing:
            # Nobody knows better than the daemon why it has killed it.
            assert replica.cause is not None
            cause, what = replica.cause, f"{replica.failing}; {how}"
            replica.last_exit = what
        else:
            others = (name for name in self.replicas if name != replica.name)
            verdict, told = self._inquest.hold(replica.program, how, replica.started, others)
            cause, what = verdict.cause, f"{how} ({verdict.words})" if verdict.words else how
            what += f"; its last error: {told}" if told else ""
        self._tell_of_end(replica, from_outside=cause in exit_cause.FROM_OUTSIDE)
        self._failed(replica, f"pid {replica.pid or '?'}: {what}", cause, now)

    def _failed(self, replica: SupervisedProgram, what: str, cause: Cause, now: float) -> None:
        if self.stopping:
            replica.move(
                ProgramState.STOPPED if replica.state is ProgramState.STOPPING else ProgramState.BACKOFF,
                what,
                now,
            )
            replica.next_try = float("inf")
            return
        replica.cause = cause
        self.metrics.ended(replica.name, cause)
        if replica.intent is Intent.HELD:
            replica.move(ProgramState.STOPPED, f"{what}; {HELD}, so not started again", now)
            log.error("%s: ERROR (%s)", replica.label, replica.note)
            return
        crowd = ""
        restarts = self._restarts[replica.name]
        if cause in exit_cause.FROM_OUTSIDE:
            decision = restarts.interrupted()
        elif replica.name == ROUTER:
            # It starts within a second and takes little: a try does no harm, and all depends on it.
            decision = restarts.failed(now)
        else:
            crowd = self._box.failed(now)
            decision = restarts.failed(now, exit_cause.HOPELESS.get(cause, ""))
        if crowd and not decision.quarantined and self._has_others_in_use(replica):
            calm = self.config.supervise.box_calm
            what = f"{what}; paused until no replica has failed for {calm:g} s: {crowd}"
            replica.move(ProgramState.QUARANTINED, what, now)
            replica.paused, replica.next_try = True, self._box.calm_at
            log.error("%s: ERROR (%s)", replica.label, what)
            return
        kind = ""
        if decision.quarantined:
            what, kind = f"{what}; quarantined: {decision.why}", "QUARANTINED, "
        replica.move(ProgramState.QUARANTINED if decision.quarantined else ProgramState.BACKOFF, what, now)
        replica.next_try = now + decision.delay
        log.error("%s: ERROR (%s); %snext try in %.1f s", replica.label, what, kind, decision.delay)

    def _has_others_in_use(self, replica: SupervisedProgram) -> bool:
        """Return whether another replica is in use. The last one is never paused: nothing would be served."""
        return any(
            other.alive or other.state in (ProgramState.WAITING, ProgramState.BACKOFF)
            for other in self.replicas.values()
            if other is not replica and other.name != ROUTER and other.state is not ProgramState.STOPPING
        )

    def _may_come_back(self, replica: SupervisedProgram, now: float) -> bool:
        """Return whether a paused replica may start: the machine is calm, and no other one is starting."""
        replica.next_try = self._box.calm_at
        return now >= replica.next_try and not any(
            other.state in (ProgramState.WAITING, ProgramState.STARTING)
            for other in self.replicas.values()
            if other.name != ROUTER
        )

    def _tell_of_end(self, replica: SupervisedProgram, *, from_outside: bool) -> None:
        if replica.program.replica is not None:
            self._link.ended(replica.program.ports[0], from_outside)

    def _check_times(self, replica: SupervisedProgram, now: float) -> None:
        if replica.state is ProgramState.READY and now - replica.since > self.config.supervise.stable_after:
            self._restarts[replica.name].stable()
        elif replica.paused and not self._may_come_back(replica, now):
            return
        elif replica.state in FAILED and now >= replica.next_try:
            replica.restarts += 1
            replica.move(ProgramState.WAITING, f"try again after: {replica.note}", now)

    def _start_those_whose_turn_it_is(self, now: float) -> None:
        if self.stopping:
            return
        supervise = self.config.supervise
        router = self.replicas.get(ROUTER)
        if router is not None:
            if router.state is ProgramState.WAITING:
                self._start(router, now)
            if router.state is ProgramState.STARTING and now - router.since < _ROUTER_HEAD_START:
                return
        loading = [
            replica
            for replica in self.replicas.values()
            if replica.state is ProgramState.STARTING
            and replica.name != ROUTER
            and now - replica.since < supervise.start_slot
        ]
        free = (supervise.parallel_starts or os.cpu_count() or 1) - len(loading)
        waiting = [r for r in self.replicas.values() if r.state is ProgramState.WAITING and r.name != ROUTER]
        # Longest wait first: a replica that fails again and again must not keep the others from starting.
        waiting.sort(key=lambda replica: replica.since)
        self._for_each("start", lambda replica: self._start(replica, now), waiting[: max(0, free)])

    def _start(self, replica: SupervisedProgram, now: float) -> None:
        # Its worker may outlive its API process by a moment, and would hold ports and memory.
        if left := proc.kill_marked(self.layout.run, replica.name):
            replica.note = f"waits for pid {left[0].pid} of its last run to end"
            return
        process = self._processes.get(replica.name)
        if process is not None and process.state not in supervisor_client.DOWN:
            return
        program = replica.program
        supervisor_client.make_log_directories(self.layout, [program])
        if not supervisor_client.are_in_place(self.layout, [program]):
            try:
                self.write()
            except OSError as error:
                # Not a failure of the program, which starts as soon as its files can be written.
                replica.note = f"waits for its files: {error}"
                return
        try:
            for port in program.ports:
                require_free(program.host, port, "dp.toml")
            self.supervisor.start(program.name)
        except SupervisorLost:
            raise
        except FastDeployError as error:
            self._failed(replica, str(error), exit_cause.explain(End("", str(error))).cause, now)
            return
        replica.last_good = now
        replica.move(ProgramState.STARTING, "loading", now)

    def _ask_the_router(self, now: float) -> None:
        router = self.replicas.get(ROUTER)
        if router is None or not router.pid or not router.alive or router.state is ProgramState.STOPPING:
            self._link.gone(now)
            return
        replicas = [r for r in self.replicas.values() if r.program.replica is not None]
        # In a reload one that is down may have the port still that another has already.
        replicas.sort(key=lambda replica: replica.alive)
        wanted = {replica.program.ports[0]: self.drains(replica) for replica in replicas}
        rows = self.routed.rows
        wrong = any(row.draining != wanted.get(port, row.draining) for port, row in rows.items())
        if self.set_aside or wrong or self._link.has_news:
            interval = _WAITED_FOR_INTERVAL
        else:
            interval = _ROUTER_INTERVAL if self.all_registered() else _REGISTRATION_INTERVAL
        self._link.step(wanted, now, interval)

    def _bring_up_to_date(self, leave: Collection[str]) -> None:
        """supervisord may have started with files that somebody else wrote, or that are older than ours."""
        self.write()
        for name in self.supervisor.processes().keys() | self.replicas.keys():
            if name not in leave:
                self.supervisor.replace(name, add=name in self.replicas)

    def _enlist(self, program: Program) -> SupervisedProgram:
        replica = self.replicas.get(program.name)
        if replica is None:
            wish = self.intents.of(program.name)
            replica = self.replicas[program.name] = SupervisedProgram(
                program, since=self._clock(), intent=wish.intent, draining=wish.draining
            )
            # Told to people in this order, and started in it.
            order = sorted(
                self.replicas.values(), key=lambda r: -1 if r.program.replica is None else r.program.replica
            )
            self.replicas = {r.name: r for r in order}
        replica.program = program
        self._restarts[program.name] = Restarts(self.config.supervise, self._dice)
        return replica
