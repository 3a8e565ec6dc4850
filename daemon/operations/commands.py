"""fdctl's commands.

At most one operation (reload, restart, start, stop) is under way; who asks for another is told which. What
the operator wishes of a replica (drain, undrain, hold, release) holds at once, whatever is under way.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ...common.errors import FastDeployError
from ..config import loader as dp_toml
from ..config.loader import Config
from ..config.programs import ROUTER, Program
from ..control import protocol, status
from ..control.server import Conversation
from ..process.supervisor_client import SupervisorError
from ..supervision.fleet import Fleet
from ..supervision.intents import Intent
from ..supervision.program_state import ProgramState, SupervisedProgram
from . import maintenance, rollout, router_reload
from .intent_commands import WISHES, grant, nobody_is_left, objection
from .operation import Operation, Told
from .plan import Step, plan

log = logging.getLogger("fd-dp")

_OPERATIONS = {"start": rollout.start, "stop": rollout.stop, "restart": rollout.restart}
#: Between two times that the router is told to read its flags file.
_FLAGS_AGAIN = 30.0


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
        self._operation: Operation | None = None
        self._conversation: Conversation | None = None
        self._done: Callable[[str], None] = lambda problem: None
        #: What is under way, and where it is, for whoever asks for something else.
        self._what = self._where = ""
        #: Those who wait until a replica is drained.
        self._waiting: list[tuple[Operation, Conversation]] = []
        #: Something was released that a reload had left as it was.
        self._left_behind = False
        self._flags_told = float("-inf")

    @property
    def busy(self) -> bool:
        return self._operation is not None

    def handle(self, command: dict[str, Any], conversation: Conversation) -> None:
        do, wait = command.get("do"), bool(command.get("wait"))
        if do == "status":
            conversation.end(protocol.OK, status=self._describe())
        elif do == "why":
            for replica in self._named(command, conversation)[:1]:
                found = status.why(self._fleet, replica, time.monotonic())
                conversation.end(
                    protocol.OK, why={**found, "problems": self._describe()["daemon"]["problems"]}
                )
        elif do == "reload":
            self.reload(conversation, dry_run=bool(command.get("dry_run")), wait=wait)
        elif do in WISHES:
            if replicas := self._named(command, conversation):
                self._wish(str(do), replicas, conversation, wait)
        elif do in _OPERATIONS:
            if not self._may_begin(conversation):
                return
            if replicas := self._named(command, conversation):
                if not wait:
                    conversation.end(protocol.OK)
                operation = _OPERATIONS[do](self._fleet, [replica.name for replica in replicas])
                self._begin(f"{do} {command.get('name')}", operation, conversation if wait else None)
        else:
            conversation.end(protocol.USAGE, error=f"unknown command {do!r}")

    def reload(self, conversation: Conversation | None, *, dry_run: bool = False, wait: bool = False) -> None:
        """Reads dp.toml again. A bad one changes nothing."""
        if not self._may_begin(conversation):
            return
        began = time.monotonic()
        try:
            config = dp_toml.load(self._file, self._prefix)
            if config.paths != self._fleet.config.paths:
                raise FastDeployError(f"{self._file}: [paths] cannot change while fd-dp runs; restart it")
            programs = self._programs_for(config)
            steps = self._plan(programs)
        except FastDeployError as error:
            log.error("reload refused, everything goes on as it was: %s", error)
            if not dry_run:
                self._fleet.metrics.reloaded("refused", time.monotonic() - began)
            if conversation:
                conversation.end(protocol.BAD_CONFIG, error=str(error))
            return
        for line in [str(step) for step in steps] or ["no program changes"]:
            log.info("reload: %s", line)
            if conversation:
                conversation.line(line)
        if conversation:
            conversation.event({"kind": "plan", "steps": [step.event() for step in steps]})
            for line in self._left_as_they_are(programs):
                conversation.line(line)
            if dry_run or not wait:
                conversation.end(protocol.OK, changes=len(steps))
        if not dry_run:
            self._roll(config, programs, steps, conversation if wait else None)

    def catch_up(self) -> None:
        """Brings what runs to what is wanted; nobody has asked for it just now."""
        fleet = self._fleet
        try:
            steps = self._plan(fleet.wanted)
        except FastDeployError as error:
            log.error("%s", error)
            return
        if steps:
            log.info("what runs is not what is wanted: %s", "; ".join(map(str, steps)))
            self._roll(fleet.config, fleet.wanted, steps, None)

    def _roll(
        self, config: Config, programs: list[Program], steps: list[Step], conversation: Conversation | None
    ) -> None:
        old, began = (self._fleet.config, self._fleet.wanted), time.monotonic()
        self._fleet.configure(config, programs)

        def done(problem: str) -> None:
            self._fleet.metrics.reloaded("rolled_back" if problem else "done", time.monotonic() - began)
            if problem:
                self._fleet.configure(*old)
                return
            self._fleet.intents.keep_only(self._fleet.programs)
            router = self._fleet.programs[ROUTER]
            if config.router.api_keys_file and router.alive and all(s.program.name != ROUTER for s in steps):
                # The file's name is the same, but what stands in it may not be.
                self._fleet.update_router_flags(router.program)

        self._begin("reload", rollout.roll(self._fleet, steps), conversation, done)

    def advance(self) -> None:
        """One move of the operation, after the fleet's step has seen the facts."""
        self._waiting = [each for each in self._waiting if self._advance_waiting(*each)]
        if self._operation is None:
            self._put_right()
            return
        try:
            self._tell(next(self._operation))
        except StopIteration as end:
            self._finish(end.value)
        except (SupervisorError, OSError) as error:
            # OSError: a full disk. What runs goes on.
            self._finish(str(error))
        except Exception as fault:
            log.exception("%s failed", self._what)
            self._finish(_internal_error(fault))

    def _begin(
        self,
        what: str,
        operation: Operation,
        conversation: Conversation | None,
        done: Callable[[str], None] = lambda problem: None,
    ) -> None:
        self._what, self._where = what, ""
        self._operation, self._conversation, self._done = operation, conversation, done

    def _tell(self, told: Told) -> None:
        if isinstance(told, str):
            log.info("%s", told)
            if self._conversation:
                self._conversation.line(told)
        elif told is not None:
            self._where = f", {told['index']} of {told['of']}: {told['label']}, {told['stage']}"
            if self._conversation:
                self._conversation.event(told)

    def _finish(self, problem: str) -> None:
        self._operation = None
        # Whatever it has left drained: the router learns of it with its next look.
        self._fleet.router.maintenance.clear()
        self._flags_told = self._fleet.now
        try:
            self._done(problem)
        except (SupervisorError, OSError) as error:
            problem = problem or f"done, but not what follows from it: {error}"
        except Exception as fault:
            log.exception("what follows %s failed", self._what)
            problem = problem or f"done, but then: {_internal_error(fault)}"
        if problem:
            log.error("ERROR (%s)", problem)
        if self._conversation and problem:
            self._conversation.end(protocol.FAILED, error=problem)
        elif self._conversation:
            self._conversation.end(protocol.OK)
        self._conversation = None

    def _put_right(self) -> None:
        """What an operation that did not end well, or a daemon that was killed, has left undone."""
        fleet = self._fleet
        if not fleet.adopted or fleet.stopping:
            return
        for replica in fleet.programs.values():
            if replica.state is ProgramState.STOPPED and replica.intent is Intent.RUN:
                fleet.request_start(replica, "start")
        if self._left_behind:
            self._left_behind = False
            self.catch_up()
        elif fleet.now - self._flags_told > _FLAGS_AGAIN and router_reload.are_old(fleet):
            self._flags_told = fleet.now
            try:
                router_reload.tell_again(fleet)
            except (SupervisorError, OSError) as error:
                log.error("router: %s", error)

    def _wish(
        self, do: str, replicas: list[SupervisedProgram], conversation: Conversation, wait: bool
    ) -> None:
        fleet = self._fleet
        if not fleet.adopted:
            conversation.end(protocol.BUSY, error="fd-dp is starting; try again later")
            return
        if problem := next((f"{r.label}: {text}" for r in replicas if (text := objection(do, r))), ""):
            conversation.end(protocol.FAILED, error=problem)
            return
        if problem := grant(fleet, do, replicas):
            conversation.line(problem)
        log.info("%s: %s", do, ", ".join(replica.label for replica in replicas))
        self._left_behind = self._left_behind or do == "release"
        if do == "drain" and not fleet.router.snapshot.problem and nobody_is_left(fleet):
            conversation.line("no replica takes requests now")
        if do == "drain" and wait:
            names = [replica.name for replica in replicas]
            self._waiting.append((maintenance.until_drained(fleet, names), conversation))
        else:
            conversation.end(protocol.OK)

    def _advance_waiting(self, operation: Operation, conversation: Conversation) -> bool:
        """Whether it goes on."""
        try:
            if isinstance(told := next(operation), str):
                conversation.line(told)
            return not conversation.is_over
        except StopIteration as end:
            if end.value:
                conversation.end(protocol.FAILED, error=end.value)
            else:
                conversation.end(protocol.OK)
            return False
        except Exception as fault:
            # The other commands that wait are not affected.
            log.exception("a command that waits for a drain failed")
            conversation.end(protocol.FAILED, error=_internal_error(fault))
            return False

    def _may_begin(self, conversation: Conversation | None) -> bool:
        if self._fleet.stopping:
            error = "fd-dp is stopping"
        elif not self._fleet.adopted:
            error = "fd-dp is starting; try again later"
        elif self.busy:
            error = f"another operation is under way ({self._what}{self._where}); try again later"
        else:
            return True
        log.warning("refused: %s", error)
        if conversation:
            conversation.end(protocol.BUSY, error=error)
        return False

    def _plan(self, programs: list[Program]) -> list[Step]:
        """Those that are held stay as they are. Raises FastDeployError if one is in the way."""
        replicas = self._fleet.programs
        held = {name for name, replica in replicas.items() if replica.intent is Intent.HELD}
        wanted = [program for program in programs if program.name not in held]
        wanted += [replicas[name].program for name in held]
        down = {name for name, replica in replicas.items() if not replica.alive}
        steps = plan([replica.program for replica in replicas.values()], wanted, down)
        for step in steps:
            if blocking := sorted(held & {*step.clears}):
                label = replicas[blocking[0]].label
                raise FastDeployError(
                    f"{label} is held and has a port that {step.program.label} is to have; "
                    f"fdctl release {blocking[0]}, then reload"
                )
        return steps

    def _left_as_they_are(self, programs: list[Program]) -> list[str]:
        replicas = self._fleet.programs.values()
        held = [replica.program for replica in replicas if replica.intent is Intent.HELD]
        wanted = [program for program in programs if program.name in {each.name for each in held}]
        return [f"not now, because it is held: {step}" for step in plan(held, wanted)]

    def _named(self, command: dict[str, Any], conversation: Conversation) -> list[SupervisedProgram]:
        """ "3", "replica3", "router"; "all" are the replicas. The error is the answer if there is none."""
        name = str(command.get("name", ""))
        replicas = self._fleet.programs
        if name == "all":
            return [replica for replica in replicas.values() if replica.program.replica is not None]
        if found := replicas.get(name) or replicas.get(f"replica{name}"):
            return [found]
        numbers = [str(number) for r in replicas.values() if (number := r.program.replica) is not None]
        error = f"no such replica; there are router, {', '.join(numbers)}, all"
        conversation.end(protocol.USAGE, error=f"{name}: ERROR ({error})")
        return []


def _internal_error(fault: Exception) -> str:
    return f"internal error in fd-dp ({fault!r}); its log has the stack trace"
