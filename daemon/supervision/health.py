"""How the programs are: what probes tell of them, and the end of those that hang.

A program is READY when it is in good health and, if it is a replica, has given a token. From then on it fails
if it does not answer, if it makes no progress with what it has in hand, or if it gives no token while it has
nothing else to do.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping

from ...common.errors import ConfigError
from ...expert_parallel.snapshot import Snapshot, read_snapshot
from ..config.options import SuperviseSection
from ..config.programs import ROUTER, expert_group_in
from ..diagnosis.exit_cause import Cause
from ..process import proc, supervisor_client
from ..process.stacks import Dump
from ..process.supervisor_client import Layout
from . import hang_detection
from .hang_detection import Stuck, WorkerProgress
from .intents import Intent
from .metrics import Metrics
from .probes import Probes, Reading
from .program_state import ProgramState, SupervisedProgram

log = logging.getLogger("fd-dp")

_LOADING_PROBE_INTERVAL = 0.25
#: States in which a program is asked how it is.
_ASKED = frozenset({ProgramState.STARTING, ProgramState.READY, ProgramState.UNHEALTHY})


class Health:
    """Moves replicas to READY, UNHEALTHY and, when they have to be killed, STOPPING.

    Args:
        look: at an expert-parallel group.
    """

    def __init__(
        self, layout: Layout, probes: Probes, metrics: Metrics, look: Callable[[str], Snapshot | None]
    ) -> None:
        self._layout = layout
        self._probes = probes
        self._metrics = metrics
        self._look = look
        self._asked: dict[str, float] = {}

    def step(
        self, replicas: Mapping[str, SupervisedProgram], supervise: SuperviseSection, now: float
    ) -> None:
        for reading in self._probes.take():
            replica = replicas.get(reading.name)
            # What it says is of no interest any more if it is of another process, or of one that ends.
            if replica is None or replica.pid != reading.pid or replica.state not in _ASKED:
                continue
            try:
                self._read(replica, reading, now)
            except Exception:
                # One bad answer must not hide those of the others.
                log.exception("%s: its health answer cannot be used", replica.label)
        for replica in replicas.values():
            if replica.failing and (replica.dump is None or replica.dump.is_done(now)):
                proc.kill_marked(self._layout.run, replica.name)
            elif replica.state in _ASKED:
                self._check_deadlines(replica, supervise, now)
        self._end_hangs(replicas, supervise.hang_after, now)

    def ask(self, replicas: Iterable[SupervisedProgram], supervise: SuperviseSection, now: float) -> None:
        for replica in replicas:
            if replica.state not in _ASKED or not replica.pid:
                continue
            interval = min(supervise.probe_interval, supervise.hang_after / 4)
            if replica.state is ProgramState.STARTING:
                interval = _LOADING_PROBE_INTERVAL
            if now - self._asked.get(replica.name, 0.0) < interval:
                continue
            self._asked[replica.name] = now
            self._probes.ask(replica.program, replica.pid, token=False)
            watch, idle_probe = replica.watch, supervise.idle_probe
            if idle_probe and replica.state is ProgramState.READY and watch.idle(now) > idle_probe:
                watch.tested = now if watch.tested is None else watch.tested
            if watch.tested is not None:
                self._probes.ask(replica.program, replica.pid, token=True)

    def _read(self, replica: SupervisedProgram, reading: Reading, now: float) -> None:
        if reading.token:
            self._read_token(replica, reading, now)
            return
        if reading.answered:
            replica.health = reading.health
            replica.watch.saw(WorkerProgress.of(reading.health), now)
        if not reading.ok:
            # A port that refuses is a program that is still starting: nothing that its note must say.
            if reading.answered or replica.state is not ProgramState.STARTING:
                replica.note = reading.problem
            return
        replica.last_good = now
        if replica.state is ProgramState.STARTING and replica.name != ROUTER:
            # In good health, but has it ever computed anything?
            self._probes.ask(replica.program, replica.pid, token=True)
        elif not replica.watch.refused:
            self._is_good(replica, now)

    def _read_token(self, replica: SupervisedProgram, reading: Reading, now: float) -> None:
        replica.watch.refused = not reading.ok
        if reading.ok:
            replica.watch.tested = None
            self._is_good(replica, now)
            return
        replica.note = reading.problem
        if replica.state is ProgramState.READY:
            self._is_unhealthy(replica, now)

    def _is_good(self, replica: SupervisedProgram, now: float) -> None:
        if replica.state is ProgramState.STARTING:
            seconds = now - replica.since
            log.info("%s: READY after %.1f s, pid %d", replica.label, seconds, replica.pid)
            if not replica.adopted:
                self._metrics.ready(replica.name, seconds)
            replica.move(ProgramState.READY, "", now)
        elif replica.state is ProgramState.UNHEALTHY:
            log.info("%s: READY again", replica.label)
            replica.move(ProgramState.READY, "", now)
        replica.note = ""

    def _is_unhealthy(self, replica: SupervisedProgram, now: float) -> None:
        note = replica.note or "no answer to health checks"
        log.warning("%s: UNHEALTHY (%s)", replica.label, note)
        replica.move(ProgramState.UNHEALTHY, note, now)

    def _check_deadlines(self, replica: SupervisedProgram, supervise: SuperviseSection, now: float) -> None:
        silent = now - replica.last_good
        if replica.state is ProgramState.STARTING and now - replica.since > supervise.startup_timeout:
            why = f"not READY within {supervise.startup_timeout:g} s"
            self._kill(replica, f"{why}: {replica.note}", Cause.STARTUP, now)
        elif replica.watch.tested_for(now) > supervise.hang_after:
            why = f"idle, and gave no token for {supervise.hang_after:g} s"
            self._kill(replica, f"{why}: {replica.note}" if replica.note else why, Cause.HANG, now)
        elif replica.state is ProgramState.READY and silent > supervise.stall_after:
            self._is_unhealthy(replica, now)
        elif replica.state is ProgramState.UNHEALTHY and silent > supervise.stall_kill:
            why = f"no good health check for {supervise.stall_kill:g} s"
            self._kill(replica, f"{why}: {replica.note}", Cause.HANG, now)

    def _end_hangs(self, replicas: Mapping[str, SupervisedProgram], hang_after: float, now: float) -> None:
        stuck, members = [], {}
        for replica in replicas.values():
            seat, pulse = replica.program.replica, replica.watch.pulse
            if seat is None or replica.state not in _ASKED:
                continue
            group = expert_group_in(replica.program.argv)
            if group is not None:
                members[group, seat] = replica.name
            seconds = replica.watch.stuck(now)
            if pulse is not None and seconds > hang_after:
                stuck.append(Stuck(replica.name, seconds, pulse.requests, group, seat))
        if not stuck:
            return
        groups = seen({one.group for one in stuck if one.group is not None}, self._look)
        judgement = hang_detection.judge(stuck, groups, members, hang_after)
        for name, why in judgement.excused.items():
            replicas[name].note = why
        for name, why in judgement.guilty.items():
            self._kill(replicas[name], f"hangs: {why}", Cause.HANG, now)

    def _kill(self, replica: SupervisedProgram, why: str, cause: Cause, now: float) -> None:
        """It is not asked to finish what it has in hand, only where it is; then it is killed.

        One that the operator holds is left as it is, and says what is wrong with it.
        """
        if replica.intent is Intent.HELD:
            replica.note = why
            return
        output = self._layout.output(replica.name)
        if told := supervisor_client.last_error(output, replica.started):
            why = f"{why}; its last error: {told}"
        where = ""
        # The signals of a router's processes are orders.
        if replica.name != ROUTER:
            replica.dump = Dump(self._layout.run, replica.name, replica.pid, output, now)
            where = f", its stacks are in {output}" if replica.dump.asked else ""
        log.error("%s: ERROR (%s); killing pid %d%s", replica.label, why, replica.pid, where)
        replica.move(ProgramState.STOPPING, why, now)
        replica.failing, replica.cause = why, cause


def seen(
    names: Iterable[str], look: Callable[[str], Snapshot | None] = read_snapshot
) -> dict[str, Snapshot | None]:
    """Those that can be looked at; None for one that nobody is in."""
    found = {}
    for name in names:
        try:
            found[name] = look(name)
        except (ConfigError, OSError) as error:
            log.warning("expert group %s cannot be looked at: %s", name, error)
    return found
