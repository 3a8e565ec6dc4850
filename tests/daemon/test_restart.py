"""The time at which a failed program is restarted."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from fastdeploy.daemon.config.options import SuperviseSection
from fastdeploy.daemon.process.restart_policy import HostFailureBudget, Restarts

POLICY = SuperviseSection(
    backoff_first=1.0, backoff_max=8.0, budget=100, budget_window=60.0, quarantine=300.0
)


def delays(count: int, dice: float, policy: SuperviseSection = POLICY) -> list[float]:
    restarts = Restarts(policy, lambda: dice)
    return [restarts.failed(float(now)).delay for now in range(count)]


def test_the_delay_doubles_up_to_its_cap() -> None:
    assert delays(6, dice=1.0) == [1, 2, 4, 8, 8, 8]


def test_the_dice_take_up_to_a_quarter() -> None:
    assert delays(4, dice=0.0) == [0.75, 1.5, 3, 6]


def test_stable_program_has_no_failures() -> None:
    restarts = Restarts(POLICY, lambda: 1.0)
    for now in range(5):
        restarts.failed(float(now))
    restarts.stable()
    assert restarts.failed(5.0).delay == 1.0


def test_quarantine_counts_only_failures_within_the_window() -> None:
    policy = SuperviseSection(budget=3, budget_window=60.0, quarantine=300.0)
    quick = Restarts(policy, lambda: 1.0)
    assert [quick.failed(now).quarantined for now in (0.0, 1.0, 2.0, 3.0)] == [False, False, True, True]
    assert quick.failed(4.0).delay == 300.0
    slow = Restarts(policy, lambda: 1.0)
    assert not any(slow.failed(now * 31.0).quarantined for now in range(20))


def test_quarantine_retries_are_jittered_and_last_until_stable() -> None:
    policy = SuperviseSection(budget=2, budget_window=60.0, quarantine=300.0)
    restarts = Restarts(policy, lambda: 0.0)
    restarts.failed(0.0)
    assert restarts.failed(1.0).quarantined
    later = restarts.failed(1000.0)
    assert (later.quarantined, later.delay) == (True, 225.0)
    assert later.why == "failure 3 in a row, 1 failure within 60 s"
    restarts.stable()
    assert not restarts.failed(2000.0).quarantined


def test_permanent_error_is_quarantined_at_once_and_only_that_time() -> None:
    restarts = Restarts(SuperviseSection(), lambda: 1.0)
    decision = restarts.failed(0.0, "a retry cannot fix a wrong flag")
    assert (decision.quarantined, decision.delay) == (True, 600.0)
    assert decision.why == "a retry cannot fix a wrong flag"
    assert not restarts.failed(1.0).quarantined


def test_host_failure_budget_is_exceeded_until_its_window_has_passed() -> None:
    box = HostFailureBudget(SuperviseSection(box_budget=3, budget_window=60.0, box_calm=20.0))
    assert box.calm_at == 0.0
    assert [box.failed(now) for now in (0.0, 1.0, 2.0)] == [""] * 3
    assert box.failed(3.0) == "4 failures within 60 s on this machine, more than box_budget = 3"
    assert box.calm_at == 23.0
    assert box.failed(70.0) == ""
    assert box.calm_at == 90.0


@given(
    st.lists(st.floats(0, 100), max_size=2000),
    st.floats(0, 1, exclude_max=True),
    st.floats(0, 1000),
    st.floats(0, 1000),
)
def test_no_delay_is_negative_or_longer_than_the_longest(
    gaps: list[float], dice: float, first: float, longest: float
) -> None:
    policy = SuperviseSection(backoff_first=first, backoff_max=longest, quarantine=77.0)
    restarts, now = Restarts(policy, lambda: dice), 0.0
    for gap in gaps:
        now += gap
        decision = restarts.failed(now)
        assert 0 <= decision.delay <= (77.0 if decision.quarantined else longest)
        assert len(restarts.failures) <= 2000
