"""Plans the steps from one list of programs to another. Pure.

The order keeps as many replicas READY as possible. The router comes first, because replicas with its new
address must find it there. Then:

* additions, which add capacity before others are replaced, and whose failure costs nothing;
* replacements, first of replicas that do not run anyway;
* removals, so that these replicas take requests until the others have been replaced.

From 8 replicas to 4 with each of the four changed, there are never fewer than 7 before the removals begin.
With removals first there would be 3.

A step that needs a port comes after the step that frees it. If steps need each other's ports in a cycle, the
first of them stops all programs that `clears` names. Only in this case is more than one replica down.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from ...common import masking
from ..config.programs import ROUTER, Program


class Verb(StrEnum):
    ADD = "add"
    REPLACE = "replace"
    REMOVE = "remove"
    #: The running process takes the new flags.
    RELOAD = "reload"


@dataclass(frozen=True, slots=True)
class Step:
    """Replacement or reload of a program (`old` and `new`), addition (`new`) or removal (`old`)."""

    old: Program | None
    new: Program | None
    #: Differences for people: "--max-model-len: 2048 -> 4096".
    why: tuple[str, ...] = ()
    #: Names of programs that hold a port of `new`. They are stopped first and start again in their own step.
    clears: tuple[str, ...] = ()

    @property
    def program(self) -> Program:
        program = self.new or self.old
        assert program is not None
        return program

    @property
    def verb(self) -> Verb:
        if self.old is None or self.new is None:
            return Verb.REMOVE if self.new is None else Verb.ADD
        return Verb.RELOAD if self.old.hash == self.new.hash else Verb.REPLACE

    def event(self) -> dict[str, Any]:
        """Return the step as it appears in events."""
        program = self.program
        return {"program": program.name, "label": program.label, "verb": self.verb, "why": list(self.why)}

    def __str__(self) -> str:
        return f"{self.verb} {self.program.label}" + (f" ({'; '.join(self.why)})" if self.why else "")


def plan(old: Iterable[Program], new: Iterable[Program], down: Collection[str] = ()) -> list[Step]:
    """Return the steps from `old` to `new` in order.

    Args:
        down: names of programs of `old` that do not run.
    """
    before = {program.name: program for program in old}
    after = {program.name: program for program in new}
    names = before.keys() | after.keys()
    pending = [Step(before.get(name), after.get(name)) for name in names if _differ(before, after, name)]
    pending.sort(key=lambda step: _order(step, down))
    holders = {port: name for name, program in before.items() for port in program.ports}
    stopped: set[str] = set()
    steps = []
    while pending:
        step = _next(pending, holders, stopped)
        pending.remove(step)
        clears = tuple(sorted(_blockers(step, holders)))
        stopped |= {*clears, step.program.name}
        holders = {port: name for port, name in holders.items() if name not in stopped}
        if step.new is not None:
            holders |= dict.fromkeys(step.new.ports, step.new.name)
            stopped.discard(step.new.name)
        why = differences(step.old, step.new) if step.old and step.new else ()
        steps.append(Step(step.old, step.new, why, clears))
    return steps


def differences(old: Program, new: Program) -> tuple[str, ...]:
    """Return the differing arguments and environment variables, with secrets masked."""
    found = []
    before, after = _arguments(old.words), _arguments(new.words)
    shown = masking.value
    for flag in dict.fromkeys((*before, *after)):
        name = masking.word(flag)
        if flag not in after:
            found.append(f"{name}: removed")
        elif masking.is_secret(flag) and before.get(flag) != after[flag]:
            found.append(f"{name}: {'changed' if flag in before else 'added'}")
        elif flag not in before:
            found.append(f"{name}{after[flag] and ' ' + shown(after[flag])}: added")
        elif before[flag] != after[flag]:
            found.append(f"{name}: {shown(before[flag])} -> {shown(after[flag])}")
    for name in sorted(old.env.keys() | new.env.keys()):
        if name not in new.env:
            found.append(f"environment {name}: removed")
        elif name not in old.env:
            found.append(f"environment {name}: added")
        elif old.env[name] != new.env[name]:
            found.append(f"environment {name}: changed")
    if old.stop_timeout != new.stop_timeout:
        found.append(f"stop_timeout: {old.stop_timeout:g} -> {new.stop_timeout:g}")
    if old.ports != new.ports and not found:
        found.append(f"ports: {old.ports} -> {new.ports}")
    return tuple(found)


def _differ(before: dict[str, Program], after: dict[str, Program], name: str) -> bool:
    if name not in before or name not in after:
        return True
    return not before[name].runs_as(after[name])


def _order(step: Step, down: Collection[str]) -> tuple[int, int]:
    program = step.program
    number = program.replica or 0
    if program.name == ROUTER:
        return 0, 0
    match step.verb:
        case Verb.ADD:
            return 1, number
        case Verb.REMOVE:
            return 4, -number
        case _:
            return (2 if program.name in down else 3), number


def _next(pending: list[Step], holders: dict[int, str], stopped: Collection[str]) -> Step:
    """Return the first step whose ports are free; a program that was stopped for its port comes first."""
    free = [step for step in pending if not _blockers(step, holders)]
    if free:
        return min(free, key=lambda step: step.program.name not in stopped)
    # Every step waits for another one. Follow them to a cycle: stopping programs helps only there.
    waiting = {step.program.name: step for step in pending}
    step, visited = pending[0], set[str]()
    while step.program.name not in visited:
        visited.add(step.program.name)
        step = waiting.get(min(_blockers(step, holders)), step)
    return step


def _blockers(step: Step, holders: dict[int, str]) -> set[str]:
    """Return the names of other programs that hold a port of `step.new`."""
    ports = step.new.ports if step.new is not None else ()
    return {holders[port] for port in ports if port in holders} - {step.program.name}


def _arguments(argv: tuple[str, ...]) -> dict[str, str]:
    """Map each flag to its words; words before the first flag belong to "program"."""
    found: dict[str, str] = {}
    flag = "program"
    for word in argv:
        if word.startswith("-"):
            flag = word
            found.setdefault(flag, "")
        else:
            found[flag] = f"{found[flag]} {word}" if found.get(flag) else word
    return found
