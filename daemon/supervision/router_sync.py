"""The daemon's view of the router, polled in the background; keeps the router's drain flags as wanted.

Every poll compares the drain flags with those wanted at that moment and corrects them. So a drain survives a
restart of the router, and a new daemon undrains what a killed one left drained.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..config.programs import ROUTER
from . import router_client
from .program_state import ProgramState, SupervisedProgram
from .router_client import BackgroundCall, RegisteredReplica, ReplicaExit, RouterUnavailable

log = logging.getLogger("fd-dp")

#: Seconds between polls: normally, while a READY replica is not registered, and while an operation waits.
_INTERVAL, _REGISTRATION_INTERVAL, FAST_INTERVAL = 1.0, 0.25, 0.1
#: Maximum number of exits kept until the router has them, and of instances known to have ended.
_MAX_EXITS = 64


@dataclass(frozen=True, slots=True)
class RouterSnapshot:
    """Result of one poll."""

    #: Start of the poll, on the daemon's clock.
    at: float = float("-inf")
    #: Registered replicas by port.
    rows: Mapping[int, RegisteredReplica] = field(default_factory=dict)
    #: Why there is no result, for people; "" if there is one.
    problem: str = "the router has not been polled"


class RouterSync:
    """Registered replicas and drain flags of the router. No method waits for the router."""

    def __init__(self, admin: Path) -> None:
        self._admin = admin
        #: Result of the last finished poll: at most a second old, less during an operation.
        self.snapshot = RouterSnapshot()
        #: Names of replicas that the operation under way has drained.
        self.maintenance: set[str] = set()
        self._call: BackgroundCall[Mapping[int, RegisteredReplica]] | None = None
        self._began = self._down_since = float("-inf")
        #: All ports that ever belonged to a replica.
        self._ports: set[int] = set()
        #: Port -> URL and instance id of the start that is registered.
        self._instances: dict[int, tuple[str, str]] = {}
        self._being_reported: Sequence[ReplicaExit] = ()
        self._exits: deque[ReplicaExit] = deque(maxlen=_MAX_EXITS)
        self._ended_instances: deque[str] = deque(maxlen=_MAX_EXITS)

    @property
    def has_news(self) -> bool:
        """True if an exit is still to be reported to the router."""
        return bool(self._exits)

    def row(self, replica: SupervisedProgram) -> RegisteredReplica | None:
        """Return the router's entry of a replica; None if there is none, or the router does not answer."""
        return None if replica.is_router else self.snapshot.rows.get(replica.port)

    def in_flight(self, replica: SupervisedProgram) -> int | None:
        """Return the number of requests in flight; None unless the replica passes its health checks there."""
        row = self.row(replica)
        return row.in_flight if row and row.up else None

    def drains(self, replica: SupervisedProgram) -> bool:
        """Return whether the router is to send it no new requests."""
        return replica.draining or replica.name in self.maintenance

    def has_registered(self, replicas: Iterable[SupervisedProgram]) -> bool:
        """Return whether every READY replica is in service at the router. It may take seconds to register."""
        ready = (replica for replica in replicas if replica.state is ProgramState.READY)
        return all((row := self.row(replica)) and row.in_service for replica in ready)

    def report_exit(self, replica: SupervisedProgram, *, from_outside: bool) -> None:
        """Queue a report of how a replica ended. Only a registered start of a replica is reported."""
        if replica.is_router:
            return
        url, instance = self._instances.pop(replica.port, ("", ""))
        if instance:
            self._ended_instances.append(instance)
            self._exits.append(ReplicaExit(url, instance, from_outside))

    def step(self, programs: Mapping[str, SupervisedProgram], now: float) -> None:
        """Read the result of the last poll, and begin another one when it is due."""
        router = programs.get(ROUTER)
        if router is None or not router.pid or not router.alive or router.state is ProgramState.STOPPING:
            self.router_down(now)
            return
        replicas = [program for program in programs.values() if not program.is_router]
        # During a reload two replicas may have the same port; the running one counts.
        replicas.sort(key=lambda replica: replica.alive)
        wanted = {replica.port: self.drains(replica) for replica in replicas}
        rows = self.snapshot.rows
        differs = any(row.draining != wanted.get(port, row.draining) for port, row in rows.items())
        if self.maintenance or differs or self.has_news:
            interval = FAST_INTERVAL
        else:
            interval = _INTERVAL if self.has_registered(replicas) else _REGISTRATION_INTERVAL
        self.poll(wanted, now, interval)

    def poll(self, wanted: Mapping[int, bool], now: float, interval: float) -> None:
        """Like `step`, for known drain flags.

        Args:
            wanted: port of each replica -> whether it is to be drained.
            interval: seconds between the starts of two polls.
        """
        if self._call is not None and self._call.is_done:
            try:
                snapshot = RouterSnapshot(self._began, self._call.result(), "")
                self._record(snapshot)
            except RouterUnavailable as error:
                snapshot = RouterSnapshot(self._began, {}, str(error))
            self._call = None
            if snapshot.at > self._down_since:
                self.snapshot = snapshot
        if self._call is None and now - self._began >= interval:
            self._began = now
            # A port that a reload has released is not to be drained.
            self._ports |= wanted.keys()
            flags = {**dict.fromkeys(self._ports, False), **wanted}
            exits = self._being_reported = tuple(self._exits)
            self._call = BackgroundCall(lambda: _report_and_poll(self._admin, exits, flags))

    def router_down(self, now: float) -> None:
        """Drop everything learned from the router: its process has ended."""
        self._down_since = now
        self.snapshot = RouterSnapshot(now, {}, "the router is down")
        self._exits.clear()

    def _record(self, snapshot: RouterSnapshot) -> None:
        for reported in self._being_reported:
            if reported in self._exits:
                self._exits.remove(reported)
        for port, row in snapshot.rows.items():
            # The router may list a replica for a moment after its end.
            if row.in_service and row.instance and row.instance not in self._ended_instances:
                self._instances[port] = (f"http://{row.authority}", row.instance)


def _should_drain(row: RegisteredReplica, wanted: Mapping[int, bool]) -> bool:
    """Return the wanted drain flag; a replica of no wanted port keeps its flag until it deregisters.

    The router keeps the entry of a deregistered replica only while it is drained.
    """
    return wanted.get(row.port, row.draining and not row.leaving)


def _report_and_poll(
    admin: Path, exits: Sequence[ReplicaExit], wanted: Mapping[int, bool]
) -> Mapping[int, RegisteredReplica]:
    for ended in exits:
        try:
            router_client.report_exit(admin, ended)
        except RouterUnavailable as error:
            # If the router does not answer at all, the poll fails too and the report is repeated. If it only
            # rejects this report, drains must still work.
            log.warning("the exit of %s could not be reported to the router: %s", ended.url, error)
    return _poll_and_correct(admin, wanted)


def _poll_and_correct(admin: Path, wanted: Mapping[int, bool]) -> Mapping[int, RegisteredReplica]:
    rows = router_client.registered(admin)
    wrong = [row for row in rows.values() if row.draining != _should_drain(row, wanted)]
    for row in wrong:
        router_client.set_draining(admin, row, not row.draining)
        log.info("router: %s %s", row.authority, "takes requests again" if row.draining else "drains")
    return router_client.registered(admin) if wrong else rows
