"""The order of starts, and the blame for a late step: the fleet with a clock set by hand."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

from fastdeploy.daemon.config.launch import HASH, MARKER
from fastdeploy.daemon.diagnosis.exit_cause import Cause
from fastdeploy.daemon.process import proc
from fastdeploy.daemon.supervision.intents import DesiredState, Intent
from fastdeploy.daemon.supervision.program_state import ProgramState

from .conftest import wait_until
from .world import World


def test_router_starts_first_then_parallel_starts_replicas_at_a_time(tmp_path: Path) -> None:
    world = World(tmp_path, 3, parallel_starts=2)
    world.pass_time(2.0)
    assert world.names(ProgramState.STARTING) == {"router"}
    world.become_ready("router")
    assert world.names(ProgramState.STARTING) == {"replica0", "replica1"}
    world.become_ready("replica1")
    assert world.names(ProgramState.STARTING) == {"replica0", "replica2"}
    world.become_ready("replica0", "replica2")
    assert world.names(ProgramState.READY) == {"router", "replica0", "replica1", "replica2"}


def test_router_that_does_not_come_up_delays_replicas_only_briefly(tmp_path: Path) -> None:
    world = World(tmp_path, 1)
    world.pass_time(5.0)
    assert world.names(ProgramState.WAITING) == {"replica0"}
    world.pass_time(10.0)
    assert world.names(ProgramState.STARTING) == {"router", "replica0"}


def test_a_replica_that_loads_for_long_does_not_hold_back_the_next(tmp_path: Path) -> None:
    world = World(tmp_path, 2, parallel_starts=1, start_slot=30)
    world.become_ready("router")
    world.pass_time(20.0)
    assert world.names(ProgramState.STARTING) == {"replica0"}
    world.pass_time(15.0)
    assert world.names(ProgramState.STARTING) == {"replica0", "replica1"}


def test_the_replica_that_has_waited_longest_starts_first(tmp_path: Path) -> None:
    world = World(tmp_path, 3, parallel_starts=1, backoff_first=1)
    world.become_ready("router")
    world.supervisor.end("replica0")
    world.pass_time(3.0)
    assert world.names(ProgramState.STARTING) == {"replica1"}
    assert world.names(ProgramState.WAITING) == {"replica0", "replica2"}
    world.supervisor.end("replica1")
    world.pass_time(0.5)
    assert world.names(ProgramState.STARTING) == {"replica2"}


def test_failing_health_checks_mean_unhealthy_and_one_good_means_ready(
    tmp_path: Path,
) -> None:
    world = World(tmp_path, 1, unhealthy_after=30, unhealthy_kill_after=180)
    world.become_ready("router", "replica0")
    world.probes.good.discard("replica0")
    world.pass_time(20.0)
    assert world.names(ProgramState.READY) == {"router", "replica0"}
    world.pass_time(20.0)
    assert world.names(ProgramState.UNHEALTHY) == {"replica0"}
    world.become_ready("replica0")
    world.pass_time(6.0)
    assert world.names(ProgramState.READY) == {"router", "replica0"}


def test_suspended_daemon_blames_no_replica_for_the_gap(tmp_path: Path) -> None:
    """A suspended laptop, a debugger or swapping stops the daemon, which then cannot probe the replicas."""
    world = World(tmp_path, 1, unhealthy_after=30, unhealthy_kill_after=180)
    world.become_ready("router", "replica0")
    world.now += 3600.0
    world.fleet.step()
    assert world.names(ProgramState.READY) == {"router", "replica0"}


def test_each_failure_waits_longer_and_a_stable_time_forgets(tmp_path: Path) -> None:
    world = World(tmp_path, 1, backoff_first=4, backoff_max=100, stable_after=60)
    world.become_ready("router", "replica0")
    waits = []
    for _ in range(3):
        world.supervisor.end("replica0")
        world.fleet.step()
        assert world.names(ProgramState.BACKOFF) == {"replica0"}
        waits.append(world.fleet.replicas["replica0"].next_try - world.now)
        world.pass_time(waits[-1] + 3.0)
        assert world.names(ProgramState.READY) == {"router", "replica0"}
    assert waits == [4, 8, 16]
    world.pass_time(70.0)
    world.supervisor.end("replica0")
    world.fleet.step()
    assert world.fleet.replicas["replica0"].next_try - world.now == 4


def test_the_loop_wakes_when_the_next_try_is_due(tmp_path: Path) -> None:
    world = World(tmp_path, 1, backoff_first=0.25)
    world.become_ready("router", "replica0")
    assert world.fleet.interval() == 1.0
    world.supervisor.end("replica0")
    world.fleet.step()
    wait = world.fleet.interval()
    assert wait == world.fleet.replicas["replica0"].next_try - world.now
    world.now += wait
    world.fleet.step()
    assert world.names(ProgramState.STARTING) == {"replica0"}


def test_program_that_should_not_run_is_stopped(tmp_path: Path) -> None:
    world = World(tmp_path, 1)
    world.become_ready("router", "replica0")
    replica = world.fleet.replicas["replica0"]
    world.fleet.set_desired(replica, DesiredState(Intent.STOPPED))
    world.fleet.stop(replica, "stopped")
    world.pass_time(1.0)
    assert replica.state is ProgramState.STOPPED
    world.supervisor.start("replica0")
    world.pass_time(1.0)
    assert world.supervisor.running["replica0"].state == "EXITED"
    assert replica.state is ProgramState.STOPPED


def fail(world: World, name: str) -> None:
    world.supervisor.end(name)
    world.fleet.step()


def world_with_a_spent_box_budget(directory: Path, **supervise: Any) -> World:
    """Return a world of three replicas, all READY after four failures, which use up the budget."""
    options = {"box_budget": 4, "box_calm": 30, "backoff_first": 1, "parallel_starts": 3, **supervise}
    world = World(directory, 3, **options)
    names = ("replica0", "replica1", "replica2")
    world.become_ready("router", *names)
    for name in (*names, names[0]):
        fail(world, name)
        world.pass_time(8.0)
    assert world.names(ProgramState.READY) == {"router", *names}
    return world


def test_after_box_budget_failures_a_further_one_pauses_its_replica(tmp_path: Path) -> None:
    world = world_with_a_spent_box_budget(tmp_path)
    fail(world, "replica1")
    fail(world, "router")
    assert world.names(ProgramState.QUARANTINED) == {"replica1"}
    note = world.fleet.replicas["replica1"].note
    assert "paused until no replica has failed for 30 s: 5 failures within 600 s on this machine" in note
    # The router is not paused.
    assert world.fleet.programs["router"].state is ProgramState.BACKOFF


def test_paused_replicas_come_back_one_at_a_time_when_the_machine_is_calm(tmp_path: Path) -> None:
    world = world_with_a_spent_box_budget(tmp_path)
    fail(world, "replica0")
    world.pass_time(10.0)
    fail(world, "replica1")
    assert world.names(ProgramState.QUARANTINED) == {"replica0", "replica1"}
    # Each failure restarts the calm period of all paused replicas.
    world.pass_time(25.0)
    assert world.names(ProgramState.QUARANTINED) == {"replica0", "replica1"}
    world.probes.good -= {"replica0", "replica1"}
    world.pass_time(10.0)
    assert world.names(ProgramState.STARTING) == {"replica0"}
    assert world.names(ProgramState.QUARANTINED) == {"replica1"}
    world.become_ready("replica0")
    assert world.names(ProgramState.STARTING) == {"replica1"} or world.names(ProgramState.READY) > {
        "replica1"
    }
    world.become_ready("replica1")
    assert world.names(ProgramState.READY) == {"router", "replica0", "replica1", "replica2"}


def test_a_paused_replica_that_fails_again_waits_for_calm_again(tmp_path: Path) -> None:
    world = world_with_a_spent_box_budget(tmp_path)
    fail(world, "replica0")
    world.probes.good.discard("replica0")
    world.pass_time(31.0)
    assert world.names(ProgramState.STARTING) == {"replica0"}
    fail(world, "replica0")
    assert world.names(ProgramState.QUARANTINED) == {"replica0"}
    assert world.fleet.replicas["replica0"].next_try == pytest.approx(world.now + 30.0)


def test_the_last_replica_is_never_paused(tmp_path: Path) -> None:
    world = world_with_a_spent_box_budget(tmp_path)
    for name in ("replica0", "replica1", "replica2"):
        fail(world, name)
    assert world.names(ProgramState.QUARANTINED) == {"replica0", "replica1"}
    assert world.names(ProgramState.BACKOFF) == {"replica2"}


def test_crash_loop_quarantine_outlasts_calm_on_the_machine(tmp_path: Path) -> None:
    world = world_with_a_spent_box_budget(tmp_path, budget=3, quarantine=600)
    fail(world, "replica0")
    replica = world.fleet.replicas["replica0"]
    assert "quarantined: failure 3 in a row" in replica.note
    world.pass_time(100.0)
    assert replica.state is ProgramState.QUARANTINED


def test_wrong_flag_is_quarantined_at_once_with_its_reason(tmp_path: Path) -> None:
    world = World(tmp_path, 1, quarantine=500)
    world.become_ready("router", "replica0")
    replica = world.fleet.replicas["replica0"]
    output = world.fleet.layout.output("replica0")
    output.write_text("api_server: ERROR (unrecognized arguments: --surprise)\n")
    world.supervisor.how = "exit status 2"
    fail(world, "replica0")
    assert (replica.state, replica.cause) == (ProgramState.QUARANTINED, Cause.FLAG)
    assert replica.next_try - world.now == 500
    assert "exit status 2 (wrong flag); its last error: api_server: ERROR (unrecognized" in replica.note
    assert replica.note.endswith("quarantined: a retry cannot fix a wrong flag")


def test_each_end_is_counted_with_its_cause_and_each_start_with_its_time(tmp_path: Path) -> None:
    world = World(tmp_path, 1)
    world.become_ready("router", "replica0")
    world.supervisor.how = "terminated by SIGSEGV"
    fail(world, "replica0")
    world.pass_time(5.0)
    value = world.fleet.metrics.registry.get_sample_value
    assert value("fd_dp_restarts_total", {"program": "replica0", "cause": "crash"}) == 1
    assert value("fd_dp_ready_seconds_count", {"program": "replica0"}) == 2
    assert value("fd_dp_restarts_total", {"program": "router", "cause": "crash"}) is None


def test_replica_start_waits_for_the_old_process_to_end(tmp_path: Path) -> None:
    """The old process would hold ports and memory that the new one needs."""
    world = World(tmp_path, 1, backoff_first=0)
    world.become_ready("router", "replica0")
    env = {**os.environ, MARKER: f"{world.fleet.layout.run}#replica0", HASH: "x"}
    with subprocess.Popen(["sleep", "600"], env=env, start_new_session=True) as old:
        wait_until(lambda: proc.marked(world.fleet.layout.run), "its mark")
        fail(world, "replica0")
        replica = world.fleet.replicas["replica0"]
        assert (replica.state, replica.note) == (
            ProgramState.WAITING,
            f"waits for pid {old.pid} of its last run to end",
        )
        assert old.wait(20) == -signal.SIGKILL
        world.fleet.step()
        assert replica.state is ProgramState.STARTING


def test_programs_restart_unreported_with_a_new_supervisord(tmp_path: Path) -> None:
    """The router ended with supervisord as well, so it has no request to blame for an exit."""
    world = World(tmp_path, 2)
    world.become_ready("router", "replica0", "replica1")
    world.fleet.set_desired(world.fleet.replicas["replica1"], DesiredState(Intent.HELD))
    world.supervisor.running.clear()
    world.fleet.on_supervisord_restarted()
    replica, held = world.fleet.replicas.values()
    assert (replica.state, replica.restarts) == (ProgramState.WAITING, 1)
    assert (held.state, held.restarts) == (ProgramState.STOPPED, 0)
    assert {program.cause for program in world.fleet.programs.values()} == {Cause.SUPERVISORD}
    assert not world.fleet.router.has_news
    world.become_ready("router", "replica0")
    assert world.names(ProgramState.READY) == {"router", "replica0"}
