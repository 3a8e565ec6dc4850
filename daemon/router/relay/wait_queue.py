"""The line of requests in front of replicas that are all full. Belongs to the event loop."""

from __future__ import annotations

import math
from collections import deque
from typing import Protocol

from ..board.board import PickFailure

#: Seconds between two passes over a line for which there is no replica. A pass takes time in a long line,
#: and each request that comes or goes would cause one.
_REST = 0.1


class Waiter(Protocol):
    """A request in the line. Its methods deal with their own exceptions: the line serves all others, too."""

    #: When it gives up, on the clock that is passed in.
    deadline: float

    @property
    def is_choosy(self) -> bool:
        """There are replicas that it does not want any more: others may find room where it finds none."""

    def try_again(self, now: float) -> PickFailure | None:
        """None if it need not wait any longer: it has got a replica, or does not want one any more."""

    def give_up(self) -> None:
        """Its deadline has come."""


class WaitQueue:
    """First come, first served; bounded in length and in time. Those that a replica has had already go
    before all others and are always let in."""

    def __init__(self, longest: int) -> None:
        self._longest = longest
        self._urgent: deque[Waiter] = deque()
        self._others: deque[Waiter] = deque()
        self._is_full = False
        self._is_advancing = False
        #: No use in trying all of them again before then.
        self._rests_until = 0.0

    def __len__(self) -> int:
        return len(self._urgent) + len(self._others)

    def join(self, waiter: Waiter, is_urgent: bool = False) -> bool:
        """False if the line is as long as it may be."""
        if is_urgent:
            self._urgent.append(waiter)
        elif len(self._others) >= self._longest:
            return False
        else:
            self._others.append(waiter)
        return True

    def has_others(self, now: float) -> bool:
        """Somebody came before one who comes now, wants the same, and still waits."""
        if self._others:
            self.advance(now)
        return bool(self._others) and self._is_full

    def leave(self, waiter: Waiter) -> None:
        for waiters in (self._urgent, self._others):
            if waiter in waiters:
                waiters.remove(waiter)

    def advance(self, now: float) -> None:
        """When a request has ended, and now and then: those of other processes end unheard."""
        if self._is_advancing or now < self._rests_until:
            return  # one that gives up has ended, too
        self._is_advancing = True
        try:
            waiting, is_any_full = len(self), False
            for waiters in (self._urgent, self._others):
                self._is_full, is_full_for_some = _serve(waiters, now)
                is_any_full |= is_full_for_some
                for waiter in [each for each in waiters if each.deadline <= now]:
                    # It may have ended together with one before it.
                    if waiter in waiters:
                        waiters.remove(waiter)
                        waiter.give_up()
            if waiting and waiting == len(self) and not is_any_full:
                # There is no replica for any of them, and a request that ends does not bring one.
                self._rests_until = now + _REST
        finally:
            self._is_advancing = False


def _serve(waiters: deque[Waiter], now: float) -> tuple[bool, bool]:
    """Where one finds everything full, so do all behind it, but for what it alone does not want. Where there
    is nobody for one, others go on. Return whether everything is full, and whether it is for some."""
    staying: list[Waiter] = []
    is_full = is_full_for_choosy = False
    try:
        while waiters and not is_full:
            waiter = waiters.popleft()
            if waiter.is_choosy and is_full_for_choosy:
                # Not quite the same for all of them, but many at a time come from the same replica.
                staying.append(waiter)
                continue
            nobody = waiter.try_again(now)
            if nobody is not None:
                staying.append(waiter)
            if nobody is PickFailure.BUSY:
                is_full_for_choosy = True
                is_full = not waiter.is_choosy
    finally:
        waiters.extendleft(reversed(staying))
    return is_full, is_full_for_choosy


def retry_after(waiting: int, ended_per_second: float, most: float) -> int:
    """Whole seconds until one who comes now would be served: as long as those before it will need.

    Args:
        most: what is said where nothing has ended lately.
    """
    if ended_per_second <= 0.0:
        return max(1, math.ceil(most))
    return max(1, min(math.ceil(most), math.ceil((waiting + 1) / ended_per_second)))
