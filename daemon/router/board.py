"""Which replicas there are, which of them may be chosen, and how many requests each has in flight.

    nobody -> UP      it registered and is healthy
    nobody -> DOWN    read from the registry file: nobody has looked yet
    UP -> DOWN        failed twice in a row, or nobody listens on its port
    DOWN -> UP        answered a health check that began after its last failure
    DOWN -> nobody    no heartbeat for minutes

A replica that is DOWN keeps its seat: requests it still has in flight are counted down on that seat. One that
comes back after it was forgotten gets a new seat, so that the end of an old request cannot count against it.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass

from .policies import Candidate, Policy, RequestFacts
from .registration import Instance

logger = logging.getLogger(__name__)

#: One hiccup is not a death; two in a row are.
FAILURES_TO_DOWN = 2
#: Seconds without a heartbeat after which a replica that is down is forgotten.
FORGET_AFTER = 300.0


class Seat:
    """A replica's place on the board. Only the board changes it, under its lock."""

    __slots__ = ("failed_at", "failures", "heard_at", "in_flight", "instance", "last_pick", "picks", "up")

    def __init__(self, instance: Instance, up: bool, now: float) -> None:
        self.instance = instance
        self.up = up
        self.in_flight = 0
        self.picks = 0
        self.last_pick = 0
        #: Failures in a row, and when the last one was.
        self.failures = 0
        self.failed_at = now
        self.heard_at = now


class Lease:
    """One request's claim on a seat: counted when it was picked, given back once."""

    def __init__(self, board: Board, seat: Seat) -> None:
        self._board = board
        self.seat = seat
        self.instance = seat.instance
        self._held = True

    def release(self) -> None:
        """May be called again; only the first call counts."""
        with self._board.lock:
            if self._held:
                self._held = False
                self.seat.in_flight -= 1
                assert self.seat.in_flight >= 0, (
                    f"replica {self.instance.name}: more requests ended than began"
                )


@dataclass(frozen=True, slots=True)
class Status:
    """A seat as it was at one moment."""

    instance: Instance
    up: bool
    in_flight: int
    picks: int


class Board:
    """Thread-safe. Nothing in here waits for a replica."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.lock = threading.Lock()
        self._clock = clock
        self._seats: dict[str, Seat] = {}
        self._picks = 0

    def pick(self, policy: Policy, facts: RequestFacts, exclude: Collection[Seat] = ()) -> Lease | None:
        """Chooses a replica that is up and counts the request on it; None if there is none left.

        Both in one critical section: otherwise all requests of a burst see the same idle replica.
        """
        with self.lock:
            seats = [seat for seat in self._seats.values() if seat.up and seat not in exclude]
            if not seats:
                return None
            candidates = [Candidate(seat.in_flight, seat.last_pick) for seat in seats]
            seat = seats[policy(candidates, facts)]
            self._picks += 1
            seat.last_pick = self._picks
            seat.picks += 1
            seat.in_flight += 1
            return Lease(self, seat)

    def seat_of(self, instance: Instance) -> Seat | None:
        with self.lock:
            return self._seats.get(instance.url)

    def admit(self, instance: Instance, up: bool = True) -> bool:
        """Seats an instance, or replaces what is known about it. True if that changed who is on the board."""
        with self.lock:
            now = self._clock()
            seat = self._seats.get(instance.url)
            if seat is None:
                self._seats[instance.url] = Seat(instance, up, now)
                logger.info("replica=%s registered, url=%s", instance.name, instance.url)
                return True
            changed = seat.instance != instance
            seat.instance = instance
            seat.heard_at = now
            return changed

    def heard(self, seat: Seat) -> None:
        """A heartbeat came, whatever the health check says."""
        with self.lock:
            seat.heard_at = self._clock()

    def healthy(self, seat: Seat, asked_at: float) -> None:
        """It answered a health check that began at `asked_at`, which says nothing about a later failure."""
        with self.lock:
            if asked_at < seat.failed_at:
                return
            seat.failures = 0
            if not seat.up:
                seat.up = True
                logger.info("replica=%s is up", seat.instance.name)

    def failed(self, seat: Seat, why: str) -> None:
        """A health check or a request failed in a way that may be a hiccup."""
        with self.lock:
            self._fail(seat, why, enough=seat.failures + 1 >= FAILURES_TO_DOWN)

    def unreachable(self, seat: Seat, why: str) -> None:
        """Nobody accepts connections there: no request is sent to it until a health check succeeds."""
        with self.lock:
            self._fail(seat, why, enough=True)

    def forget_lost(self) -> bool:
        """Removes replicas that are down and have long been silent. True if there were any."""
        with self.lock:
            limit = self._clock() - FORGET_AFTER
            lost = [seat for seat in self._seats.values() if not seat.up and seat.heard_at < limit]
            for seat in lost:
                del self._seats[seat.instance.url]
                logger.warning(
                    "replica=%s forgotten: down, and no heartbeat for %.0f s",
                    seat.instance.name,
                    FORGET_AFTER,
                )
            return bool(lost)

    def seats(self) -> list[Seat]:
        with self.lock:
            return list(self._seats.values())

    def status(self) -> list[Status]:
        """Everybody on the board, in the order of replica numbers."""
        with self.lock:
            rows = [Status(s.instance, s.up, s.in_flight, s.picks) for s in self._seats.values()]
        unnumbered = 1 << 16
        return sorted(
            rows,
            key=lambda r: (unnumbered if r.instance.replica is None else r.instance.replica, r.instance.url),
        )

    def _fail(self, seat: Seat, why: str, enough: bool) -> None:
        seat.failures += 1
        seat.failed_at = self._clock()
        if seat.up and enough:
            seat.up = False
            logger.warning("replica=%s is down: %s", seat.instance.name, why)
        elif seat.up:
            logger.warning("replica=%s failed once, still in use: %s", seat.instance.name, why)
