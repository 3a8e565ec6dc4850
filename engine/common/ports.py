"""TCP ports before they are used: is this one free, and if not, who has it."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

from .addresses import addresses_of, listen
from .errors import ConfigError

_LISTEN = "0A"
#: Of those that are looked for: below it many are some service's own.
_LOWEST = 20_000
_RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")


def require_free(host: str, port: int, flag: str) -> None:
    """Return when it is, on all addresses of the host.

    Raises:
        ConfigError: the port cannot be listened on; one line with the flag that asked for it and the holder.
    """
    for address in addresses_of(host):
        try:
            # As the server itself will do: connections of an earlier run in TIME_WAIT are no obstacle.
            listen(address, port).close()
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise ConfigError(
                    f"{flag}: port {port} on {address} is taken{_by_whom(port)}; choose a free one"
                ) from None
            raise ConfigError(f"{flag}: cannot listen on {address} port {port}: {error.strerror}") from None


def find_free(count: int) -> list[int]:
    """Ports of loopback that were free a moment ago; all held at once, so that they differ.

    The kernel gives none of them to a connection by itself: while a server is down, nobody gets its port.
    """
    first, last = _range_of_connections()
    ports = [*range(_LOWEST, first), *range(last + 1, 1 << 16)]
    # Not with the seed that somebody has given to all of this process.
    random.Random().shuffle(ports)
    with ExitStack() as stack:
        found: list[int] = []
        while ports and len(found) < count:
            with contextlib.suppress(OSError):  # it is taken
                found.append(_hold(ports.pop(), stack))
        # At last, any will do.
        return found + [_hold(0, stack) for _ in range(count - len(found))]


def _hold(port: int, stack: ExitStack) -> int:
    one = stack.enter_context(socket.socket())
    one.bind(("127.0.0.1", port))
    return one.getsockname()[1]


def _range_of_connections() -> tuple[int, int]:
    try:
        first, last = _RANGE.read_text().split()
    except FileNotFoundError:
        return 32768, 60999  # Linux's own, where a sandbox does not tell
    return int(first), int(last)


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
