"""Planned stops lose no request: a replica is drained before its stop, and none stays drained."""

from __future__ import annotations

import os
import signal
from typing import Any

from fastdeploy.daemon.config.programs import admin_socket
from fastdeploy.daemon.control import protocol
from fastdeploy.daemon.supervision.router_client import registered, set_draining

from .conftest import Running, wait_until


def stages(messages: list[dict[str, Any]]) -> list[tuple[str, str]]:
    events = [message["event"] for message in messages if "event" in message]
    return [(event["program"], event["stage"]) for event in events if event["kind"] == "stage"]


def lines(messages: list[dict[str, Any]]) -> list[str]:
    return [message["line"] for message in messages if "line" in message]


def nobody_is_drained(running: Running) -> None:
    wait_until(lambda: len(running.rows()) == 2 and not running.drained(), "all take requests")


def restart_while_in_flight(running: Running, requests: int) -> None:
    """Begin a restart of replica 0; return when it is drained."""
    running.set_in_flight(0, requests)
    running.do("restart", "0", wait=False)
    wait_until(lambda: running.drained() == {0}, "replica 0 is drained")


def test_restart_waits_for_requests_in_flight_and_undrains_afterwards(
    lent: Running,
) -> None:
    before = lent.pids()
    restart_while_in_flight(lent, 3)
    lent.set_in_flight(0, 1)
    wait_until(lambda: lent.programs()["replica0"]["in_flight"] == 1, "the daemon sees it")
    assert lent.pids() == before
    assert lent.status()["daemon"]["state"] == "BUSY"
    lent.set_in_flight(0, 0)
    lent.wait_ready_again("replica0", before["replica0"])
    nobody_is_drained(lent)


def test_restart_reports_its_stages_and_requests_in_flight(lent: Running) -> None:
    lent.write(drain_timeout=0.5)
    lent.do("reload")
    lent.set_in_flight(1, 2)
    told = lent.tell("restart", name="all")
    assert told[-1] == {"code": protocol.OK}
    assert list(dict.fromkeys(stages(told))) == [
        (name, stage) for name in ("replica0", "replica1") for stage in ("drain", "stop", "start", "ready")
    ]
    drains = [message["event"] for message in told if message.get("event", {}).get("stage") == "drain"]
    assert {(event["label"], event["index"], event["of"]) for event in drains} == {
        *(("replica 0", 1, 2), ("replica 1", 2, 2)),
    }
    assert drains[-1]["in_flight"] == 2
    # Requests left at the deadline are resumed on other replicas, which the operator may want to know.
    assert "replica 1: 2 requests in flight after 0.5 s; resumed on other replicas" in lines(told)
    assert lent.ready()


def test_drain_timeout_0_stops_without_waiting(lent: Running) -> None:
    lent.write(drain_timeout=0)
    lent.do("reload")
    lent.set_in_flight(0, 3)
    told = lent.tell("restart", name="0")
    assert told[-1] == {"code": protocol.OK}
    assert stages(told) == [("replica0", stage) for stage in ("stop", "start", "ready")]


def test_the_only_replica_serves_until_it_is_idle(running: Running) -> None:
    """Draining the only replica would mean an outage for as long as its requests take."""
    running.write(replicas=1)
    running.start_and_wait()
    before = running.pids()
    running.set_in_flight(0, 1)
    running.do("restart", "0", wait=False)
    said = "replica 0: not drained, because no other replica takes requests; it stops when it is idle"
    wait_until(lambda: said in running.log(), "the message has arrived")
    assert (running.drained(), running.pids()) == (set(), before)
    running.set_in_flight(0, 0)
    running.wait_ready_again("replica0", before["replica0"])


def test_replica_that_stays_down_is_drained_even_if_it_is_the_last(lent: Running) -> None:
    lent.set_in_flight(0, 1)
    lent.do("stop", "all", wait=False)
    wait_until(lambda: lent.drained() == {0, 1}, "both are drained")
    assert lent.ready()
    lent.set_in_flight(0, 0)
    states = lambda: {entry["state"] for entry in lent.status()["replicas"]}  # noqa: E731
    wait_until(lambda: states() == {"STOPPED"}, "both are down")
    wait_until(lambda: lent.rows() == {}, "the router has no replica left")
    lent.do("start", "all")
    nobody_is_drained(lent)


def test_restart_works_without_a_router(lent: Running) -> None:
    lent.do("stop", "router")
    told = lent.tell("restart", name="0")
    assert told[-1] == {"code": protocol.OK}
    assert "replica 0: not drained: the router is down" in lines(told)


def test_a_router_that_dies_while_a_replica_is_drained_changes_nothing(lent: Running) -> None:
    before = lent.pids()
    restart_while_in_flight(lent, 3)
    os.kill(before["router"], signal.SIGKILL)
    lent.wait_ready_again("router", before["router"])
    wait_until(lambda: lent.programs()["replica0"]["in_flight"] == 3, "the daemon asks the new one")
    assert lent.drained() == {0}
    assert lent.pids()["replica0"] == before["replica0"]
    lent.set_in_flight(0, 0)
    lent.wait_ready_again("replica0", before["replica0"])
    nobody_is_drained(lent)


def test_hung_router_delays_operations_only_briefly(lent: Running) -> None:
    lent.write(drain_timeout=1)
    lent.do("reload")
    before = lent.pids()
    os.kill(before["router"], signal.SIGSTOP)
    lent.do("restart", "0", wait=False)
    wait_until(lambda: lent.programs()["replica0"]["pid"] not in (None, before["replica0"]), "a new one")
    os.kill(before["router"], signal.SIGCONT)
    lent.wait_ready_again("replica0", before["replica0"])
    nobody_is_drained(lent)


def test_next_daemon_undrains_a_replica_left_drained_by_a_killed_one(lent: Running) -> None:
    before = lent.pids()
    restart_while_in_flight(lent, 1)
    lent.stop(signal.SIGKILL)
    lent.start()
    nobody_is_drained(lent)
    wait_until(lent.ready, "everything adopted")
    assert lent.pids() == before


def test_drain_set_directly_at_the_router_is_undone(lent: Running) -> None:
    """The daemon holds the operator's intent and overrides drains that were set at the router directly."""
    admin = admin_socket(lent.prefix / "run")
    set_draining(admin, registered(admin)[lent.ports[1]], True)
    nobody_is_drained(lent)
