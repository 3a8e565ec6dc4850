"""Checks whether TCP ports are free, and finds free ones."""

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

#: State LISTEN in /proc/net/tcp.
_LISTEN = "0A"
#: Lowest port that `find_free` returns; many below are assigned to services.
_LOWEST = 20_000
_RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")


def require_free(host: str, port: int, flag: str) -> None:
    """Check that a port is free on all addresses of the host.

    Raises:
        ConfigError: the port is not free. The message names the flag that set it and its holder.
    """
    for address in addresses_of(host):
        try:
            # With SO_REUSEADDR, as in the server: connections in TIME_WAIT do not matter.
            listen(address, port).close()
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise ConfigError(
                    f"{flag}: port {port} on {address} is taken{_holder(port)}; choose a free one"
                ) from None
            raise ConfigError(f"{flag}: cannot listen on {address} port {port}: {error.strerror}") from None


def find_free(count: int) -> list[int]:
    """Return distinct ports that are currently free on loopback.

    They lie outside the range of ephemeral ports, so the kernel does not give them to outgoing connections
    while a server is down.
    """
    first, last = _ephemeral_range()
    ports = [*range(_LOWEST, first), *range(last + 1, 1 << 16)]
    # Its own generator, independent of `random.seed` elsewhere in this process.
    random.Random().shuffle(ports)
    with ExitStack() as stack:
        found: list[int] = []
        while ports and len(found) < count:
            with contextlib.suppress(OSError):  # in use
                found.append(_hold(ports.pop(), stack))
        # If these do not suffice, any port.
        return found + [_hold(0, stack) for _ in range(count - len(found))]


def _hold(port: int, stack: ExitStack) -> int:
    one = stack.enter_context(socket.socket())
    one.bind(("127.0.0.1", port))
    return one.getsockname()[1]


def _ephemeral_range() -> tuple[int, int]:
    """Return the first and last port that the kernel gives to outgoing connections."""
    try:
        first, last = _RANGE.read_text().split()
    except FileNotFoundError:
        return 32768, 60999  # Linux's default, for sandboxes without the file
    return int(first), int(last)


def _holder(port: int) -> str:
    """Return the process that holds a port, as " by pid ..."; "" if it belongs to another user."""
    inodes = set(_listening_sockets(port))
    for directory in Path("/proc").glob("[0-9]*/fd"):
        try:
            if any(os.readlink(fd) in inodes for fd in directory.iterdir()):
                name = (directory.parent / "comm").read_text().strip()
                return f" by pid {directory.parent.name} ({name})"
        except OSError:
            continue  # ended meanwhile, or of another user
    return ""


def _listening_sockets(port: int) -> Iterator[str]:
    for table in (Path("/proc/net/tcp"), Path("/proc/net/tcp6")):
        lines = table.read_text().splitlines()[1:] if table.exists() else []
        for line in lines:
            _, local, _, state, *rest = line.split()
            if state == _LISTEN and int(local.rpartition(":")[2], 16) == port:
                yield f"socket:[{rest[5]}]"
