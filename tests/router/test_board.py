"""Requests on the board: picking and counting are one atomic step, and counts are exact."""

import threading
from collections import Counter
from pathlib import Path

import pytest

from fastdeploy.daemon.router.board.board import Board, BoardError, Lease, PickFailure
from fastdeploy.daemon.router.instance import ReplicaHandle
from fastdeploy.daemon.router.policy.policies import policy_named
from fastdeploy.daemon.router.policy.policy import RequestFacts

from .boards import FACTS, REQUEST_NUM, in_flight, instance, pick, seat_replicas


def test_d5_a_burst_of_threads_over_idle_replicas_lands_evenly(board: Board) -> None:
    """Upstream picked first and counted later, so a burst saw the same idle worker."""
    seat_replicas(board, 8)
    leases: list[Lease] = []
    barrier = threading.Barrier(64)

    def request() -> None:
        barrier.wait()
        leases.append(pick(board))

    threads = [threading.Thread(target=request) for _ in range(64)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert in_flight(board) == [8] * 8
    for lease in leases:
        lease.release()
    assert in_flight(board) == [0] * 8


def test_consecutive_requests_visit_all_replicas(board: Board) -> None:
    seat_replicas(board, 4)
    names = []
    for _ in range(8):
        lease = pick(board)
        names.append(lease.instance.name)
        lease.release()
    assert Counter(names) == {"0": 2, "1": 2, "2": 2, "3": 2}
    assert [row.pick_count for row in board.status()] == [2] * 4


def test_round_robin_takes_turns_whatever_is_in_flight(board: Board) -> None:
    seat_replicas(board, 3)
    names = [pick(board, policy_named("round_robin")).instance.name for _ in range(6)]
    assert names == ["0", "1", "2", "0", "1", "2"]


def test_lease_is_released_once(board: Board) -> None:
    seat_replicas(board, 1)
    first, second = pick(board), pick(board)
    first.release()
    first.release()
    assert in_flight(board) == [1]
    second.release()
    assert in_flight(board) == [0]


def test_prompt_tokens_are_counted_while_their_request_is_in_flight(board: Board) -> None:
    seat_replicas(board, 2)
    long = pick(board, facts=RequestFacts(0, prompt_tokens=9000))
    policy = policy_named("process_tokens")
    short = [pick(board, policy, RequestFacts(0, prompt_tokens=100)) for _ in range(5)]
    assert {lease.instance.name for lease in short} == {"1"}
    assert [row.tokens for row in board.status()] == [9000, 500]
    for lease in [long, *short]:
        lease.release()
    assert [row.tokens for row in board.status()] == [0, 0]


def test_prompts_with_a_common_prefix_go_to_the_same_replica(board: Board) -> None:
    seat_replicas(board, 4)
    policy, facts = policy_named("cache_aware"), RequestFacts(0, 100, prefix=(11, 12, 13))
    names = set()
    for _ in range(6):
        lease = pick(board, policy, facts)
        names.add(lease.instance.name)
        lease.release()
    assert len(names) == 1


def test_replaced_replica_has_no_cached_prefixes(board: Board) -> None:
    seat_replicas(board, 2, start="a")
    policy, facts = policy_named("cache_aware"), RequestFacts(0, 100, prefix=(11, 12, 13))
    first = pick(board, policy, facts)
    other = pick(board, exclude=[first.handle])
    board.admit(instance(int(first.instance.name), "b"))
    other.release()
    pick(board, exclude=[other.handle])
    assert pick(board, policy, facts).handle == other.handle


def test_excluded_seats_are_never_picked(board: Board) -> None:
    seat_replicas(board, 3)
    tried: list[ReplicaHandle] = []
    while isinstance(lease := board.pick(REQUEST_NUM, FACTS, tried), Lease):
        tried.append(lease.handle)
    assert lease is PickFailure.DOWN
    assert len(set(tried)) == len(tried) == 3


def test_a_replica_gets_no_more_requests_than_it_takes_at_a_time(board: Board) -> None:
    seat_replicas(board, 2, limit=2)
    leases = [pick(board) for _ in range(4)]
    assert board.pick(REQUEST_NUM, FACTS) is PickFailure.BUSY
    leases[0].release()
    assert pick(board).handle == leases[0].handle
    board.unreachable(leases[0].handle, "refused")
    assert board.pick(REQUEST_NUM, FACTS) is PickFailure.BUSY
    assert board.pick(REQUEST_NUM, FACTS, [leases[1].handle]) is PickFailure.DOWN


def test_requests_of_other_routers_count_too(board: Board) -> None:
    seat_replicas(board, 2, limit=4)
    handles = board.handles()
    board.set_remote({handles[0]: (3, 1000)})
    assert [pick(board).handle for _ in range(3)] == [handles[1]] * 3
    assert [pick(board).handle, pick(board).handle] == [handles[0], handles[1]]
    assert board.pick(REQUEST_NUM, FACTS) is PickFailure.BUSY
    assert [(row.in_flight, row.in_flight_elsewhere) for row in board.status()] == [(1, 3), (4, 0)]
    board.set_remote({})
    assert pick(board).handle == handles[0]


def test_reported_load_of_a_replica_reaches_the_policy(board: Board) -> None:
    seat_replicas(board, 2)
    policy = policy_named("fd_metrics_score")
    board.set_load(board.handles()[0], running=5, waiting=1)
    assert [pick(board, policy).instance.name for _ in range(4)] == ["1"] * 4


def test_memory_that_is_no_board_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(1 << 25))
    with path.open("r+b") as file, pytest.raises(BoardError, match="is not a board of this version"):
        Board.attach(file.fileno())
    path.write_bytes(b"short")
    with path.open("r+b") as file, pytest.raises(BoardError, match="is not a board"):
        Board.attach(file.fileno())
