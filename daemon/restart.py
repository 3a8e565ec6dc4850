"""When a program that failed is tried again. Pure: the clock and the dice are passed in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from .options import SuperviseSection


@dataclass(frozen=True, slots=True)
class Decision:
    #: Seconds from now.
    delay: float
    quarantined: bool


@dataclass(slots=True)
class Restarts:
    """The failures of one program.

    The delay doubles with each failure in a row, up to a cap; a quarter of it is left to the dice, so that
    replicas which failed together do not load together again. Too many failures within a window put the
    program into quarantine: it is still tried, slowly, never silently for ever and never not at all.
    """

    policy: SuperviseSection
    random: Callable[[], float]
    in_a_row: int = 0
    #: Times of the failures within the window, oldest first.
    failures: list[float] = field(default_factory=list)

    def failed(self, now: float) -> Decision:
        policy = self.policy
        self.failures = [at for at in self.failures if now - at < policy.budget_window]
        self.failures.append(now)
        self.in_a_row += 1
        if len(self.failures) >= policy.budget:
            return Decision(policy.quarantine, quarantined=True)
        # The exponent is capped as well: 2.0 ** 1100 is an OverflowError.
        exponential = policy.backoff_first * 2.0 ** min(self.in_a_row - 1, 60)
        return Decision(
            min(exponential, policy.backoff_max) * (0.75 + 0.25 * self.random()), quarantined=False
        )

    def stable(self) -> None:
        """It has been READY for `stable_after`: the next failure is a first one."""
        self.in_a_row = 0
        self.failures.clear()
