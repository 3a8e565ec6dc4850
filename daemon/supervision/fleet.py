"""All supervised programs, and the decisions which to start, stop and try again.

`step` reads the facts (supervisord's processes, the results of the probes), changes the states of the
programs accordingly and acts on these states. `request_start` and `stop` only change a state; the next step
acts on it. So a step that was interrupted by the death of supervisord can simply be repeated.
"""

from __future__ import annotations

import logging
import math
import random
import time
from collections.abc import Callable, Collection, Iterable

from ...common.errors import FastDeployError
from ...expert_parallel.snapshot import Snapshot, read_snapshot
from ..config.loader import Config
from ..config.programs import ROUTER, Program, admin_socket
from ..diagnosis import exit_cause
from ..diagnosis.exit_cause import Cause, Exit
from ..diagnosis.exit_diagnosis import ExitDiagnosis
from ..process import proc, supervisor_client, supervisord_config
from ..process.supervisor_client import Process, Supervisor, SupervisorLost
from .adoption import running_programs
from .health import Health
from .intents import DesiredState, Intent, Intents
from .metrics import Metrics
from .probes import Probes
from .program_state import FAILED, ProgramState, Retry, SupervisedProgram
from .router_sync import FAST_INTERVAL, RouterSync
from .start_queue import StartFailed, StartQueue

log = logging.getLogger("fd-dp")

#: Notes of programs that the daemon does not start.
STOPPED = "stopped by the operator"
HELD = "held by the operator"
#: Seconds between two steps after which the daemon itself must have been suspended.
_MAX_STEP_GAP = 5.0


