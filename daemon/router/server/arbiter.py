"""gunicorn's arbiter with a reload that drops no request and rolls back.

Old workers serve until the same number of new ones is ready. If the new ones do not start, or the
configuration is invalid, nothing changes. A replaced worker no longer counts and may run until its last
stream ends. gunicorn's own reload stops the old workers before the new ones are ready, blocks the arbiter
meanwhile, does not replace a worker that dies while an old one still streams, and ends the program if a new
worker does not start.
"""

from __future__ import annotations

import logging
import signal
import socket
import time
from typing import Protocol

from gunicorn.sock import UnixSocket

from ....common.errors import ConfigError
from ....common.gunicorn_base import Arbiter, HaltServer
from ..board.board import Board
from ..board.memory import WORKERS
from ..config.loader import Configuration
from ..control.admin_socket import AdminSocket
from ..control.reload_status import Outcome, ReloadStatus

logger = logging.getLogger(__name__)

#: Seconds between two checks of starting workers, minimum seconds that they get, and seconds before the next
#: start after one has failed.
_CHECK_INTERVAL, _START_SECONDS, _PAUSE_SECONDS = 0.05, 10.0, 1.0


class Application(Protocol):
    """gunicorn application with the additions that a reload needs."""

    board: Board
    reloads: ReloadStatus
    configuration: Configuration

    def read_again(self) -> Configuration:
        """Read the configuration again. Raises ConfigError, also for a change that needs a restart."""

    def use(self, configuration: Configuration) -> None:
        """Use the configuration for workers that are started from now on."""


