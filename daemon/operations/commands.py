"""Dispatch of fdctl's commands.

At most one operation (reload, restart, start, stop) is in progress. A second one is rejected with the name of
the first.
Drain, undrain, hold and release take effect at once, during operations too.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..config.loader import Config
from ..config.programs import Program
from ..control import protocol, status
from ..control.server import Conversation
from ..supervision.fleet import Fleet
from ..supervision.program_state import SupervisedProgram
from . import rollout
from .intent_commands import DESIRED_STATES, IntentCommands
from .operation_runner import OperationRunner
from .reloader import Reloader
from .repair import Repair

log = logging.getLogger("fd-dp")

_OPERATIONS = {"start": rollout.start, "stop": rollout.stop, "restart": rollout.restart}


class Commands:
    """Carries out commands of fdctl, and reloads on SIGHUP.

    Args:
        prefix: as in `config.loader.load`.
        programs_for: returns the programs of a configuration, or raises ConfigError.
        describe: returns the result of the command `status`.
    """

    def __init__(
        self,
        fleet: Fleet,
        file: Path,
        prefix: Path | None,
        programs_for: Callable[[Config], list[Program]],
        describe: Callable[[], dict[str, Any]],
    ) -> None:
        self._fleet = fleet
        self._describe = describe
        self._runner = OperationRunner(fleet)
        self._reloader = Reloader(fleet, self._runner, file, prefix, programs_for)
        self._intents = IntentCommands(fleet)
        self._repair = Repair(fleet, self._runner, self._reloader, self._intents)

    @property
    def busy(self) -> bool:
        """True while an operation is in progress."""
        return self._runner.busy

    def handle(self, command: dict[str, Any], conversation: Conversation) -> None:
        """Carry out a command from the control socket, or begin its operation."""
        name, wait = command.get("do"), bool(command.get("wait"))
        if name == "status":
            conversation.end(protocol.OK, status=self._describe())
        elif name == "why":
            for program in self._selected(command, conversation)[:1]:
                found = status.why(self._fleet, program, time.monotonic())
                problems = self._describe()["daemon"]["problems"]
                conversation.end(protocol.OK, why={**found, "problems": problems})
        elif name == "reload":
            self.reload(conversation, dry_run=bool(command.get("dry_run")), wait=wait)
        elif name in DESIRED_STATES:
            if programs := self._selected(command, conversation):
                self._intents.handle(str(name), programs, conversation, wait=wait)
        elif name in _OPERATIONS:
            if not self._may_begin(conversation):
                return
            if programs := self._selected(command, conversation):
                if not wait:
                    conversation.end(protocol.OK)
                operation = _OPERATIONS[name](self._fleet, [program.name for program in programs])
                self._runner.begin(f"{name} {command.get('name')}", operation, conversation if wait else None)
        else:
            conversation.end(protocol.USAGE, error=f"unknown command {name!r}")

    def reload(self, conversation: Conversation | None, *, dry_run: bool = False, wait: bool = False) -> None:
        """Read dp.toml and apply it, unless another operation is in progress."""
        if self._may_begin(conversation):
            self._reloader.reload(conversation, dry_run=dry_run, wait=wait)

    def catch_up(self) -> None:
        """Bring adopted programs to the configuration of dp.toml."""
        self._reloader.catch_up()

    def advance(self) -> None:
        """Resume operations. Call this after each step of the fleet."""
        self._intents.advance()
        if self._runner.busy:
            self._runner.advance()
        else:
            self._repair.step()

    def _may_begin(self, conversation: Conversation | None) -> bool:
        error = self._runner.rejection()
        if error:
            log.warning("command rejected: %s", error)
            if conversation:
                conversation.end(protocol.BUSY, error=error)
        return not error

    def _selected(self, command: dict[str, Any], conversation: Conversation) -> list[SupervisedProgram]:
        """Return the programs that a command names: "3", "replica3", "router", or "all" for all replicas.

        If there is none, the conversation ends with an error and the list is empty.
        """
        name = str(command.get("name", ""))
        programs = self._fleet.programs
        if name == "all":
            return [program for program in programs.values() if not program.is_router]
        if found := programs.get(name) or programs.get(f"replica{name}"):
            return [found]
        numbers = [str(program.spec.replica) for program in programs.values() if not program.is_router]
        error = f"no such replica; there are router, {', '.join(numbers)}, all"
        conversation.end(protocol.USAGE, error=f"{name}: ERROR ({error})")
        return []
