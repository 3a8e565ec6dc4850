"""`fdctl status` and `why` say so when the router has no use for a READY replica."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fastdeploy.daemon.control import status
from fastdeploy.daemon.supervision.program_state import ProgramState
from fastdeploy.daemon.supervision.router_client import RegisteredReplica
from fastdeploy.daemon.supervision.router_sync import RouterSnapshot

from .world import World


@pytest.fixture
def world(tmp_path: Path) -> World:
    world = World(tmp_path, replicas=2)
    world.become_ready("router", "replica0", "replica1")
    world.pass_time(3.0)
    assert world.names(ProgramState.READY) == {"router", "replica0", "replica1"}
    return world


def notes(world: World, look: RouterSnapshot) -> list[str]:
    world.fleet.router.snapshot = look
    shown = status.status(world.fleet, state="READY", config="", prefix=None, supervisord=1, problems=[])
    return [replica["note"] for replica in shown["replicas"]]


def row(world: World, name: str, **changes: Any) -> tuple[int, RegisteredReplica]:
    port = world.fleet.programs[name].port
    fields = {"up": True, "leaving": False, "draining": False, "in_flight": 0, **changes}
    return port, RegisteredReplica(f"[::1]:{port}", "::1", port, **fields)


def test_a_ready_replica_that_the_router_lacks_has_a_note(world: World) -> None:
    rows = dict([row(world, "replica0")])
    had, lacked = notes(world, RouterSnapshot(world.now, rows, ""))
    assert had == ""
    assert lacked == "not registered at the router; fdctl logs 1 says why"
    missing = status.why(world.fleet, world.fleet.replicas["replica1"], world.now)
    assert missing["waits_for"] == "the router, which does not use it yet"


def test_a_ready_replica_that_the_router_cannot_use_has_a_note(world: World) -> None:
    port, down = row(world, "replica0", up=False)
    rows = dict([(port, down), row(world, "replica1", leaving=True)])
    assert notes(world, RouterSnapshot(world.now, rows, "")) == [
        f"the router's health checks at [::1]:{port} fail",
        "not registered at the router; fdctl logs 1 says why",
    ]


def test_a_router_that_was_asked_before_or_is_silent_gives_no_note(world: World) -> None:
    ready_since = world.fleet.replicas["replica0"].since
    assert notes(world, RouterSnapshot(ready_since - 1.0, {}, "")) == ["", ""]
    assert notes(world, RouterSnapshot(world.now, {}, "the router is down")) == ["", ""]


def test_a_replica_that_is_drained_has_no_such_note(world: World) -> None:
    rows = dict([row(world, "replica0", draining=True), row(world, "replica1")])
    assert notes(world, RouterSnapshot(world.now, rows, "")) == ["", ""]
