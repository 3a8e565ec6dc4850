"""fd-router's command line."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

from .... import __version__
from ....common.cli import MAX_BODY_BYTES, CommandLine
from ....common.cors import DEFAULT
from ....common.tracing_config import add_tracing_flags
from ..policy.policies import POLICIES

#: Maximum number of clients of a worker, unless a flag says otherwise.
DEFAULT_MAX_CONNECTIONS = 8192
LEVELS = ("debug", "info", "warning", "error")


def fixed_flags(arguments: argparse.Namespace) -> dict[str, str]:
    """Return the settings that cannot change while the router runs, by flag.

    The certificate can change, but TLS cannot be switched on or off: clients would not know.
    """
    return {
        "--host": arguments.host,
        "--port": str(arguments.port),
        "--registry-file": str(arguments.registry_file),
        "--admin-socket": str(arguments.admin_socket),
        "--certfile": "no TLS" if arguments.certfile is None else "TLS",
    }


def changed_flags(before: Mapping[str, str], after: Mapping[str, str]) -> tuple[str, ...]:
    """Return the names that differ between two results of `fixed_flags`, which may be from two versions."""
    return tuple(sorted(name for name in before.keys() & after.keys() if before[name] != after[name]))


def file_parser() -> argparse.ArgumentParser:
    """Return the parser of a flags file: all flags except --flags-file and those that print something."""
    command_line = CommandLine(prog="fd-router", allow_abbrev=False, add_help=False)
    _add_flags(command_line)
    return command_line


def parser() -> argparse.ArgumentParser:
    command_line = CommandLine(
        prog="fd-router",
        description="Distributes OpenAI requests among the replicas that have registered.",
        epilog="Signals: SIGTERM stops gracefully, SIGINT at once, SIGHUP reads all files again "
        "(flags, keys, certificate) and replaces the workers, SIGUSR2 starts the program a second time to "
        "replace this one. Exit codes: 0 after SIGTERM or SIGINT, 2 invalid command line, 5 cannot listen on "
        "the address, 6 this version cannot replace the running one. "
        "Environment: FD_API_KEY (keys, separated by commas), FD_LOG_DIR, FD_LOG_BACKUP_COUNT, OTEL_*.",
        allow_abbrev=False,
    )
    command_line.add_argument("--version", "-V", action="version", version=f"fd-router {__version__}")
    command_line.add_argument(
        "--flags-file",
        type=Path,
        metavar="FILE",
        help="file with more flags, a JSON array of words appended to the command line; read again at SIGHUP",
    )
    _add_flags(command_line)
    return command_line


def _add_flags(command_line: argparse.ArgumentParser) -> None:
    add = command_line.add_argument
    add("--host", default="127.0.0.1", help="address to listen on (default %(default)s: this machine only)")
    add("--port", type=int, default=30000, help="port to listen on (default %(default)s)")
    add(
        "--policy",
        default="request_num",
        metavar="NAME",
        help=f"one of {', '.join(POLICIES)} (default %(default)s)",
    )
    add(
        "--registry-file",
        type=Path,
        metavar="FILE",
        help="file that keeps the registrations across restarts of the router",
    )
    add(
        "--allow-host",
        action="append",
        default=[],
        metavar="NET",
        help="address or network from which replicas may register, besides this machine; may be repeated",
    )
    add("--api-keys-file", type=Path, metavar="FILE", help="file with API keys for /v1, one per line")
    add(
        *("--cors-origins", "--allow-origins"),
        default=",".join(DEFAULT),
        metavar="LIST",
        help="origins of web pages that may read responses of /v1, separated by commas: loopback for pages "
        "of this machine, * for all pages, empty for none (default %(default)s)",
    )
    add("--no-page", dest="page", action="store_false", help="serve no web page at /")
    add("--workers", type=int, default=1, metavar="N", help="worker processes (default %(default)s)")
    add(
        "--max-connections",
        type=int,
        default=0,
        metavar="N",
        help=f"maximum client connections per worker (default {DEFAULT_MAX_CONNECTIONS}, or what the limit "
        "of open files allows)",
    )
    add(
        "--max-in-flight",
        type=int,
        default=4096,
        metavar="N",
        help="maximum requests in flight per worker, including waiting ones (default %(default)s)",
    )
    add(
        "--queue-size",
        type=int,
        default=1024,
        metavar="N",
        help="maximum requests per worker that wait while all replicas are full (default %(default)s)",
    )
    add(
        "--queue-timeout-secs",
        type=float,
        default=30.0,
        metavar="SECS",
        help="maximum time in the wait queue before a request gets 429 (default %(default)g)",
    )
    add(
        "--request-timeout-secs",
        type=float,
        default=1800.0,
        metavar="SECS",
        help="time without data after which a request fails, for replicas that send no keep-alive messages, "
        "such as FastDeploy's (default %(default)g)",
    )
    add(
        "--progress-timeout-secs",
        "--progress-timeout",
        dest="progress_timeout_secs",
        type=float,
        default=90.0,
        metavar="SECS",
        help="time without data after which a replica counts as dead, for replicas that send keep-alive "
        "messages (default %(default)g)",
    )
    add(
        "--max-body-bytes",
        metavar="BYTES",
        type=int,
        default=MAX_BODY_BYTES,
        help="maximum size of a request body (default %(default)s)",
    )
    add(
        "--client-timeout-secs",
        type=float,
        default=60.0,
        metavar="SECS",
        help="time that a client gets to send a request head, and may pause while it sends a body or reads a "
        "response (default %(default)g)",
    )
    add(
        "--keep-alive-secs",
        type=float,
        default=75.0,
        metavar="SECS",
        help="time that a connection stays open without a request (default %(default)g: longer than in nginx "
        "and load balancers, so that they never send on a connection that is being closed)",
    )
    add(
        "--graceful-timeout-secs",
        type=int,
        default=10,
        metavar="SECS",
        help="time that requests get to complete after SIGTERM (default %(default)s)",
    )
    add(
        "--worker-timeout-secs",
        type=int,
        default=30,
        metavar="SECS",
        help="time after which a hung worker is replaced (default %(default)s)",
    )
    add(
        "--health-check-interval-secs",
        type=float,
        default=2.0,
        metavar="SECS",
        help="time between two health checks of a replica (default %(default)g)",
    )
    add(
        "--board",
        metavar="URL",
        help="redis://HOST:PORT/DB, through which counts and registrations are shared with routers on other "
        "machines; needs pip install 'fd-dp[redis]'. A URL with a password belongs in FD_ROUTER_BOARD_URL, "
        "which ps does not show",
    )
    add(
        "--register-keys-file",
        type=Path,
        metavar="FILE",
        help="file with keys, one per line, for replicas of --allow-host (FD_ROUTER_REGISTER_KEY)",
    )
    add(
        "--admin-keys-file",
        type=Path,
        metavar="FILE",
        help="file with keys, one per line, for /admin on this machine (FD_ROUTER_ADMIN_KEY)",
    )
    add(
        "--admin-socket",
        type=Path,
        metavar="FILE",
        help="also listen on this unix socket, where /admin needs no key",
    )
    add("--certfile", type=Path, metavar="FILE", help="TLS certificate")
    add("--keyfile", type=Path, metavar="FILE", help="TLS private key")
    add(
        "--log-level",
        default="info",
        metavar="LEVEL",
        help=f"one of {', '.join(LEVELS)} (default %(default)s)",
    )
    add_tracing_flags(command_line)
    add("--splitwise", action="store_true", help=argparse.SUPPRESS)
    add("--config_path", help=argparse.SUPPRESS)
