"""The router takes other flags while it runs: they are written into its flags file, and SIGHUP says so."""

from __future__ import annotations

import logging
from collections.abc import Generator

from ..config.programs import ROUTER, Program, admin_socket
from ..supervision import router_client
from ..supervision.fleet import Fleet
from ..supervision.program_state import FAILED, ProgramState
from ..supervision.router_client import BackgroundCall, Flags, RouterUnavailable
from .operation import Operation, Place, insist, stage

log = logging.getLogger("fd-dp")

#: It starts new workers, which get a minute for that, and then ends the old ones.
_PATIENCE = 90.0


def reload(fleet: Fleet, program: Program, place: Place) -> Operation:
    """Until all of its workers run with them. If they do not, the caller gives it the old ones back."""
    replica = fleet.programs[program.name]
    yield stage(program, "reload", place)
    before = yield from _ask(fleet)
    problem = yield from insist(lambda: fleet.update_router_flags(program))
    if problem:
        return problem
    began = fleet.now
    # One that is down, or starts again meanwhile, finds them at its start.
    while replica.alive:
        now = yield from _ask(fleet)
        if now is not None and now.hash == program.flags_hash and now.outcome == "done":
            break
        if _was_turned_down(before, now):
            log_file = fleet.layout.logs / ROUTER / "router.log"
            return f"did not take its new flags; {log_file} says why"
        if fleet.now - began > _PATIENCE or fleet.stopping:
            return f"does not run with its new flags after {_PATIENCE:g} s"
        yield None
    if replica.state in FAILED:
        return replica.note
    yield stage(program, "ready", place)
    return ""


def are_old(fleet: Fleet) -> bool:
    """The router has other flags than those in its file, and has not turned them down.

    A daemon that was killed after it had written them has not sent the signal.
    """
    router = fleet.programs.get(ROUTER)
    if router is None or router.state is not ProgramState.READY:
        return False
    told = router.health.get("reload")
    taken = isinstance(told, dict) and told.get("outcome") == "done"
    return taken and router.health.get("flags") != router.program.flags_hash


def tell_again(fleet: Fleet) -> None:
    """Raises SupervisorError or OSError."""
    log.warning("router: has other flags than those in its file; telling it")
    fleet.update_router_flags(fleet.programs[ROUTER].program)


def _was_turned_down(before: Flags | None, now: Flags | None) -> bool:
    if before is None or now is None or now.number <= before.number:
        return False
    return now.outcome in ("refused", "failed")


def _ask(fleet: Fleet) -> Generator[None, None, Flags | None]:
    call = BackgroundCall(lambda: router_client.flags(admin_socket(fleet.layout.run)))
    while not call.is_done:
        yield None
    try:
        return call.result()
    except RouterUnavailable:
        return None
