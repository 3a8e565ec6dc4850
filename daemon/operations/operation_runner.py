"""Runs one operation at a time."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

from ..control import protocol
from ..control.server import Conversation
from ..process.supervisor_client import SupervisorError
from ..supervision.fleet import Fleet
from .operation import Operation, Update

log = logging.getLogger("fd-dp")


def _do_nothing(problem: str) -> None:
    pass


@dataclass(slots=True)
class _Running:
    #: The command that started it, for example "restart all".
    name: str
    operation: Operation
    #: The client that waits for the result, if any.
    conversation: Conversation | None
    #: Called once with the failure, or "".
    on_end: Callable[[str], None]
    #: ", 2 of 3: replica 1, drain"; empty until the operation has reported a stage.
    position: str = ""


class OperationRunner:
    """Owner of the operation that is in progress, if there is one."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._running: _Running | None = None
        #: Time of the last end of an operation, on the fleet's clock.
        self.last_end = float("-inf")

    @property
    def busy(self) -> bool:
        return self._running is not None

    def rejection(self) -> str:
        """Return why no operation can begin now, or ""."""
        if self._fleet.stopping:
            return "fd-dp is stopping"
        if not self._fleet.adopted:
            return "fd-dp is starting; try again later"
        if running := self._running:
            return f"another operation is in progress ({running.name}{running.position}); try again later"
        return ""

    def begin(
        self,
        name: str,
        operation: Operation,
        conversation: Conversation | None,
        on_end: Callable[[str], None] = _do_nothing,
    ) -> None:
        """Start an operation; `advance` resumes it. The caller has checked `rejection`.

        Args:
            name: the command, for log lines and for the rejection of other commands.
            conversation: gets updates and the result; None if no client waits for them.
            on_end: called with the reason of the failure, or "".
        """
        self._running = _Running(name, operation, conversation, on_end)

    def advance(self) -> None:
        """Resume the operation once. Call this after each step of the fleet."""
        if (running := self._running) is None:
            return
        try:
            _report(running, next(running.operation))
        except StopIteration as end:
            self._finish(running, end.value)
        except (SupervisorError, OSError) as error:
            # OSError: a full disk. Programs keep running.
            self._finish(running, str(error))
        except Exception as fault:
            log.exception("%s failed", running.name)
            self._finish(running, internal_error(fault))

    def _finish(self, running: _Running, problem: str) -> None:
        self._running = None
        # The next poll of the router ends the drains.
        self._fleet.router.maintenance.clear()
        self.last_end = self._fleet.now
        try:
            running.on_end(problem)
        except (SupervisorError, OSError) as error:
            problem = problem or f"done, but its follow-up failed: {error}"
        except Exception as fault:
            log.exception("the follow-up of %s failed", running.name)
            problem = problem or f"done, but its follow-up failed: {internal_error(fault)}"
        if problem:
            log.error("ERROR (%s)", problem)
        if running.conversation and problem:
            running.conversation.end(protocol.FAILED, error=problem)
        elif running.conversation:
            running.conversation.end(protocol.OK)


def internal_error(fault: Exception) -> str:
    return f"internal error in fd-dp ({fault!r}); its log has the stack trace"


def _report(running: _Running, update: Update) -> None:
    conversation = running.conversation
    if isinstance(update, str):
        log.info("%s", update)
        if conversation:
            conversation.line(update)
    elif update is not None:
        running.position = f", {update['index']} of {update['of']}: {update['label']}, {update['stage']}"
        if conversation:
            conversation.event(update)
