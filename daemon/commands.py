"""fdctl's commands, and the one operation (reload, restart, start, stop) that may be under way."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import FastDeployError
from . import config as dp_toml
from . import control, rollout, status
from .config import Config
from .control import Conversation
from .fleet import Fleet
from .programs import Program
from .replica import Replica
from .supervisor import SupervisorError

log = logging.getLogger("fd-dp")


class Commands:
    """Args: `programs_for` decides what runs for a configuration; `describe` makes the answer to `status`."""

    def __init__(
        self,
        fleet: Fleet,
        file: Path,
        prefix: Path | None,
        programs_for: Callable[[Config], list[Program]],
        describe: Callable[[], dict[str, Any]],
    ) -> None:
        self._fleet = fleet
        self._file = file
        self._prefix = prefix
        self._programs_for = programs_for
        self._describe = describe
        self._operation: rollout.Operation | None = None
        self._conversation: Conversation | None = None
        self._done: Callable[[str], None] = lambda problem: None

    @property
    def busy(self) -> bool:
        return self._operation is not None

    def handle(self, command: dict[str, Any], conversation: Conversation) -> None:
        do, wait = command.get("do"), bool(command.get("wait"))
        if do == "status":
            conversation.end(control.OK, status=self._describe())
        elif do == "why":
            for replica in self._named(command, conversation)[:1]:
                conversation.end(control.OK, why=status.why(self._fleet, replica, time.monotonic()))
        elif do == "reload":
            self.reload(conversation, dry_run=bool(command.get("dry_run")), wait=wait)
        elif do in ("start", "stop", "restart"):
            if not self._may_begin(conversation):
                return
            if names := [replica.name for replica in self._named(command, conversation)]:
                operation = {"start": rollout.start, "stop": rollout.stop, "restart": rollout.restart}[do]
                if not wait:
                    conversation.end(control.OK)
                self._begin(operation(self._fleet, names), conversation if wait else None)
        else:
            conversation.end(control.USAGE, error=f"unknown command {do!r}")

    def reload(self, conversation: Conversation | None, *, dry_run: bool = False, wait: bool = False) -> None:
        """Reads dp.toml again. A bad one changes nothing."""
        if not self._may_begin(conversation):
            return
        try:
            config = dp_toml.load(self._file, self._prefix)
            if config.paths != self._fleet.config.paths:
                raise FastDeployError(f"{self._file}: [paths] cannot change while fd-dp runs; restart it")
            programs = self._programs_for(config)
        except FastDeployError as error:
            log.error("reload refused, everything goes on as it was: %s", error)
            if conversation:
                conversation.end(control.BAD_CONFIG, error=str(error))
            return
        steps = self._plan(programs)
        for line in [str(step) for step in steps] or ["no program changes"]:
            log.info("reload: %s", line)
            if conversation:
                conversation.line(line)
        if conversation and (dry_run or not wait):
            conversation.end(control.OK, changes=len(steps))
        if not dry_run:
            self.roll_to(config, programs, conversation if wait else None)

    def roll_to(self, config: Config, programs: list[Program], conversation: Conversation | None) -> None:
        """Brings what runs to `programs`, or back to what it was."""
        old = self._fleet.config, self._fleet.wanted
        steps = self._plan(programs)
        self._fleet.configure(config, programs)

        def done(problem: str) -> None:
            if problem:
                self._fleet.configure(*old)

        self._begin(rollout.roll(self._fleet, steps), conversation, done)

    def advance(self) -> None:
        """One move of the operation, after the fleet's step has seen the facts."""
        if self._operation is None:
            return
        try:
            line = next(self._operation)
            if line is not None:
                log.info("%s", line)
                if self._conversation:
                    self._conversation.line(line)
        except StopIteration as end:
            self._finish(end.value)
        except (SupervisorError, OSError) as error:
            # OSError: a full disk. What runs goes on.
            self._finish(str(error))

    def _begin(
        self,
        operation: rollout.Operation,
        conversation: Conversation | None,
        done: Callable[[str], None] = lambda problem: None,
    ) -> None:
        self._operation, self._conversation, self._done = operation, conversation, done

    def _finish(self, problem: str) -> None:
        self._operation = None
        self._done(problem)
        if problem:
            log.error("ERROR (%s)", problem)
        if self._conversation and problem:
            self._conversation.end(control.FAILED, error=problem)
        elif self._conversation:
            self._conversation.end(control.OK)
        self._conversation = None

    def _may_begin(self, conversation: Conversation | None) -> bool:
        if self._fleet.stopping:
            error = "fd-dp is stopping"
        elif not self._fleet.adopted:
            error = "fd-dp is starting; try again later"
        elif self.busy:
            error = "another operation is under way; try again later"
        else:
            return True
        log.warning("refused: %s", error)
        if conversation:
            conversation.end(control.BUSY, error=error)
        return False

    def _plan(self, programs: list[Program]) -> list[rollout.Step]:
        return rollout.plan([replica.program for replica in self._fleet.replicas.values()], programs)

    def _named(self, command: dict[str, Any], conversation: Conversation) -> list[Replica]:
        """ "3", "replica3", "router"; "all" are the replicas. The error is the answer if there is none."""
        name = str(command.get("name", ""))
        replicas = self._fleet.replicas
        if name == "all":
            return [replica for replica in replicas.values() if replica.program.replica is not None]
        if found := replicas.get(name) or replicas.get(f"replica{name}"):
            return [found]
        numbers = [str(number) for r in replicas.values() if (number := r.program.replica) is not None]
        error = f"no such replica; there are router, {', '.join(numbers)}, all"
        conversation.end(control.USAGE, error=f"{name}: ERROR ({error})")
        return []
