"""Replicas leaving and entering service, with a clock set by hand: the waits and their limits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastdeploy.daemon.config.programs import programs_of
from fastdeploy.daemon.operations import rollout
from fastdeploy.daemon.operations.maintenance import bring_up, take_down
from fastdeploy.daemon.operations.operation import Operation, StepPosition
from fastdeploy.daemon.operations.plan import plan
from fastdeploy.daemon.supervision.intents import DesiredState, Intent
from fastdeploy.daemon.supervision.program_state import ProgramState
from fastdeploy.daemon.supervision.router_client import RegisteredReplica
from fastdeploy.daemon.supervision.router_sync import RouterSnapshot, RouterSync

from .world import World


class FakeRouter(RouterSync):
    """Knows every replica that is READY, unless it is in `unknown`."""

    def __init__(self, world: World) -> None:
        super().__init__(Path("nowhere"))
        self._world = world
        self.answers = True
        #: Numbers of replicas that do not register; `busy` has the requests in flight by number.
        self.unknown: set[int] = set()
        self.busy: dict[int, int] = {}

    def poll(self, wanted: Mapping[int, bool], now: float, interval: float) -> None:
        if not self.answers:
            self.snapshot = RouterSnapshot(now, {}, "the router does not answer")
            return
        rows = {}
        for replica in self._world.fleet.replicas.values():
            number, port = replica.spec.replica, replica.port
            if number is not None and number not in self.unknown and replica.state is ProgramState.READY:
                in_flight = self.busy.get(number, 0)
                rows[port] = RegisteredReplica("", "127.0.0.1", port, True, False, wanted[port], in_flight)
        self.snapshot = RouterSnapshot(now, rows, "")


class Rolling:
    """A world with an operation in progress."""

    def __init__(self, directory: Path, replicas: int, **supervise: Any) -> None:
        self.world = World(directory, replicas, parallel_starts=replicas, **supervise)
        self.router = FakeRouter(self.world)
        self.world.fleet.router = self.router
        self.world.become_ready("router", *(f"replica{number}" for number in range(replicas)))
        self.told: list[Any] = []
        self.result: str | None = None
        self._operation: Operation | None = None

    def begin(self, operation: Operation) -> None:
        self.result, self._operation = None, operation

    def pass_time(self, seconds: float) -> None:
        """Repeat a turn of the daemon's loop: a step of the fleet, then a step of the operation."""
        end = self.world.now + seconds
        while self.world.now < end and self.result is None:
            self.world.pass_time(0.1, step=0.1)
            try:
                assert self._operation is not None
                if (told := next(self._operation)) is not None:
                    self.told.append(told)
            except StopIteration as end_of_it:
                self.result = end_of_it.value or ""

    def state(self, name: str) -> ProgramState:
        return self.world.fleet.programs[name].state

    def restart(self, name: str) -> None:
        self.begin(self._restart(name))

    def _restart(self, name: str) -> Operation:
        yield from take_down(self.world.fleet, name, "test", StepPosition())
        self.world.fleet.request_start(self.world.fleet.programs[name], "test")
        return (yield from bring_up(self.world.fleet, name, StepPosition()))

    def lines(self) -> list[str]:
        return [told for told in self.told if isinstance(told, str)]


def test_draining_replica_runs_until_idle_or_drain_timeout(tmp_path: Path) -> None:
    rolling = Rolling(tmp_path, 2, drain_timeout=20)
    rolling.router.busy[0] = 1
    rolling.restart("replica0")
    rolling.pass_time(19.0)
    assert rolling.state("replica0") is ProgramState.READY
    assert rolling.world.fleet.router.maintenance == {"replica0"}
    rolling.pass_time(10.0)
    assert rolling.result == ""
    assert rolling.lines() == ["replica 0: 1 request in flight after 20 s; resumed on other replicas"]
    assert rolling.world.fleet.router.maintenance == set()


def test_a_router_that_is_silent_is_waited_for_a_little_and_fails_nothing(tmp_path: Path) -> None:
    rolling = Rolling(tmp_path, 2, drain_timeout=1000)
    rolling.router.answers = False
    rolling.restart("replica0")
    rolling.pass_time(9.0)
    assert rolling.state("replica0") is ProgramState.READY
    rolling.pass_time(30.0)
    assert rolling.result == ""
    assert rolling.lines() == [
        "replica 0: not drained: the router does not answer",
        "replica 0: READY; whether the router uses it is unknown: the router does not answer",
    ]


