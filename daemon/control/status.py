"""The daemon's status: the stable schema of `fdctl status --json`, and a one-line summary."""

from __future__ import annotations

import os
import time
from typing import Any

from ... import __version__
from ..config import masking
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
    """Return the answer to the command `status`. docs/fdctl.md describes its fields."""
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


def why(fleet: Fleet, replica: SupervisedProgram, now: float) -> dict[str, Any]:
    """Return the answer to the command `why`: the status of a program and more about it."""
    return {
        **_entry(fleet, replica),
        "for": round(max(0.0, now - replica.since), 1),
        "waits_for": waiting_reason.waits_for(fleet, replica, now) or None,
        "last_exit_time": replica.last_exit_time or None,
        "next_try_in": waiting_reason.next_try_in(replica, now),
        "output": str(fleet.layout.output(replica.name)),
        "argv": masking.argv(replica.program.words),
    }


def all_ready(fleet: Fleet) -> bool:
    """Return whether every program that should run is READY and every replica is registered."""
    wanted = (replica for replica in fleet.programs.values() if not replica.left_down)
    return (
        fleet.adopted
        and all(replica.state is ProgramState.READY for replica in wanted)
        and fleet.router.has_registered(fleet.replicas.values())
    )


def is_usable(fleet: Fleet) -> bool:
    """Return whether every program has been started once and requests are answered.

    The latter does not count if the operator has stopped all replicas.
    """
    wanted = {replica.name: replica for replica in fleet.programs.values() if not replica.left_down}
    router = wanted.pop(ROUTER, None)
    states = {replica.state for replica in wanted.values()}
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
        replica.state in (ProgramState.WAITING, ProgramState.STARTING) and not replica.restarts
        for replica in fleet.programs.values()
    )


def one_line(fleet: Fleet) -> str:
    """ "7/8 ready, replica 4 loading 62%"."""
    ready = sum(replica.state is ProgramState.READY for replica in fleet.replicas.values())
    words = [f"{ready}/{len(fleet.replicas)} ready"]
    for replica in fleet.programs.values():
        if replica.state is ProgramState.STARTING:
            progress = _number(replica.health.get("progress"))
            words.append(
                f"{replica.label} loading" + (f" {100 * progress:.0f}%" if progress is not None else "")
            )
        elif replica.state not in (ProgramState.READY, ProgramState.WAITING):
            words.append(f"{replica.label} {'paused' if replica.paused else replica.state}")
    return ", ".join(words)


def _entry(fleet: Fleet, replica: SupervisedProgram) -> dict[str, Any]:
    number = replica.program.replica
    entry: dict[str, Any] = {} if number is None else {"replica": number}
    progress = _number(replica.health.get("progress"))
    return entry | {
        "name": replica.name,
        "state": str(replica.state),
        "pid": replica.pid or None,
        "uptime": max(0, int(time.time() - replica.started)) if replica.started else None,
        "restarts": replica.restarts,
        "host": replica.program.host,
        "port": replica.program.ports[0],
        "metrics_port": replica.program.ports[0 if number is None else 1],
        "in_flight": fleet.router.in_flight(replica),
        "progress": progress if replica.state is ProgramState.STARTING else None,
        "intent": str(replica.intent),
        "draining": replica.draining,
        "drain_confirmed": _drain_confirmed(fleet, replica),
        "last_exit": replica.last_exit or None,
        "cause": str(replica.cause) if replica.cause else None,
        "note": replica.note or waiting_reason.missing_at_the_router(fleet, replica),
    }


def _drain_confirmed(fleet: Fleet, replica: SupervisedProgram) -> bool | None:
    """Return whether the router confirms that it drains the replica; None if it should not be drained."""
    if not replica.draining:
        return None
    row = fleet.router.row(replica)
    return row.draining if row is not None else not fleet.router.snapshot.problem


def _number(value: Any) -> float | None:
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None
