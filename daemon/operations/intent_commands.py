"""Commands that change an operator's intent and take effect at once: drain, undrain, hold, release."""

from __future__ import annotations

import logging
from collections.abc import Callable

from ..control import protocol
from ..control.server import Conversation
from ..supervision.fleet import HELD, Fleet
from ..supervision.intents import DesiredState, Intent
from ..supervision.program_state import FAILED, ProgramState, SupervisedProgram
from . import maintenance
from .operation import Operation
from .operation_runner import internal_error

log = logging.getLogger("fd-dp")

#: Desired state after a command, by its name.
DESIRED_STATES: dict[str, Callable[[SupervisedProgram], DesiredState]] = {
    "drain": lambda program: DesiredState(program.intent, draining=True),
    "undrain": lambda program: DesiredState(program.intent, draining=False),
    "hold": lambda program: DesiredState(Intent.HELD, program.draining),
    "release": lambda program: DesiredState(
        Intent.RUN if program.intent is Intent.HELD else program.intent, program.draining
    ),
}


class IntentCommands:
    """Carries out these commands, and lets clients wait until a replica is drained."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        #: Clients that wait until a replica is drained.
        self._drains: list[tuple[Operation, Conversation]] = []
        #: A program was released. Reloads skip held programs, so it may need a newer configuration.
        self._has_released = False

    def handle(
        self, command: str, replicas: list[SupervisedProgram], conversation: Conversation, *, wait: bool
    ) -> None:
        """Carry out one of `DESIRED_STATES` for these programs."""
        fleet = self._fleet
        if not fleet.adopted:
            conversation.end(protocol.BUSY, error="fd-dp is starting; try again later")
            return
        problems = (f"{r.label}: {text}" for r in replicas if (text := rejection(command, r)))
        if problem := next(problems, ""):
            conversation.end(protocol.FAILED, error=problem)
            return
        if problem := apply(fleet, command, replicas):
            conversation.line(problem)
        log.info("%s: %s", command, ", ".join(replica.label for replica in replicas))
        self._has_released = self._has_released or command == "release"
        if command == "drain" and not fleet.router.snapshot.problem and no_replica_accepting(fleet):
            conversation.line("no replica takes requests now")
        if command == "drain" and wait:
            names = [replica.name for replica in replicas]
            self._drains.append((maintenance.until_drained(fleet, names), conversation))
        else:
            conversation.end(protocol.OK)

    def take_release(self) -> bool:
        """Return True if a program was released since the last call."""
        has_released, self._has_released = self._has_released, False
        return has_released

    def advance(self) -> None:
        """Resume every drain that a client waits for."""
        self._drains = [each for each in self._drains if _advance(*each)]


def rejection(command: str, program: SupervisedProgram) -> str:
    """Return why a command cannot be carried out, or ""."""
    if command in ("drain", "undrain") and program.is_router:
        return "only replicas can be drained"
    if command == "hold" and program.intent is Intent.STOPPED:
        return f"it is stopped, so it cannot be held; fdctl start {program.name} first"
    return ""


def apply(fleet: Fleet, command: str, programs: list[SupervisedProgram]) -> str:
    """Record and apply a desired state. Return why it could not be saved, or ""."""
    problem = ""
    for program in programs:
        problem = fleet.set_desired(program, DESIRED_STATES[command](program))
        if command == "hold" and program.state in FAILED:
            # It has ended, and a held program is not started again.
            fleet.stop(program, HELD)
    return problem


def no_replica_accepting(fleet: Fleet) -> bool:
    """Return whether every READY replica is drained."""
    replicas = fleet.replicas.values()
    return all(
        replica.state is not ProgramState.READY or fleet.router.drains(replica) for replica in replicas
    )


def _advance(operation: Operation, conversation: Conversation) -> bool:
    """Return whether it has to be resumed again."""
    try:
        if isinstance(update := next(operation), str):
            conversation.line(update)
        return not conversation.is_over
    except StopIteration as end:
        if end.value:
            conversation.end(protocol.FAILED, error=end.value)
        else:
            conversation.end(protocol.OK)
        return False
    except Exception as fault:
        # Other waiting clients are not affected.
        log.exception("a command that waits for a drain failed")
        conversation.end(protocol.FAILED, error=internal_error(fault))
        return False
