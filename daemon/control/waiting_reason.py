"""Explains what a program waits for, for `fdctl why`."""

from __future__ import annotations

import math
import os

from ...common.addresses import authority
from ..config.programs import ROUTER
from ..supervision.fleet import Fleet
from ..supervision.intents import Intent
from ..supervision.program_state import FAILED, ProgramState, SupervisedProgram

#: First words of the note of a program that cannot be started yet.
_WAITS_FOR = "waits for "


def waits_for(fleet: Fleet, program: SupervisedProgram, now: float) -> str:
    """Return what a program waits for, or "" if it waits for nothing.

    Args:
        now: time on the fleet's clock.
    """
    supervise = fleet.config.supervise
    age = now - program.since
    word = _word(program)
    match program.state:
        case ProgramState.STOPPED:
            return f"the operator: fdctl start {word}" if program.left_down else "its turn in a reload"
        case ProgramState.WAITING:
            return _turn(fleet, program)
        case ProgramState.STARTING:
            what = "its first answer" if program.is_router else "its first token"
            return f"{what}; it counts as failed in {_seconds(supervise.startup_timeout - age)}"
        case ProgramState.READY:
            return _ready_waits_for(fleet, program)
        case ProgramState.UNHEALTHY:
            if program.intent is Intent.HELD:
                return f"a successful health check, or the operator: fdctl release {word}"
            left = supervise.unhealthy_kill_after - (now - program.last_good)
            return f"a successful health check; it is killed in {_seconds(left)}"
        case ProgramState.STOPPING if program.kill_reason:
            return "its thread stacks; then it is killed"
        case ProgramState.STOPPING:
            return f"its last requests; it is killed in {_seconds(program.spec.stop_timeout - age)}"
        case ProgramState.QUARANTINED if program.paused:
            return _calm(supervise.box_calm, program.next_try - now)
        case ProgramState.BACKOFF | ProgramState.QUARANTINED:
            delay = next_try_in(program, now)
            return "the end of fd-dp" if delay is None else f"its next restart, in {_seconds(delay)}"


def missing_at_the_router(fleet: Fleet, program: SupervisedProgram) -> str:
    """Return why the router does not use a READY replica, or "".

    Return "" also while the router does not answer, which `fdctl status` reports separately.
    """
    if program.is_router or program.state is not ProgramState.READY or fleet.router.snapshot.problem:
        return ""
    row = fleet.router.row(program)
    if row is not None and row.in_service:
        return ""
    # The snapshot is older than the READY state of the replica.
    if fleet.router.snapshot.at <= program.since:
        return ""
    if row is None or row.leaving:
        return f"not registered at the router; fdctl logs {_word(program)} says why"
    return f"the router's health checks at {authority(row.host, row.port)} fail"


def _calm(box_calm: float, left: float) -> str:
    if left > 0:
        return f"{box_calm:g} s without a failure of any replica, {_seconds(left)} left"
    return "its turn: paused replicas start one at a time"


def next_try_in(program: SupervisedProgram, now: float) -> float | None:
    """Return the seconds to the next start; None if it has not failed, or the daemon is stopping."""
    if program.state not in FAILED or not math.isfinite(program.next_try):
        return None
    return max(0.0, round(program.next_try - now, 1))


def _turn(fleet: Fleet, program: SupervisedProgram) -> str:
    router = fleet.programs.get(ROUTER)
    if (
        not program.is_router
        and router is not None
        and router.state in (ProgramState.WAITING, ProgramState.STARTING)
    ):
        return "the router, which starts first"
    loading = [r.label for r in fleet.replicas.values() if r.state is ProgramState.STARTING]
    if program.note.startswith(_WAITS_FOR):
        return program.note.removeprefix(_WAITS_FOR)
    if not loading or program.is_router:
        return "the end of its old process"
    slots = fleet.config.supervise.parallel_starts
    why = f"parallel_starts = {slots}" if slots else f"one per core, and there are {os.cpu_count()}"
    return f"its turn to load, after {', '.join(loading)} ({why})"


def _ready_waits_for(fleet: Fleet, program: SupervisedProgram) -> str:
    """Return what a READY replica waits for, or ""."""
    word = _word(program)
    if program.draining and fleet.router.snapshot.problem:
        return f"the router, which still sends it requests: {fleet.router.snapshot.problem}"
    if program.draining:
        rest = fleet.router.in_flight(program)
        left = f"the end of its requests ({rest} in flight), then for " if rest else ""
        return f"{left}the operator, who has drained it; fdctl undrain {word}"
    if fleet.router.drains(program):
        return (
            f"the end of its requests ({fleet.router.in_flight(program) or 0} in flight); then it is stopped"
        )
    if program.intent is Intent.HELD:
        return f"the operator, who holds it; fdctl release {word}"
    if missing_at_the_router(fleet, program):
        return "the router, which does not use it yet"
    return ""


def _word(program: SupervisedProgram) -> str:
    """Return the name of a program on fdctl's command line."""
    return program.name if program.is_router else str(program.spec.replica)


def _seconds(number: float) -> str:
    return f"{max(0.0, number):.0f} s"
