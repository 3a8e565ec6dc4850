"""`fdctl why`: the explanation for a program in each of its states."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest

from fastdeploy.common.errors import FastDeployError
from fastdeploy.daemon.config.loader import Config, parse
from fastdeploy.daemon.config.programs import Program
from fastdeploy.daemon.control.waiting_reason import next_try_in, waits_for
from fastdeploy.daemon.fdctl.program_output import last_lines, stacks_in
from fastdeploy.daemon.supervision.intents import Intent
from fastdeploy.daemon.supervision.program_state import ProgramState, SupervisedProgram
from fastdeploy.daemon.supervision.router_sync import RouterSnapshot

from .conftest import Running, wait_until

NOW = 1000.0


def program(number: int | None) -> Program:
    name = "router" if number is None else f"replica{number}"
    return Program(name, ("x",), MappingProxyType({}), (5000,), stop_timeout=30.0)


def config() -> Config:
    text = '[model]\npath = "demo"\n[supervise]\nstartup_timeout = 600\n'
    text += "unhealthy_kill_after = 60\nparallel_starts = 1\n"
    return parse(text, "dp.toml", Path("/p"), Path("/p"))


@dataclass
class Seen:
    """The parts of a fleet that `waits_for` reads."""

    programs: dict[str, SupervisedProgram] = field(default_factory=dict)
    config: Config = field(default_factory=config)
    busy: int | None = 0
    snapshot: RouterSnapshot = field(default_factory=lambda: RouterSnapshot(problem=""))

    @property
    def replicas(self) -> dict[str, SupervisedProgram]:
        return {name: one for name, one in self.programs.items() if not one.is_router}

    @property
    def router(self) -> Seen:
        return self

    def row(self, replica: SupervisedProgram) -> None:
        """Return None: the router has not been asked."""

    def add(self, number: int | None, state: ProgramState, **other: Any) -> SupervisedProgram:
        one = SupervisedProgram(program(number), state, since=NOW - 12, **other)
        self.programs[one.name] = one
        return one

    def in_flight(self, replica: SupervisedProgram) -> int | None:
        return self.busy

    def drains(self, replica: SupervisedProgram) -> bool:
        return replica.draining


@pytest.mark.parametrize(
    ("state", "other", "told"),
    [
        (ProgramState.READY, {}, ""),
        (
            ProgramState.READY,
            {"draining": True},
            "the end of its requests (2 in flight), then for the operator, who has drained it; "
            "fdctl undrain 1",
        ),
        (
            ProgramState.READY,
            {"intent": Intent.HELD},
            "the operator, who holds it; fdctl release 1",
        ),
        (ProgramState.STOPPED, {"intent": Intent.STOPPED}, "the operator: fdctl start 1"),
        (ProgramState.STOPPED, {"intent": Intent.HELD}, "the operator: fdctl start 1"),
        (ProgramState.WAITING, {"note": "waits for its files: disk full"}, "its files: disk full"),
        (ProgramState.STOPPED, {}, "its turn in a reload"),
        (
            ProgramState.QUARANTINED,
            {"paused": True, "next_try": NOW + 42},
            "60 s without a failure of any replica, 42 s left",
        ),
        (
            ProgramState.QUARANTINED,
            {"paused": True, "next_try": NOW - 1},
            "its turn: paused replicas start one at a time",
        ),
        (ProgramState.STARTING, {}, "its first token; it counts as failed in 588 s"),
        (ProgramState.UNHEALTHY, {"last_good": NOW - 20}, "a successful health check; it is killed in 40 s"),
        (
            ProgramState.UNHEALTHY,
            {"last_good": NOW - 20, "intent": Intent.HELD},
            "a successful health check, or the operator: fdctl release 1",
        ),
        (ProgramState.STOPPING, {}, "its last requests; it is killed in 18 s"),
        (ProgramState.STOPPING, {"kill_reason": "hangs"}, "its thread stacks; then it is killed"),
        (ProgramState.BACKOFF, {"next_try": NOW + 7.4}, "its next restart, in 7 s"),
        (ProgramState.QUARANTINED, {"next_try": NOW + 400}, "its next restart, in 400 s"),
        (ProgramState.BACKOFF, {"next_try": float("inf")}, "the end of fd-dp"),
        (ProgramState.WAITING, {}, "the end of its old process"),
    ],
)
def test_what_a_replica_waits_for(state: ProgramState, other: dict[str, Any], told: str) -> None:
    fleet = Seen(busy=2)
    fleet.add(None, ProgramState.READY)
    assert waits_for(fleet, fleet.add(1, state, **other), NOW) == told  # type: ignore[arg-type]


def test_replica_waits_for_the_router_then_for_loading_replicas() -> None:
    fleet = Seen()
    router, waiting = fleet.add(None, ProgramState.STARTING), fleet.add(1, ProgramState.WAITING)
    assert waits_for(fleet, waiting, NOW) == "the router, which starts first"  # type: ignore[arg-type]
    router.state = ProgramState.READY
    fleet.add(0, ProgramState.STARTING)
    told = waits_for(fleet, waiting, NOW)  # type: ignore[arg-type]
    assert told == "its turn to load, after replica 0 (parallel_starts = 1)"


def test_the_next_try_is_a_number_that_json_can_carry() -> None:
    fleet = Seen()
    assert next_try_in(fleet.add(1, ProgramState.BACKOFF, next_try=NOW + 7.44), NOW) == 7.4
    assert next_try_in(fleet.add(1, ProgramState.BACKOFF, next_try=float("inf")), NOW) is None
    assert next_try_in(fleet.add(1, ProgramState.READY), NOW) is None


def test_stacks_are_found_at_the_end_of_an_output(tmp_path: Path) -> None:
    file = tmp_path / "output.log"
    assert stacks_in(file) is None
    before = "".join(f"line {number}\n" for number in range(100))
    dump = (
        "Thread 0x00007f12 (most recent call first):\n"
        '  File "a.py", line 3 in wait\n'
        "\n"
        "Current thread 0x00007f34 (most recent call first):\n"
        '  File "b.py", line 5 in <module>\n'
    )
    file.write_text(before)
    assert stacks_in(file) is None
    file.write_text(before + dump + "killed\n")
    stacks = stacks_in(file)
    assert stacks is not None
    assert stacks.threads == 2
    assert last_lines(file, stacks.lines_ago)[0].startswith("Thread 0x00007f12")


def test_unreadable_output_is_an_error_and_missing_output_is_empty(tmp_path: Path) -> None:
    assert last_lines(tmp_path / "none", 5) == []
    with pytest.raises(FastDeployError, match="cannot be read"):
        last_lines(tmp_path, 5)


def test_a_fleet_that_is_not_well_is_explained(running: Running) -> None:
    running.write(replicas=3, backoff_first=60)
    running.start_and_wait()
    assert running.fdctl("why").stdout == "all 4 programs are READY\n"
    os.kill(running.pids()["replica0"], signal.SIGKILL)
    running.fdctl("stop", "1")
    running.fdctl("drain", "2", "--no-wait")
    wait_until(lambda: running.programs()["replica0"]["state"] == "BACKOFF", "exit noticed")
    wait_until(lambda: "READY draining" in running.fdctl("status").stdout, "the router drains")
    assert "STOPPED by operator" in running.fdctl("status").stdout
    told = running.fdctl("why").stdout
    assert "router: " not in told
    one, two, three = ("replica " + part for part in told.split("replica ")[1:])
    assert one.startswith("replica 0: BACKOFF for ")
    assert "waits for: its next restart, in " in one
    assert "last exit: terminated by SIGKILL (cause: killed), " in one
    assert two.startswith("replica 1: STOPPED for ")
    assert "wanted: down (stopped by the operator)" in two
    assert "waits for: the operator: fdctl start 1" in two
    assert three.startswith("replica 2: READY for ")
    assert "wanted: running; drained" in three
    alone = running.fdctl("why", "0").stdout
    assert alone.splitlines()[-2].startswith("last 1 lines of ")
    assert alone.splitlines()[-1] == f"  fake replica on port {running.ports[1]}"
    found = json.loads(running.fdctl("why", "0", "--json").stdout)
    assert (found["cause"], found["intent"]) == ("killed", "run")
    assert 0 < found["next_try_in"] <= 60
