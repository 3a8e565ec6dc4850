"""The queue of requests that wait for a replica. Belongs to the event loop."""

from __future__ import annotations

import math
from collections import deque
from typing import Protocol

from ..board.board import PickFailure

#: Seconds between two passes over a queue for which there is no replica at all. A pass over a long queue
#: takes time, and each request that arrives or ends would cause one.
_MIN_INTERVAL = 0.1


class Waiter(Protocol):
    """A request in the queue. Its methods raise no exceptions, which would reach other requests."""

    #: When it gives up, on the clock that is passed in.
    deadline: float

    @property
    def has_exclusions(self) -> bool:
        """True if it avoids some replicas, so that others may find room where it finds none."""

    def try_again(self, now: float) -> PickFailure | None:
        """Return None if it no longer waits: it has a replica, or has ended."""

    def give_up(self) -> None:
        """End the wait: the deadline has passed."""


class WaitQueue:
    """First come, first served, with limits on length and time.

    Urgent requests, which a replica has had already, come before all others and are always accepted.
    """

    def __init__(self, max_length: int) -> None:
        self._max_length = max_length
        self._urgent: deque[Waiter] = deque()
        self._others: deque[Waiter] = deque()
        #: The last pass over the others found all replicas busy.
        self._is_blocked = False
        self._is_advancing = False
        #: A pass before then would be useless.
        self._next_pass = 0.0

    def __len__(self) -> int:
        return len(self._urgent) + len(self._others)

    def join(self, waiter: Waiter, is_urgent: bool = False) -> bool:
        """Return False if the queue is full."""
        if is_urgent:
            self._urgent.append(waiter)
        elif len(self._others) >= self._max_length:
            return False
        else:
            self._others.append(waiter)
        return True

    def has_others(self, now: float) -> bool:
        """Return True if earlier requests wait for the same replicas as a new one."""
        if self._others:
            self.advance(now)
        return bool(self._others) and self._is_blocked

    def leave(self, waiter: Waiter) -> None:
        for waiters in (self._urgent, self._others):
            if waiter in waiters:
                waiters.remove(waiter)

    def advance(self, now: float) -> None:
        """Serve the requests that find a replica, and end those whose deadline has passed.

        Call this when a request ends, and periodically, because requests of other processes end, too.
        """
        # A waiter that gives up ends its request, which calls this again.
        if self._is_advancing or now < self._next_pass:
            return
        self._is_advancing = True
        try:
            waiting, is_any_busy = len(self), False
            for waiters in (self._urgent, self._others):
                self._is_blocked, is_busy = _serve(waiters, now)
                is_any_busy |= is_busy
                for waiter in [each for each in waiters if each.deadline <= now]:
                    # It may have ended together with one before it.
                    if waiter in waiters:
                        waiters.remove(waiter)
                        waiter.give_up()
            if waiting and waiting == len(self) and not is_any_busy:
                # No replica is up for any of them, so a request that ends does not help.
                self._next_pass = now + _MIN_INTERVAL
        finally:
            self._is_advancing = False


def _serve(waiters: deque[Waiter], now: float) -> tuple[bool, bool]:
    """Try the waiters in order. Stop at one that finds all replicas busy, unless it has exclusions.

    Returns:
        True if it stopped, and True if a waiter found all replicas that it accepts busy.
    """
    staying: list[Waiter] = []
    is_blocked = is_busy = False
    try:
        while waiters and not is_blocked:
            waiter = waiters.popleft()
            if waiter.has_exclusions and is_busy:
                # Its exclusions may differ, but most such waiters come from the same lost replica.
                staying.append(waiter)
                continue
            failure = waiter.try_again(now)
            if failure is not None:
                staying.append(waiter)
            if failure is PickFailure.BUSY:
                is_busy = True
                is_blocked = not waiter.has_exclusions
    finally:
        waiters.extendleft(reversed(staying))
    return is_blocked, is_busy


def retry_after(waiting: int, ended_per_second: float, limit: float) -> int:
    """Return the estimated seconds until a new request would be served, a whole number.

    Args:
        waiting: requests in the queue.
        ended_per_second: rate at which requests have ended lately.
        limit: the result if none have, and its maximum.
    """
    if ended_per_second <= 0.0:
        return max(1, math.ceil(limit))
    return max(1, min(math.ceil(limit), math.ceil((waiting + 1) / ended_per_second)))
