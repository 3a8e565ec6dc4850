"""Takes replicas out of service and brings them back, so that no request is lost by it.

Before one that serves is stopped, the router gives it nothing new, until nothing is left in flight, or for
`drain_timeout`: what is left then goes on at another replica, which the router sees to when it says farewell.
It is back when the router gives it requests again. The router may be restarting, or gone, meanwhile: that
takes some seconds longer, and fails nothing.
"""

from __future__ import annotations

from collections.abc import Iterable

from ..config.programs import ROUTER
from ..supervision.fleet import Fleet
from ..supervision.intents import Intent
from ..supervision.program_state import FAILED, ProgramState, SupervisedProgram
from .operation import Operation, Passage, Place, stage

#: A router that is started anew needs a second or two. One that is silent for longer keeps nobody.
_ROUTER_PATIENCE = 10.0
#: From READY to being used: a heartbeat, which comes every second, and a health check of the router's.
_SERVICE_PATIENCE = 30.0
#: A new daemon has asked everybody once.
_FIRST_ANSWERS = 15.0
_ON_THE_WAY = (ProgramState.WAITING, ProgramState.STARTING, ProgramState.BACKOFF, ProgramState.STOPPING)


def take_down(fleet: Fleet, name: str, why: str, place: Place, *, for_good: bool = False) -> Passage:
    """Until it is down. `for_good`: nobody waits for its return, so that it is drained in any case."""
    replica = fleet.programs.get(name)
    if replica is None:
        return
    if for_good or _stand_ins(fleet, name):
        yield from drain(fleet, [name], place)
    elif _serves(fleet, name):
        yield from _await_quiet(fleet, replica, place)
    if replica.alive:
        yield stage(replica.program, "stop", place)
    yield from end(fleet, name, why)


def end(fleet: Fleet, name: str, why: str) -> Passage:
    """Without draining it."""
    while (replica := fleet.programs.get(name)) is not None:
        fleet.stop(replica, why)
        if not replica.alive:
            return
        yield None


def bring_up(fleet: Fleet, name: str, place: Place) -> Operation:
    """Until it is READY, or fails for the first time, and then until the router uses it.

    The fleet's startup timeout makes sure that this ends.
    """
    yield stage(fleet.programs[name].program, "start", place)
    while (replica := fleet.programs[name]).state is not ProgramState.READY:
        if replica.state in FAILED or replica.state is ProgramState.STOPPED:
            return replica.note or "was stopped"
        if fleet.stopping:
            return "fd-dp ends"
        yield None
    fleet.router.maintenance.discard(name)
    problem = yield from _until_used(fleet, replica)
    if not problem:
        yield stage(replica.program, "ready", place)
    return problem


def drain(fleet: Fleet, names: Iterable[str], place: Place) -> Passage:
    """The router gives those of them that serve nothing new, until what they have has ended or time is up."""
    timeout = fleet.config.supervise.drain_timeout
    left = [name for name in names if _serves(fleet, name)]
    if not left or not timeout:
        return
    began = heard = fleet.now
    told: dict[str, int] = {}
    fleet.router.maintenance.update(left)
    while left:
        for name in left:
            in_flight = fleet.router.in_flight(fleet.programs[name]) or 0
            if told.get(name) != in_flight:
                told[name] = in_flight
                yield stage(fleet.programs[name].program, "drain", place, in_flight)
        yield None
        heard = heard if fleet.router.snapshot.problem else fleet.now
        for name in [*left]:
            took = fleet.now - began
            label, rest = (
                fleet.programs[name].label,
                _requests(fleet.router.in_flight(fleet.programs[name]) or 0),
            )
            if not _serves(fleet, name):
                yield f"{label}: {fleet.programs[name].state} while it was drained"
            elif is_drained(fleet, name, began):
                fleet.metrics.drained(name, took)
            elif took >= timeout:
                fleet.metrics.drained(name, took)
                yield f"{label}: {rest} in flight after {timeout:g} s; going on elsewhere"
            elif fleet.now - heard > _patience_with_router(fleet):
                yield f"{label}: not drained: {fleet.router.snapshot.problem}"
            else:
                continue
            left.remove(name)


def until_drained(fleet: Fleet, names: list[str]) -> Operation:
    """Waits until nothing is in flight at those that the operator has drained, for as long as that takes."""
    began = fleet.now
    told: dict[str, int] = {}
    complained = ""
    while left := [name for name in names if name in fleet.programs and not is_drained(fleet, name, began)]:
        for name in left:
            replica = fleet.programs[name]
            if not replica.draining:
                return f"{replica.label}: is drained no more"
            row = fleet.router.row(replica)
            if row is not None and row.draining and told.get(name, 0) != row.in_flight:
                told[name] = row.in_flight
                yield f"{replica.label}: {_requests(row.in_flight)} in flight"
        if fleet.router.snapshot.problem not in ("", complained):
            complained = fleet.router.snapshot.problem
            yield f"{complained}; until it does, it keeps sending requests to what is to be drained"
        if not told and fleet.router.snapshot.problem and fleet.now - began > _patience_with_router(fleet):
            return f"{fleet.router.snapshot.problem}; it is told as soon as it does"
        yield None
    return ""


