"""FastDeploy's launcher: starts one api_server per replica and waits for them.

    python -m fastdeploy.entrypoints.openai.multi_api_server --num-servers 8 --ports 1811,1822,... \
        --args --model PATH --data-parallel-size 8 ...

It restarts no server (the daemon does that), and leaves none behind: SIGTERM and SIGINT stop all servers;
when one dies the launcher logs it and stops the others; when the launcher is killed, the kernel kills them.

Exit status: 0 after SIGTERM, 130 after SIGINT, 1 if a server died, 2 for wrong arguments.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ...common import log
from ...common.cli import CommandLine
from ...common.errors import ConfigError
from ...common.ports import find_free, require_free
from ...common.process_control import die_with_parent
from .options import parse_arguments

logger = logging.getLogger("fastdeploy.launcher")

#: Seconds from SIGTERM to SIGKILL, in addition to the servers' own time for open requests.
_STOP_SECONDS = 20.0
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD)
_QUEUE_FLAG = "--engine-worker-queue-port"
_GROUP_FLAG = "--expert-parallel-group"
#: Flag that the launcher sets for each server -> the launcher's own flag.
_PER_SERVER_FLAGS = {
    "--port": "--ports",
    "--metrics-port": "--metrics-ports",
    "--controller-port": "--controller-ports",
    "--local-data-parallel-id": "--num-servers",
}


@dataclass(frozen=True, slots=True)
class ServerProcess:
    """One api_server to start."""

    index: int
    port: int
    arguments: tuple[str, ...]
    log_directory: Path

    @property
    def command(self) -> list[str]:
        return [sys.executable, "-m", "fastdeploy.entrypoints.openai.api_server", *self.arguments]

    @property
    def environment(self) -> dict[str, str]:
        return {**os.environ, "FD_LOG_DIR": str(self.log_directory), "FD_ENABLE_MULTI_API_SERVER": "1"}


def main(argv: Sequence[str] | None = None) -> int:
    log.configure("launcher")
    try:
        options, passed = _parser().parse_known_args(argv)
        log_directory = Path(os.environ.get("FD_LOG_DIR") or "log")
        servers = plan_servers(options, [*passed, *options.args], log_directory, find_free)
        # Report a wrong flag once, before any start; the servers differ in their ports only.
        config = parse_arguments(servers[0].arguments)
    except ConfigError as error:
        print(f"multi_api_server: ERROR ({error})", file=sys.stderr)
        return 2
    return run(servers, config.timeout_graceful_shutdown + _STOP_SECONDS)


def plan_servers(
    options: argparse.Namespace,
    arguments: list[str],
    log_directory: Path,
    find_free: Callable[[int], list[int]],
) -> list[ServerProcess]:
    """Return the servers to start.

    Args:
        arguments: those of every server.
        find_free: returns the given number of free ports.

    Raises:
        ConfigError: the numbers of ports and servers differ, or a port is taken.
    """
    count: int = options.num_servers
    if count < 1:
        raise ConfigError(f"--num-servers is {count}; it must be at least 1")
    for flag, instead in _PER_SERVER_FLAGS.items():
        if _pop_flag(arguments, flag)[0] is not None:
            raise ConfigError(f"{flag} after --args: every server gets its own, see {instead}")
    arguments = _with_data_parallel_size(arguments, count)
    queue, arguments = _pop_flag(arguments, _QUEUE_FLAG)
    host = _pop_flag(arguments, "--host")[0] or "127.0.0.1"

    given = {
        "--port": _ports("--ports", options.ports, count),
        "--metrics-port": _ports("--metrics-ports", options.metrics_ports, count),
        "--controller-port": _ports("--controller-ports", options.controller_ports, count),
        _QUEUE_FLAG: _ports(_QUEUE_FLAG, queue, count),
    }
    flag_of_port: dict[int, str] = {}
    for flag, ports in given.items():
        name = _PER_SERVER_FLAGS.get(flag, flag)
        for port in ports:
            if port in flag_of_port:
                raise ConfigError(f"port {port} is given twice: {flag_of_port[port]} and {name}")
            flag_of_port[port] = name
            # The queue connects a server and its worker, always on loopback.
            require_free("127.0.0.1" if flag == _QUEUE_FLAG else host, port, name)
    found = (port for port in find_free(3 * count + len(flag_of_port)) if port not in flag_of_port)
    for flag in ("--port", "--metrics-port", _QUEUE_FLAG):
        given[flag] = given[flag] or [next(found) for _ in range(count)]
    arguments = _with_expert_group(arguments, given["--port"][0])
    return [
        ServerProcess(
            index=index,
            port=given["--port"][index],
            arguments=(
                *arguments,
                *(f"{flag}={ports[index]}" for flag, ports in given.items() if ports),
                f"--local-data-parallel-id={index}",
            ),
            log_directory=log_directory / f"log_{index}",
        )
        for index in range(count)
    ]


def run(servers: list[ServerProcess], stop_seconds: float) -> int:
    """Run the servers until a signal or the death of one; return the exit status."""
    # sigwaitinfo takes signals one by one, so no handler interrupts other code.
    signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    children: list[tuple[ServerProcess, subprocess.Popen[bytes]]] = []
    try:
        for server in servers:
            children.append((server, _start(server)))
            logger.info(
                "server %d: started as pid %d on port %d", server.index, children[-1][1].pid, server.port
            )
        while True:
            caught = signal.sigwaitinfo(_SIGNALS).si_signo
            if caught != signal.SIGCHLD:
                logger.info("%s: stopping all servers", signal.Signals(caught).name)
                return 0 if caught == signal.SIGTERM else 130
            if dead := [(server, child) for server, child in children if child.poll() is not None]:
                for server, child in dead:
                    logger.error(
                        "server %d (port %d, pid %d) %s; stopping the others", *_describe_exit(server, child)
                    )
                return 1
    except OSError as error:
        logger.error("server %d cannot be started: %s; stopping the others", len(children), error)
        return 1
    finally:
        _stop([child for _, child in children], stop_seconds)


def _start(server: ServerProcess) -> subprocess.Popen[bytes]:
    launcher = os.getpid()

    def in_child() -> None:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
        die_with_parent(launcher)

    return subprocess.Popen(
        server.command,
        env=server.environment,
        stdin=subprocess.DEVNULL,
        # Not in the terminal's foreground group: only the launcher gets Ctrl-C; it sends SIGTERM.
        process_group=0,
        # Safe here: the launcher has one thread.
        preexec_fn=in_child,
    )


def _stop(children: list[subprocess.Popen[bytes]], seconds: float) -> None:
    """Send SIGTERM; at the deadline, or at a second signal to the launcher, send SIGKILL."""
    for child in children:
        child.terminate()
    deadline = time.monotonic() + seconds
    while any(child.poll() is None for child in children):
        left = deadline - time.monotonic()
        caught = signal.sigtimedwait(_SIGNALS, left) if left > 0 else None
        if caught is None or caught.si_signo != signal.SIGCHLD:
            logger.warning("killing the servers that have not stopped")
            for child in children:
                child.kill()
            break
    for child in children:
        child.wait()


def _describe_exit(server: ServerProcess, child: subprocess.Popen[bytes]) -> tuple[int, int, int, str]:
    code = child.returncode
    how = f"exited with code {code}" if code >= 0 else f"was killed by {signal.Signals(-code).name}"
    return server.index, server.port, child.pid, how


def _with_data_parallel_size(arguments: list[str], count: int) -> list[str]:
    size, _ = _pop_flag(arguments, "--data-parallel-size")
    if size is None:
        return [*arguments, f"--data-parallel-size={count}"]
    if size != str(count):
        raise ConfigError(
            f"--num-servers is {count} and --data-parallel-size is {size}; they must be equal "
            "(all replicas run on this machine)"
        )
    return arguments


def _with_expert_group(arguments: list[str], port: int) -> list[str]:
    """Name an expert group that only this launch uses: the port is unique on this machine."""
    enabled = any(word.replace("_", "-") == "--enable-expert-parallel" for word in arguments)
    if not enabled or _pop_flag(arguments, _GROUP_FLAG)[0] is not None:
        return arguments
    return [*arguments, f"{_GROUP_FLAG}=port-{port}"]


def _ports(flag: str, text: str | None, count: int) -> list[int]:
    """Return the ports; none if `text` is None or -1, FastDeploy's value for that."""
    if text is None or text.strip() == "-1":
        return []
    parts = [part.strip() for part in text.split(",")]
    for part in parts:
        if not (part.isascii() and part.isdigit() and 1 <= int(part) <= 65535):
            raise ConfigError(f"{flag}: {part!r} is not a port (1 to 65535)")
    if len(parts) != count:
        raise ConfigError(f"{flag} has {len(parts)} ports and --num-servers is {count}; give one per server")
    return [int(part) for part in parts]


