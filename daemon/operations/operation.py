"""Operations (reload, restart, start, stop) as generators.

The daemon's loop resumes an operation after each step of the fleet. An operation never blocks, and it sees
the same facts as the rest of the daemon.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any

from ..config.programs import Program
from ..process.supervisor_client import SupervisorError, SupervisorLost

#: A line of text for people, an event for programs (see protocol.py), or None for "still waiting".
Update = str | dict[str, Any] | None
#: Returns "" or the reason of its failure.
Operation = Generator[Update, None, str]
#: A part of an operation that cannot fail.
Waiting = Generator[Update, None, None]


@dataclass(frozen=True, slots=True)
class StepPosition:
    """Position of a step in its operation, counted from 1."""

    index: int = 1
    of: int = 1


def stage_event(
    program: Program, stage: str, position: StepPosition, in_flight: int = 0, note: str = ""
) -> dict[str, Any]:
    """Return an event that says which stage of its step a program has reached.

    Args:
        stage: "drain", "stop", "start", "ready", "failed", "rollback" or "reload".
    """
    return {
        "kind": "stage",
        "program": program.name,
        "label": program.label,
        "stage": stage,
        "index": position.index,
        "of": position.of,
        "in_flight": in_flight,
        "note": note,
    }


def retry_until_accepted(change: Callable[[], None]) -> Operation:
    """Call `change` until supervisord has accepted it.

    While supervisord does not answer, the daemon's loop replaces it or waits for systemd to do so.
    """
    while True:
        try:
            change()
            return ""
        except SupervisorLost:
            yield None
        except (SupervisorError, OSError) as error:
            return str(error)
