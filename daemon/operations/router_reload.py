"""Changes the flags of a running router: writes them into its flags file and sends SIGHUP."""

from __future__ import annotations

import logging
from collections.abc import Generator

from ..config.programs import ROUTER, Program, admin_socket
from ..supervision import router_client
from ..supervision.fleet import Fleet
from ..supervision.program_state import FAILED, ProgramState
from ..supervision.router_client import BackgroundCall, Flags, RouterUnavailable
from .operation import Operation, StepPosition, retry_until_accepted, stage_event

log = logging.getLogger("fd-dp")

#: Seconds. The router's new workers get a minute to start; then it stops the old ones.
_RELOAD_TIMEOUT = 90.0


def reload(fleet: Fleet, program: Program, position: StepPosition) -> Operation:
    """Send new flags to the router and wait until all of its workers use them.

    On failure the caller rolls back.
    """
    router = fleet.programs[program.name]
    yield stage_event(program, "reload", position)
    before = yield from _ask(fleet)
    problem = yield from retry_until_accepted(lambda: fleet.update_router_flags(program))
    if problem:
        return problem
    began = fleet.now
    # A router that is down reads them when it starts.
    while router.alive:
        now = yield from _ask(fleet)
        if now is not None and now.hash == program.flags_hash and now.outcome == "done":
            break
        if _was_rejected(before, now):
            log_file = fleet.layout.logs / ROUTER / "router.log"
            return f"rejected its new flags; {log_file} says why"
        if fleet.now - began > _RELOAD_TIMEOUT or fleet.stopping:
            return f"does not use its new flags after {_RELOAD_TIMEOUT:g} s"
        yield None
    if router.state in FAILED:
        return router.note
    yield stage_event(program, "ready", position)
    return ""


def has_old_flags(fleet: Fleet) -> bool:
    """Return whether a READY router uses other flags than those in its file, without having rejected them.

    This happens when a daemon is killed after it has written the file and before it sends the signal.
    """
    router = fleet.programs.get(ROUTER)
    if router is None or router.state is not ProgramState.READY:
        return False
    last = router.health.get("reload")
    accepted = isinstance(last, dict) and last.get("outcome") == "done"
    return accepted and router.health.get("flags") != router.spec.flags_hash


def signal_again(fleet: Fleet) -> None:
    """Tell the router to read its flags file. Raises SupervisorError or OSError."""
    log.warning("router: its flags differ from those in its file; sending SIGHUP")
    fleet.update_router_flags(fleet.programs[ROUTER].spec)


def _was_rejected(before: Flags | None, now: Flags | None) -> bool:
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
