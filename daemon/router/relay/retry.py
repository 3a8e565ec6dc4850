"""When a request is tried at another replica, and how often. Pure, the clock is passed in.

Deaths do not count against a budget: suspicion.py limits them. Retries that only move load around (busy
replicas) do, or an overloaded fleet would get every request several times.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..http.upstream import Fault

_DEATHS = frozenset({Fault.UNANSWERED, Fault.CUT, Fault.SILENT})
_DESCRIPTIONS = {
    Fault.UNANSWERED: "did not answer",
    Fault.CUT: "did not finish its response",
    Fault.GARBLED: "does not speak HTTP",
    Fault.SILENT: "timed out",
}


def is_death(fault: Fault) -> bool:
    """Return True if the replica had the request when it failed."""
    return fault in _DEATHS


def describe(fault: Fault, why: str) -> str:
    """Describe the fault without the replica's address, for clients and logs, which name the replica."""
    return f"{_DESCRIPTIONS[fault]}: {why}" if fault in _DESCRIPTIONS else why


def is_busy(status: int, has_retry_after: bool) -> bool:
    """Return True if the replica, or a proxy in front of it, declines the request for now."""
    return status in (502, 503) or (status == 429 and has_retry_after)


def is_overload(status: int, is_ours: bool) -> bool:
    """Return True if that refusal may mean overload.

    A replica of fd-dp (`is_ours`) sends 503 only while it is starting, stopping or failed, to all requests.
    """
    return status == 429 or not is_ours


def cannot_be_resumed(status: int) -> bool:
    """Return True if every replica would refuse to resume the stream in the same way."""
    return status in (400, 404, 409, 413, 422)


@dataclass(slots=True)
class RetryBudget:
    """Token bucket: a share of the requests, and a constant rate so that a quiet router can retry at all.

    After Finagle's retry budgets.
    """

    share: float = 0.2
    per_second: float = 10.0
    capacity: float = 100.0
    _tokens: float = 100.0
    _updated_at: float = 0.0

    def deposit(self) -> None:
        """Add the share of one incoming request."""
        if self._tokens < self.capacity:
            self._tokens = min(self.capacity, self._tokens + self.share)

    def withdraw(self, now: float) -> bool:
        """Return True if one more retry is within the budget."""
        self._tokens = min(self.capacity, self._tokens + (now - self._updated_at) * self.per_second)
        self._updated_at = now
        if self._tokens < 1.0:
            return False
        self._tokens -= 1.0
        return True
