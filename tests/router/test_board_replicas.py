"""Replicas on the board, when they leave and return."""

import pytest

from fastdeploy.daemon.router.board.board import FORGET_AFTER, Board, PickFailure, ReplicaState
from fastdeploy.daemon.router.board.memory import ROWS
from fastdeploy.daemon.router.instance import Instance, RegistrationError

from .boards import FACTS, REQUEST_NUM, Clock, in_flight, instance, pick, seat_replicas, states


def test_d4_end_of_an_old_request_does_not_count_for_a_new_instance(board: Board, clock: Clock) -> None:
    """Upstream's unsigned counter wrapped to 2^64-1, and that worker was never picked again."""
    seat_replicas(board, 1)
    old = pick(board)
    board.unreachable(old.handle, "refused")
    clock.now += FORGET_AFTER + 1
    assert board.forget_lost()
    assert board.status() == []
    board.admit(instance(0))
    new = pick(board)
    old.release()
    assert in_flight(board) == [1]
    new.release()
    assert in_flight(board) == [0]


def test_restarted_replica_is_another_instance_at_once(board: Board) -> None:
    board.admit(instance(0, "a", limit=1))
    old = pick(board)
    board.failed(old.handle, "connection reset")
    assert board.admit(instance(0, "b", limit=1))
    new = pick(board)
    assert new.handle != old.handle
    board.unreachable(old.handle, "connection reset")
    assert states(board) == [ReplicaState.UP]
    old.release()
    assert in_flight(board) == [1]
    new.release()
    assert in_flight(board) == [0]


def test_late_heartbeat_of_a_replaced_instance_is_ignored(board: Board) -> None:
    board.admit(instance(0, "a"))
    board.admit(instance(0, "b"))
    assert not board.admit(instance(0, "a"))
    assert [row.instance.instance for row in board.status()] == ["b"]


def test_registering_again_keeps_seat_and_count(board: Board) -> None:
    seat_replicas(board, 1)
    lease = pick(board)
    assert not board.admit(instance(0))
    assert board.admit(Instance("127.0.0.1", 1000, replica=7))
    [row] = board.status()
    assert (row.instance.name, row.in_flight) == ("7", 1)
    lease.release()
    assert in_flight(board) == [0]


def test_deregistered_replica_is_removed_with_its_last_request(board: Board, clock: Clock) -> None:
    board.admit(instance(0, "a"))
    lease = pick(board)
    assert not board.deregister(instance(0).url, "another")
    assert board.deregister(instance(0).url, "a")
    assert board.pick(REQUEST_NUM, FACTS) is PickFailure.DOWN
    assert not board.admit(instance(0, "a"))
    [row] = board.status()
    assert (row.leaving, row.in_flight) == (True, 1)
    lease.release()
    board.measure(clock.now)
    assert board.status() == []
    assert not board.admit(instance(0, "a"))
    assert board.admit(instance(0, "b"))


def test_draining_replica_gets_nothing_new_even_after_a_restart(board: Board) -> None:
    board.admit(instance(0, "a"))
    [handle] = board.handles()
    assert board.drain(handle)
    assert board.pick(REQUEST_NUM, FACTS) is PickFailure.DOWN
    board.admit(instance(0, "b"))
    [row] = board.status()
    assert row.draining
    assert not board.undrain(handle)
    assert board.undrain(row.handle)
    assert pick(board).instance.instance == "b"


def test_a_removed_replica_comes_back_with_its_next_heartbeat(board: Board) -> None:
    board.admit(instance(0, "a"))
    lease = pick(board)
    assert board.remove(lease.handle)
    assert not board.remove(lease.handle)
    assert board.status() == []
    assert board.handle_of(instance(0).url) is None
    assert board.admit(instance(0, "a"))
    lease.release()
    assert in_flight(board) == [0]


def test_rows_are_used_again(board: Board) -> None:
    for start in range(3 * ROWS):
        board.admit(instance(0, f"start-{start}"))
    assert len(board.status()) == 1


def test_row_is_reused_only_after_requests_of_its_old_replica_end(board: Board) -> None:
    board.admit(instance(0, "0"))
    leases = []
    for start in range(1, ROWS):
        leases.append(pick(board))
        board.admit(instance(0, str(start)))
    with pytest.raises(RegistrationError, match="the board is full: it has room for 256 replicas") as raised:
        board.admit(instance(1))
    assert raised.value.status == 503
    for lease in leases:
        lease.release()
    assert board.admit(instance(1))
    assert in_flight(board) == [0, 0]


def test_a_registration_that_does_not_fit_is_refused(board: Board) -> None:
    devices = tuple("9" * 64 for _ in range(200))
    with pytest.raises(RegistrationError, match="too long"):
        board.admit(Instance("127.0.0.1", 1000, device_ids=devices))
    assert board.status() == []


def test_sixty_four_replicas_in_the_order_of_their_numbers(board: Board) -> None:
    for number in reversed(range(64)):
        board.admit(instance(number))
    board.admit(Instance("127.0.0.1", 999))
    assert [row.instance.replica for row in board.status()] == [*range(64), None]
    for _ in range(130):
        pick(board)
    assert in_flight(board) == [2] * 65