class RouterArbiter(Arbiter):
    app: Application

    def __init__(self, app: Application) -> None:
        #: Reload whose configuration new workers get.
        self._generation = 0
        #: Reload and configuration to roll back to, until all workers have the new one.
        self._previous: tuple[int, Configuration] | None = None
        #: Worker -> reload whose configuration it has.
        self._generations: dict[int, int] = {}
        #: Workers without a heartbeat so far -> time of their start.
        self._starting: dict[int, float] = {}
        #: Workers that were asked to end (SIGUSR2), and those of them that were asked to hurry (SIGTERM).
        self._leaving: set[int] = set()
        self._hurried: set[int] = set()
        self._may_spawn_at = 0.0
        self._lacks_room = False
        path = app.configuration.settings.admin_socket
        self._admin_socket = AdminSocket(path) if path is not None else None
        super().__init__(app)

    def reload(self) -> None:
        """Handle SIGHUP."""
        self.log.reopen_files()
        number = self.app.reloads.begin()
        try:
            configuration = self.app.read_again()
        except Exception as error:
            # No error in a file may end the router.
            why = str(error) if isinstance(error, ConfigError) else repr(error)
            logger.error("reload: %s; keeping the old configuration", why)
            self.app.reloads.end(number, Outcome.REFUSED)
            return
        if self._previous is None:
            self._previous = self._generation, self.app.configuration
        self._switch(number, configuration)
        self.manage_workers()

    def spawn_worker(self) -> int:
        generation, now = self._generation, time.monotonic()
        pid: int = super().spawn_worker()
        self._generations[pid], self._starting[pid] = generation, now
        return pid

    def stop(self, graceful: bool = True) -> None:
        """Remove the admin socket first: gunicorn's own code fails if the path is gone."""
        if self._admin_socket is not None and self._is_only_program:
            self._admin_socket.remove()
        for listener in self._admin_listeners():
            listener.close()
            self.LISTENERS.remove(listener)
        super().stop(graceful)

    def manage_workers(self) -> None:
        """Start missing workers and end surplus ones."""
        self._check_admin_socket()
        self._check_starting()
        current = sum(self._is_current(pid) for pid in self._serving())
        self._spawn(self.num_workers - current)
        # Workers with an old configuration end first.
        ready = sorted(self._ready(), key=lambda pid: (self._is_current(pid), self.WORKERS[pid].age))
        for pid in ready[: max(0, len(ready) - self.num_workers)]:
            self._leaving.add(pid)
            self.kill_worker(pid, signal.SIGUSR2)
        if self._previous is not None and all(
            self._is_current(pid) and pid not in self._starting for pid in self._serving()
        ):
            self._previous = None
            self.app.reloads.end(self._generation, Outcome.DONE)
            logger.info("reload: done")

    def reap_workers(self) -> None:
        """End the router if a worker cannot start, unless another one is ready, as in a reload."""
        while True:
            try:
                super().reap_workers()
                return
            except HaltServer:
                if not self._ready():
                    raise

    def wait_for_signals(self, timeout: float = 1.0) -> list[int]:
        signals: list[int] = super().wait_for_signals(_CHECK_INTERVAL if self._starting else timeout)
        return signals

    @property
    def _is_only_program(self) -> bool:
        """False during an upgrade, when this program replaces another or is being replaced."""
        return bool(self.reexec_pid == self.master_pid == 0)

    def _admin_listeners(self) -> list[UnixSocket]:
        return [listener for listener in self.LISTENERS if listener.sock.family == socket.AF_UNIX]

    def _check_admin_socket(self) -> None:
        """Bind the socket again if its path was removed. Workers get the new one; later ones inherit it."""
        if self._admin_socket is None or not self._is_only_program:
            return
        listener = self._admin_socket.bind_if_lost()
        if listener is None:
            return
        for old in self._admin_listeners():
            old.close()
            self.LISTENERS.remove(old)
        path = str(self._admin_socket.path)
        self.LISTENERS.append(UnixSocket(path, self.cfg, self.log, fd=listener.detach()))
        for worker in self.WORKERS.values():
            worker.pass_listener(self.LISTENERS[-1].sock)

    def _switch(self, generation: int, configuration: Configuration) -> None:
        self._generation = generation
        self.app.use(configuration)
        self.setup(self.app)

    def _check_starting(self) -> None:
        failed, patience = False, max(_START_SECONDS, 2 * self.timeout)
        for pid, since in list(self._starting.items()):
            worker = self.WORKERS.get(pid)
            if worker is None:
                failed |= self._is_current(pid)
                del self._starting[pid]
            elif worker.is_ready:
                del self._starting[pid]
            elif time.monotonic() - since > patience:
                # gunicorn watches only workers that have sent a heartbeat.
                logger.error("worker %d did not start within %.0f s and is killed", pid, patience)
                self.kill_worker(pid, signal.SIGKILL)
        for known in (self._leaving, self._hurried):
            known &= self.WORKERS.keys()
        self._generations = {pid: self._generations[pid] for pid in self.WORKERS}
        if failed:
            self._may_spawn_at = time.monotonic() + _PAUSE_SECONDS
            self._roll_back("a new worker ended before it was ready")

    def _roll_back(self, why: str) -> None:
        if self._previous is not None:
            logger.error("reload: %s; keeping the old configuration", why)
            self.app.reloads.end(self._generation, Outcome.FAILED)
            self._switch(*self._previous)
            self._previous = None

    def _serving(self) -> list[int]:
        return [pid for pid in self.WORKERS if pid not in self._leaving]

    def _ready(self) -> list[int]:
        return [pid for pid in self._serving() if pid not in self._starting]

    def _is_current(self, pid: int) -> bool:
        return self._generations[pid] == self._generation

    def _spawn(self, missing: int) -> None:
        """Start workers, within the board's slots: no stream of an old worker is cut off for a new one."""
        others = self.app.board.pids() - self.WORKERS.keys()
        room = max(0, WORKERS - len(self.WORKERS) - len(others))
        if time.monotonic() < self._may_spawn_at:
            return
        for _ in range(min(missing, room)):
            try:
                self.spawn_worker()
            except OSError as error:
                logger.error("a worker cannot be started: %s", error)
                self._may_spawn_at = time.monotonic() + _PAUSE_SECONDS
                self._roll_back("not all new workers can be started")
                return
        if missing > room and not self._lacks_room:
            logger.warning(
                "%d new workers have to wait: old workers that still have requests use %d of all %d slots",
                *(missing - room, len(self._leaving), WORKERS),
            )
        self._lacks_room = missing > room
        if self._lacks_room:
            for pid in self._leaving - self._hurried:
                # SIGTERM closes connections without a request soon.
                self.kill_worker(pid, signal.SIGTERM)
            self._hurried |= self._leaving
