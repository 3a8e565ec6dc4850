"""Extension of supervisord's XML-RPC interface: how programs ended. supervisor only logs the signal."""

from __future__ import annotations

from typing import Any

from supervisor.xmlrpc import Faults, RPCError


class EndsInterface:
    """Methods in the namespace "fd"."""

    def __init__(self, ends: dict[str, str] | None) -> None:
        self._ends = ends

    def howItEnded(self, name: str) -> str:
        """Return how the last process of a program ended; "" if none has."""
        if self._ends is None:
            raise RPCError(Faults.UNKNOWN_METHOD, "supervisor's own supervisord runs, not fd_supervisord")
        return self._ends.get(name, "")


def make_ends_interface(running: Any) -> EndsInterface:
    return EndsInterface(getattr(running.options, "ends", None))
