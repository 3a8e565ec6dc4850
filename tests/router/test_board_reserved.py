"""Replicas reserved for one request, and fd-dp's reports about replicas that have ended."""

from __future__ import annotations

from fastdeploy.daemon.router.board.board import Board, Ending, Lease, PickFailure, ReplicaState
from fastdeploy.daemon.router.board.memory import ENDINGS

from .boards import FACTS, REQUEST_NUM, Clock, instance, pick, seat_replicas, states
from .forked import Forked


def test_a_reserved_replica_takes_nothing_else(board: Board) -> None:
    seat_replicas(board, 2)
    handle = board.reserve()
    assert handle is not None
    others = [pick(board) for _ in range(5)]
    assert {lease.handle for lease in others} == {each for each in board.handles() if each != handle}
    # Requests that exclude a free replica are not rejected: they wait.
    assert board.pick(REQUEST_NUM, FACTS, [others[0].handle]) is PickFailure.BUSY
    assert [row.reserved for row in board.status()] == [row.handle == handle for row in board.status()]
    board.unreserve(handle)
    assert pick(board).handle == handle


def test_the_least_loaded_replica_is_reserved_and_picked_once_it_is_empty(board: Board) -> None:
    seat_replicas(board, 2)
    leases = [pick(board) for _ in range(3)]
    handle = board.reserve()
    assert handle == leases[1].handle
    assert board.pick_reserved(handle, FACTS) is PickFailure.BUSY
    leases[1].release()
    lone = board.pick_reserved(handle, FACTS)
    assert isinstance(lone, Lease)
    assert lone.handle == handle
    assert [row.in_flight for row in board.status()] == [2, 1]


def test_at_most_half_of_the_replicas_are_reserved_except_a_single_one(board: Board) -> None:
    seat_replicas(board, 1)
    assert board.reserve() is not None
    assert board.reserve() is None
    seat_replicas(board, 5)
    assert board.reserve() is not None
    assert board.reserve() is None


def test_what_is_excluded_is_not_reserved(board: Board) -> None:
    seat_replicas(board, 2)
    first, second = board.handles()
    assert board.reserve([first]) == second
    board.unreserve(second)
    assert board.reserve([first, second]) is None


def test_reservation_ends_when_the_replica_goes_down(board: Board) -> None:
    seat_replicas(board, 2)
    handle = board.reserve()
    assert handle is not None
    board.unreachable(handle, "refused")
    assert board.pick_reserved(handle, FACTS) is PickFailure.DOWN
    assert not any(row.reserved for row in board.status())


def test_reservation_ends_when_the_replica_restarts(board: Board) -> None:
    seat_replicas(board, 1, "a")
    handle = board.reserve()
    assert handle is not None
    board.admit(instance(0, "b"))
    assert board.pick_reserved(handle, FACTS) is PickFailure.DOWN
    assert pick(board).instance.instance == "b"


def test_requests_on_a_reserved_replica_move_after_a_while(board: Board, clock: Clock) -> None:
    seat_replicas(board, 2)
    handle = board.reserve()
    assert board.reserved_before(clock.now) == set()
    clock.now += 1.0
    assert board.reserved_before(clock.now) == {handle}


def test_reservations_of_a_dead_worker_end(board: Board) -> None:
    seat_replicas(board, 2)

    def work(child: Forked) -> None:
        board.open_counters()
        child.send(board.reserve() is not None)
        child.receive()

    worker = Forked(work)
    assert worker.receive()
    assert any(row.reserved for row in board.status())
    worker.kill()
    board.drop_dead_workers()
    assert not any(row.reserved for row in board.status())


def test_report_of_an_exit_concerns_that_start_only(board: Board) -> None:
    seat_replicas(board, 2, "a")
    handles = board.handles()
    assert board.ending_of(handles[0]) is Ending.UNKNOWN
    board.record_ending(handles[0].url, "a", Ending.FROM_OUTSIDE)
    assert [board.ending_of(handle) for handle in handles] == [Ending.FROM_OUTSIDE, Ending.UNKNOWN]
    board.admit(instance(0, "b"))
    successor = board.handle_of(handles[0].url)
    assert successor is not None
    assert board.ending_of(successor) is Ending.UNKNOWN


def test_latest_report_counts_and_old_ones_are_dropped(board: Board) -> None:
    seat_replicas(board, 1, "a")
    [handle] = board.handles()
    for ending in (Ending.FROM_OUTSIDE, Ending.ITS_OWN):
        board.record_ending(handle.url, "a", ending)
    assert board.ending_of(handle) is Ending.ITS_OWN
    for number in range(ENDINGS):
        board.record_ending(handle.url, f"other {number}", Ending.ITS_OWN)
    assert board.ending_of(handle) is Ending.UNKNOWN


def test_a_replica_without_an_id_is_never_explained(board: Board) -> None:
    seat_replicas(board, 1)
    [handle] = board.handles()
    board.record_ending(handle.url, "", Ending.FROM_OUTSIDE)
    assert board.ending_of(handle) is Ending.UNKNOWN


def test_loss_is_recorded_but_a_drain_is_not(board: Board, clock: Clock) -> None:
    seat_replicas(board, 2, "a")
    first, second = board.handles()
    assert not board.has_lost_one_since(0.0)
    board.deregister(first.url, "a")
    assert board.has_lost_one_since(clock.now - 1.0)
    assert not board.has_lost_one_since(clock.now)
    board.drain(second)
    assert not board.has_lost_one_since(clock.now - 1.0)


def test_suspect_on_a_probing_replica_is_its_trial_request(board: Board, clock: Clock) -> None:
    seat_replicas(board, 1)
    (handle,) = board.handles()
    board.unreachable(handle, "refused")
    clock.now += 60.0
    board.healthy(handle, asked_at=clock.now)
    assert states(board) == [ReplicaState.PROBING]
    assert board.reserve() == handle
    lease = board.pick_reserved(handle, FACTS)
    assert isinstance(lease, Lease)
    board.unreserve(handle)
    # Its trial request has not ended.
    assert board.pick(REQUEST_NUM, FACTS) is PickFailure.BUSY


def test_no_replica_is_lost_before_the_first_one(board: Board) -> None:
    seat_replicas(board, 1)
    assert not board.has_lost_one_since(-100.0), "the machine started a moment ago"
    board.unreachable(board.handles()[0], "refused")
    assert board.has_lost_one_since(-100.0)
