"""Ports for a test's servers. While a server is down, no parallel test is given its port."""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import socket

#: Below the kernel's default range of ephemeral ports, and below the default ports of router and daemon.
_ALL = range(20_000, 30_000)
_PROCESSES = 16
#: The share of this pytest-xdist worker.
_OWN = _ALL[int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:]) % _PROCESSES :: _PROCESSES]
#: Starts at a random port, for the sake of other test runs on this machine.
_next = itertools.islice(itertools.cycle(_OWN), random.Random().randrange(len(_OWN)), None)


def free_ports(count: int) -> list[int]:
    """Return ports that are free on loopback, least recently used first."""
    with contextlib.ExitStack() as held:
        found: list[int] = []
        for port in itertools.islice(_next, len(_OWN)):
            with contextlib.suppress(OSError):  # it is taken
                held.enter_context(socket.socket()).bind(("127.0.0.1", port))
                found.append(port)
            if len(found) == count:
                return found
    raise AssertionError(f"fewer than {count} of {len(_OWN)} ports are free")


def accepts(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
