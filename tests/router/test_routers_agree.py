"""After any sequence of events several routers agree on the replicas."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule

from fastdeploy.daemon.router.control.shared_replicas import SharedReplicas, SharedState
from fastdeploy.daemon.router.instance import Instance

from .boards import Clock
from .talking import LAN, Hub, Router, replica


class Talk(RuleBasedStateMachine):
    """Random events at three routers, which agree once each has had its turns."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.hub = Hub(self.clock)
        self.routers = [Router(self.hub) for _ in range(3)]
        self.starts = [0, 0]

    def teardown(self) -> None:
        for _ in range(4):
            for router in self.routers:
                router.turn()
        seen = [
            [(row.instance, row.draining) for row in router.board.status() if not row.leaving]
            for router in self.routers
        ]
        for router in self.routers:
            router.board.close()
        assert seen[0] == seen[1] == seen[2]

    def instance(self, number: int) -> Instance:
        return replica(f"start-{self.starts[number]}", number)

    @rule(at=st.integers(0, 2))
    def turn(self, at: int) -> None:
        self.routers[at].turn()

    @rule(at=st.integers(0, 2), number=st.integers(0, 1))
    def heartbeat(self, at: int, number: int) -> None:
        self.routers[at].hears(self.instance(number))

    @rule(at=st.integers(0, 2), number=st.integers(0, 1))
    def restart(self, at: int, number: int) -> None:
        self.starts[number] += 1
        self.clock.now += 5
        self.routers[at].hears(self.instance(number))

    @rule(at=st.integers(0, 2), number=st.integers(0, 1))
    def farewell(self, at: int, number: int) -> None:
        self.routers[at].board.deregister(self.instance(number).url, self.instance(number).instance)
        self.starts[number] += 1
        self.clock.now += 5

    @rule(
        at=st.integers(0, 2), number=st.integers(0, 1), order=st.sampled_from(["drain", "undrain", "remove"])
    )
    def order(self, at: int, number: int, order: str) -> None:
        board = self.routers[at].board
        handle = board.handle_of(self.instance(number).url)
        if handle is not None:
            getattr(board, order)(handle)

    @rule(seconds=st.sampled_from([1.0, 30.0]))
    def time_passes(self, seconds: float) -> None:
        self.clock.now += seconds
        for router in self.routers:
            router.checks_health()

    @rule(at=st.integers(0, 2))
    def another_leads(self, at: int) -> None:
        self.routers[at].shared = SharedReplicas(self.routers[at].board, LAN, self.clock)

    @rule()
    def memory_is_lost(self) -> None:
        self.hub.said = SharedState()


Talk.TestCase.settings = settings(max_examples=80, stateful_step_count=30, deadline=None)
TestTalk = Talk.TestCase
