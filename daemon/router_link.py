"""What the router knows of the replicas, looked at again and again; its drain flags, kept as they should be.

Orders are not sent and forgotten: each look compares the flags with what is wanted at the time, and puts
right what differs. So an order survives a router that is restarting, and what a daemon that was killed has
left drained, the next one undrains.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from . import router_admin
from .router_admin import InBackground, RouterSilent, Row

log = logging.getLogger("fd-dp")


@dataclass(frozen=True, slots=True)
class Look:
    #: When it began, on the loop's clock.
    at: float = float("-inf")
    #: By port; without those that the router does not know.
    rows: Mapping[int, Row] = field(default_factory=dict)
    #: Why there is none: the router did not answer.
    problem: str = "the router has not been asked"


class RouterLink:
    """Belongs to the loop, which never waits for it."""

    def __init__(self, admin: Path) -> None:
        self._admin = admin
        #: The last look that is over.
        self.look = Look()
        self._call: InBackground[Mapping[int, Row]] | None = None
        self._began = self._gone = float("-inf")
        #: All that were ever wanted.
        self._ports: set[int] = set()

    def step(self, wanted: Mapping[int, bool], now: float, interval: float) -> None:
        """Takes in what has been seen, and begins another look when it is time.

        Args:
            wanted: ports of the replicas -> whether they shall be drained.
            interval: seconds from the beginning of one look to that of the next.
        """
        if self._call is not None and self._call.is_done:
            try:
                look = Look(self._began, self._call.result(), "")
            except RouterSilent as error:
                look = Look(self._began, {}, str(error))
            self._call = None
            if look.at > self._gone:
                self.look = look
        if self._call is None and now - self._began >= interval:
            self._began = now
            # Nobody wants anything of a port that a reload has given up.
            self._ports |= wanted.keys()
            snapshot = {**dict.fromkeys(self._ports, False), **wanted}
            self._call = InBackground(lambda: _look_and_put_right(self._admin, snapshot))

    def gone(self, now: float) -> None:
        """The router's process has ended: nobody knows anything."""
        self._gone = now
        self.look = Look(now, {}, "the router is down")


def _shall_drain(row: Row, wanted: Mapping[int, bool]) -> bool:
    """The router keeps a place for one that has left only as long as it is drained."""
    return wanted.get(row.port, row.draining and not row.leaving)


def _look_and_put_right(admin: Path, wanted: Mapping[int, bool]) -> Mapping[int, Row]:
    rows = router_admin.registered(admin)
    wrong = [row for row in rows.values() if row.draining != _shall_drain(row, wanted)]
    for row in wrong:
        router_admin.set_draining(admin, row, not row.draining)
        log.info("router: %s %s", row.authority, "takes requests again" if row.draining else "drains")
    return router_admin.registered(admin) if wrong else rows
