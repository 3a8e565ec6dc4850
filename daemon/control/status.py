"""The daemon's status: the stable schema of `fdctl status --json`, and a one-line summary."""

from __future__ import annotations

import os
import time
from typing import Any

from ... import __version__
from ...common import masking
from ..config.programs import ROUTER, address
from ..supervision.fleet import Fleet
from ..supervision.program_state import ProgramState, SupervisedProgram
from . import waiting_reason


def status(
    fleet: Fleet,
    *,
    state: str,
    config: str,
    prefix: str | None,
    supervisord: int,
    problems: list[str],
) -> dict[str, Any]:
    """Return the result of the command `status`. docs/fdctl.md describes its fields."""
    replicas = [_entry(fleet, replica) for replica in fleet.replicas.values()]
    router = fleet.programs.get(ROUTER)
    return {
        "daemon": {
            "pid": os.getpid(),
            "version": __version__,
            "state": state,
            "config": config,
            "prefix": prefix,
            "supervisord": supervisord,
            "url": f"http://{address(fleet.config.router.host, fleet.config.router.port)}",
            "ready": sum(replica["state"] == ProgramState.READY for replica in replicas),
            "replicas": len(replicas),
            "logs": str(fleet.layout.logs),
            "problems": problems,
        },
        "router": _entry(fleet, router) if router else None,
        "replicas": replicas,
    }


def why(fleet: Fleet, program: SupervisedProgram, now: float) -> dict[str, Any]:
    """Return the result of the command `why`: the status of a program and more about it."""
    return {
        **_entry(fleet, program),
        "for": round(max(0.0, now - program.since), 1),
        "waits_for": waiting_reason.waits_for(fleet, program, now) or None,
        "last_exit_time": program.last_exit_time or None,
        "next_try_in": waiting_reason.next_try_in(program, now),
        "output": str(fleet.layout.output(program.name)),
        "argv": masking.argv(program.spec.words),
    }


def all_ready(fleet: Fleet) -> bool:
    """Return whether every program that should run is READY and every replica is registered."""
    wanted = (program for program in fleet.programs.values() if not program.left_down)
    return (
        fleet.adopted
        and all(program.state is ProgramState.READY for program in wanted)
        and fleet.router.has_registered(fleet.replicas.values())
    )


def is_usable(fleet: Fleet) -> bool:
    """Return whether every program has started once and the system answers requests.

    It need not answer requests if the operator has stopped all replicas.
    """
    wanted = {program.name: program for program in fleet.programs.values() if not program.left_down}
    router = wanted.pop(ROUTER, None)
    states = {program.state for program in wanted.values()}
    if not fleet.adopted or states & {ProgramState.WAITING, ProgramState.STARTING}:
        return False
    # The router cannot use a replica that has not registered.
    if router is not None and not (
        router.state is ProgramState.READY and fleet.router.has_registered(fleet.replicas.values())
    ):
        return False
    return ProgramState.READY in states or not states


def is_first_start(fleet: Fleet) -> bool:
    """Return whether a program has not been started yet, or is loading for the first time."""
    return not fleet.adopted or any(
        program.state in (ProgramState.WAITING, ProgramState.STARTING) and not program.restarts
        for program in fleet.programs.values()
    )


def one_line(fleet: Fleet) -> str:
    """Return a summary such as "7/8 ready, replica 4 loading 62%"."""
    ready = sum(replica.state is ProgramState.READY for replica in fleet.replicas.values())
    words = [f"{ready}/{len(fleet.replicas)} ready"]
    for program in fleet.programs.values():
        if program.state is ProgramState.STARTING:
            progress = _number(program.health.get("progress"))
            words.append(
                f"{program.label} loading" + (f" {100 * progress:.0f}%" if progress is not None else "")
            )
        elif program.state not in (ProgramState.READY, ProgramState.WAITING):
            words.append(f"{program.label} {'paused' if program.paused else program.state}")
    return ", ".join(words)


def _entry(fleet: Fleet, program: SupervisedProgram) -> dict[str, Any]:
    number = program.spec.replica
    entry: dict[str, Any] = {} if number is None else {"replica": number}
    progress = _number(program.health.get("progress"))
    return entry | {
        "name": program.name,
        "state": str(program.state),
        "pid": program.pid or None,
        "uptime": max(0, int(time.time() - program.started)) if program.started else None,
        "restarts": program.restarts,
        "host": program.spec.host,
        "port": program.spec.ports[0],
        "metrics_port": program.spec.ports[0 if number is None else 1],
        "in_flight": fleet.router.in_flight(program),
        "progress": progress if program.state is ProgramState.STARTING else None,
        "intent": str(program.intent),
        "draining": program.draining,
        "drain_confirmed": _drain_confirmed(fleet, program),
        "last_exit": program.last_exit or None,
        "cause": str(program.cause) if program.cause else None,
        "note": program.note or waiting_reason.missing_at_the_router(fleet, program),
    }


def _drain_confirmed(fleet: Fleet, program: SupervisedProgram) -> bool | None:
    """Return whether the router confirms that it drains the replica; None if it should not be drained."""
    if not program.draining:
        return None
    row = fleet.router.row(program)
    return row.draining if row is not None else not fleet.router.snapshot.problem


def _number(value: Any) -> float | None:
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None
