"""fd-router's command line, and what it says checked."""

from __future__ import annotations

import argparse
import ipaddress
import os
import ssl
from pathlib import Path
from typing import TYPE_CHECKING

from ... import __version__
from ...command_line import CommandLine
from ...errors import ConfigError
from ...file_limit import open_files_limit
from .keys import read_keys
from .policies import POLICIES, policy_named
from .registration import IPNetwork
from .settings import Settings

if TYPE_CHECKING:
    from .redis_board import RedisAddress

_LEVELS = ("debug", "info", "warning", "error")
#: Descriptors of a connection and of the replica that answers it, and of all else.
_FILES_PER_CONNECTION = 2
_OTHER_FILES = 512
_MOST_CONNECTIONS = 8192


def settings_of(arguments: argparse.Namespace) -> Settings:
    """Reads the files that the arguments name, too.

    Raises:
        ConfigError: something is wrong.
    """
    if arguments.splitwise:
        raise ConfigError("--splitwise: disaggregated prefill and decode is not there; leave the flag out")
    if arguments.config_path is not None:
        raise ConfigError("--config_path: FastDeploy's YAML is not read; use the flags (fd-router --help)")
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
        workers=arguments.workers,
        max_connections=arguments.max_connections or _connections_that_fit(),
        max_in_flight=arguments.max_in_flight,
        queue_size=arguments.queue_size,
        queue_timeout=arguments.queue_timeout_secs,
        request_timeout=arguments.request_timeout_secs,
        progress_timeout=arguments.progress_timeout_secs,
        max_body_bytes=arguments.max_body_bytes,
        client_timeout=arguments.client_timeout_secs,
        keep_alive=arguments.keep_alive_secs,
        keys=read_keys("--api-keys-file", arguments.api_keys_file, os.environ.get("FD_API_KEY", "")),
        register_keys=read_keys(
            "--register-keys-file", arguments.register_keys_file, os.environ.get("FD_ROUTER_REGISTER_KEY", "")
        ),
        admin_keys=read_keys(
            "--admin-keys-file", arguments.admin_keys_file, os.environ.get("FD_ROUTER_ADMIN_KEY", "")
        ),
        allow_hosts=tuple(_network(text) for text in arguments.allow_host),
        registry_file=arguments.registry_file,
        admin_socket=arguments.admin_socket,
        graceful_timeout=arguments.graceful_timeout_secs,
        worker_timeout=arguments.worker_timeout_secs,
        health_interval=arguments.health_check_interval_secs,
        redis=_redis(arguments.board or os.environ.get("FD_ROUTER_BOARD_URL", "")),
        tls=_tls(arguments.certfile, arguments.keyfile),
    )


def files_needed(settings: Settings) -> int:
    """Open files of a worker."""
    return settings.max_connections * _FILES_PER_CONNECTION + _OTHER_FILES


def _tls(certfile: Path | None, keyfile: Path | None) -> ssl.SSLContext | None:
    if certfile is None and keyfile is None:
        return None
    if certfile is None or keyfile is None:
        raise ConfigError("--certfile and --keyfile: TLS needs both; give both or neither")
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.set_alpn_protocols(["http/1.1"])
    try:
        # Without a password it would be asked for on the terminal.
        context.load_cert_chain(certfile, keyfile, password="")
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", None) or getattr(error, "strerror", None) or str(error)
        raise ConfigError(f"--certfile {certfile}, --keyfile {keyfile}: cannot be used ({reason})") from None
    return context


def _redis(url: str) -> RedisAddress | None:
    if not url:
        return None
    # Slow to import, and few need it.
    from .redis_board import RedisAddress

    return RedisAddress.parse(url)