def test_router_that_returns_in_time_drains_the_replica(tmp_path: Path) -> None:
    rolling = Rolling(tmp_path, 2, drain_timeout=1000)
    rolling.router.answers = False
    rolling.router.busy[0] = 1
    rolling.restart("replica0")
    rolling.pass_time(8.0)
    rolling.router.answers = True
    rolling.pass_time(300.0)
    assert rolling.state("replica0") is ProgramState.READY
    assert rolling.result is None
    rolling.router.busy[0] = 0
    rolling.pass_time(30.0)
    assert (rolling.result, rolling.lines()) == ("", [])


def test_replica_unknown_to_the_router_counts_as_failed(tmp_path: Path) -> None:
    """The replica is READY. Its new configuration may be the cause, which would affect the others as well."""
    rolling = Rolling(tmp_path, 2)
    rolling.router.unknown.add(0)
    rolling.restart("replica0")
    rolling.pass_time(60.0)
    assert rolling.state("replica0") is ProgramState.READY
    assert (
        rolling.result
        == "READY, but the router does not use it after 30 s; does it register with this router?"
    )


def test_drain_ends_when_the_replica_dies(tmp_path: Path) -> None:
    rolling = Rolling(tmp_path, 2, drain_timeout=1000)
    rolling.router.busy[0] = 5
    rolling.restart("replica0")
    rolling.pass_time(1.0)
    rolling.world.supervisor.end("replica0")
    rolling.pass_time(30.0)
    assert rolling.result == ""
    assert rolling.lines() == ["replica 0: BACKOFF while it was drained"]


def test_reload_stops_no_replica_while_another_restarts(tmp_path: Path) -> None:
    rolling = Rolling(tmp_path, 3, backoff_first=30)
    fleet = rolling.world.fleet
    rolling.world.supervisor.end("replica2")
    rolling.world.pass_time(1.0)
    assert rolling.state("replica2") is ProgramState.BACKOFF
    rolling.begin(rollout.restart(fleet, ["replica0", "replica1"]))
    rolling.pass_time(20.0)
    assert rolling.world.names(ProgramState.READY) == {"router", "replica0", "replica1"}
    assert rolling.lines() == ["replica 0: waits for replica 2 (BACKOFF)"]
    rolling.pass_time(60.0)
    assert rolling.result == ""


def test_restart_does_not_wait_for_quarantined_or_stopped_replicas(tmp_path: Path) -> None:
    rolling = Rolling(tmp_path, 4, budget=1, quarantine=10_000)
    fleet = rolling.world.fleet
    rolling.world.supervisor.end("replica3")
    fleet.set_desired(fleet.replicas["replica2"], DesiredState(Intent.STOPPED))
    fleet.stop(fleet.replicas["replica2"], "stopped")
    rolling.world.pass_time(1.0)
    assert rolling.state("replica3") is ProgramState.QUARANTINED
    rolling.begin(rollout.restart(fleet, ["replica0", "replica1"]))
    rolling.pass_time(60.0)
    assert (rolling.result, rolling.lines()) == ("", ["restart replica 0", "restart replica 1"])


def test_permanently_failing_replica_is_replaced_first_as_the_canary(tmp_path: Path) -> None:
    """Replacing it loses no capacity, and the new configuration may be meant to repair it."""
    rolling = Rolling(tmp_path, 2, budget=1, quarantine=10_000)
    fleet = rolling.world.fleet
    rolling.world.probes.good.discard("replica1")
    rolling.world.supervisor.end("replica1")
    rolling.world.pass_time(1.0)
    new = [*programs_of(fleet.config)]
    new[1:] = [replace(program, argv=(*program.argv, "--changed")) for program in new[1:]]
    down = {name for name, replica in fleet.programs.items() if not replica.alive}
    steps = plan([replica.spec for replica in fleet.programs.values()], new, down)
    rolling.begin(rollout.roll(fleet, steps))
    rolling.pass_time(30.0)
    assert rolling.world.names(ProgramState.STARTING) == {"replica1"}
    assert rolling.world.names(ProgramState.READY) == {"router", "replica0"}
    rolling.world.supervisor.end("replica1")
    rolling.world.probes.good.add("replica1")
    rolling.pass_time(60.0)
    assert rolling.result is not None
    assert rolling.result.startswith("replica 1, the canary: pid ")
    assert rolling.world.names(ProgramState.READY) == {"router", "replica0", "replica1"}
    assert [replica.spec for replica in fleet.programs.values()] == programs_of(fleet.config)