def is_drained(fleet: Fleet, name: str, since: float) -> bool:
    """The router has said after `since` that it gives it nothing new and has nothing there, or knows none."""
    look, row = fleet.router.snapshot, fleet.router.row(fleet.programs[name])
    if look.problem or look.at < since:
        return False
    return row is None or (row.draining and row.in_flight == 0)


def until_known(fleet: Fleet) -> Passage:
    """A new daemon does not know yet which of the programs that it has found are at work."""
    began = fleet.now
    while fleet.now - began < _FIRST_ANSWERS and any(
        replica.state is ProgramState.STARTING and not replica.health for replica in fleet.programs.values()
    ):
        yield None


def until_others_are_back(fleet: Fleet, name: str) -> Passage:
    """One on its way back is out of service already: two would be too many. Ends with the startup timeout,
    because one that fails again and again may need just what is about to be done."""
    began, told = fleet.now, False
    while _serves(fleet, name) and fleet.now - began < fleet.config.supervise.startup_timeout:
        missing = [
            f"{other.label} ({other.state})"
            for other in fleet.replicas.values()
            if other.name != name
            if other.intent is Intent.RUN and other.state in _ON_THE_WAY and not _serves(fleet, other.name)
        ]
        if not missing or fleet.stopping:
            return
        if not told:
            told = True
            yield f"{fleet.programs[name].label}: waits for {', '.join(missing)}"
        yield None


def _await_quiet(fleet: Fleet, replica: SupervisedProgram, place: Place) -> Passage:
    """Nobody else could take what it is not given: it goes on up to a moment without requests."""
    timeout = fleet.config.supervise.drain_timeout
    if not timeout:
        return
    yield f"{replica.label}: not drained: no other takes requests; it is stopped when it has none"
    began, told = fleet.now, -1
    while _serves(fleet, replica.name) and (took := fleet.now - began) < timeout:
        in_flight = fleet.router.in_flight(replica)
        if in_flight == 0 and fleet.router.snapshot.at > began:
            return
        if in_flight is None and took > _patience_with_router(fleet):
            return
        if in_flight is not None and told != in_flight:
            told = in_flight
            yield stage(replica.program, "drain", place, in_flight)
        yield None


def _until_used(fleet: Fleet, replica: SupervisedProgram) -> Operation:
    """Until the router gives it requests, or has been silent for long: that is no fault of the replica.

    To be READY and not known to the router may well be the fault of a new configuration, and what happens to
    one would happen to all.
    """
    if replica.program.replica is None:
        return ""
    began, heard = fleet.now, False
    while True:
        look, row = fleet.router.snapshot, fleet.router.row(replica)
        heard |= look.at > began and not look.problem
        if replica.state is not ProgramState.READY:
            return replica.note or f"{replica.state} soon after it was READY"
        if row is not None and row.in_service and row.draining == fleet.router.drains(replica):
            return ""
        waited = fleet.now - began
        if not heard and waited > _patience_with_router(fleet):
            yield f"{replica.label}: READY, but nobody says whether it is used: {look.problem}"
            return ""
        if waited > _SERVICE_PATIENCE:
            return f"READY, but not in use {_SERVICE_PATIENCE:g} s later; does it register with this router?"
        yield None


def _serves(fleet: Fleet, name: str) -> bool:
    """READY, or found at work by a new daemon that still waits for its first token."""
    replica = fleet.programs.get(name)
    if replica is None or replica.program.replica is None:
        return False
    row = fleet.router.row(replica)
    used = replica.state is ProgramState.STARTING and row is not None and row.in_service
    return replica.state is ProgramState.READY or used


def _stand_ins(fleet: Fleet, name: str) -> bool:
    """Whether another replica can take its requests."""
    others = (other for other in fleet.replicas.values() if other.name != name)
    return any(_serves(fleet, other.name) and not fleet.router.drains(other) for other in others)


def _patience_with_router(fleet: Fleet) -> float:
    """Seconds."""
    router = fleet.programs.get(ROUTER)
    return _ROUTER_PATIENCE if router is not None and not router.left_down else 0.0


def _requests(number: int) -> str:
    return "1 request" if number == 1 else f"{number} requests"
