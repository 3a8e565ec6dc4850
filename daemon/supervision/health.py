"""Health of the programs: applies the readings of the probes and kills programs that hang.

A program is READY when its health check succeeds and, for a replica, when it has generated a token. After
that it fails if it does not answer, if it makes no progress on its requests, or if it is idle and generates
no token.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping

from ...common.errors import ConfigError
from ...expert_parallel.snapshot import Snapshot, read_snapshot
from ..config.options import SuperviseSection
from ..config.programs import expert_group_in
from ..diagnosis.exit_cause import Cause
from ..process import output_tail, proc
from ..process.stacks import Dump
from ..process.supervisord_config import Layout
from .hang_detection import Stalled, find_hung
from .intents import Intent
from .metrics import Metrics
from .probes import Probes, Reading
from .program_state import ProgramState, SupervisedProgram

log = logging.getLogger("fd-dp")

_LOADING_PROBE_INTERVAL = 0.25
#: States in which a program is probed.
_PROBED = frozenset({ProgramState.STARTING, ProgramState.READY, ProgramState.UNHEALTHY})


class Health:
    """Moves programs to READY, UNHEALTHY and, to kill them, STOPPING.

    Args:
        read_snapshot: reads the snapshot of an expert-parallel group.
    """

    def __init__(
        self,
        layout: Layout,
        probes: Probes,
        metrics: Metrics,
        read_snapshot: Callable[[str], Snapshot | None],
    ) -> None:
        self._layout = layout
        self._probes = probes
        self._metrics = metrics
        self._read_snapshot = read_snapshot
        self._last_probe: dict[str, float] = {}

    def step(
        self, programs: Mapping[str, SupervisedProgram], supervise: SuperviseSection, now: float
    ) -> None:
        for reading in self._probes.take():
            program = programs.get(reading.name)
            # A reading of a previous process, or of one that is ending, is useless.
            if program is None or program.pid != reading.pid or program.state not in _PROBED:
                continue
            try:
                self._apply(program, reading, now)
            except Exception as error:
                # A bad reading must not affect the others.
                log.error("%s: cannot use the result of its health check (%r)", program.label, error)
        for program in programs.values():
            if program.kill_reason and (program.dump is None or program.dump.is_done(now)):
                proc.kill_marked(self._layout.run, program.name)
            elif program.state in _PROBED:
                self._check_deadlines(program, supervise, now)
        self._kill_hung(programs, supervise.no_progress_timeout, now)

    def ask(self, programs: Iterable[SupervisedProgram], supervise: SuperviseSection, now: float) -> None:
        """Begin the probes that are due."""
        for program in programs:
            if program.state not in _PROBED or not program.pid:
                continue
            interval = min(supervise.probe_interval, supervise.no_progress_timeout / 4)
            if program.state is ProgramState.STARTING:
                interval = _LOADING_PROBE_INTERVAL
            if now - self._last_probe.get(program.name, 0.0) < interval:
                continue
            self._last_probe[program.name] = now
            self._probes.ask(program.spec, program.pid, token=False)
            progress, idle_probe = program.progress, supervise.idle_probe
            if idle_probe and program.state is ProgramState.READY and progress.idle_for(now) > idle_probe:
                progress.expect_token(now)
            if progress.token_due_since is not None:
                self._probes.ask(program.spec, program.pid, token=True)

    def _apply(self, program: SupervisedProgram, reading: Reading, now: float) -> None:
        if reading.token:
            self._apply_token(program, reading, now)
            return
        if reading.answered:
            program.health_reported(reading.health, now)
        if not reading.ok:
            # While a program starts, its port refuses connections. That is not worth a note.
            if reading.answered or program.state is not ProgramState.STARTING:
                program.set_note(reading.problem)
            return
        program.probe_ok(now)
        if program.state is ProgramState.STARTING and not program.is_router:
            # A health check does not prove that it can generate.
            self._probes.ask(program.spec, program.pid, token=True)
        elif not program.progress.token_failed:
            self._make_ready(program, now)

    def _apply_token(self, program: SupervisedProgram, reading: Reading, now: float) -> None:
        program.progress.token_probed(reading.ok)
        if reading.ok:
            self._make_ready(program, now)
            return
        program.set_note(reading.problem)
        if program.state is ProgramState.READY:
            self._make_unhealthy(program, now)

    def _make_ready(self, program: SupervisedProgram, now: float) -> None:
        if program.state is ProgramState.STARTING:
            seconds = now - program.since
            log.info("%s: READY after %.1f s, pid %d", program.label, seconds, program.pid)
            if not program.adopted:
                self._metrics.ready(program.name, seconds)
            program.move(ProgramState.READY, "", now)
        elif program.state is ProgramState.UNHEALTHY:
            log.info("%s: READY again", program.label)
            program.move(ProgramState.READY, "", now)
        program.set_note("")

    def _make_unhealthy(self, program: SupervisedProgram, now: float) -> None:
        note = program.note or "no answer to health checks"
        log.warning("%s: UNHEALTHY (%s)", program.label, note)
        program.move(ProgramState.UNHEALTHY, note, now)

    def _check_deadlines(self, program: SupervisedProgram, supervise: SuperviseSection, now: float) -> None:
        silent = now - program.last_good
        if program.state is ProgramState.STARTING and now - program.since > supervise.startup_timeout:
            why = f"not READY within {supervise.startup_timeout:g} s"
            self._kill(program, f"{why}: {program.note}", Cause.STARTUP, now)
        elif program.progress.token_overdue_for(now) > supervise.no_progress_timeout:
            why = f"idle, but no token within {supervise.no_progress_timeout:g} s"
            self._kill(program, f"{why}: {program.note}" if program.note else why, Cause.HANG, now)
        elif program.state is ProgramState.READY and silent > supervise.unhealthy_after:
            self._make_unhealthy(program, now)
        elif program.state is ProgramState.UNHEALTHY and silent > supervise.unhealthy_kill_after:
            why = f"no successful health check for {supervise.unhealthy_kill_after:g} s"
            self._kill(program, f"{why}: {program.note}", Cause.HANG, now)

    def _kill_hung(
        self, programs: Mapping[str, SupervisedProgram], no_progress_timeout: float, now: float
    ) -> None:
        stalled, members = [], {}
        for program in programs.values():
            rank, last = program.spec.replica, program.progress.last
            if rank is None or program.state not in _PROBED:
                continue
            group = expert_group_in(program.spec.argv)
            if group is not None:
                members[group, rank] = program.name
            seconds = program.progress.stalled_for(now)
            if last is not None and seconds > no_progress_timeout:
                stalled.append(Stalled(program.name, seconds, last.requests, group, rank))
        if not stalled:
            return
        groups = group_snapshots({one.group for one in stalled if one.group is not None}, self._read_snapshot)
        report = find_hung(stalled, groups, members, no_progress_timeout)
        for name, why in report.blocked.items():
            programs[name].set_note(why)
        for name, why in report.hung.items():
            self._kill(programs[name], f"hangs: {why}", Cause.HANG, now)

    def _kill(self, program: SupervisedProgram, why: str, cause: Cause, now: float) -> None:
        """Kill a program after it has written the stacks of its threads; it gets no time to finish.

        A program that the operator holds only gets a note.
        """
        if program.intent is Intent.HELD:
            program.set_note(why)
            return
        output = self._layout.output(program.name)
        if error := output_tail.last_error(output, program.started):
            why = f"{why}; its last error: {error}"
        dump, where = None, ""
        # The router's processes use the signal for something else.
        if not program.is_router:
            dump = Dump(self._layout.run, program.name, program.pid, output, now)
            where = f", its stacks are in {output}" if dump.has_processes else ""
        log.error("%s: ERROR (%s); killing pid %d%s", program.label, why, program.pid, where)
        program.killing(why, cause, dump, now)


def group_snapshots(
    names: Iterable[str], read_snapshot: Callable[[str], Snapshot | None] = read_snapshot
) -> dict[str, Snapshot | None]:
    """Return the readable snapshots of expert-parallel groups; None for a group without members."""
    found = {}
    for name in names:
        try:
            found[name] = read_snapshot(name)
        except (ConfigError, OSError) as error:
            log.warning("expert group %s cannot be read: %s", name, error)
    return found
