"""The operations: apply a plan, restart, start, stop.

A plan takes one replica at a time out of service, see maintenance.py.
"""

from __future__ import annotations

from ..config.programs import ROUTER, Program
from ..supervision.fleet import STOPPED, Fleet
from ..supervision.intents import DesiredState, Intent
from ..supervision.program_state import SupervisedProgram
from . import router_reload
from .maintenance import bring_up, drain, end, take_down, until_others_are_back, until_probed
from .operation import Operation, StepPosition, retry_until_accepted, stage_event
from .plan import Step, Verb


def roll(fleet: Fleet, steps: list[Step]) -> Operation:
    """Carry out the steps one after the other, all of them or none.

    The first replica that starts with the new configuration is the canary. If it or a later program does not
    come up, every changed program gets its old configuration back.
    """
    yield from until_probed(fleet)
    done: list[Step] = []
    canary = True
    for index, step in enumerate(steps, 1):
        position, program = StepPosition(index, len(steps)), step.program
        yield f"{index}/{len(steps)}: {step.verb} {program.label}"
        done.append(step)
        problem = yield from _apply(fleet, step, position)
        if problem:
            name = program.label + (", the canary" if canary and program.name != ROUTER else "")
            yield stage_event(program, "failed", position, note=problem)
            yield f"{name}: ERROR ({problem}); restoring the old configuration"
            for undo in reversed(done):
                yield from _undo(fleet, undo, position)
            return f"{name}: {problem}; the old configuration is restored"
        if program.name != ROUTER and step.new is not None:
            canary = canary and fleet.programs[program.name].left_down
    return ""


def restart(fleet: Fleet, names: list[str]) -> Operation:
    """Stop and start programs, one at a time, each with its current configuration."""
    for index, name in enumerate(names, 1):
        program, position = fleet.programs[name], StepPosition(index, len(names))
        if len(names) > 1:
            if program.intent is not Intent.RUN:
                continue  # stopped and held programs are restarted only by name
            yield from until_others_are_back(fleet, name)
        yield f"restart {program.label}"
        if problem := _clear_stopped(fleet, program):
            yield problem
        yield from take_down(fleet, name, "restart", position)
        fleet.request_start(program, "restart")
        problem = yield from bring_up(fleet, name, position)
        if problem:
            return f"{program.label}: {problem}"
    return ""


def start(fleet: Fleet, names: list[str]) -> Operation:
    """Start programs at the same time and wait for each."""
    for name in names:
        if problem := _clear_stopped(fleet, fleet.programs[name]):
            yield problem
        fleet.request_start(fleet.programs[name], "start")
    for index, name in enumerate(names, 1):
        problem = yield from bring_up(fleet, name, StepPosition(index, len(names)))
        if problem:
            return f"{fleet.programs[name].label}: {problem}"
        yield f"{fleet.programs[name].label}: READY"
    return ""


def stop(fleet: Fleet, names: list[str]) -> Operation:
    """Drain and stop programs at the same time, and keep them down until `start` or `restart`."""
    for name in names:
        program = fleet.programs[name]
        if problem := fleet.set_desired(program, DesiredState(Intent.STOPPED, program.draining)):
            yield problem
    yield from drain(fleet, names, StepPosition())
    for name in names:
        fleet.stop(fleet.programs[name], STOPPED)
    for index, name in enumerate(names, 1):
        yield stage_event(fleet.programs[name].spec, "stop", StepPosition(index, len(names)))
        yield from end(fleet, name, STOPPED)
        yield f"{fleet.programs[name].label}: stopped"
    return ""


def _apply(fleet: Fleet, step: Step, position: StepPosition) -> Operation:
    if step.verb is Verb.RELOAD:
        return (yield from router_reload.reload(fleet, step.program, position))
    name = step.program.name
    for each in (*step.clears, name):
        yield from until_others_are_back(fleet, each)
        yield from take_down(fleet, each, "new configuration", position, for_good=step.new is None)
    problem = yield from retry_until_accepted(lambda: fleet.replace_program(name, step.new))
    if problem:
        # Usually a full disk. The old configuration can still be started.
        if (known := fleet.programs.get(name)) is not None and not known.left_down:
            fleet.request_start(known, "new configuration failed")
        return problem
    if step.new is None or fleet.programs[name].intent is Intent.STOPPED:
        return ""
    fleet.request_start(fleet.programs[name], "new configuration")
    return (yield from bring_up(fleet, name, position))


def _undo(fleet: Fleet, step: Step, position: StepPosition) -> Operation:
    back = Step(step.new, step.old, clears=_port_holders(fleet, step.old))
    yield stage_event(back.program, "rollback", position)
    failed = yield from _apply(fleet, back, position)
    yield f"{back.program.label}: " + (f"ERROR ({failed})" if failed else "restored")
    return failed


def _port_holders(fleet: Fleet, program: Program | None) -> tuple[str, ...]:
    """Return the names of other programs that have one of its ports."""
    if program is None:
        return ()
    others = (other.spec for other in fleet.programs.values() if other.name != program.name)
    return tuple(other.name for other in others if set(other.ports) & set(program.ports))


def _clear_stopped(fleet: Fleet, program: SupervisedProgram) -> str:
    """Reset the intent STOPPED to RUN. Return why that could not be saved, or ""."""
    if program.intent is not Intent.STOPPED:
        return ""
    return fleet.set_desired(program, DesiredState(Intent.RUN, program.draining))