class Fleet:
    """Owner of all supervised programs, the replicas and the router.

    Args:
        watch: called with each new pid; it must call `on_process_exit` when that process has ended.
        rng: returns random numbers from [0, 1) for the backoff.
        read_snapshot: reads the snapshot of an expert-parallel group.
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
        rng: Callable[[], float] = random.random,
        read_snapshot: Callable[[str], Snapshot | None] = read_snapshot,
    ) -> None:
        self.config = config
        self.layout = client.layout
        self.metrics = Metrics()
        self.supervisor = client
        self.wanted = list(programs)
        #: By name: the router first, then the replicas in order.
        self.programs: dict[str, SupervisedProgram] = {}
        #: `adopt` has succeeded, so `programs` is complete.
        self.adopted = False
        self.stopping = False
        self.intents = Intents(config.paths.state)
        self.router = RouterSync(admin_socket(config.paths.run))
        self._queue = StartQueue(client, config.supervise, self.write_files, rng)
        self._diagnosis = ExitDiagnosis(client.layout)
        self._health = Health(client.layout, probes, self.metrics, read_snapshot)
        self._watch = watch
        self._clock = clock
        #: Pids that the kernel has reported as ended and supervisord has not.
        self._ended_pids: set[int] = set()
        #: (program, action) -> the error that was logged last.
        self._errors: dict[tuple[str, str], str] = {}
        self._processes: dict[str, Process] = {}
        self._last_step = clock()

    @property
    def replicas(self) -> dict[str, SupervisedProgram]:
        """The programs without the router."""
        return {name: program for name, program in self.programs.items() if not program.is_router}

    @property
    def now(self) -> float:
        """Current time on the clock of all times in the fleet."""
        return self._clock()

    def adopt(self) -> list[str]:
        """Take over the programs that supervisord runs. After an error it can be called again.

        They keep running, whatever their configuration; a rollout replaces those with an old one later.

        Returns:
            Names of the running programs whose configuration is not the wanted one.
        """
        self.programs = {}
        wanted = {program.name: program for program in self.wanted}
        running = running_programs(self.supervisor, self.wanted)
        now = self._clock()
        for name in wanted.keys() | running.keys():
            program = self._add(running[name][1] if name in running else wanted[name])
            if name in running:
                process = running[name][0]
                program.adopt(process.pid, proc.started_at(process.pid) or process.started, now)
                self._watch(process.pid)
                log.info("%s: adopted pid %d", program.label, process.pid)
                if program.intent is Intent.STOPPED:
                    # The previous daemon was killed after it had saved the intent.
                    self.stop(program, STOPPED)
            elif program.left_down:
                program.set_note(STOPPED if program.intent is Intent.STOPPED else HELD)
        self._update_supervisord(except_for=running.keys())
        for program in self.programs.values():
            if not program.alive and not program.left_down:
                self.request_start(program, "start")
        self.adopted = True
        return [n for n, (_, program) in running.items() if n not in wanted or not program.runs_as(wanted[n])]

    def request_start(self, program: SupervisedProgram, why: str) -> None:
        """Put a program into the start queue unless it runs or waits already."""
        if program.state in {ProgramState.STOPPED, *FAILED}:
            program.move(ProgramState.WAITING, why, self._clock())

    def stop(self, program: SupervisedProgram, why: str) -> None:
        """Stop a program. supervisord kills it after the stop timeout."""
        if program.alive:
            program.stop(why, self._clock())
        elif program.state is not ProgramState.STOPPED:
            program.move(ProgramState.STOPPED, why, self._clock())

    def set_desired(self, program: SupervisedProgram, desired: DesiredState) -> str:
        """Set the desired state, which takes effect at once. Return why it could not be saved, or ""."""
        problem = self.intents.set(program.name, desired)
        program.set_desired(desired.intent, desired.draining)
        return problem

    def replace_program(self, name: str, program: Program | None) -> None:
        """Change the configuration of a program that is down, or remove it.

        Raises SupervisorError; or OSError if the files cannot be written, before anything has changed.
        """
        known = self.programs.get(name)
        assert known is None or not known.alive, name
        others = [other.spec for other in self.programs.values() if other is not known]
        supervisord_config.write_files(self.layout, others if program is None else [*others, program])
        if program is None:
            self.programs.pop(name, None)
            self._queue.remove(name)
        else:
            self._add(program)
        self.supervisor.replace(name, add=program is not None)

    def update_router_flags(self, program: Program) -> None:
        """Write the flags file of the router and, if it runs, make it reload the file.

        Raises SupervisorError; or OSError if the file cannot be written, before anything has changed.
        """
        router = self.programs[program.name]
        others = [other.spec for other in self.programs.values() if other is not router]
        supervisord_config.write_files(self.layout, [*others, program])
        router.set_spec(program)
        self.supervisor.send_signal(program.name, "HUP")

    def write_files(self) -> None:
        """Write supervisord's files for the programs as they run now, not as a rollout will leave them."""
        supervisord_config.write_files(self.layout, [program.spec for program in self.programs.values()])

    def configure(self, config: Config, programs: Iterable[Program]) -> None:
        """Set the wanted configuration. Running programs change only by `replace_program`."""
        self.config = config
        self.wanted = list(programs)
        self._queue.configure(config.supervise)

    def on_supervisord_restarted(self) -> None:
        """Handle a new supervisord: the old one has ended, and with it every program.

        No exit is reported to the router, which has ended as well and has forgotten its requests.
        """
        now = self._clock()
        for program in self.programs.values():
            if program.state is ProgramState.STOPPING and not program.kill_reason:
                program.move(ProgramState.STOPPED, "supervisord ended", now)
            elif program.alive:
                is_held = program.intent is Intent.HELD
                note = f"supervisord ended; {HELD}, so not started again" if is_held else "supervisord ended"
                program.lost_with_supervisord(note, now)
                self.metrics.ended(program.name, Cause.SUPERVISORD)
        self._ended_pids.clear()
        self._update_supervisord(except_for=frozenset())

    def on_process_exit(self, pid: int) -> None:
        """Record that the kernel has reported the end of a process; supervisord does within a second."""
        self._ended_pids.add(pid)

    def router_has_been_up(self, seconds: float) -> bool:
        """Return whether the router has been READY for more than some seconds."""
        router = self.programs.get(ROUTER)
        return router is not None and router.state is ProgramState.READY and self.now - router.since > seconds

    def step(self) -> None:
        """Observe all programs and act. Raises SupervisorLost if supervisord does not answer."""
        now = self._clock()
        self._compensate_for_suspend(now)
        self._processes = self.supervisor.processes()
        self._for_each("observe", lambda program: self._observe(program, now))
        self._diagnosis.poll((program.pid for program in self.programs.values() if program.pid), now)
        self._health.step(self.programs, self.config.supervise, now)
        self._for_each("check", lambda program: self._check_retry(program, now))
        self._start_next(now)
        self._health.ask(self.programs.values(), self.config.supervise, now)
        self.router.step(self.programs, now)

    def interval(self) -> float:
        """Return the seconds until the next step is due if nothing wakes the loop."""
        if self._ended_pids & {program.pid for program in self.programs.values()}:
            return 0.05
        if self.router.has_news:
            return FAST_INTERVAL
        states = {program.state for program in self.programs.values()}
        if ProgramState.STOPPING in states:
            return 0.1
        if states & {ProgramState.WAITING, ProgramState.STARTING}:
            return 0.25
        failed = (program for program in self.programs.values() if program.state in FAILED)
        next_try = min((program.next_try for program in failed), default=math.inf)
        return min(1.0, max(0.05, next_try - self._clock()))

    def _for_each(
        self,
        what: str,
        act: Callable[[SupervisedProgram], None],
        programs: Iterable[SupervisedProgram] | None = None,
    ) -> None:
        """Call `act` for each program. An error is logged once and does not affect the other programs."""
        for program in list(self.programs.values() if programs is None else programs):
            try:
                act(program)
                self._errors.pop((program.name, what), None)
            except SupervisorLost:
                raise
            except Exception as error:
                if self._errors.get((program.name, what)) != repr(error):
                    self._errors[program.name, what] = repr(error)
                    is_expected = isinstance(error, FastDeployError | OSError)
                    log.error(
                        "%s: fd-dp cannot %s it (%s); trying again",
                        program.label,
                        what,
                        error if is_expected else repr(error),
                        exc_info=None if is_expected else error,
                    )

    def _compensate_for_suspend(self, now: float) -> None:
        gap = now - self._last_step
        self._last_step = now
        if gap > _MAX_STEP_GAP:
            for program in self.programs.values():
                program.compensate(gap)

    def _observe(self, program: SupervisedProgram, now: float) -> None:
        process = self._processes.get(program.name)
        if process is None or process.state in supervisor_client.DOWN:
            if program.alive:
                self._exited(program, now)
            return
        if not program.alive:
            # Started by someone else, or by a call whose response was lost.
            if process.state in supervisor_client.UP:
                log.warning("%s: pid %d runs though it should not; stopping it", program.label, process.pid)
                self.supervisor.stop(program.name)
            return
        if process.pid != program.pid:
            program.has_process(process.pid, proc.started_at(process.pid) or process.started)
            self._watch(process.pid)
            log.info("%s: started, pid %d", program.label, process.pid)
        is_stopping = program.state is ProgramState.STOPPING and not program.kill_reason
        if is_stopping and process.state in supervisor_client.UP:
            self.supervisor.stop(program.name)

    def _exited(self, program: SupervisedProgram, now: float) -> None:
        how = self.supervisor.how_it_ended(program.name)
        self._ended_pids.discard(program.pid)
        if program.state is ProgramState.STOPPING and not program.kill_reason:
            program.exited(how)
            self.router.report_exit(program, from_outside=True)
            log.info("%s: stopped (%s)", program.label, how)
            program.move(ProgramState.STOPPED, program.note, now)
            return
        if program.kill_reason:
            assert program.cause is not None
            cause, what = program.cause, f"{program.kill_reason}; {how}"
            program.exited(what)
        else:
            program.exited(how)
            others = (name for name in self.programs if name != program.name)
            verdict, error = self._diagnosis.diagnose(program.spec, how, program.started, others)
            cause, what = verdict.cause, f"{how} ({verdict.words})" if verdict.words else how
            what += f"; its last error: {error}" if error else ""
        self.router.report_exit(program, from_outside=cause in exit_cause.FROM_OUTSIDE)
        self._failed(program, f"pid {program.pid or '?'}: {what}", cause, now)

    def _failed(self, program: SupervisedProgram, what: str, cause: Cause, now: float) -> None:
        if self.stopping:
            program.abandon(what, now)
            return
        self.metrics.ended(program.name, cause)
        if program.intent is Intent.HELD:
            program.failed(cause, f"{what}; {HELD}, so not started again", None, now)
            log.error("%s: ERROR (%s)", program.label, program.note)
            return
        others = [other for other in self.replicas.values() if other is not program]
        retry = self._queue.after_failure(program, cause, others, now)
        program.failed(cause, what + self._why_delayed(retry), retry, now)
        next_try = ""
        if not retry.paused:
            kind = "QUARANTINED, " if retry.quarantined else ""
            next_try = f"; {kind}next try in {retry.at - now:.1f} s"
        log.error("%s: ERROR (%s)%s", program.label, program.note, next_try)

    def _why_delayed(self, retry: Retry) -> str:
        if retry.paused:
            calm = self.config.supervise.box_calm
            return f"; paused until no replica has failed for {calm:g} s: {retry.why}"
        return f"; quarantined: {retry.why}" if retry.quarantined else ""

    def _check_retry(self, program: SupervisedProgram, now: float) -> None:
        """Put a failed program into the start queue when its next try is due."""
        if program.state is ProgramState.READY and now - program.since > self.config.supervise.stable_after:
            self._queue.stable(program.name)
        elif program.paused and not self._queue.may_resume(program, self.replicas.values(), now):
            return
        elif program.state in FAILED and now >= program.next_try:
            program.retry(f"try again after: {program.note}", now)

    def _start_next(self, now: float) -> None:
        if self.stopping:
            return
        router = self.programs.get(ROUTER)
        if router is not None and router.state is ProgramState.WAITING:
            self._start(router, now)
        replicas = self._queue.next_replicas(self.programs, now)
        self._for_each("start", lambda replica: self._start(replica, now), replicas)

    def _start(self, program: SupervisedProgram, now: float) -> None:
        try:
            self._queue.start(program, self._processes.get(program.name), now)
        except StartFailed as error:
            verdict = exit_cause.explain(Exit("", str(error)))
            self._failed(program, str(error), verdict.cause, now)

    def _update_supervisord(self, except_for: Collection[str]) -> None:
        """Write the files and make supervisord use them: it may have started with those of another daemon."""
        self.write_files()
        for name in self.supervisor.processes().keys() | self.programs.keys():
            if name not in except_for:
                self.supervisor.replace(name, add=name in self.programs)

    def _add(self, spec: Program) -> SupervisedProgram:
        program = self.programs.get(spec.name)
        if program is None:
            desired = self.intents.of(spec.name)
            program = self.programs[spec.name] = SupervisedProgram(
                spec, since=self._clock(), intent=desired.intent, draining=desired.draining
            )
            # Programs are shown and started in this order.
            order = sorted(
                self.programs.values(), key=lambda p: -1 if p.spec.replica is None else p.spec.replica
            )
            self.programs = {p.name: p for p in order}
        program.set_spec(spec)
        self._queue.add(spec.name)
        return program
