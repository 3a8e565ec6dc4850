"""When a program that failed is tried again. Pure: the clock and the dice are passed in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from ..config.options import SuperviseSection


@dataclass(frozen=True, slots=True)
class Decision:
    #: Seconds from now.
    delay: float
    quarantined: bool
    #: Why it is quarantined, for people.
    why: str = ""


@dataclass(slots=True)
class Restarts:
    """The failures of one program.

    The delay doubles with each failure in a row, up to a cap; a quarter of it is left to the dice, so that
    replicas which failed together do not load together again. Too many failures within a window put the
    program into quarantine, and there it stays until it has been stable: it is still tried, slowly, never
    silently for ever and never not at all.
    """

    policy: SuperviseSection
    random: Callable[[], float]
    in_a_row: int = 0
    quarantined: bool = False
    #: Times of the failures within the window, oldest first.
    failures: list[float] = field(default_factory=list)

    def failed(self, now: float, at_once: str = "") -> Decision:
        """`at_once`: why a quick try would be in vain, or do harm; empty if there is no such reason."""
        policy = self.policy
        self.failures = _recent(self.failures, now, policy.budget_window)
        self.failures.append(now)
        self.in_a_row += 1
        self.quarantined |= len(self.failures) >= policy.budget
        if self.quarantined and not at_once:
            at_once = f"failure {self.in_a_row} in a row, {_count(self.failures, policy)}"
        if at_once:
            return Decision(self._spread(policy.quarantine), True, at_once)
        # The exponent is capped as well: 2.0 ** 1100 is an OverflowError.
        exponential = policy.backoff_first * 2.0 ** min(self.in_a_row - 1, 60)
        return Decision(self._spread(min(exponential, policy.backoff_max)), quarantined=False)

    def interrupted(self) -> Decision:
        """Decide after an end from outside, such as a signal 9: it says nothing about the program."""
        return Decision(self._spread(self.policy.backoff_first), quarantined=False)

    def stable(self) -> None:
        """It has been READY for `stable_after`: the next failure is a first one."""
        self.in_a_row = 0
        self.quarantined = False
        self.failures.clear()

    def _spread(self, delay: float) -> float:
        return delay * (0.75 + 0.25 * self.random())


@dataclass(slots=True)
class HostFailureBudget:
    """The failures of all replicas of the machine: when there are many, it is the machine that fails.

    To start everything again at once would make that worse, so whatever fails from then on is paused. The
    pause ends by itself when no replica has failed for `box_calm`.
    """

    policy: SuperviseSection
    failures: list[float] = field(default_factory=list)

    def failed(self, now: float) -> str:
        """Record a failure. Return why its replica is paused, or "" while there are not too many failures."""
        policy = self.policy
        self.failures = _recent(self.failures, now, policy.budget_window)
        self.failures.append(now)
        if len(self.failures) <= policy.box_budget:
            return ""
        return f"{_count(self.failures, policy)} on this machine, more than box_budget = {policy.box_budget}"

    @property
    def calm_at(self) -> float:
        """Time at which the pause ends if no replica fails before it."""
        return self.failures[-1] + self.policy.box_calm if self.failures else 0.0


def _recent(failures: list[float], now: float, window: float) -> list[float]:
    return [at for at in failures if now - at < window]


def _count(failures: list[float], policy: SuperviseSection) -> str:
    plural = "failure" if len(failures) == 1 else "failures"
    return f"{len(failures)} {plural} within {policy.budget_window:g} s"
