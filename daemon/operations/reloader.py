"""Reloads, which `fdctl reload` and SIGHUP begin."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path

from ...common.errors import FastDeployError
from ..config import loader as dp_toml
from ..config.loader import Config
from ..config.programs import ROUTER, Program
from ..control import protocol
from ..control.server import Conversation
from ..supervision.fleet import Fleet
from ..supervision.intents import Intent
from . import rollout
from .operation_runner import OperationRunner
from .plan import Step, plan

log = logging.getLogger("fd-dp")


class Reloader:
    """Replaces running programs with those of dp.toml.

    Args:
        prefix: as in `config.loader.load`.
        programs_for: returns the programs of a configuration, or raises ConfigError.
    """

    def __init__(
        self,
        fleet: Fleet,
        runner: OperationRunner,
        file: Path,
        prefix: Path | None,
        programs_for: Callable[[Config], list[Program]],
    ) -> None:
        self._fleet = fleet
        self._runner = runner
        self._file = file
        self._prefix = prefix
        self._programs_for = programs_for

    def reload(self, conversation: Conversation | None, *, dry_run: bool, wait: bool) -> None:
        """Read dp.toml and begin the operation that applies it. An invalid file changes nothing.

        The caller has checked that an operation may begin.
        """
        began = time.monotonic()
        try:
            config = dp_toml.load(self._file, self._prefix)
            if config.paths != self._fleet.config.paths:
                raise FastDeployError(f"{self._file}: [paths] cannot change while fd-dp runs; restart it")
            programs = self._programs_for(config)
            steps = self._plan(programs)
        except FastDeployError as error:
            log.error("reload rejected, nothing has changed: %s", error)
            if not dry_run:
                self._fleet.metrics.reloaded("refused", time.monotonic() - began)
            if conversation:
                conversation.end(protocol.BAD_CONFIG, error=str(error))
            return
        for notice in config.deprecations:
            log.warning("%s", notice)
        for line in [str(step) for step in steps] or ["no program changes"]:
            log.info("reload: %s", line)
            if conversation:
                conversation.line(line)
        if conversation:
            conversation.event({"kind": "plan", "steps": [step.event() for step in steps]})
            for line in self._postponed(programs):
                conversation.line(line)
            if dry_run or not wait:
                conversation.end(protocol.OK, changes=len(steps))
        if not dry_run:
            self._begin(config, programs, steps, conversation if wait else None)

    def catch_up(self) -> None:
        """Bring running programs to the configuration that was loaded last, if they differ from it.

        A daemon that was killed during a reload leaves programs of two configurations behind, and a reload
        skips held programs.
        """
        fleet = self._fleet
        try:
            steps = self._plan(fleet.wanted)
        except FastDeployError as error:
            log.error("%s", error)
            return
        if steps:
            log.info("running programs differ from dp.toml: %s", "; ".join(map(str, steps)))
            self._begin(fleet.config, fleet.wanted, steps, None)

    def _begin(
        self, config: Config, programs: list[Program], steps: list[Step], conversation: Conversation | None
    ) -> None:
        old, began = (self._fleet.config, self._fleet.wanted), time.monotonic()
        self._fleet.configure(config, programs)

        def on_end(problem: str) -> None:
            self._fleet.metrics.reloaded("rolled_back" if problem else "done", time.monotonic() - began)
            if problem:
                self._fleet.configure(*old)
                return
            self._fleet.intents.keep_only(self._fleet.programs)
            router = self._fleet.programs[ROUTER]
            if config.router.api_keys_file and router.alive and all(s.program.name != ROUTER for s in steps):
                # The key file may have changed although its name has not.
                self._fleet.update_router_flags(router.spec)

        self._runner.begin("reload", rollout.roll(self._fleet, steps), conversation, on_end)

    def _plan(self, programs: list[Program]) -> list[Step]:
        """Return the steps to `programs`, without held programs.

        Raises FastDeployError if a step needs the port of a held program.
        """
        supervised = self._fleet.programs
        held = {name for name, program in supervised.items() if program.intent is Intent.HELD}
        wanted = [program for program in programs if program.name not in held]
        wanted += [supervised[name].spec for name in held]
        down = {name for name, program in supervised.items() if not program.alive}
        steps = plan([program.spec for program in supervised.values()], wanted, down)
        for step in steps:
            if blocking := sorted(held & {*step.clears}):
                label = supervised[blocking[0]].label
                raise FastDeployError(
                    f"{step.program.label} needs a port of {label}, which is held; "
                    f"fdctl release {blocking[0]}, then reload"
                )
        return steps

    def _postponed(self, programs: list[Program]) -> list[str]:
        """Return a line for each step that waits for the release of its program."""
        supervised = self._fleet.programs.values()
        held = [program.spec for program in supervised if program.intent is Intent.HELD]
        wanted = [program for program in programs if program.name in {each.name for each in held}]
        return [f"postponed until it is released: {step}" for step in plan(held, wanted)]
