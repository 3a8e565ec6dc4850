"""The reports of a worker without requests of its own, while other ranks of its group have some."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from fastdeploy.common.messages import AddRequest, FromWorker
from fastdeploy.common.request import SamplingParams
from fastdeploy.core import worker

STEP_SECONDS = 0.01


class World:
    """Engine, rank and API process in one; `events` wake the worker one by one, then it must end."""

    def __init__(self, *events: Callable[[World], object]) -> None:
        self._events = list(events)
        self.now = 0.0
        self.steps = self.own_steps = self.others_steps = 0
        #: The step count of each report at rest, and "step" for each step of its own.
        self.told: list[int | str] = []
        self.left = self.stopping = False

    # ---- the engine

    @property
    def has_work(self) -> bool:
        return self.own_steps > 0

    def add(self, message: AddRequest) -> None:
        self.own_steps += message.params.max_tokens

    def step(self) -> str:
        self.own_steps -= 1
        self._compute()
        return "step"

    def on_idle(self) -> int:
        assert not self.has_work
        return self.steps

    # ---- the rank, and its group

    @property
    def group(self) -> World:
        return self

    @property
    def wakeups(self) -> World:
        return self

    def fileno(self) -> int:
        return 0

    @property
    def is_wanted(self) -> bool:
        return self.others_steps > 0

    def execute_dummy_batch(self) -> None:
        if self.is_wanted:
            self._compute()

    def leave(self) -> None:
        self.left = True

    # ---- the API process

    def watch(self, descriptor: int, timeout: float) -> None:
        pass

    def receive(self, *, wait: bool) -> list[AddRequest]:
        if not wait:
            return []
        if not self._events:
            self.stopping = True
            return []
        message = self._events.pop(0)(self)
        return [message] if isinstance(message, AddRequest) else []

    def send(self, message: FromWorker | int | str) -> None:
        assert isinstance(message, int | str)
        if not self.stopping:
            self.told.append(message)

    def _compute(self) -> None:
        self.steps += 1
        self.others_steps = max(0, self.others_steps - 1)
        self.now += STEP_SECONDS


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Callable[..., World]:
    def run_through(*events: Callable[[World], object]) -> World:
        world = World(*events)
        monkeypatch.setattr(worker.time, "monotonic", lambda: world.now)
        worker.serve(world, world, world)  # type: ignore[arg-type]
        assert world.left
        return world

    return run_through


def others_compute(steps: int) -> Callable[[World], object]:
    return lambda world: setattr(world, "others_steps", steps)


def asked_for(steps: int) -> Callable[[World], object]:
    return lambda world: AddRequest("a", [1], SamplingParams(max_tokens=steps), 0.0)


def test_reports_are_sent_at_start_each_second_and_when_idle(run: Callable[..., World]) -> None:
    told = run(others_compute(1000)).told
    assert (told[0], told[-1]) == (0, 1000)
    # The steps take ten seconds.
    assert 10 <= len(told) <= 12


def test_own_steps_are_reported_and_the_final_count_includes_assistance(
    run: Callable[..., World],
) -> None:
    def busy(world: World) -> object:
        world.others_steps = 5
        return asked_for(3)(world)

    assert run(busy).told == [0, "step", "step", "step", 3, 5]


def test_membership_change_while_idle_is_reported(run: Callable[..., World]) -> None:
    assert run(lambda world: None, lambda world: None).told == [0, 0, 0]
