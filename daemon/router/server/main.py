"""fd-router: the listening sockets and gunicorn's settings."""

from __future__ import annotations

import json
import logging
import os
import shlex
import socket
import sys
import threading
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from ....common import log, worker_heartbeat
from ....common.addresses import authority, is_loopback, listen
from ....common.errors import ConfigError, is_disk_condition
from ....common.gunicorn_base import BaseApplication, Logger, forget_inherited_sockets
from ....common.process_control import die_with_parent
from ..addresses import AllowedAddresses
from ..board.board import Board, BoardError
from ..config.loader import Configuration, check_fixed, read
from ..config.settings import Settings
from ..control import admin_socket
from ..control.registry import RegistryFile
from ..control.reload_status import ReloadStatus
from ..http import fast_path
from ..metrics import counter_memory
from ..metrics.counter_memory import CounterMemory
from .arbiter import RouterArbiter

if TYPE_CHECKING:
    from ..control.app import ControlPlane

logger = logging.getLogger(__name__)

EXIT_USAGE = 2
EXIT_ADDRESS = 5
EXIT_UPGRADE = 6
#: Variables for the program that replaces this one: gunicorn's own, the board, the flags that must not have
#: changed, and the counters.
_REPLACES = "GUNICORN_PID"
_BOARD = "FD_ROUTER_BOARD"
_FIXED = "FD_ROUTER_FIXED"
_COUNTERS = "FD_ROUTER_COUNTERS"


def main(argv: Sequence[str] | None = None) -> None:
    words = sys.argv[1:] if argv is None else argv
    try:
        _require("uvloop", "httptools")
        fast_path.require()
        configuration = read(words)
        settings = configuration.settings
        RegistryFile(settings.registry_file).prepare()
        log.configure("router", "router.log")
    except ConfigError as error:
        _exit(EXIT_USAGE, error)
    if _REPLACES in os.environ and _BOARD in os.environ:
        # Started by SIGUSR2: use the listening sockets, the board and the counters of the old program.
        try:
            check_fixed(json.loads(os.environ.get(_FIXED, "{}")), configuration.fixed)
            _RouterApplication(words, configuration, []).run()
        except (BoardError, ConfigError) as error:
            _exit(EXIT_UPGRADE, f"the old program cannot be replaced and continues: {error}")
    forget_inherited_sockets()
    listeners = [_listen_or_exit(address, settings.port) for address in settings.addresses]
    if settings.admin_socket is not None:
        listeners += _listen_on_path_or_exit(settings.admin_socket)
    board = Board.create()
    RegistryFile(settings.registry_file).restore(board, AllowedAddresses(settings.allow_hosts))
    os.environ[_BOARD] = str(board.descriptor)
    os.environ[_FIXED] = json.dumps(configuration.fixed)
    os.environ[_COUNTERS] = str(counter_memory.create())
    _RouterApplication(words, configuration, listeners).run()


class _RouterApplication(BaseApplication):
    """gunicorn application. Board and counters are in memory that its workers share."""

    def __init__(
        self, words: Sequence[str], configuration: Configuration, listeners: Sequence[socket.socket]
    ) -> None:
        """`words` is the command line, which is read again at a reload with all files that it names."""
        self._words = words
        self.configuration = configuration
        self._binds = [f"fd://{listener.detach()}" for listener in listeners]
        self.board = Board.attach(int(os.environ[_BOARD]))
        # A router of an older version has no such variable.
        self.counters = CounterMemory(int(os.environ.get(_COUNTERS, "-1")))
        self.reloads = ReloadStatus()
        super().__init__()

    @property
    def settings(self) -> Settings:
        return self.configuration.settings

    def load_config(self) -> None:
        settings = self.settings
        logging.getLogger().setLevel(settings.log_level)
        values = {
            "bind": self._binds or [authority(address, settings.port) for address in settings.addresses],
            "worker_class": "fastdeploy.daemon.router.server.worker.RouterWorker",
            "workers": settings.workers,
            # For hung workers only; it does not limit requests.
            "timeout": settings.worker_timeout,
            "graceful_timeout": settings.graceful_timeout,
            "logger_class": _RootLogger,
            "proc_name": "fd-router",
            # It is not used here, and its default path is the same for all gunicorns of a user.
            "control_socket_disable": True,
            "post_fork": _after_fork,
            "post_worker_init": _start,
            "child_exit": _worker_ended,
        }
        for key, value in values.items():
            self.cfg.set(key, value)

    def load(self) -> ControlPlane:
        # Imported here so that errors of the command line are reported without importing Flask.
        from ..control.app import ControlPlane

        return ControlPlane(self.settings, self.board, self.counters, self.reloads)

    def run(self) -> None:
        worker_heartbeat.keep_in_memory()
        RouterArbiter(self).run()

    # ---- a reload

    def read_again(self) -> Configuration:
        configuration = read(self._words)
        check_fixed(self.configuration.fixed, configuration.fixed)
        return configuration

    def use(self, configuration: Configuration) -> None:
        self.configuration = configuration
        self.do_load_config()


class _RootLogger(Logger):
    """Passes gunicorn's records to the root logger, and logs an OSError of a connection in one line."""

    def setup(self, cfg: Any) -> None:
        super().setup(cfg)
        self.error_log.handlers.clear()
        self.error_log.propagate = True
        self.error_log.setLevel(logging.NOTSET)

    def exception(self, msg: str, *args: Any, **kwargs: Any) -> None:
        kind, error, _ = sys.exc_info()
        if isinstance(error, OSError):
            self.error_log.warning(f"{msg} (%s: %s)", *args, kind.__name__ if kind else "?", error)
        else:
            super().exception(msg, *args, **kwargs)


def _start(worker: Any) -> None:
    router: ControlPlane = worker.wsgi
    router.start()
    settings: Settings = worker.app.settings
    logger.info("listening on %s port %d", " and ".join(settings.addresses), settings.port)
    if all(map(is_loopback, settings.addresses)):
        logger.info("reachable from this machine only; --host 0.0.0.0 opens the router to the network")


def _worker_ended(server: Any, worker: Any) -> None:
    """Clear a dead worker's counts on the board and add its metrics to the totals.

    This runs in a thread: if a stopped worker holds the board's lock, the arbiter must be free to kill it.
    """

    def clear_up() -> None:
        server.app.board.drop_dead_workers()
        server.app.counters.collect_from_dead()

    threading.Thread(target=clear_up, daemon=True).start()


def _after_fork(server: Any, worker: Any) -> None:
    """End a worker with its arbiter; otherwise it would keep the port from the next router."""
    die_with_parent(server.pid)


def _listen_or_exit(address: str, port: int) -> socket.socket:
    try:
        return listen(address, port, backlog=2048)
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        _exit(EXIT_ADDRESS, f"cannot listen on {address} port {port}: {reason}")


def _listen_on_path_or_exit(path: Path) -> list[socket.socket]:
    """Return no socket if the disk is full or read-only; the arbiter makes it later."""
    try:
        return [admin_socket.bind(path)]
    except OSError as error:
        if is_disk_condition(error):
            return []
        reason = (error.strerror or str(error)).lower()
        _exit(
            EXIT_ADDRESS,
            f"--admin-socket {path}: cannot be made ({reason}); its directory must exist and be writable",
        )


def _require(*modules: str) -> None:
    missing = [name for name in modules if find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"the router needs {' and '.join(missing)}, which is not installed: "
            + shlex.join([sys.executable, "-m", "pip", "install", *missing])
        )


def _exit(code: int, message: object) -> NoReturn:
    print(f"fd-router: {message}", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()
