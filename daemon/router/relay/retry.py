"""When a request is tried at another replica, and how often. Pure, the clock is passed in.

A death is followed by another attempt as long as there are replicas (suspicion.py limits it). What merely
moves load around (busy replicas) has a budget, or a fleet that is overloaded would get every request several
times.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..http.upstream import Fault

_DEATHS = frozenset({Fault.UNANSWERED, Fault.CUT, Fault.SILENT})
_SAID = {
    Fault.UNANSWERED: "did not answer",
    Fault.CUT: "did not finish its answer",
    Fault.GARBLED: "does not speak HTTP",
    Fault.SILENT: "fell silent",
}


def is_death(fault: Fault) -> bool:
    """The replica had the request when it failed."""
    return fault in _DEATHS


def in_words(fault: Fault, why: str) -> str:
    """Describe the fault without the replica's address, for clients and logs, which name the replica."""
    return f"{_SAID[fault]}: {why}" if fault in _SAID else why


def is_busy(status: int, has_retry_after: bool) -> bool:
    """An answer with which a replica, or what stands in front of it, says "not here, not now"."""
    return status in (502, 503) or (status == 429 and has_retry_after)


def is_overload(status: int, is_ours: bool) -> bool:
    """That answer may be for want of room. A replica of ours says 503 only when it is not there any more: it
    is starting, ending or has failed, and all its requests with it."""
    return status == 429 or not is_ours


def cannot_be_resumed(status: int) -> bool:
    """A refusal to resume that every replica would repeat: it is the stream that cannot go on."""
    return status in (400, 404, 409, 413, 422)


@dataclass(slots=True)
class RetryBudget:
    """A token bucket: a share of the requests, and a few more so that a quiet router may retry at all.

    After Finagle's retry budgets.
    """

    share: float = 0.2
    per_second: float = 10.0
    most: float = 100.0
    _tokens: float = 100.0
    _since: float = 0.0

    def deposit(self) -> None:
        """For each request that comes in."""
        if self._tokens < self.most:
            self._tokens = min(self.most, self._tokens + self.share)

    def withdraw(self, now: float) -> bool:
        """True if one more retry is within the budget."""
        self._tokens = min(self.most, self._tokens + (now - self._since) * self.per_second)
        self._since = now
        if self._tokens < 1.0:
            return False
        self._tokens -= 1.0
        return True
