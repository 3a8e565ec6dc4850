"""Shared knowledge of replicas: how routers learn of them, tell each other, and forget."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from fastdeploy.daemon.router.addresses import AllowedAddresses
from fastdeploy.daemon.router.board.board import FORGET_AFTER, PickFailure, ReplicaState
from fastdeploy.daemon.router.control import shared_replicas
from fastdeploy.daemon.router.control.shared_replicas import SharedReplicas, SharedState, shared_name
from fastdeploy.daemon.router.instance import Instance
from fastdeploy.daemon.router.policy.policies import policy_named
from fastdeploy.daemon.router.policy.policy import RequestFacts

from .boards import Clock, pick
from .talking import LAN, Hub, Router, replica, turns


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def hub(clock: Clock) -> Hub:
    return Hub(clock)


@pytest.fixture
def routers(hub: Hub) -> Iterator[tuple[Router, Router]]:
    routers = Router(hub), Router(hub)
    yield routers
    for router in routers:
        router.board.close()


def test_shared_registration_is_checked_before_use(
    routers: tuple[Router, Router],
) -> None:
    one, other = routers
    one.hears(replica())
    turns(one, other)
    assert other.row().instance == replica()
    assert other.row().state == ReplicaState.DOWN
    other.checks_health()
    assert other.row().state == ReplicaState.UP


def test_restarted_replica_is_new_for_both_routers(routers: tuple[Router, Router], clock: Clock) -> None:
    one, other = routers
    one.hears(replica("a"))
    turns(one, other)
    clock.now += 5
    other.hears(replica("b"))
    turns(one, other)
    assert (one.knows(), other.knows()) == (["b"], ["b"])
    clock.now += 5
    one.hears(replica("c"))
    turns(other, one)
    assert (one.knows(), other.knows()) == (["c"], ["c"])


def test_a_deregistration_at_one_reaches_the_other(routers: tuple[Router, Router], clock: Clock) -> None:
    one, other = routers
    one.hears(replica())
    turns(one, other)
    other.checks_health()
    lease = pick(other.board)
    one.board.deregister(replica().url, "a")
    turns(one, other)
    assert one.knows() == []
    assert [row.leaving for row in other.board.status()] == [True]
    assert other.board.pick(policy_named("request_num"), RequestFacts(0)) is PickFailure.DOWN
    lease.release()
    other.board.measure(clock.now)
    turns(one, other)
    assert (one.knows(), other.knows()) == ([], [])


def test_a_deregistration_with_requests_in_flight_reaches_the_other(routers: tuple[Router, Router]) -> None:
    one, other = routers
    one.hears(replica())
    turns(one, other)
    lease = pick(one.board)
    one.board.deregister(replica().url, "a")
    turns(one, other)
    assert [row.leaving for row in one.board.status()] == [True]
    assert other.knows() == []
    assert not other.board.admit(replica())  # its last heartbeat comes late
    lease.release()


def test_removed_replica_is_absent_at_both_until_a_heartbeat(
    routers: tuple[Router, Router], clock: Clock
) -> None:
    one, other = routers
    one.hears(replica())
    turns(one, other)
    other.board.remove(other.row().handle)
    turns(other, one)
    assert (one.knows(), other.knows()) == ([], [])
    clock.now += 5
    one.hears(replica())
    turns(one, other)
    assert (one.knows(), other.knows()) == (["a"], ["a"])


def test_drain_applies_at_both_routers(routers: tuple[Router, Router]) -> None:
    one, other = routers
    one.hears(replica())
    turns(one, other)
    one.board.drain(one.row().handle)
    turns(one, other)
    assert (one.row().draining, other.row().draining) == (True, True)
    other.board.undrain(other.row().handle)
    turns(other, one)
    assert (one.row().draining, other.row().draining) == (False, False)


def test_new_router_learns_the_shared_state(routers: tuple[Router, Router], hub: Hub) -> None:
    one, _ = routers
    for number in range(3):
        one.hears(replica("a", number))
    one.board.drain(one.row(1).handle)
    turns(one)
    late = Router(hub)
    turns(late)
    assert [row.draining for row in late.board.status()] == [False, True, False]
    late.board.close()


def test_new_leader_changes_nothing(routers: tuple[Router, Router], hub: Hub, clock: Clock) -> None:
    one, other = routers
    one.hears(replica())
    one.board.drain(one.row().handle)
    turns(one, other)
    clock.now += 100
    one.shared = SharedReplicas(one.board, LAN, clock)
    before = one.board.status(), hub.said
    turns(one)
    assert (one.board.status(), hub.said) == before


def test_heartbeat_to_one_router_keeps_a_replica_at_the_other(
    routers: tuple[Router, Router], clock: Clock
) -> None:
    one, other = routers
    one.hears(replica())
    turns(one, other)
    for _ in range(100):
        clock.now += 5
        one.hears(replica())
        turns(one, other)
        other.board.forget_lost()
        one.board.forget_lost()
    assert (one.knows(), other.knows()) == (["a"], ["a"])


def test_replica_dropped_by_one_router_stays_at_the_other(
    routers: tuple[Router, Router], clock: Clock
) -> None:
    one, other = routers
    one.hears(replica())
    turns(one, other)
    clock.now += FORGET_AFTER + 10
    other.board.forget_lost()  # it cannot reach the replica, and no router has had a heartbeat
    turns(other, one)
    assert (one.knows(), other.knows()) == (["a"], [])
    one.hears(replica())
    turns(one, other)
    assert (one.knows(), other.knows()) == (["a"], ["a"])


def test_replica_without_heartbeats_expires_at_all_routers(
    routers: tuple[Router, Router], clock: Clock
) -> None:
    """Routers pass its entry to each other, but without heartbeats the entry expires."""
    one, other = routers
    one.hears(replica())
    for _ in range(100):
        clock.now += 5
        turns(one, other)
    for router in routers:
        router.board.unreachable(router.row().handle, "refused")
        assert router.board.forget_lost()
    turns(one, other)
    assert (one.knows(), other.knows()) == ([], [])


def test_lost_shared_state_is_published_again(routers: tuple[Router, Router], hub: Hub) -> None:
    one, other = routers
    one.hears(replica("a", 0))
    other.hears(replica("b", 1))
    turns(one, other)
    one.board.drain(one.row(0).handle)
    turns(one, other)
    hub.said = SharedState()
    turns(other, one)
    assert (one.knows(), other.knows()) == (["a", "b"], ["a", "b"])
    assert set(hub.said.entries) == {replica("a", 0).url, replica("b", 1).url}
    assert hub.said.draining == {replica("a", 0).url: "1"}


def test_an_old_copy_of_the_shared_state_changes_nothing(
    routers: tuple[Router, Router], hub: Hub, clock: Clock
) -> None:
    one, other = routers
    one.hears(replica("a"))
    turns(one, other)
    old = hub.said
    clock.now += 100
    one.hears(replica("b"))
    turns(one, other)
    one.board.drain(one.row().handle)
    turns(one, other)
    hub.said = old
    turns(other, one)
    assert (one.knows(), other.knows()) == (["b"], ["b"])
    assert (one.row().draining, other.row().draining) == (True, True)
    assert json.loads(hub.said.entries[replica().url])["registration"]["instance"] == "b"


def test_loopback_addresses_are_distinct_on_each_machine(
    routers: tuple[Router, Router], hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = routers
    mine = Instance("127.0.0.1", 8000, instance="mine")
    one.hears(mine)
    turns(one, other)
    assert other.knows() == ["mine"]  # another router on the same machine
    monkeypatch.setattr(shared_replicas, "_here", lambda: "another machine")
    shared_name.cache_clear()
    elsewhere = Router(hub)
    elsewhere.hears(Instance("127.0.0.1", 8000, instance="theirs"))
    turns(elsewhere)
    assert elsewhere.knows() == ["theirs"]
    assert len(hub.said.entries) == 2
    elsewhere.board.close()
    shared_name.cache_clear()


def test_replicas_not_allowed_here_are_not_removed_elsewhere(
    hub: Hub, caplog: pytest.LogCaptureFixture
) -> None:
    open_one, closed = Router(hub), Router(hub, AllowedAddresses())
    open_one.hears(replica())
    for _ in range(3):
        turns(open_one, closed)
    assert (open_one.knows(), closed.knows()) == (["a"], [])
    assert caplog.text.count("--allow-host 10.0.0.1") == 1
    assert "token-a" not in caplog.text
    for router in (open_one, closed):
        router.board.close()


@pytest.mark.parametrize(
    "entry", ["", "[]", "{}", '{"registration": {}, "state": "here"}', '{"registration": 5}']
)
def test_invalid_shared_data_is_ignored(routers: tuple[Router, Router], hub: Hub, entry: str) -> None:
    one, _ = routers
    hub.said = SharedState(
        {"http://10.0.0.9:1": entry}, {"http://10.0.0.9:1": "x"}, {"http://10.0.0.9:1": "soon"}
    )
    turns(one)
    assert one.knows() == []
    assert hub.said.entries.get("http://10.0.0.9:1", entry) == entry


def test_removed_replicas_expire_from_the_shared_state(
    routers: tuple[Router, Router], hub: Hub, clock: Clock
) -> None:
    one, other = routers
    one.hears(replica())
    turns(one, other)
    one.board.deregister(replica().url, "a")
    turns(one, other)
    assert hub.said.entries
    clock.now += 3 * FORGET_AFTER
    turns(one, other)
    assert not hub.said


def test_an_invalid_entry_of_a_known_replica_does_not_hide_other_changes(
    routers: tuple[Router, Router], hub: Hub, clock: Clock
) -> None:
    one, other = routers
    one.hears(replica())
    turns(one, other)
    clock.now += 5
    one.hears(replica("b", 1))
    one.turn()
    name, entry = shared_name(replica()), '{"registration": {}, "state": "here"}'
    hub.said = hub.said.updated(SharedState({name: entry}, {}, {name: str(hub.now())}))
    other.turn()
    assert other.knows() == ["a", "b"]
