"""Takes replicas out of service and brings them back without losing requests.

A serving replica is drained before it is stopped: the router sends it no new requests until none is in
flight, or for `drain_timeout`. When the replica deregisters, the router resumes the remaining ones on other
replicas. A replica is back in service when the router uses it again. If the router does not answer meanwhile,
this takes a few seconds longer, but does not fail.
"""

from __future__ import annotations

from collections.abc import Iterable

from ..config.programs import ROUTER
from ..supervision.fleet import Fleet
from ..supervision.intents import Intent
from ..supervision.program_state import FAILED, ProgramState, SupervisedProgram
from .operation import Operation, StepPosition, Waiting, stage_event

#: Seconds to wait for a router that does not answer. A restart takes a second or two.
_ROUTER_TIMEOUT = 10.0
#: Seconds from READY to use by the router: one heartbeat and one health check.
_REGISTRATION_TIMEOUT = 30.0
#: Seconds after which a new daemon has probed every program once.
_FIRST_PROBES = 15.0
_RETURNING = (ProgramState.WAITING, ProgramState.STARTING, ProgramState.BACKOFF, ProgramState.STOPPING)


def take_down(
    fleet: Fleet, name: str, why: str, position: StepPosition, *, for_good: bool = False
) -> Waiting:
    """Drain a program if it is a replica that serves, and stop it.

    Args:
        for_good: it does not come back, so drain it even if no other replica can take its requests.
    """
    program = fleet.programs.get(name)
    if program is None:
        return
    if for_good or _has_substitute(fleet, name):
        yield from drain(fleet, [name], position)
    elif _serves(fleet, name):
        yield from _until_idle(fleet, program, position)
    if program.alive:
        yield stage_event(program.spec, "stop", position)
    yield from end(fleet, name, why)


def end(fleet: Fleet, name: str, why: str) -> Waiting:
    """Stop a program without draining it."""
    while (program := fleet.programs.get(name)) is not None:
        fleet.stop(program, why)
        if not program.alive:
            return
        yield None


def bring_up(fleet: Fleet, name: str, position: StepPosition) -> Operation:
    """Wait until a program is READY and the router uses it, or until it fails for the first time.

    `startup_timeout` limits the wait.
    """
    yield stage_event(fleet.programs[name].spec, "start", position)
    while (program := fleet.programs[name]).state is not ProgramState.READY:
        if program.state in FAILED or program.state is ProgramState.STOPPED:
            return program.note or "was stopped"
        if fleet.stopping:
            return "fd-dp is stopping"
        yield None
    fleet.router.maintenance.discard(name)
    problem = yield from _until_in_use(fleet, program)
    if not problem:
        yield stage_event(program.spec, "ready", position)
    return problem


def drain(fleet: Fleet, names: Iterable[str], position: StepPosition) -> Waiting:
    """Drain the serving replicas among `names` until none has requests in flight, or for `drain_timeout`."""
    timeout = fleet.config.supervise.drain_timeout
    left = [name for name in names if _serves(fleet, name)]
    if not left or not timeout:
        return
    began = last_answer = fleet.now
    shown: dict[str, int] = {}
    fleet.router.maintenance.update(left)
    while left:
        for name in left:
            in_flight = fleet.router.in_flight(fleet.programs[name]) or 0
            if shown.get(name) != in_flight:
                shown[name] = in_flight
                yield stage_event(fleet.programs[name].spec, "drain", position, in_flight)
        yield None
        last_answer = last_answer if fleet.router.snapshot.problem else fleet.now
        for name in [*left]:
            took = fleet.now - began
            label = fleet.programs[name].label
            rest = _requests(fleet.router.in_flight(fleet.programs[name]) or 0)
            if not _serves(fleet, name):
                yield f"{label}: {fleet.programs[name].state} while it was drained"
            elif is_drained(fleet, name, began):
                fleet.metrics.drained(name, took)
            elif took >= timeout:
                fleet.metrics.drained(name, took)
                yield f"{label}: {rest} in flight after {timeout:g} s; resumed on other replicas"
            elif fleet.now - last_answer > _router_timeout(fleet):
                yield f"{label}: not drained: {fleet.router.snapshot.problem}"
            else:
                continue
            left.remove(name)


def until_drained(fleet: Fleet, names: list[str]) -> Operation:
    """Wait, without a limit, until replicas that the operator has drained have no request in flight."""
    began = fleet.now
    shown: dict[str, int] = {}
    reported = ""
    while left := [name for name in names if name in fleet.programs and not is_drained(fleet, name, began)]:
        for name in left:
            replica = fleet.programs[name]
            if not replica.draining:
                return f"{replica.label}: is no longer drained"
            row = fleet.router.row(replica)
            if row is not None and row.draining and shown.get(name, 0) != row.in_flight:
                shown[name] = row.in_flight
                yield f"{replica.label}: {_requests(row.in_flight)} in flight"
        if fleet.router.snapshot.problem not in ("", reported):
            reported = fleet.router.snapshot.problem
            yield f"{reported}; these replicas may still get requests"
        if not shown and fleet.router.snapshot.problem and fleet.now - began > _router_timeout(fleet):
            return f"{fleet.router.snapshot.problem}; the drain takes effect when it answers"
        yield None
    return ""