def _pop_flag(arguments: list[str], flag: str) -> tuple[str | None, list[str]]:
    """Return the value of `flag` as an api_server would parse it (the last one), and the other words."""
    value = None
    rest: list[str] = []
    words = iter(arguments)
    for word in words:
        name, equals, text = word.partition("=")
        if name.startswith("--") and name.replace("_", "-") == flag:
            value = text if equals else next(words, "")
        else:
            rest.append(word)
    return value, rest


def _parser() -> argparse.ArgumentParser:
    parser = CommandLine(
        prog="python -m fastdeploy.entrypoints.openai.multi_api_server",
        description="Start one api_server per replica; stop all of them on a signal or when one dies.",
        epilog="Exit status: 0 after SIGTERM, 130 after SIGINT, 1 if a server died, 2 for wrong arguments.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--num-servers", type=int, default=2, metavar="N", help="replicas to start (default %(default)s)"
    )
    parser.add_argument(
        "--ports", default="8000,8002", metavar="P,P,...", help="one per server (default %(default)s)"
    )
    parser.add_argument("--metrics-ports", metavar="P,P,...", help="one per server (default: free ports)")
    parser.add_argument("--controller-ports", metavar="P,P,...", help="one per server (default: none)")
    parser.add_argument(
        "--args",
        nargs=argparse.REMAINDER,
        default=[],
        help="arguments for every server; a list for --engine-worker-queue-port has one port per server",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
