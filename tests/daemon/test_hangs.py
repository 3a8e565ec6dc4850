"""Detection of hangs: the decision by itself, and the fleet with a clock set by hand."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastdeploy.daemon.config.loader import parse
from fastdeploy.daemon.config.programs import expert_group_of
from fastdeploy.daemon.diagnosis.exit_cause import Cause
from fastdeploy.daemon.supervision.hang_detection import (
    HangReport,
    ProgressTracker,
    Stalled,
    WorkerProgress,
    find_hung,
    root_blockers,
)
from fastdeploy.daemon.supervision.intents import DesiredState, Intent
from fastdeploy.daemon.supervision.program_state import ProgramState, SupervisedProgram
from fastdeploy.expert_parallel.snapshot import RankSnapshot, Snapshot

from .conftest import Running, alive, wait_until
from .world import World

GROUP = "dp-1"
MEMBERS = {(GROUP, seat): f"replica{seat}" for seat in range(4)}


def seat(
    number: int,
    *waits_for: int,
    seconds: float | None = 70.0,
    phase: str = "computing",
    state: str = "active",
) -> RankSnapshot:
    return RankSnapshot(
        number,
        pid=100 + number,
        state=state,
        epoch=1,
        steps=5,
        phase=phase,
        layer=1,
        seconds=seconds,
        tokens=8,
        waits_for=waits_for,
    )


def snapshot(*seats: RankSnapshot) -> Snapshot:
    active = tuple(one.seat for one in seats)
    return Snapshot(GROUP, 1, active, 0, 0, 0, num_seats=8, seats=seats, awaited=None)


def stalled(number: int, group: str | None = GROUP) -> Stalled:
    return Stalled(f"replica{number}", 65.0, 3, group, number)


def report_of(numbers: tuple[int, ...], *seats: RankSnapshot) -> HangReport:
    return find_hung([stalled(number) for number in numbers], {GROUP: snapshot(*seats)}, MEMBERS, 60.0)


# ---- the decision


def test_worker_without_a_group_is_hung() -> None:
    found = find_hung([stalled(2, group=None)], {}, {}, 60.0)
    assert found.hung == {"replica2": "no step for 65 s, requests in flight: 3"}
    # Its model has no experts, or the group has no member yet.
    assert find_hung([stalled(2)], {GROUP: None}, MEMBERS, 60.0).hung.keys() == {"replica2"}
    assert find_hung([stalled(2)], {GROUP: snapshot(seat(0))}, MEMBERS, 60.0).hung.keys() == {"replica2"}


def test_waiting_ranks_are_excused_and_the_awaited_one_is_blamed() -> None:
    found = report_of((0, 1), seat(0, 2), seat(1, 2), seat(2))
    assert found.hung == {"replica2": "other ranks have waited for it for 65 s (computing, layer 1)"}
    waits = "no step for 65 s, requests in flight: 3; waits for rank 2 (computing, layer 1)"
    assert found.blocked == {"replica0": waits, "replica1": waits}


def test_awaited_rank_with_work_is_blamed_once() -> None:
    found = report_of((0, 1, 2), seat(0, 1, 2), seat(1), seat(2, 1))
    assert found.hung.keys() == {"replica1"}
    assert found.blocked.keys() == {"replica0", "replica2"}


def test_idle_rank_that_ignores_the_call_is_blamed() -> None:
    found = report_of((0,), seat(0, 1), seat(1, phase="idle", seconds=3600.0))
    assert found.hung.keys() == {"replica1"}


def test_step_that_proceeds_layer_by_layer_is_not_hung() -> None:
    found = report_of((0, 1), seat(0, 1), seat(1, seconds=2.0))
    assert found.hung == {}
    assert (
        found.blocked["replica1"]
        == "no step for 65 s, requests in flight: 3; its step makes progress (computing, layer 1)"
    )


def test_replica_that_stopped_first_is_blamed_when_two_wait_mutually() -> None:
    """It was stopped during a wait that is satisfied by now."""
    assert report_of((0, 1), seat(0, 1, seconds=66.0), seat(1, 0, seconds=65.0)).hung.keys() == {"replica0"}
    assert report_of((0, 1), seat(0, 1, seconds=65.0), seat(1, 0, seconds=66.0)).hung.keys() == {"replica1"}


def test_joining_rank_that_never_arrives_is_blamed() -> None:
    found = report_of((0,), seat(0, 3), seat(3, seconds=None, phase="idle", state="joining"))
    assert found.hung.keys() == {"replica3"}


def test_dead_rank_is_left_to_its_group() -> None:
    found = report_of((0,), seat(0, 1), seat(1, state="dead"))
    assert (found.hung, found.blocked.keys()) == ({}, {"replica0"})


def test_blame_requires_a_readable_group_and_a_rank_of_this_daemon() -> None:
    found = find_hung([stalled(0)], {}, MEMBERS, 60.0)
    assert found.blocked == {
        "replica0": "no step for 65 s, requests in flight: 3; its expert group cannot be read"
    }
    assert report_of((0,), seat(0, 7), seat(7)).hung == {}


@given(
    st.dictionaries(
        st.integers(0, 7),
        st.tuples(st.sets(st.integers(0, 7), max_size=7), st.none() | st.floats(0, 1e6)),
        min_size=1,
    )
)
def test_awaited_seats_always_exist_and_prefer_those_not_waiting(
    waits: dict[int, tuple[set[int], float | None]],
) -> None:
    seats = {n: seat(n, *sorted(others - {n}), seconds=s) for n, (others, s) in waits.items()}
    for one in seats.values():
        found = root_blockers(one, seats)
        assert found
        assert len(found) == 1 or not any(other.waits_for for other in found)


# ---- the progress of one process


def test_progress_is_a_new_step_or_having_nothing_to_do() -> None:
    progress = ProgressTracker()
    progress.update(WorkerProgress(5, 1, 100.0), 0.0)
    assert progress.stalled_for(10.0) == 10.0, "it is not blamed for what was before"
    progress.update(WorkerProgress(5, 1, 120.0), 20.0)
    assert progress.stalled_for(20.0) == 20.0
    progress.update(WorkerProgress(6, 1, 0.5), 30.0)
    assert progress.stalled_for(40.0) == 0.5
    progress.update(WorkerProgress(6, 0, 0.0), 40.0)
    progress.update(WorkerProgress(6, 1, 3.0), 50.0)
    assert progress.stalled_for(50.0) == 3.0


def test_time_in_which_the_daemon_slept_does_not_count() -> None:
    progress = ProgressTracker()
    progress.update(WorkerProgress(5, 1, 1.0), 0.0)
    progress.expect_token(0.0)
    progress.compensate(3600.0)
    progress.update(WorkerProgress(5, 1, 3601.0), 3601.0)
    assert progress.stalled_for(3601.0) == 1.0
    progress.update(WorkerProgress(5, 1, 0.0), 3601.0)
    assert progress.token_overdue_for(3601.0) == 1.0


@pytest.mark.parametrize("worker", [None, {}, [], 3, {"steps": "x", "requests": 1, "silent": 0}])
def test_health_check_without_worker_progress_is_ignored(worker: object) -> None:
    assert WorkerProgress.of({"worker": worker}) is None
    progress = ProgressTracker()
    progress.update(None, 5.0)
    assert (progress.stalled_for(1e9), progress.idle_for(1e9)) == (0.0, 0.0)


# ---- the fleet


def started(tmp_path: Path, **supervise: float) -> tuple[World, SupervisedProgram]:
    options: dict[str, Any] = {"no_progress_timeout": 20, "idle_probe": 0, **supervise}
    world = World(tmp_path, 1, **options)
    world.become_ready("router", "replica0")
    return world, world.fleet.replicas["replica0"]


def test_replica_with_work_and_without_steps_is_killed(tmp_path: Path) -> None:
    world, replica = started(tmp_path)
    world.work("replica0", requests=2)
    world.pass_time(19.0)
    assert replica.state is ProgramState.READY
    world.pass_time(8.0)
    assert (replica.state, replica.cause) == (ProgramState.STOPPING, Cause.HANG)
    assert replica.kill_reason.startswith("hangs: no step for ")
    assert replica.kill_reason.endswith("s, requests in flight: 2")
    world.supervisor.end("replica0")
    world.fleet.step()
    assert replica.state is ProgramState.BACKOFF
    assert "hangs: no step for" in replica.note
    assert (
        world.fleet.metrics.registry.get_sample_value(
            "fd_dp_restarts_total", {"program": "replica0", "cause": "hang"}
        )
        == 1
    )


def test_long_prompt_in_many_steps_is_not_a_hang(tmp_path: Path) -> None:
    world, replica = started(tmp_path)
    for _ in range(20):
        world.work("replica0")
        world.pass_time(15.0)
    assert replica.state is ProgramState.READY


def test_held_replica_is_not_killed_but_has_a_note(tmp_path: Path) -> None:
    world, replica = started(tmp_path)
    world.fleet.set_desired(replica, DesiredState(Intent.HELD))
    world.work("replica0")
    world.pass_time(100.0)
    assert replica.state is ProgramState.READY
    assert replica.note.startswith("hangs: no step for ")


def test_replica_hung_at_first_token_is_killed_before_startup_timeout(
    tmp_path: Path,
) -> None:
    world = World(tmp_path, 1, no_progress_timeout=20, startup_timeout=600)
    world.probes.silent.add("replica0")
    world.probes.good |= {"router", "replica0"}
    world.pass_time(3.0)
    world.work("replica0")
    world.pass_time(30.0)
    assert world.fleet.replicas["replica0"].cause is Cause.HANG


def test_suspended_machine_has_no_hung_replicas(tmp_path: Path) -> None:
    world, replica = started(tmp_path)
    world.work("replica0")
    world.pass_time(3.0)
    world.now += 3600.0
    world.pass_time(6.0)
    world.work("replica0")
    world.pass_time(6.0)
    assert replica.state is ProgramState.READY


def test_token_probe_is_sent_to_idle_replicas_only(tmp_path: Path) -> None:
    world, _ = started(tmp_path, idle_probe=60)
    world.work("replica0", requests=0)
    first = world.probes.tokens["replica0"]
    world.pass_time(55.0)
    assert world.probes.tokens["replica0"] == first
    world.pass_time(20.0)
    assert world.probes.tokens["replica0"] > first
    world.work("replica0", requests=0)
    world.pass_time(6.0)
    asked = world.probes.tokens["replica0"]
    for _ in range(20):
        world.pass_time(30.0)
        world.work("replica0", requests=0)
    assert world.probes.tokens["replica0"] == asked
    world.work("replica0", requests=1)
    world.pass_time(15.0)
    assert world.probes.tokens["replica0"] == asked


def test_idle_replica_without_a_token_is_unhealthy_then_killed(tmp_path: Path) -> None:
    world, replica = started(tmp_path, idle_probe=60)
    world.work("replica0", requests=0)
    world.probes.wordless.add("replica0")
    world.pass_time(75.0)
    assert (replica.state, replica.note) == (ProgramState.UNHEALTHY, "no token")
    world.pass_time(20.0)
    assert replica.cause is Cause.HANG
    assert replica.kill_reason == "idle, but no token within 20 s: no token"


def test_idle_replica_with_a_late_token_is_ready_again(tmp_path: Path) -> None:
    world, replica = started(tmp_path, idle_probe=60)
    world.work("replica0", requests=0)
    world.probes.wordless.add("replica0")
    world.pass_time(75.0)
    world.probes.wordless.clear()
    world.work("replica0", requests=0)
    world.pass_time(8.0)
    assert replica.state is ProgramState.READY
    world.pass_time(40.0)
    assert replica.state is ProgramState.READY


def test_idle_replica_that_never_answers_its_token_probe_is_killed(tmp_path: Path) -> None:
    world, replica = started(tmp_path, idle_probe=60)
    world.work("replica0", requests=0)
    world.probes.silent.add("replica0")
    world.pass_time(95.0)
    assert replica.kill_reason == "idle, but no token within 20 s"


def test_idle_replica_is_excused_if_its_token_probe_waits_for_others(tmp_path: Path) -> None:
    world = World(
        tmp_path,
        2,
        "expert_parallel = true",
        lambda name: snapshot(seat(0, 1), seat(1)),
        no_progress_timeout=20,
        idle_probe=60,
    )
    world.become_ready("router", "replica0", "replica1")
    world.work("replica0", requests=0)
    world.probes.silent.add("replica0")
    world.pass_time(68.0)
    world.work("replica0", requests=1)
    world.pass_time(40.0)
    assert world.names(ProgramState.STOPPING) == {"replica1"}


def test_idle_replica_given_work_is_not_judged_by_its_token_probe(tmp_path: Path) -> None:
    world, replica = started(tmp_path, idle_probe=60)
    world.work("replica0", requests=0)
    world.probes.silent.add("replica0")
    world.pass_time(70.0)
    for _ in range(20):
        world.work("replica0", requests=2)
        world.pass_time(10.0)
    assert replica.state is ProgramState.READY


def test_only_the_rank_that_the_others_wait_for_is_killed(tmp_path: Path) -> None:
    seen: list[str] = []

    def look(name: str) -> Snapshot:
        seen.append(name)
        return snapshot(seat(0, 2), seat(1, 2), seat(2))

    world = World(tmp_path, 3, "expert_parallel = true", look, no_progress_timeout=20, idle_probe=0)
    world.become_ready("router", "replica0", "replica1", "replica2")
    for name in ("replica0", "replica1"):
        world.work(name)
    world.pass_time(10.0)
    assert seen == [], "who makes progress is not looked at"
    world.pass_time(20.0)
    assert world.names(ProgramState.STOPPING) == {"replica2"}
    assert set(seen) == {expert_group_of(world.fleet.config)}
    assert "waits for rank 2" in world.fleet.replicas["replica0"].note


def test_hang_timeouts_come_from_dp_toml(tmp_path: Path) -> None:
    config = parse(
        '[model]\npath = "demo"\n[supervise]\nno_progress_timeout = 2.5\n', "dp.toml", tmp_path, tmp_path
    )
    assert (config.supervise.no_progress_timeout, config.supervise.idle_probe) == (2.5, 60.0)


# ---- a real daemon with fake processes


def test_hanging_replica_logs_its_stacks_is_killed_and_restarts(running: Running, tmp_path: Path) -> None:
    stuck_file = tmp_path / "stuck"
    running.write(extra_args=("--stuck-file", str(stuck_file)), no_progress_timeout=1)
    running.start_and_wait()
    before = running.pids()
    stuck_file.touch()
    wait_until(lambda: not alive(before["replica0"]), "hanging replica 0 killed")
    stuck_file.unlink()
    entry = running.wait_ready_again("replica0", before["replica0"])
    assert entry["cause"] == "hang"
    assert re.search(
        r"replica 0: ERROR \(hangs: no step for \d+ s, requests in flight: 1\); killing pid", running.log()
    )
    output = (running.prefix / "logs" / "replica0" / "output.log").read_text()
    assert "most recent call first" in output
    assert "in deadlocked" in output


def test_stopped_process_logs_its_stacks_and_is_restarted(running: Running) -> None:
    running.write(unhealthy_after=1, unhealthy_kill_after=2)
    running.start_and_wait()
    before = running.pids()
    os.kill(before["replica1"], signal.SIGSTOP)
    entry = running.wait_ready_again("replica1", before["replica1"])
    assert entry["cause"] == "hang"
    assert "no successful health check for 2 s" in running.log()
