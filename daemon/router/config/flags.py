"""fd-router's command line: its flags, and which of them a router that runs can take anew."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

from .... import __version__
from ....common.cli import CommandLine
from ....common.cors import DEFAULT
from ..policy.policies import POLICIES

#: Clients of a worker, if nobody says how many.
MOST_CONNECTIONS = 8192
LEVELS = ("debug", "info", "warning", "error")


def fixed_in(arguments: argparse.Namespace) -> dict[str, str]:
    """What holds as long as the router runs, by flag: where it listens, and what it has read once.

    Another certificate is fine, but nobody can tell clients that TLS comes or goes.
    """
    return {
        "--host": arguments.host,
        "--port": str(arguments.port),
        "--registry-file": str(arguments.registry_file),
        "--admin-socket": str(arguments.admin_socket),
        "--certfile": "no TLS" if arguments.certfile is None else "TLS",
    }


def changed(before: Mapping[str, str], after: Mapping[str, str]) -> tuple[str, ...]:
    """The names of what differs in two answers of `fixed_in`, which may be those of two versions."""
    return tuple(sorted(name for name in before.keys() & after.keys() if before[name] != after[name]))


def file_parser() -> argparse.ArgumentParser:
    """Of the words of a flags file: all flags but those that print something and that name the file."""
    command_line = CommandLine(prog="fd-router", allow_abbrev=False, add_help=False)
    _add_flags(command_line)
    return command_line


def parser() -> argparse.ArgumentParser:
    command_line = CommandLine(
        prog="fd-router",
        description="Spreads OpenAI requests over the replicas that have registered themselves.",
        epilog="Signals: SIGTERM ends it gracefully, SIGINT at once, SIGHUP reads all files anew "
        "(flags, keys, certificate) for new workers, SIGUSR2 starts the program anew beside this one. "
        "Exit codes: 0 after SIGTERM or SIGINT, 2 the command line is wrong, 5 the address cannot be "
        "listened on, 6 this version cannot replace the one that runs. "
        "Environment: FD_API_KEY (keys, separated by commas), FD_LOG_DIR, FD_LOG_BACKUP_COUNT.",
        allow_abbrev=False,
    )
    command_line.add_argument("--version", "-V", action="version", version=f"fd-router {__version__}")
    command_line.add_argument(
        "--flags-file",
        type=Path,
        metavar="FILE",
        help="more flags, a JSON array of words, which come after those of the command line; read again at "
        "SIGHUP",
    )
    _add_flags(command_line)
    return command_line


def _add_flags(command_line: argparse.ArgumentParser) -> None:
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
    add(
        "--cors-origins",
        default=",".join(DEFAULT),
        metavar="LIST",
        help="origins of web pages that may read answers of /v1, separated by commas; loopback for pages of "
        "this machine, * for all pages, empty for none (default %(default)s)",
    )
    add("--workers", type=int, default=1, help="processes that serve (default %(default)s)")
    add(
        "--max-connections",
        type=int,
        default=0,
        metavar="N",
        help=f"clients connected to a worker at a time (default {MOST_CONNECTIONS}, if files allow)",
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
    add("--log-level", default="info", help=f"one of {', '.join(LEVELS)} (default %(default)s)")
    add("--splitwise", action="store_true", help=argparse.SUPPRESS)
    add("--config_path", help=argparse.SUPPRESS)
