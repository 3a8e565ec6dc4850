"""gunicorn's arbiter, with a graceful reload that takes nothing from anybody.

Old workers go on until as many new ones answer. If those do not come up, or the files are wrong, everything
stays as it was. A worker that was replaced no longer counts among those that serve: it may go on for as long
as its last stream does. gunicorn's own reload stops the old workers before the new ones answer, holds up the
arbiter meanwhile, starts no worker in place of one that died while an old one still streams, and ends
everything when a new one does not start.
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
from ..control.reload_status import Outcome, Reloads

logger = logging.getLogger(__name__)

#: Seconds between two looks at workers that are starting; that they get at least; and until the next one is
#: started after one has failed.
_LOOK, _START_SECONDS, _PAUSE_SECONDS = 0.05, 10.0, 1.0


class Application(Protocol):
    """gunicorn's, with what a reload needs."""

    board: Board
    reloads: Reloads
    configuration: Configuration

    def read_again(self) -> Configuration:
        """What the files say now. Raises ConfigError, also if it cannot change while the router runs."""

    def use(self, configuration: Configuration) -> None:
        """From now on, by workers that are started."""


class RouterArbiter(Arbiter):
    app: Application

    def __init__(self, app: Application) -> None:
        #: The reload whose configuration new workers get. As long as not all of those serve: the one to go
        #: back to, and its configuration.
        self._generation = 0
        self._proven: tuple[int, Configuration] | None = None
        self._generations: dict[int, int] = {}
        #: When those were started that have yet to give a sign of life.
        self._starting: dict[int, float] = {}
        #: Those that were told to end, and to be quick about it.
        self._leaving: set[int] = set()
        self._hurried: set[int] = set()
        self._may_spawn_at = 0.0
        self._lacks_room = False
        path = app.configuration.settings.admin_socket
        self._admin_socket = AdminSocket(path) if path is not None else None
        super().__init__(app)

    def reload(self) -> None:
        """SIGHUP."""
        self.log.reopen_files()
        number = self.app.reloads.begin()
        try:
            configuration = self.app.read_again()
        except Exception as error:
            # Whatever is wrong there must not end what runs.
            why = str(error) if isinstance(error, ConfigError) else repr(error)
            logger.error("reload: %s; going on as before", why)
            self.app.reloads.end(number, Outcome.REFUSED)
            return
        if self._proven is None:
            self._proven = self._generation, self.app.configuration
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
        """Starts workers that are missing, and ends those that are too many."""
        self._keep_admin_socket()
        self._look_at_those_that_start()
        fresh = sum(self._is_fresh(pid) for pid in self._serving())
        self._spawn(self.num_workers - fresh)
        # The oldest configuration first.
        ready = sorted(self._ready(), key=lambda pid: (self._is_fresh(pid), self.WORKERS[pid].age))
        for pid in ready[: max(0, len(ready) - self.num_workers)]:
            self._leaving.add(pid)
            self.kill_worker(pid, signal.SIGUSR2)
        if self._proven is not None and all(
            self._is_fresh(pid) and pid not in self._starting for pid in self._serving()
        ):
            self._proven = None
            self.app.reloads.end(self._generation, Outcome.DONE)
            logger.info("reload: done")

    def reap_workers(self) -> None:
        """One that does not come up ends the router where no other serves: at its start, not in a reload."""
        while True:
            try:
                super().reap_workers()
                return
            except HaltServer:
                if not self._ready():
                    raise

    def wait_for_signals(self, timeout: float = 1.0) -> list[int]:
        signals: list[int] = super().wait_for_signals(_LOOK if self._starting else timeout)
        return signals

    @property
    def _is_only_program(self) -> bool:
        """No upgrade is under way: this program neither replaces another nor is being replaced."""
        return bool(self.reexec_pid == self.master_pid == 0)

    def _admin_listeners(self) -> list[UnixSocket]:
        return [listener for listener in self.LISTENERS if listener.sock.family == socket.AF_UNIX]

    def _keep_admin_socket(self) -> None:
        """Listen again if the path was removed: workers get the new socket, later ones inherit it."""
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

    def _look_at_those_that_start(self) -> None:
        failed, patience = False, max(_START_SECONDS, 2 * self.timeout)
        for pid, since in list(self._starting.items()):
            worker = self.WORKERS.get(pid)
            if worker is None:
                failed |= self._is_fresh(pid)
                del self._starting[pid]
            elif worker.is_ready:
                del self._starting[pid]
            elif time.monotonic() - since > patience:
                # gunicorn looks only after those that have begun to give signs of life.
                logger.error("worker %d does not start within %.0f s", pid, patience)
                self.kill_worker(pid, signal.SIGKILL)
        for known in (self._leaving, self._hurried):
            known &= self.WORKERS.keys()
        self._generations = {pid: self._generations[pid] for pid in self.WORKERS}
        if failed:
            self._may_spawn_at = time.monotonic() + _PAUSE_SECONDS
            self._go_back("a new worker ended before it served")

    def _go_back(self, why: str) -> None:
        """If there is a way back."""
        if self._proven is not None:
            logger.error("reload: %s; going on as before", why)
            self.app.reloads.end(self._generation, Outcome.FAILED)
            self._switch(*self._proven)
            self._proven = None

    def _serving(self) -> list[int]:
        return [pid for pid in self.WORKERS if pid not in self._leaving]

    def _ready(self) -> list[int]:
        return [pid for pid in self._serving() if pid not in self._starting]

    def _is_fresh(self, pid: int) -> bool:
        return self._generations[pid] == self._generation

    def _spawn(self, missing: int) -> None:
        """As many as the board has places for: streams of old workers are not cut off for them."""
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
                self._go_back("not all new workers can be started")
                return
        if missing > room and not self._lacks_room:
            logger.warning(
                "%d new workers have to wait: of all %d places, %d have workers that end what they have",
                *(missing - room, WORKERS, len(self._leaving)),
            )
        self._lacks_room = missing > room
        if self._lacks_room:
            for pid in self._leaving - self._hurried:
                # For connections without a request there is no time now.
                self.kill_worker(pid, signal.SIGTERM)
            self._hurried |= self._leaving
