"""Who starts when, and what a late step may be blamed for: the fleet with a clock that is set by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastdeploy.daemon.config import parse
from fastdeploy.daemon.fleet import Fleet
from fastdeploy.daemon.probes import Probes, Reading
from fastdeploy.daemon.programs import Program, programs_of
from fastdeploy.daemon.replica import State
from fastdeploy.daemon.supervisor import Layout, Process, Supervisor
from fastdeploy.ports import find_free


class FakeSupervisor(Supervisor):
    """Starts nothing; a program that is started runs until the test says otherwise."""

    def __init__(self, layout: Layout) -> None:
        super().__init__(layout)
        self.running: dict[str, Process] = {}

    def processes(self) -> dict[str, Process]:
        return dict(self.running)

    def start(self, name: str) -> None:
        # A pid that no process has: the kernel's are below 2**22.
        self.running[name] = Process(name, "RUNNING", (1 << 22) + len(self.running) + 1, 1)

    def stop(self, name: str) -> None:
        self.end(name)

    def replace(self, name: str, *, add: bool) -> None:
        pass

    def end(self, name: str) -> None:
        process = self.running[name]
        self.running[name] = Process(name, "EXITED", 0, process.started)


class FakeProbes(Probes):
    def __init__(self) -> None:
        super().__init__(lambda: None)
        self.good: set[str] = set()
        self._waiting: list[Reading] = []

    def ask(self, program: Program, pid: int, token: bool) -> None:
        self._waiting.append(Reading(program.name, pid, program.name in self.good, True))

    def take(self) -> list[Reading]:
        readings, self._waiting = self._waiting, []
        return readings


class World:
    def __init__(self, directory: Path, replicas: int, **supervise: Any) -> None:
        ports = find_free(1 + 3 * replicas)
        lines = [
            '[model]\npath = "demo"',
            f"[parallel]\ndata_parallel_size = {replicas}",
            f"[router]\nport = {ports[0]}",
            f"[engine]\nports = {ports[1 : 1 + replicas]}",
            f"metrics_ports = {ports[1 + replicas : 1 + 2 * replicas]}",
            f"engine_worker_queue_ports = {ports[1 + 2 * replicas :]}",
            "[supervise]",
            *(f"{key} = {value}" for key, value in supervise.items()),
        ]
        config = parse("\n".join(lines), "dp.toml", directory, directory)
        self.now = 1000.0
        self.supervisor = FakeSupervisor(Layout(config.paths.run, config.paths.logs))
        self.probes = FakeProbes()
        self.fleet = Fleet(
            config,
            programs_of(config),
            self.supervisor,
            self.probes,
            watch=lambda pid: None,
            clock=lambda: self.now,
            dice=lambda: 1.0,
        )
        self.fleet.adopt()

    def pass_time(self, seconds: float, step: float = 0.5) -> None:
        end = self.now + seconds
        while self.now < end:
            self.now = min(end, self.now + step)
            self.fleet.step()

    def become_ready(self, *names: str) -> None:
        self.probes.good |= set(names)
        self.pass_time(2.0)

    def names(self, state: State) -> set[str]:
        return {name for name, replica in self.fleet.replicas.items() if replica.state is state}


def test_the_router_first_then_as_many_replicas_at_a_time_as_may_load(tmp_path: Path) -> None:
    world = World(tmp_path, 3, parallel_starts=2)
    world.pass_time(2.0)
    assert world.names(State.STARTING) == {"router"}
    world.become_ready("router")
    assert world.names(State.STARTING) == {"replica0", "replica1"}
    world.become_ready("replica1")
    assert world.names(State.STARTING) == {"replica0", "replica2"}
    world.become_ready("replica0", "replica2")
    assert world.names(State.READY) == {"router", "replica0", "replica1", "replica2"}


def test_a_router_that_does_not_come_up_holds_the_replicas_back_for_a_moment_only(tmp_path: Path) -> None:
    world = World(tmp_path, 1)
    world.pass_time(5.0)
    assert world.names(State.WAITING) == {"replica0"}
    world.pass_time(10.0)
    assert world.names(State.STARTING) == {"router", "replica0"}


def test_a_replica_that_loads_for_long_does_not_hold_back_the_next(tmp_path: Path) -> None:
    world = World(tmp_path, 2, parallel_starts=1, start_slot=30)
    world.become_ready("router")
    world.pass_time(20.0)
    assert world.names(State.STARTING) == {"replica0"}
    world.pass_time(15.0)
    assert world.names(State.STARTING) == {"replica0", "replica1"}


def test_health_checks_that_fail_make_it_unhealthy_and_one_that_is_good_makes_it_ready(
    tmp_path: Path,
) -> None:
    world = World(tmp_path, 1, stall_after=30, stall_kill=180)
    world.become_ready("router", "replica0")
    world.probes.good.discard("replica0")
    world.pass_time(20.0)
    assert world.names(State.READY) == {"router", "replica0"}
    world.pass_time(20.0)
    assert world.names(State.UNHEALTHY) == {"replica0"}
    world.become_ready("replica0")
    world.pass_time(6.0)
    assert world.names(State.READY) == {"router", "replica0"}


def test_a_daemon_that_was_stopped_itself_blames_nobody_for_the_time(tmp_path: Path) -> None:
    """A laptop's lid, a debugger, a machine without memory: the replicas could not be asked meanwhile."""
    world = World(tmp_path, 1, stall_after=30, stall_kill=180)
    world.become_ready("router", "replica0")
    world.now += 3600.0
    world.fleet.step()
    assert world.names(State.READY) == {"router", "replica0"}


def test_each_failure_waits_longer_and_a_stable_time_forgets(tmp_path: Path) -> None:
    world = World(tmp_path, 1, backoff_first=4, backoff_max=100, stable_after=60)
    world.become_ready("router", "replica0")
    waits = []
    for _ in range(3):
        world.supervisor.end("replica0")
        world.fleet.step()
        assert world.names(State.BACKOFF) == {"replica0"}
        waits.append(world.fleet.replicas["replica0"].next_try - world.now)
        world.pass_time(waits[-1] + 3.0)
        assert world.names(State.READY) == {"router", "replica0"}
    assert waits == [4, 8, 16]
    world.pass_time(70.0)
    world.supervisor.end("replica0")
    world.fleet.step()
    assert world.fleet.replicas["replica0"].next_try - world.now == 4


def test_what_runs_though_it_should_not_is_stopped(tmp_path: Path) -> None:
    world = World(tmp_path, 1)
    world.become_ready("router", "replica0")
    replica = world.fleet.replicas["replica0"]
    world.fleet.hold(replica, True)
    world.fleet.stop(replica, "held")
    world.pass_time(1.0)
    assert replica.state is State.STOPPED
    world.supervisor.start("replica0")
    world.pass_time(1.0)
    assert world.supervisor.running["replica0"].state == "EXITED"
    assert replica.state is State.STOPPED
