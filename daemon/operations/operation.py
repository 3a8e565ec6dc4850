"""What an operation is, and what it tells.

An operation (reload, restart, start, stop) is a generator that the daemon's loop resumes after each step of
the fleet: it never waits by itself, and it sees the same facts as everything else.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any

from ..config.programs import Program
from ..process.supervisor_client import SupervisorError, SupervisorLost

#: A line for people, an event for programs (see protocol.py), or None for "still waiting".
Told = str | dict[str, Any] | None
#: Its end is "" or the reason why it failed.
Operation = Generator[Told, None, str]
#: A part of one that only takes time.
Passage = Generator[Told, None, None]


@dataclass(frozen=True, slots=True)
class Place:
    """Which step of how many."""

    index: int = 1
    of: int = 1


def stage(program: Program, stage: str, place: Place, in_flight: int = 0, note: str = "") -> dict[str, Any]:
    """An event: "drain", "stop", "start", "ready", "failed", "rollback" or "reload"."""
    return {
        "kind": "stage",
        "program": program.name,
        "label": program.label,
        "stage": stage,
        "index": place.index,
        "of": place.of,
        "in_flight": in_flight,
        "note": note,
    }


def insist(change: Callable[[], None]) -> Operation:
    """Until supervisord has taken it. When it is lost the loop starts another, or waits until systemd has."""
    while True:
        try:
            change()
            return ""
        except SupervisorLost:
            yield None
        except (SupervisorError, OSError) as error:
            return str(error)
