"""The conditions under which a request is suspected of killing replicas, and is refused."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from fastdeploy.daemon.router.board.board import Ending
from fastdeploy.daemon.router.instance import ReplicaHandle
from fastdeploy.daemon.router.relay.suspicion import (
    MAX_ALONE,
    SUSPECT_AFTER,
    SUSPECT_AFTER_ANY,
    Death,
    Suspicion,
    Verdict,
)

from .boards import instance

OWN, OUTSIDE, UNKNOWN = Ending.ITS_OWN, Ending.FROM_OUTSIDE, Ending.UNKNOWN
PATIENCE = 10.0


def verdict(
    shared: Sequence[Ending], alone: Sequence[Ending] = (), waited: float = 0.0, patience: float = PATIENCE
) -> Verdict:
    """Return the verdict `waited` seconds after the last of these deaths, with fd-dp's report on each."""
    suspicion, endings = Suspicion(), {}
    for number, ending in enumerate([*shared, *alone]):
        handle = ReplicaHandle(number, number, instance(number))
        suspicion.deaths.append(Death(handle, number >= len(shared), at=100.0, problem="lost"))
        endings[handle] = ending
    return suspicion.verdict(endings.__getitem__, 100.0 + waited, patience)


def test_a_request_without_deaths_is_innocent() -> None:
    assert verdict([]) is Verdict.INNOCENT


@pytest.mark.parametrize("ending", [OWN, UNKNOWN])
def test_deaths_in_a_row_make_a_suspect(ending: Ending) -> None:
    assert verdict([ending] * (SUSPECT_AFTER - 1)) is Verdict.INNOCENT
    assert verdict([ending] * SUSPECT_AFTER) is Verdict.SUSPECT


def test_deaths_from_outside_make_no_suspect_unless_they_do_not_end() -> None:
    assert verdict([OUTSIDE] * (SUSPECT_AFTER_ANY - 1)) is Verdict.INNOCENT
    assert verdict([OUTSIDE] * SUSPECT_AFTER_ANY) is Verdict.SUSPECT


def test_report_of_fd_dp_clears_a_suspect() -> None:
    assert verdict([OWN, UNKNOWN]) is Verdict.SUSPECT
    assert verdict([OWN, OUTSIDE]) is Verdict.INNOCENT


def test_suspect_is_never_deadly_before_it_was_alone() -> None:
    assert verdict([OWN] * 20, waited=1000.0) is Verdict.SUSPECT


def test_request_tried_alone_is_deadly_once_the_cause_is_known() -> None:
    assert verdict([OWN, OWN], [UNKNOWN], waited=PATIENCE / 2) is Verdict.PENDING
    assert verdict([OWN, OWN], [OWN]) is Verdict.POISONOUS


def test_request_tried_alone_is_deadly_without_a_report_in_time() -> None:
    assert verdict([OWN, OWN], [UNKNOWN], waited=PATIENCE) is Verdict.POISONOUS
    assert verdict([OWN, OWN], [UNKNOWN], patience=0.0) is Verdict.POISONOUS


def test_request_is_retried_if_its_replica_was_killed_from_outside() -> None:
    assert verdict([OWN, OWN], [OUTSIDE]) is Verdict.SUSPECT
    assert verdict([OWN], [OUTSIDE]) is Verdict.INNOCENT


def test_kills_from_outside_that_always_hit_the_suspect_are_bounded() -> None:
    assert verdict([OUTSIDE] * SUSPECT_AFTER_ANY, [OUTSIDE] * (MAX_ALONE - 1)) is Verdict.SUSPECT
    assert verdict([OUTSIDE] * SUSPECT_AFTER_ANY, [OUTSIDE] * MAX_ALONE) is Verdict.POISONOUS
