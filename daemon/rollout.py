"""Two lists of programs -> the steps that lead from one to the other, and how they are carried out.

The plan is pure. It is carried out as a generator which the daemon's loop resumes after each step of the
fleet: it never waits by itself, and it sees the same facts as everything else.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable
from dataclasses import dataclass

from . import masking
from .fleet import HELD, Fleet
from .programs import ROUTER, Program
from .replica import State
from .supervisor import SupervisorError, SupervisorLost

#: What a running operation tells between its steps: a line for people, or None for "still waiting".
#: Its end is "" or the reason why it failed.
Operation = Generator[str | None, None, str]


@dataclass(frozen=True, slots=True)
class Step:
    """One program is replaced (old and new), added (new) or removed (old)."""

    old: Program | None
    new: Program | None
    #: What differs, for people: "--max-model-len: 2048 -> 4096".
    why: tuple[str, ...] = ()
    #: Programs that still hold a port which `new` needs; they end first, and come back in their own step.
    clears: tuple[str, ...] = ()

    @property
    def program(self) -> Program:
        program = self.new or self.old
        assert program is not None
        return program

    def __str__(self) -> str:
        verb = "replace" if self.old and self.new else "add" if self.new else "remove"
        return f"{verb} {self.program.label}" + (f" ({'; '.join(self.why)})" if self.why else "")


def plan(old: Iterable[Program], new: Iterable[Program]) -> list[Step]:
    """Removals first, the highest first; then, router first and in order, replacements and additions."""
    before = {program.name: program for program in old}
    after = {program.name: program for program in new}
    removed = [before[name] for name in before if name not in after]
    steps = [Step(program, None) for program in sorted(removed, key=_order, reverse=True)]
    current = {name: program for name, program in before.items() if name in after}
    for program in sorted(after.values(), key=_order):
        known = before.get(program.name)
        if known is not None and known.hash == program.hash:
            continue
        others = (other for other in current.values() if other.name != program.name)
        clears = tuple(other.name for other in others if set(other.ports) & set(program.ports))
        steps.append(Step(known, program, differences(known, program) if known else (), clears))
        current[program.name] = program
    return steps


def differences(old: Program, new: Program) -> tuple[str, ...]:
    """Which arguments and environment variables differ, without the values that may be secrets."""
    found = []
    before, after = _arguments(old.argv), _arguments(new.argv)
    for flag in dict.fromkeys((*before, *after)):
        name = masking.word(flag)
        if flag not in after:
            found.append(f"{name}: removed")
        elif masking.is_secret(flag) and before.get(flag) != after[flag]:
            found.append(f"{name}: {'changed' if flag in before else 'added'}")
        elif flag not in before:
            found.append(f"{name}{after[flag] and ' ' + after[flag]}: added")
        elif before[flag] != after[flag]:
            found.append(f"{name}: {before[flag]} -> {after[flag]}")
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


def roll(fleet: Fleet, steps: list[Step]) -> Operation:
    """One program at a time, the next only when the last is READY. All of it, or nothing.

    If a program fails with its new configuration, every program that was changed gets its old one back.
    """
    done: list[Step] = []
    for step in steps:
        yield str(step)
        done.append(step)
        problem = yield from _apply(fleet, step)
        if problem:
            yield f"{step.program.label}: ERROR ({problem}); putting the old configuration back"
            for undo in reversed(done):
                back = Step(undo.new, undo.old, clears=_clears(fleet, undo.old))
                failed = yield from _apply(fleet, back)
                yield f"{back.program.label}: " + (f"ERROR ({failed})" if failed else "as before")
            return f"{step.program.label}: {problem}; the old configuration is back"
    return ""


def restart(fleet: Fleet, names: list[str]) -> Operation:
    """Ends and starts them, one at a time, each with the configuration that it has."""
    for name in names:
        replica = fleet.replicas[name]
        if replica.held and len(names) > 1:
            continue  # "all" is not a wish to start what was stopped by name
        yield f"restart {replica.label}"
        fleet.hold(replica, False)
        yield from _stop(fleet, name, "restart")
        fleet.want(replica, "restart")
        problem = yield from _until_ready(fleet, name)
        if problem:
            return f"{replica.label}: {problem}"
    return ""


def start(fleet: Fleet, names: list[str]) -> Operation:
    """Starts those that do not run, together, and waits for each."""
    for name in names:
        fleet.hold(fleet.replicas[name], False)
        fleet.want(fleet.replicas[name], "start")
    for name in names:
        problem = yield from _until_ready(fleet, name)
        if problem:
            return f"{fleet.replicas[name].label}: {problem}"
        yield f"{fleet.replicas[name].label}: READY"
    return ""


def stop(fleet: Fleet, names: list[str]) -> Operation:
    """Ends them, together, and keeps them down until someone starts them."""
    for name in names:
        fleet.hold(fleet.replicas[name], True)
        fleet.stop(fleet.replicas[name], HELD)
    for name in names:
        yield from _stop(fleet, name, HELD)
        yield f"{fleet.replicas[name].label}: stopped"
    return ""


def _apply(fleet: Fleet, step: Step) -> Operation:
    for name in (*step.clears, step.program.name):
        yield from _stop(fleet, name, "new configuration")
    while True:
        try:
            fleet.put(step.program.name, step.new)
            break
        except SupervisorLost:
            # The loop starts it again, or waits until systemd has.
            yield None
        except (SupervisorError, OSError) as error:
            # A full disk, mostly. What it was before can still be started.
            if (known := fleet.replicas.get(step.program.name)) is not None and not known.held:
                fleet.want(known, "new configuration failed")
            return str(error)
    if step.new is None:
        return ""
    replica = fleet.replicas[step.new.name]
    if replica.held:
        return ""
    fleet.want(replica, "new configuration")
    return (yield from _until_ready(fleet, step.new.name))


def _stop(fleet: Fleet, name: str, why: str) -> Generator[None, None, None]:
    while (replica := fleet.replicas.get(name)) is not None:
        fleet.stop(replica, why)
        if not replica.alive:
            return
        yield None


def _until_ready(fleet: Fleet, name: str) -> Operation:
    """Ends with READY or with its first failure; the fleet's startup timeout makes sure that it ends."""
    while True:
        replica = fleet.replicas[name]
        if replica.state is State.READY:
            return ""
        if replica.state in (State.BACKOFF, State.QUARANTINED):
            return replica.note
        if replica.held or fleet.stopping:
            return "was stopped"
        yield None


def _clears(fleet: Fleet, program: Program | None) -> tuple[str, ...]:
    if program is None:
        return ()
    others = (replica.program for replica in fleet.replicas.values() if replica.name != program.name)
    return tuple(other.name for other in others if set(other.ports) & set(program.ports))


def _order(program: Program) -> int:
    return -1 if program.name == ROUTER else program.replica or 0


def _arguments(argv: tuple[str, ...]) -> dict[str, str]:
    """--flag -> its words; what comes before the first flag is "program"."""
    found: dict[str, str] = {}
    flag = "program"
    for word in argv:
        if word.startswith("-"):
            flag = word
            found.setdefault(flag, "")
        else:
            found[flag] = f"{found[flag]} {word}" if found.get(flag) else word
    return found
