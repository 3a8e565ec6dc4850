"""Restart policy: backoff, quarantine, and the failure budget of the machine. Without I/O or a clock."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from ..config.options import SuperviseSection


@dataclass(frozen=True, slots=True)
class Decision:
    """Reaction to a failure."""

    #: Seconds until the next try.
    delay: float
    quarantined: bool
    #: Reason of the quarantine, for people.
    why: str = ""


@dataclass(slots=True)
class Restarts:
    """Failures of one program, and its backoff.

    The delay doubles with each failure in a row, up to a maximum. A quarter of it is random, so that replicas
    that failed together do not load together again. Too many failures within a window quarantine the program:
    it is retried slowly until it has been stable.
    """

    policy: SuperviseSection
    #: Returns numbers from [0, 1).
    random: Callable[[], float]
    #: Failures since the program was last stable.
    in_a_row: int = 0
    quarantined: bool = False
    #: Times of the failures within the window, oldest first.
    failures: list[float] = field(default_factory=list)

    def failed(self, now: float, no_quick_retry: str = "") -> Decision:
        """Record a failure.

        Args:
            no_quick_retry: why a quick retry would be useless; "" if it would not.
        """
        policy = self.policy
        self.failures = _recent(self.failures, now, policy.budget_window)
        self.failures.append(now)
        self.in_a_row += 1
        self.quarantined |= len(self.failures) >= policy.budget
        if self.quarantined and not no_quick_retry:
            no_quick_retry = f"failure {self.in_a_row} in a row, {_count(self.failures, policy)}"
        if no_quick_retry:
            return Decision(self._jittered(policy.quarantine), True, no_quick_retry)
        # The exponent is capped as well: 2.0 ** 1100 is an OverflowError.
        exponential = policy.backoff_first * 2.0 ** min(self.in_a_row - 1, 60)
        return Decision(self._jittered(min(exponential, policy.backoff_max)), quarantined=False)

    def interrupted(self) -> Decision:
        """Return the delay after an exit caused from outside, which is not a failure of the program."""
        return Decision(self._jittered(self.policy.backoff_first), quarantined=False)

    def stable(self) -> None:
        """Forget all failures: the program has been READY for `stable_after`."""
        self.in_a_row = 0
        self.quarantined = False
        self.failures.clear()

    def _jittered(self, delay: float) -> float:
        return delay * (0.75 + 0.25 * self.random())


@dataclass(slots=True)
class HostFailureBudget:
    """Failures of all replicas of the machine. If there are many, the machine itself has a problem.

    Restarting everything at once would make it worse, so each further replica that fails is paused. The pause
    ends when no replica has failed for `box_calm`.
    """

    policy: SuperviseSection
    failures: list[float] = field(default_factory=list)

    def failed(self, now: float) -> str:
        """Record a failure. Return why the replica is paused, or "" while the budget is not exhausted."""
        policy = self.policy
        self.failures = _recent(self.failures, now, policy.budget_window)
        self.failures.append(now)
        if len(self.failures) <= policy.box_budget:
            return ""
        return f"{_count(self.failures, policy)} on this machine, more than box_budget = {policy.box_budget}"

    @property
    def calm_at(self) -> float:
        """End of the pause if no replica fails before."""
        return self.failures[-1] + self.policy.box_calm if self.failures else 0.0


def _recent(failures: list[float], now: float, window: float) -> list[float]:
    return [at for at in failures if now - at < window]


def _count(failures: list[float], policy: SuperviseSection) -> str:
    plural = "failure" if len(failures) == 1 else "failures"
    return f"{len(failures)} {plural} within {policy.budget_window:g} s"
