"""The board in several processes: counts stay exact whichever process counts or dies."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest

from fastdeploy.daemon.router.board.board import Board, BoardError, Lease, PickFailure, ReplicaState
from fastdeploy.daemon.router.board.memory import WORKERS
from fastdeploy.daemon.router.instance import Instance
from fastdeploy.daemon.router.policy.policy import RequestFacts

from .boards import REQUEST_NUM, in_flight, pick
from .forked import Forked

FACTS = RequestFacts(0, prompt_tokens=10)
pytestmark = pytest.mark.timeout(300)


@pytest.fixture
def board() -> Iterator[Board]:
    board = Board.create()
    yield board
    board.close()


def instance(number: int, start: str = "a") -> Instance:
    return Instance("127.0.0.1", 1000 + number, replica=number, instance=start)


def start_worker(board: Board, picks: int = 0) -> Forked:
    """Start a worker that has made `picks` picks and then takes the orders "pick" and "release"."""

    def work(child: Forked) -> None:
        board.open_counters()
        leases = [pick(board, facts=FACTS) for _ in range(picks)]
        child.send("ready")
        while (order := child.receive()) != "end":
            if order == "pick":
                leases.append(pick(board, facts=FACTS))
            else:
                leases.pop().release()
            child.send("done")

    worker = Forked(work)
    assert worker.receive() == "ready"
    return worker


def tell(worker: Forked, order: str) -> None:
    worker.send(order)
    assert worker.receive() == "done"


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_d5_burst_over_idle_replicas_is_even_for_any_number_of_workers(board: Board, workers: int) -> None:
    for number in range(8):
        board.admit(instance(number))
    gate_out, gate_in = os.pipe()

    def work(child: Forked) -> None:
        os.close(gate_in)
        board.open_counters()
        child.send("ready")
        os.read(gate_out, 1)  # returns when the parent closes its end, so that all start at the same moment
        leases = [pick(board, facts=FACTS) for _ in range(64 // workers)]
        child.send("picked")
        child.receive()
        for lease in leases:
            lease.release()

    children = [Forked(work) for _ in range(workers)]
    for child in children:
        assert child.receive() == "ready"
    os.close(gate_in)
    for child in children:
        assert child.receive() == "picked"
    assert in_flight(board) == [8] * 8
    for child in children:
        child.send("release")
        assert child.wait() == 0
    assert in_flight(board) == [0] * 8
    os.close(gate_out)


def test_changes_by_one_worker_are_visible_to_others(board: Board) -> None:
    worker = start_worker(board)
    board.admit(instance(0))
    board.admit(instance(1))
    [handle, _] = board.handles()
    board.drain(handle)
    tell(worker, "pick")
    board.undrain(handle)
    board.admit(instance(1, "b"))
    tell(worker, "pick")
    tell(worker, "pick")
    assert [(row.instance.instance, row.in_flight) for row in board.status()] == [("a", 1), ("b", 1)]
    worker.kill()


def test_the_requests_of_a_killed_worker_end_with_it(board: Board) -> None:
    board.admit(instance(0))
    board.open_counters()
    own = pick(board, facts=FACTS)
    worker = start_worker(board, picks=5)
    assert in_flight(board) == [6]
    worker.kill()
    board.drop_dead_workers()
    assert [(row.in_flight, row.tokens) for row in board.status()] == [(1, 10)]
    own.release()
    assert in_flight(board) == [0]


def test_leader_drops_counts_of_a_dead_worker_missed_by_its_parent(board: Board) -> None:
    board.admit(instance(0))
    worker = start_worker(board, picks=5)
    board.measure(1.0)
    assert in_flight(board) == [5]
    worker.kill()
    board.measure(2.0)
    assert in_flight(board) == [0]


def test_live_worker_keeps_its_requests_when_dead_ones_are_dropped(board: Board) -> None:
    board.admit(instance(0))
    worker = start_worker(board, picks=3)
    board.drop_dead_workers()
    assert in_flight(board) == [3]
    worker.kill()


def test_a_probe_of_a_killed_worker_does_not_block_the_next(board: Board) -> None:
    board.admit(instance(0))
    [handle] = board.handles()
    board.unreachable(handle, "refused")
    while board.status()[0].state != ReplicaState.PROBING:
        time.sleep(0.05)
        board.healthy(handle, time.monotonic())
    worker = start_worker(board, picks=1)
    board.open_counters()
    assert board.pick(REQUEST_NUM, FACTS) is PickFailure.BUSY
    worker.kill()
    board.drop_dead_workers()
    assert isinstance(board.pick(REQUEST_NUM, FACTS), Lease)


def test_lock_of_a_killed_worker_is_released(board: Board) -> None:
    board.admit(instance(0))

    def die(child: Forked) -> None:
        board.open_counters()
        with board._lock:
            os.kill(os.getpid(), signal.SIGKILL)

    assert Forked(die).wait() == -signal.SIGKILL
    board.open_counters()
    assert isinstance(board.pick(REQUEST_NUM, FACTS), Lease)


def test_forked_child_can_take_a_lock_held_by_a_thread_of_its_parent(board: Board) -> None:
    board.admit(instance(0))
    holds, may_go = threading.Event(), threading.Event()

    def hold() -> None:
        with board._lock:
            holds.set()
            may_go.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    holds.wait()
    worker = Forked(lambda child: child.send([board.open_counters(), len(board.status())]))
    may_go.set()
    thread.join()
    assert worker.receive() == [0, 1]
    worker.wait()


def test_worker_columns_are_limited_and_reused_after_a_death(board: Board) -> None:
    workers = [start_worker(board) for _ in range(WORKERS)]
    with pytest.raises(BoardError, match=f"room for {WORKERS} workers"):
        board.open_counters()
    workers.pop(7).kill()
    assert board.open_counters() == 7
    assert board.open_counters() == 7
    for worker in workers:
        worker.kill()


def test_worker_that_resigns_never_leads_again(board: Board) -> None:
    def work(child: Forked) -> None:
        before = board.try_lead()
        board.resign()
        child.send([before, board.try_lead()])
        child.receive()

    worker = Forked(work)
    assert worker.receive() == [True, False]
    assert board.try_lead()
    worker.kill()


def test_another_worker_leads_when_the_leader_is_dead(board: Board) -> None:
    def work(child: Forked) -> None:
        while True:
            child.send(board.try_lead())
            child.receive()

    workers = [Forked(work) for _ in range(3)]
    leads = [worker.receive() for worker in workers]
    assert leads.count(True) == 1
    leader = leads.index(True)
    workers.pop(leader).kill()
    for worker in workers:
        worker.send("again")
    assert [worker.receive() for worker in workers].count(True) == 1
    for worker in workers:
        worker.kill()


def test_upgraded_router_continues_with_the_board(board: Board) -> None:
    board.admit(instance(0))
    board.drain(board.handles()[0])
    worker = start_worker(board)
    program = """
import sys
from fastdeploy.daemon.router.board.board import Board
from fastdeploy.daemon.router.policy.policies import RequestFacts, policy_named
board = Board.attach(int(sys.argv[1]))
board.open_counters()
[row] = board.status()
assert row.draining and row.instance.instance == "a"
board.undrain(row.handle)
print([board.pick(policy_named("request_num"), RequestFacts(0)).instance.name for _ in range(2)], flush=True)
sys.stdin.read()
"""
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(board.descriptor)],
        pass_fds=[board.descriptor],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "['0', '0']\n"
    tell(worker, "pick")
    assert in_flight(board) == [3]
    process.communicate()
    board.drop_dead_workers()
    assert in_flight(board) == [1]
    worker.kill()
