"""A plan carried out, and what fdctl can ask for besides. Never more than one replica is out of service for a
plan's sake: its turn comes when the others are in service, see maintenance.py."""

from __future__ import annotations

from ..config.programs import ROUTER, Program
from ..supervision.fleet import STOPPED, Fleet
from ..supervision.intents import Intent, Wish
from ..supervision.program_state import SupervisedProgram
from . import router_reload
from .maintenance import bring_up, drain, end, take_down, until_known, until_others_are_back
from .operation import Operation, Place, insist, stage
from .plan import Step, Verb


def roll(fleet: Fleet, steps: list[Step]) -> Operation:
    """One step after the other. All of it, or nothing.

    The first replica that is started with the new configuration is the canary. If it does not come up, or any
    program after it, everything that was changed gets its old configuration back.
    """
    yield from until_known(fleet)
    done: list[Step] = []
    canary = True
    for index, step in enumerate(steps, 1):
        place, program = Place(index, len(steps)), step.program
        yield f"{index}/{len(steps)}: {step.verb} {program.label}"
        done.append(step)
        problem = yield from _apply(fleet, step, place)
        if problem:
            name = program.label + (", the canary" if canary and program.name != ROUTER else "")
            yield stage(program, "failed", place, note=problem)
            yield f"{name}: ERROR ({problem}); putting the old configuration back"
            for undo in reversed(done):
                yield from _undo(fleet, undo, place)
            return f"{name}: {problem}; the old configuration is back"
        if program.name != ROUTER and step.new is not None:
            canary = canary and fleet.programs[program.name].left_down
    return ""


def restart(fleet: Fleet, names: list[str]) -> Operation:
    """Ends and starts them, one at a time, each with the configuration that it has."""
    for index, name in enumerate(names, 1):
        replica, place = fleet.programs[name], Place(index, len(names))
        if len(names) > 1:
            if replica.intent is not Intent.RUN:
                continue  # "all" is not a wish to touch what was stopped, or is held, by name
            yield from until_others_are_back(fleet, name)
        yield f"restart {replica.label}"
        if problem := _no_longer_stopped(fleet, replica):
            yield problem
        yield from take_down(fleet, name, "restart", place)
        fleet.request_start(replica, "restart")
        problem = yield from bring_up(fleet, name, place)
        if problem:
            return f"{replica.label}: {problem}"
    return ""


def start(fleet: Fleet, names: list[str]) -> Operation:
    """Starts those that do not run, together, and waits for each."""
    for name in names:
        if problem := _no_longer_stopped(fleet, fleet.programs[name]):
            yield problem
        fleet.request_start(fleet.programs[name], "start")
    for index, name in enumerate(names, 1):
        problem = yield from bring_up(fleet, name, Place(index, len(names)))
        if problem:
            return f"{fleet.programs[name].label}: {problem}"
        yield f"{fleet.programs[name].label}: READY"
    return ""


def stop(fleet: Fleet, names: list[str]) -> Operation:
    """Drains and ends them, together, and keeps them down until someone starts them."""
    for name in names:
        replica = fleet.programs[name]
        if problem := fleet.wish(replica, Wish(Intent.STOPPED, replica.draining)):
            yield problem
    yield from drain(fleet, names, Place())
    for name in names:
        fleet.stop(fleet.programs[name], STOPPED)
    for index, name in enumerate(names, 1):
        yield stage(fleet.programs[name].program, "stop", Place(index, len(names)))
        yield from end(fleet, name, STOPPED)
        yield f"{fleet.programs[name].label}: stopped"
    return ""


def _apply(fleet: Fleet, step: Step, place: Place) -> Operation:
    if step.verb is Verb.RELOAD:
        return (yield from router_reload.reload(fleet, step.program, place))
    name = step.program.name
    for each in (*step.clears, name):
        yield from until_others_are_back(fleet, each)
        yield from take_down(fleet, each, "new configuration", place, for_good=step.new is None)
    problem = yield from insist(lambda: fleet.replace_program(name, step.new))
    if problem:
        # A full disk, mostly. What it was before can still be started.
        if (known := fleet.programs.get(name)) is not None and not known.left_down:
            fleet.request_start(known, "new configuration failed")
        return problem
    if step.new is None or fleet.programs[name].intent is Intent.STOPPED:
        return ""
    fleet.request_start(fleet.programs[name], "new configuration")
    return (yield from bring_up(fleet, name, place))


def _undo(fleet: Fleet, step: Step, place: Place) -> Operation:
    back = Step(step.new, step.old, clears=_holders(fleet, step.old))
    yield stage(back.program, "rollback", place)
    failed = yield from _apply(fleet, back, place)
    yield f"{back.program.label}: " + (f"ERROR ({failed})" if failed else "as before")
    return failed


def _holders(fleet: Fleet, program: Program | None) -> tuple[str, ...]:
    """Others that have one of its ports."""
    if program is None:
        return ()
    others = (replica.program for replica in fleet.programs.values() if replica.name != program.name)
    return tuple(other.name for other in others if set(other.ports) & set(program.ports))


def _no_longer_stopped(fleet: Fleet, replica: SupervisedProgram) -> str:
    """End the wish STOPPED. Return why that could not be saved, or ""."""
    if replica.intent is not Intent.STOPPED:
        return ""
    return fleet.wish(replica, Wish(Intent.RUN, replica.draining))
