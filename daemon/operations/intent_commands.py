"""What the operator says of replicas and what is true at once: drain, undrain, hold, release."""

from __future__ import annotations

from collections.abc import Callable

from ..supervision.fleet import HELD, Fleet
from ..supervision.intents import Intent, Wish
from ..supervision.program_state import FAILED, ProgramState, SupervisedProgram

#: The wish that follows from what the replica's was.
WISHES: dict[str, Callable[[SupervisedProgram], Wish]] = {
    "drain": lambda replica: Wish(replica.intent, draining=True),
    "undrain": lambda replica: Wish(replica.intent, draining=False),
    "hold": lambda replica: Wish(Intent.HELD, replica.draining),
    "release": lambda replica: Wish(
        Intent.RUN if replica.intent is Intent.HELD else replica.intent, replica.draining
    ),
}


def objection(do: str, replica: SupervisedProgram) -> str:
    """Why it cannot be wished, or ""."""
    if do in ("drain", "undrain") and replica.program.replica is None:
        return "only replicas can be drained"
    if do == "hold" and replica.intent is Intent.STOPPED:
        return f"it is stopped, and there is nothing to hold; fdctl start {replica.name} first"
    return ""


def grant(fleet: Fleet, do: str, replicas: list[SupervisedProgram]) -> str:
    """Record and apply a wish. Return why it could not be saved, or ""."""
    problem = ""
    for replica in replicas:
        problem = fleet.wish(replica, WISHES[do](replica))
        if do == "hold" and replica.state in FAILED:
            # It has ended, and is not started again.
            fleet.stop(replica, HELD)
    return problem


def nobody_is_left(fleet: Fleet) -> bool:
    """Whether all that could take requests are drained."""
    replicas = fleet.replicas.values()
    return all(
        replica.state is not ProgramState.READY or fleet.router.drains(replica) for replica in replicas
    )
