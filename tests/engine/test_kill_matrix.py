"""A rank is killed at every point of a step: the texts of the others do not change by a byte.

Some of the matrix belongs to `make test`; all of it is `make chaos`.
"""

from __future__ import annotations

import random
import signal
from collections.abc import Iterator
from dataclasses import replace

import pytest

from fastdeploy.expert_parallel.layout import PHASES
from fastdeploy.expert_parallel.snapshot import read_snapshot

from ..waiting import wait_until
from .expert_ranks import EXPERT_CONFIG, ranks_of, requests_of, undisturbed
from .worker_api import DEADLINE_S, Ranks, Texts

#: Layers of the tiny model that have experts.
LAYERS = (0, 1)
WITHIN_A_LAYER = ("computing", "sending", "sent", "experts", "returning", "returned", "combining")
SURVIVORS = (0, 1)
VICTIM = 2
#: Number of the step, or collective, of its life in which the victim is caught.
NTH = 9

assert set(WITHIN_A_LAYER) <= set(PHASES)


def some_of(cases: list[tuple[str, int]], ordinary: set[tuple[str, int]]) -> list[object]:
    """Return all cases; those that are not ordinary are marked as chaos."""
    return [
        pytest.param(*case, marks=() if case in ordinary else pytest.mark.chaos, id=f"{case[0]}-{case[1]}")
        for case in cases
    ]


ONE_KILL = some_of(
    [("beginning", 0), *((phase, layer) for layer in LAYERS for phase in WITHIN_A_LAYER)],
    {("beginning", 0), ("sending", 1), ("experts", 0), ("returned", 1)},
)


@pytest.fixture(scope="module")
def expected(model_cache: None, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Texts]:
    requests = {seat: requests_of(seat) for seat in range(4)}
    return undisturbed(EXPERT_CONFIG, tmp_path_factory.mktemp("alone"), requests)


@pytest.fixture(scope="module")
def group(model_cache: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    """Two ranks that must survive every kill of another; shared by the tests of this file."""
    config = replace(EXPERT_CONFIG, expert_parallel_stall_kill=2.0)
    with ranks_of(4, tmp_path_factory.mktemp("group"), config) as ranks:
        ranks.start(*SURVIVORS)
        ranks.wait_ready()
        yield ranks


@pytest.fixture(autouse=True)
def _only_survivors_are_left(group: Ranks) -> Iterator[None]:
    yield
    for seat in set(group.apis) - set(SURVIVORS):
        group.lose(seat).close()
    wait_until(lambda: members(group) == SURVIVORS, "the others are buried", deadline=10)


def members(ranks: Ranks) -> tuple[int, ...]:
    found = read_snapshot(ranks.group)
    return () if found is None else found.active


def survive(ranks: Ranks, expected: dict[int, Texts], *victims: int) -> None:
    """Generate on all ranks while the victims' workers are killed; check the survivors' texts."""
    lost = [ranks.apis[seat] for seat in victims]
    texts = ranks.generate({seat: requests_of(seat) for seat in (*SURVIVORS, *victims)}, mortal=victims)
    assert texts == {seat: expected[seat] for seat in SURVIVORS}
    for api in lost:
        assert api.process.wait(DEADLINE_S) == -signal.SIGKILL


@pytest.mark.parametrize(("phase", "layer"), ONE_KILL)
def test_survivors_of_a_rank_that_dies(
    phase: str, layer: int, group: Ranks, expected: dict[int, Texts]
) -> None:
    group.start(VICTIM, trap=f"{phase}:{layer}:{NTH}:SIGKILL")
    group.wait_ready(VICTIM)
    survive(group, expected, VICTIM)


@pytest.mark.parametrize(("phase", "layer"), some_of([(phase, 0) for phase in WITHIN_A_LAYER], {("sent", 0)}))
def test_ranks_survive_a_death_during_recovery_from_another(
    phase: str, layer: int, group: Ranks, expected: dict[int, Texts]
) -> None:
    group.start(VICTIM, trap=f"{phase}:{layer}:{NTH}:SIGKILL")
    group.wait_ready(VICTIM)
    # It arrives first for the epoch in which it joins, then for the epoch of the other victim's death.
    group.start(3, trap="arriving:0:2:SIGKILL")
    group.wait_ready(3)
    survive(group, expected, VICTIM, 3)


def test_survivors_of_a_newcomer_that_dies_while_it_joins(group: Ranks, expected: dict[int, Texts]) -> None:
    started: list[int] = []

    def after(tokens: int) -> None:
        if tokens > 20 and not started:
            started.append(VICTIM)
            group.start(VICTIM, trap="arriving:0:1:SIGKILL")

    rounds = 0
    while not started or group.apis[VICTIM].process.poll() is None:
        texts = group.generate({seat: requests_of(seat) for seat in SURVIVORS}, after)
        assert texts == {seat: expected[seat] for seat in SURVIVORS}
        rounds += 1
        assert rounds < 300


@pytest.mark.parametrize(
    ("phase", "layer"), some_of([(phase, 1) for phase in WITHIN_A_LAYER], {("experts", 1)})
)
def test_survivors_of_a_rank_that_is_stopped(
    phase: str, layer: int, group: Ranks, expected: dict[int, Texts]
) -> None:
    group.start(VICTIM, trap=f"{phase}:{layer}:{NTH}:SIGSTOP")
    group.wait_ready(VICTIM)
    survive(group, expected, VICTIM)


@pytest.mark.chaos
def test_survivors_of_kills_at_random_moments(group: Ranks, expected: dict[int, Texts]) -> None:
    """Kills twenty newcomers, some of them while they load or join."""
    moments = random.Random(4)
    for _ in range(20):
        group.start(VICTIM)
        deadly = moments.randrange(1, 400)
        if moments.random() < 0.7:
            group.wait_ready(VICTIM)

        def after(tokens: int, deadly: int = deadly) -> None:
            if VICTIM in group.apis and tokens >= deadly:
                group.lose(VICTIM).process.kill()

        seats = (*SURVIVORS, VICTIM) if moments.random() < 0.5 and members(group) != SURVIVORS else SURVIVORS
        texts = group.generate({seat: requests_of(seat) for seat in seats}, after)
        assert {seat: texts[seat] for seat in SURVIVORS} == {seat: expected[seat] for seat in SURVIVORS}
        if VICTIM in group.apis:
            group.lose(VICTIM).close()
