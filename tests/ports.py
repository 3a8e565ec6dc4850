"""Ports for the servers of a test. While one is down, no test that runs beside it is given its port."""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import socket

#: Below those that the kernel gives to connections, unless it was told otherwise.
_ALL = range(20_000, 32_768)
_PROCESSES = 16
#: pytest-xdist's name for this one.
_OWN = _ALL[int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:]) % _PROCESSES :: _PROCESSES]
#: From anywhere, for the sake of whoever runs other tests on this machine.
_next = itertools.islice(itertools.cycle(_OWN), random.Random().randrange(len(_OWN)), None)


def free_ports(count: int) -> list[int]:
    """Those that nobody has on loopback, least recently used first."""
    with contextlib.ExitStack() as held:
        found: list[int] = []
        for port in itertools.islice(_next, len(_OWN)):
            with contextlib.suppress(OSError):  # it is taken
                held.enter_context(socket.socket()).bind(("127.0.0.1", port))
                found.append(port)
            if len(found) == count:
                return found
    raise AssertionError(f"fewer than {count} of {len(_OWN)} ports are free")
