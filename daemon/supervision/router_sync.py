"""What the router knows of the replicas, looked at again and again; its drain flags, kept as they should be.

Orders are not sent and forgotten: each look compares the flags with what is wanted at the time, and puts
right what differs. So an order survives a router that is restarting, and what a daemon that was killed has
left drained, the next one undrains.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from . import router_client
from .router_client import Ended, InBackground, RouterSilent, Row

log = logging.getLogger("fd-dp")

#: Most ends that are kept until the router knows them, and most starts whose end is remembered.
_MOST_ENDS = 64


@dataclass(frozen=True, slots=True)
class RouterSnapshot:
    #: When it began, on the loop's clock.
    at: float = float("-inf")
    #: By port; without those that the router does not know.
    rows: Mapping[int, Row] = field(default_factory=dict)
    #: Why there is none: the router did not answer.
    problem: str = "the router has not been asked"


class RouterSync:
    """Belongs to the loop, which never waits for it."""

    def __init__(self, admin: Path) -> None:
        self._admin = admin
        #: The last look that is over.
        self.look = RouterSnapshot()
        self._call: InBackground[Mapping[int, Row]] | None = None
        self._began = self._gone = float("-inf")
        #: All that were ever wanted.
        self._ports: set[int] = set()
        #: By port: URL and id of the start that is registered.
        self._starts: dict[int, tuple[str, str]] = {}
        self._being_told: Sequence[Ended] = ()
        self._ends: deque[Ended] = deque(maxlen=_MOST_ENDS)
        self._told: deque[str] = deque(maxlen=_MOST_ENDS)

    @property
    def has_news(self) -> bool:
        """True while the router has yet to be told how a replica ended."""
        return bool(self._ends)

    def ended(self, port: int, from_outside: bool) -> None:
        """Note that a replica ended. The next step tells the router, if the replica was registered there."""
        url, instance = self._starts.pop(port, ("", ""))
        if instance:
            self._told.append(instance)
            self._ends.append(Ended(url, instance, from_outside))

    def step(self, wanted: Mapping[int, bool], now: float, interval: float) -> None:
        """Takes in what has been seen, and begins another look when it is time.

        Args:
            wanted: ports of the replicas -> whether they shall be drained.
            interval: seconds from the beginning of one look to that of the next.
        """
        if self._call is not None and self._call.is_done:
            try:
                look = RouterSnapshot(self._began, self._call.result(), "")
                self._take_in(look)
            except RouterSilent as error:
                look = RouterSnapshot(self._began, {}, str(error))
            self._call = None
            if look.at > self._gone:
                self.look = look
        if self._call is None and now - self._began >= interval:
            self._began = now
            # Nobody wants anything of a port that a reload has given up.
            self._ports |= wanted.keys()
            snapshot = {**dict.fromkeys(self._ports, False), **wanted}
            self._being_told = tuple(self._ends)
            ends = self._being_told
            self._call = InBackground(lambda: _tell_and_look(self._admin, ends, snapshot))

    def gone(self, now: float) -> None:
        """The router's process has ended: nobody knows anything."""
        self._gone = now
        self.look = RouterSnapshot(now, {}, "the router is down")
        self._ends.clear()

    def _take_in(self, look: RouterSnapshot) -> None:
        for ended in self._being_told:
            if ended in self._ends:
                self._ends.remove(ended)
        for port, row in look.rows.items():
            # The router may list a replica for a moment after its end.
            if row.is_there and row.instance and row.instance not in self._told:
                self._starts[port] = (f"http://{row.authority}", row.instance)


def _shall_drain(row: Row, wanted: Mapping[int, bool]) -> bool:
    """The router keeps a place for one that has left only as long as it is drained."""
    return wanted.get(row.port, row.draining and not row.leaving)


def _tell_and_look(admin: Path, ends: Sequence[Ended], wanted: Mapping[int, bool]) -> Mapping[int, Row]:
    for ended in ends:
        try:
            router_client.tell_of_end(admin, ended)
        except RouterSilent as error:
            # If the router is silent altogether the look fails, too, and this is tried again. If it is this
            # word alone that it does not take, the drains must not suffer for it.
            log.warning("the router was not told how %s has ended: %s", ended.url, error)
    return _look_and_put_right(admin, wanted)


def _look_and_put_right(admin: Path, wanted: Mapping[int, bool]) -> Mapping[int, Row]:
    rows = router_client.registered(admin)
    wrong = [row for row in rows.values() if row.draining != _shall_drain(row, wanted)]
    for row in wrong:
        router_client.set_draining(admin, row, not row.draining)
        log.info("router: %s %s", row.authority, "takes requests again" if row.draining else "drains")
    return router_client.registered(admin) if wrong else rows