def _connections_that_fit() -> int:
    """Where open files are few, connections are; a number that was asked for is another matter."""
    return max(1, min(_MOST_CONNECTIONS, (open_files_limit() - _OTHER_FILES) // _FILES_PER_CONNECTION))


def _network(text: str) -> IPNetwork:
    try:
        return ipaddress.ip_network(text, strict=False)
    except ValueError:
        raise ConfigError(
            f"--allow-host is {text!r}; it must be an address or a network, e.g. 10.0.0.0/24"
        ) from None


def parser() -> argparse.ArgumentParser:
    command_line = CommandLine(
        prog="fd-router",
        description="Spreads OpenAI requests over the replicas that have registered themselves.",
        epilog="Signals: SIGTERM ends it gracefully, SIGINT at once, SIGHUP reads the files with keys anew, "
        "in new workers, SIGUSR2 starts the program anew beside this one. "
        "Exit codes: 0 after SIGTERM or SIGINT, 2 the command line is wrong, 5 the address cannot be "
        "listened on, 6 this version cannot replace the one that runs. "
        "Environment: FD_API_KEY (keys, separated by commas), FD_LOG_DIR, FD_LOG_BACKUP_COUNT.",
        allow_abbrev=False,
    )
    add = command_line.add_argument
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
    add("--workers", type=int, default=1, help="processes that serve (default %(default)s)")
    add(
        "--max-connections",
        type=int,
        default=0,
        metavar="N",
        help=f"clients connected to a worker at a time (default {_MOST_CONNECTIONS}, if files allow)",
    )
    add(
        "--max-in-flight",
        type=int,
        default=4096,
        metavar="N",
        help="requests under way in a worker at a time, those in line included (default %(default)s)",
    )
    add(
        "--queue-size",
        type=int,
        default=1024,
        metavar="N",
        help="requests that wait in a worker while all replicas are full (default %(default)s)",
    )
    add(
        "--queue-timeout-secs",
        type=float,
        default=30.0,
        help="time that they wait before they are told to come back (default %(default)g)",
    )
    add(
        "--request-timeout-secs",
        type=float,
        default=1800.0,
        help="silence after which the answer of a replica without signs of life (FastDeploy's give none) "
        "is given up (default %(default)g)",
    )
    add(
        "--progress-timeout-secs",
        "--progress-timeout",
        dest="progress_timeout_secs",
        type=float,
        default=90.0,
        help="silence after which a replica that gives signs of life is taken for dead (default %(default)g)",
    )
    add("--max-body-bytes", type=int, default=10 << 20, help="largest request body (default %(default)s)")
    add(
        "--client-timeout-secs",
        type=float,
        default=60.0,
        help="time that a client gets for the head of a request, and may pause while it sends a body or "
        "reads its answer (default %(default)g)",
    )
    add(
        "--keep-alive-secs",
        type=float,
        default=75.0,
        help="time that a connection may stay without a request (default %(default)g: longer than nginx and "
        "load balancers keep theirs, so that they never send on one that is being closed)",
    )
    add(
        "--graceful-timeout-secs",
        type=int,
        default=10,
        help="time that requests get to end after SIGTERM (default %(default)s)",
    )
    add(
        "--worker-timeout-secs",
        type=int,
        default=30,
        help="time after which a worker that hangs is replaced (default %(default)s)",
    )
    add(
        "--health-check-interval-secs",
        type=float,
        default=2.0,
        help="time between two looks at a replica (default %(default)g)",
    )
    add(
        "--board",
        metavar="URL",
        help="redis://HOST:PORT/DB: counts and registrations are shared with routers on other machines "
        "(with a password in it better as FD_ROUTER_BOARD_URL, which ps does not show)",
    )
    add(
        "--register-keys-file",
        type=Path,
        metavar="FILE",
        help="keys, one a line, that replicas of --allow-host must show (FD_ROUTER_REGISTER_KEY)",
    )
    add(
        "--admin-keys-file",
        type=Path,
        metavar="FILE",
        help="keys, one a line, that /admin asks for on this machine (FD_ROUTER_ADMIN_KEY)",
    )
    add(
        "--admin-socket",
        type=Path,
        metavar="FILE",
        help="a unix socket to listen on besides, on which /admin asks for no key",
    )
    add("--certfile", type=Path, metavar="FILE", help="for TLS: the certificate")
    add("--keyfile", type=Path, metavar="FILE", help="for TLS: its key")
    add("--log-level", default="info", help=f"one of {', '.join(_LEVELS)} (default %(default)s)")
    add("--splitwise", action="store_true", help=argparse.SUPPRESS)
    add("--config_path", help=argparse.SUPPRESS)
    add("--version", "-V", action="version", version=f"fd-router {__version__}")
    return command_line