def is_drained(fleet: Fleet, name: str, since: float) -> bool:
    """Return whether the router has confirmed the drain after `since`, or does not know the replica."""
    snapshot, row = fleet.router.snapshot, fleet.router.row(fleet.programs[name])
    if snapshot.problem or snapshot.at < since:
        return False
    return row is None or (row.draining and row.in_flight == 0)


def until_probed(fleet: Fleet) -> Waiting:
    """Wait until a new daemon knows which of the adopted programs are READY."""
    began = fleet.now
    while fleet.now - began < _FIRST_PROBES and any(
        program.state is ProgramState.STARTING and not program.health for program in fleet.programs.values()
    ):
        yield None


def until_others_are_back(fleet: Fleet, name: str) -> Waiting:
    """Wait while another replica is starting or stopping, so that only one is out of service.

    The wait ends after `startup_timeout`: a replica that keeps failing may need the very change that waits.
    """
    began, shown = fleet.now, False
    while _serves(fleet, name) and fleet.now - began < fleet.config.supervise.startup_timeout:
        missing = [
            f"{other.label} ({other.state})"
            for other in fleet.replicas.values()
            if other.name != name
            if other.intent is Intent.RUN and other.state in _RETURNING and not _serves(fleet, other.name)
        ]
        if not missing or fleet.stopping:
            return
        if not shown:
            shown = True
            yield f"{fleet.programs[name].label}: waits for {', '.join(missing)}"
        yield None


def _until_idle(fleet: Fleet, replica: SupervisedProgram, position: StepPosition) -> Waiting:
    """Wait for an idle moment instead of draining: no other replica could take the requests."""
    timeout = fleet.config.supervise.drain_timeout
    if not timeout:
        return
    yield f"{replica.label}: not drained, because no other replica takes requests; it stops when it is idle"
    began, shown = fleet.now, -1
    while _serves(fleet, replica.name) and (took := fleet.now - began) < timeout:
        in_flight = fleet.router.in_flight(replica)
        if in_flight == 0 and fleet.router.snapshot.at > began:
            return
        if in_flight is None and took > _router_timeout(fleet):
            return
        if in_flight is not None and shown != in_flight:
            shown = in_flight
            yield stage_event(replica.spec, "drain", position, in_flight)
        yield None


def _until_in_use(fleet: Fleet, program: SupervisedProgram) -> Operation:
    """Wait until the router uses a replica.

    It is a failure if the router answers and does not use the READY replica: the reason may be the new
    configuration, which would do the same to every other replica. It is none if the router does not answer.
    """
    if program.is_router:
        return ""
    began, has_answered = fleet.now, False
    while True:
        snapshot, row = fleet.router.snapshot, fleet.router.row(program)
        has_answered |= snapshot.at > began and not snapshot.problem
        if program.state is not ProgramState.READY:
            return program.note or f"{program.state} soon after it was READY"
        if row is not None and row.in_service and row.draining == fleet.router.drains(program):
            return ""
        waited = fleet.now - began
        if not has_answered and waited > _router_timeout(fleet):
            yield f"{program.label}: READY; whether the router uses it is unknown: {snapshot.problem}"
            return ""
        if waited > _REGISTRATION_TIMEOUT:
            return (
                f"READY, but the router does not use it after {_REGISTRATION_TIMEOUT:g} s; "
                "does it register with this router?"
            )
        yield None


def _serves(fleet: Fleet, name: str) -> bool:
    """Return whether a replica is READY, or was adopted in use and not yet probed for a token."""
    program = fleet.programs.get(name)
    if program is None or program.is_router:
        return False
    row = fleet.router.row(program)
    used = program.state is ProgramState.STARTING and row is not None and row.in_service
    return program.state is ProgramState.READY or used


def _has_substitute(fleet: Fleet, name: str) -> bool:
    """Return whether another replica can take the requests of this one."""
    others = (other for other in fleet.replicas.values() if other.name != name)
    return any(_serves(fleet, other.name) and not fleet.router.drains(other) for other in others)


def _router_timeout(fleet: Fleet) -> float:
    router = fleet.programs.get(ROUTER)
    return _ROUTER_TIMEOUT if router is not None and not router.left_down else 0.0


def _requests(number: int) -> str:
    return "1 request" if number == 1 else f"{number} requests"
