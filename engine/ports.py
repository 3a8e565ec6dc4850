"""TCP ports before they are used: is this one free, and if not, who has it."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

from .errors import ConfigError

_LISTEN = "0A"


def require_free(host: str, port: int, flag: str) -> None:
    """Returns when it is.

    Raises:
        ConfigError: the port cannot be listened on; one line with the flag that asked for it and the holder.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        # As the server itself will do: connections of an earlier run in TIME_WAIT are no obstacle.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
            probe.listen(1)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise ConfigError(
                    f"{flag}: port {port} on {host} is taken{_by_whom(port)}; choose a free one"
                ) from None
            raise ConfigError(f"{flag}: cannot listen on {host} port {port}: {error.strerror}") from None


def find_free(count: int) -> list[int]:
    """Ports of loopback that were free a moment ago; all held at once, so that they differ."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def _by_whom(port: int) -> str:
    """Empty when the holder belongs to another user: only root may look."""
    inodes = set(_listening_sockets(port))
    for directory in Path("/proc").glob("[0-9]*/fd"):
        try:
            if any(os.readlink(fd) in inodes for fd in directory.iterdir()):
                name = (directory.parent / "comm").read_text().strip()
                return f" by pid {directory.parent.name} ({name})"
        except OSError:
            continue  # it has ended meanwhile, or is not ours to look into
    return ""


def _listening_sockets(port: int) -> Iterator[str]:
    for table in (Path("/proc/net/tcp"), Path("/proc/net/tcp6")):
        lines = table.read_text().splitlines()[1:] if table.exists() else []
        for line in lines:
            _, local, _, state, *rest = line.split()
            if state == _LISTEN and int(local.rpartition(":")[2], 16) == port:
                yield f"socket:[{rest[5]}]"
