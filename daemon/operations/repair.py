"""Periodic repair of what a failed operation or a killed daemon has left unfinished."""

from __future__ import annotations

import logging

from ..process.supervisor_client import SupervisorError
from ..supervision.fleet import Fleet
from ..supervision.intents import Intent
from ..supervision.program_state import ProgramState
from . import router_reload
from .intent_commands import IntentCommands
from .operation_runner import OperationRunner
from .reloader import Reloader

log = logging.getLogger("fd-dp")

#: Seconds between two signals to a router that has old flags.
_FLAGS_INTERVAL = 30.0


class Repair:
    """Repairs. The loop calls `step` while no operation is in progress."""

    def __init__(
        self, fleet: Fleet, runner: OperationRunner, reloader: Reloader, intents: IntentCommands
    ) -> None:
        self._fleet = fleet
        self._runner = runner
        self._reloader = reloader
        self._intents = intents
        self._last_signal = float("-inf")

    def step(self) -> None:
        fleet = self._fleet
        if not fleet.adopted or fleet.stopping:
            return
        for replica in fleet.programs.values():
            if replica.state is ProgramState.STOPPED and replica.intent is Intent.RUN:
                fleet.request_start(replica, "start")
        if self._intents.take_release():
            self._reloader.catch_up()
        elif self._is_due() and router_reload.has_old_flags(fleet):
            self._last_signal = fleet.now
            try:
                router_reload.signal_again(fleet)
            except (SupervisorError, OSError) as error:
                log.error("router: %s", error)

    def _is_due(self) -> bool:
        return self._fleet.now - max(self._last_signal, self._runner.last_end) > _FLAGS_INTERVAL
