"""fd-router: the command line, the listening socket and gunicorn's settings."""

from __future__ import annotations

import argparse
import ctypes
import ipaddress
import logging
import os
import signal
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from gunicorn.app.base import BaseApplication
from gunicorn.glogging import Logger

from ... import __version__, log
from ...command_line import CommandLine
from ...errors import ConfigError
from ...file_limit import allow_open_files, connections_of, descriptors_of
from .app import Router
from .keys import read_keys
from .policies import POLICIES, policy_named
from .registration import IPNetwork
from .registry import RegistryFile
from .settings import Settings

logger = logging.getLogger(__name__)

EXIT_USAGE = 2
EXIT_ADDRESS = 5
_PR_SET_PDEATHSIG = 1
_LEVELS = ("debug", "info", "warning", "error")


def main(argv: Sequence[str] | None = None) -> None:
    try:
        arguments = _parser().parse_args(argv)
        settings = _settings(arguments)
        RegistryFile(settings.registry_file).prepare()
        allow_open_files(descriptors_of(settings.threads), f"--threads {settings.threads}")
        log.configure("router", "router.log")
        logging.getLogger().setLevel(arguments.log_level.upper())
    except ConfigError as error:
        _exit(EXIT_USAGE, error)
    try:
        listener = _listen(settings.host, settings.port)
    except OSError as error:
        reason = error.strerror or error
        _exit(EXIT_ADDRESS, f"cannot listen on {settings.host} port {settings.port}: {str(reason).lower()}")
    _Server(settings, listener).run()


class _Server(BaseApplication):
    """One gunicorn worker: the board lives in its memory."""

    def __init__(self, settings: Settings, listener: socket.socket) -> None:
        self._settings = settings
        self._descriptor = listener.detach()
        super().__init__()

    def load_config(self) -> None:
        settings = self._settings
        values = {
            "bind": f"fd://{self._descriptor}",
            "worker_class": "fastdeploy.daemon.router.worker.RouterWorker",
            "workers": 1,
            "threads": settings.threads,
            "worker_connections": connections_of(settings.threads),
            "keepalive": 60,
            # The daemon decides about a router that hangs; requests last as long as they last.
            "timeout": 0,
            "graceful_timeout": settings.graceful_timeout,
            "logger_class": _ThroughRoot,
            "proc_name": "fd-router",
            # Its default path is one for all gunicorns of a user, and nobody here asks it anything.
            "control_socket_disable": True,
            "post_fork": _die_with_parent,
            "post_worker_init": _start,
        }
        for key, value in values.items():
            self.cfg.set(key, value)

    def load(self) -> Router:
        return Router(self._settings)


class _ThroughRoot(Logger):
    """gunicorn's records go where all others go; faults of one connection are a line, not a stack trace."""

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
    router: Router = worker.wsgi
    router.start()
    settings: Settings = worker.app._settings
    logger.info("listening on %s port %d", settings.host, settings.port)
    if ipaddress.ip_address(settings.host).is_loopback:
        logger.info("reachable from this machine only; --host 0.0.0.0 opens the router to the network")


def _die_with_parent(server: Any, worker: Any) -> None:
    """Otherwise a worker whose arbiter was killed would keep the port from the next router."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != server.pid:
        os._exit(1)  # it died before the line above


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind((host, port))
    listener.listen(2048)
    return listener


def _settings(arguments: argparse.Namespace) -> Settings:
    if arguments.splitwise:
        raise ConfigError("--splitwise: disaggregated prefill and decode is not there; leave the flag out")
    if arguments.config_path is not None:
        raise ConfigError("--config_path: FastDeploy's YAML is not read; use the flags (fd-router --help)")
    if arguments.workers != 1:
        raise ConfigError(f"--workers is {arguments.workers}; the board lives in one process: use 1")
    if arguments.log_level not in _LEVELS:
        raise ConfigError(f"--log-level is {arguments.log_level!r}; it must be one of {', '.join(_LEVELS)}")
    try:
        host = str(ipaddress.ip_address("127.0.0.1" if arguments.host == "localhost" else arguments.host))
    except ValueError:
        raise ConfigError(
            f"--host is {arguments.host!r}; it must be an IP address, e.g. 127.0.0.1 or 0.0.0.0"
        ) from None
    return Settings(
        host=host,
        port=arguments.port,
        policy=policy_named(arguments.policy),
        threads=arguments.threads,
        request_timeout=arguments.request_timeout_secs,
        max_body_bytes=arguments.max_body_bytes,
        keys=read_keys(arguments.api_keys_file, os.environ.get("FD_API_KEY", "")),
        allow_hosts=tuple(_network(text) for text in arguments.allow_host),
        registry_file=arguments.registry_file,
        graceful_timeout=arguments.graceful_timeout_secs,
        health_interval=arguments.health_check_interval_secs,
    )


def _network(text: str) -> IPNetwork:
    try:
        return ipaddress.ip_network(text, strict=False)
    except ValueError:
        raise ConfigError(
            f"--allow-host is {text!r}; it must be an address or a network, e.g. 10.0.0.0/24"
        ) from None


def _parser() -> argparse.ArgumentParser:
    parser = CommandLine(
        prog="fd-router",
        description="Spreads OpenAI requests over the replicas that have registered themselves.",
        epilog="Exit codes: 0 after SIGTERM or SIGINT, 2 the command line is wrong, 5 the address cannot be "
        "listened on. Environment: FD_API_KEY (keys, separated by commas), FD_LOG_DIR, FD_LOG_BACKUP_COUNT.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--host", default="127.0.0.1", help="address to listen on (default %(default)s: this machine only)")
    add("--port", type=int, default=30000, help="port to listen on (default %(default)s)")
    add("--policy", default="request_num", help=f"one of {', '.join(POLICIES)} (default %(default)s)")
    add(
        "--registry-file",
        type=Path,
        metavar="FILE",
        help="remembers the replicas over a restart of the router",
    )
    add(
        "--allow-host",
        action="append",
        default=[],
        metavar="NET",
        help="address or network from which replicas may register besides this machine; may be repeated",
    )
    add("--api-keys-file", type=Path, metavar="FILE", help="keys that /v1 asks for, one a line")
    add(
        "--threads",
        type=int,
        default=512,
        help="requests and connections served at a time (default %(default)s)",
    )
    add("--workers", type=int, default=1, help="processes; only 1 for now")
    add(
        "--request-timeout-secs",
        type=float,
        default=1800.0,
        help="silence after which a replica's answer is given up (default %(default)g)",
    )
    add("--max-body-bytes", type=int, default=10 << 20, help="largest request body (default %(default)s)")
    add(
        "--graceful-timeout-secs",
        type=int,
        default=10,
        help="time that requests get to end after SIGTERM (default %(default)s)",
    )
    add(
        "--health-check-interval-secs",
        type=float,
        default=2.0,
        help="time between two looks at a replica (default %(default)g)",
    )
    add("--log-level", default="info", help=f"one of {', '.join(_LEVELS)} (default %(default)s)")
    add("--splitwise", action="store_true", help=argparse.SUPPRESS)
    add("--config_path", help=argparse.SUPPRESS)
    add("--version", "-V", action="version", version=f"fd-router {__version__}")
    return parser


def _exit(code: int, message: object) -> NoReturn:
    print(f"fd-router: {message}", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()
