"""The board: pick and count are one act, counts are exact, states follow the table in board.py."""

import threading
from collections import Counter

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from fastdeploy.daemon.router.board import FORGET_AFTER, Board, Lease
from fastdeploy.daemon.router.policies import RequestFacts, policy_named
from fastdeploy.daemon.router.registration import Instance

FACTS = RequestFacts("/v1/completions", b"{}", 0)
REQUEST_NUM = policy_named("request_num")


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def instance(number: int) -> Instance:
    return Instance("127.0.0.1", 1000 + number, replica=number)


def board_of(count: int, clock: Clock | None = None) -> Board:
    board = Board(clock or Clock())
    for number in range(count):
        board.admit(instance(number))
    return board


def pick(board: Board, policy=REQUEST_NUM) -> Lease:
    lease = board.pick(policy, FACTS)
    assert lease is not None
    return lease


def test_d5_a_burst_over_idle_replicas_lands_evenly():
    """Upstream chose first and counted later: all of a burst saw the same idle worker."""
    board = board_of(8)
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
    assert [row.in_flight for row in board.status()] == [8] * 8
    for lease in leases:
        lease.release()
    assert [row.in_flight for row in board.status()] == [0] * 8


def test_one_request_after_another_visits_everybody():
    board = board_of(4)
    names = []
    for _ in range(8):
        lease = pick(board)
        names.append(lease.instance.name)
        lease.release()
    assert Counter(names) == {"0": 2, "1": 2, "2": 2, "3": 2}


def test_round_robin_takes_turns_whatever_is_in_flight():
    board = board_of(3)
    names = [pick(board, policy_named("round_robin")).instance.name for _ in range(6)]
    assert names == ["0", "1", "2", "0", "1", "2"]


def test_a_lease_is_given_back_once():
    board = board_of(1)
    first, second = pick(board), pick(board)
    first.release()
    first.release()
    assert board.status()[0].in_flight == 1
    second.release()
    assert board.status()[0].in_flight == 0


def test_d4_the_end_of_an_old_request_does_not_count_against_a_replica_that_came_back():
    """Upstream's unsigned counter went to 2^64-1, and that worker was never picked again."""
    clock = Clock()
    board = board_of(1, clock)
    old = pick(board)
    board.unreachable(old.seat, "refused")
    clock.now += FORGET_AFTER + 1
    assert board.forget_lost()
    assert board.status() == []
    board.admit(instance(0))
    new = pick(board)
    old.release()
    assert board.status()[0].in_flight == 1
    new.release()
    assert board.status()[0].in_flight == 0


def test_d6_one_failure_is_a_hiccup_and_two_in_a_row_are_not():
    """Upstream removed an instance at its first failed probe."""
    clock = Clock()
    board = board_of(1, clock)
    [seat] = board.seats()
    board.failed(seat, "timeout")
    assert board.status()[0].up
    clock.now += 1
    board.healthy(seat, clock.now)
    board.failed(seat, "timeout")
    assert board.status()[0].up
    board.failed(seat, "timeout")
    assert not board.status()[0].up
    assert board.pick(REQUEST_NUM, FACTS) is None


def test_a_refused_connection_takes_it_out_at_once_and_a_health_check_brings_it_back():
    clock = Clock()
    board = board_of(2, clock)
    seat = board.seat_of(instance(0))
    board.unreachable(seat, "refused")
    assert [row.up for row in board.status()] == [False, True]
    board.healthy(seat, clock.now - 1)  # began before the failure: says nothing
    assert [row.up for row in board.status()] == [False, True]
    clock.now += 1
    board.healthy(seat, clock.now)
    assert [row.up for row in board.status()] == [True, True]


def test_a_healthy_replica_without_heartbeats_is_kept():
    clock = Clock()
    board = board_of(1, clock)
    clock.now += FORGET_AFTER + 1
    assert not board.forget_lost()
    assert board.status()[0].up


def test_a_heartbeat_keeps_a_replica_that_is_down_on_the_board():
    clock = Clock()
    board = board_of(1, clock)
    [seat] = board.seats()
    board.unreachable(seat, "refused")
    clock.now += FORGET_AFTER - 1
    board.heard(seat)
    clock.now += FORGET_AFTER - 1
    assert not board.forget_lost()


def test_registering_again_keeps_seat_and_count():
    board = board_of(1)
    lease = pick(board)
    assert not board.admit(instance(0))
    assert board.admit(Instance("127.0.0.1", 1000, replica=7))
    [row] = board.status()
    assert (row.instance.name, row.in_flight) == ("7", 1)
    lease.release()


def test_excluded_seats_are_never_picked():
    board = board_of(3)
    tried = []
    while lease := board.pick(REQUEST_NUM, FACTS, tried):
        tried.append(lease.seat)
    assert len(set(tried)) == len(tried) == 3


class BoardMachine(RuleBasedStateMachine):
    """Whatever happens in whatever order, a seat's count is the number of its leases that are held."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.board = Board(self.clock)
        self.held: list[Lease] = []

    @rule(number=st.integers(0, 4), up=st.booleans())
    def register(self, number, up):
        self.board.admit(instance(number), up)

    @rule(name=st.sampled_from(["request_num", "round_robin"]))
    def request(self, name):
        lease = self.board.pick(policy_named(name), FACTS)
        assert (lease is None) == (not any(row.up for row in self.board.status()))
        if lease is not None:
            self.held.append(lease)

    @precondition(lambda self: self.held)
    @rule(data=st.data(), twice=st.booleans())
    def end(self, data, twice):
        lease = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
        lease.release()
        if twice:
            lease.release()

    @precondition(lambda self: self.board.seats())
    @rule(data=st.data(), kind=st.sampled_from(["failed", "unreachable", "healthy"]))
    def health(self, data, kind):
        seat = data.draw(st.sampled_from(self.board.seats()))
        if kind == "healthy":
            self.board.healthy(seat, self.clock.now)
        else:
            getattr(self.board, kind)(seat, "why")

    @rule(seconds=st.sampled_from([1.0, FORGET_AFTER + 1]))
    def time_passes(self, seconds):
        self.clock.now += seconds
        self.board.forget_lost()

    @invariant()
    def counts_are_exact(self):
        for seat in self.board.seats():
            assert seat.in_flight == sum(lease.seat is seat for lease in self.held)
        assert all(lease.seat.in_flight > 0 for lease in self.held)


BoardMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestBoardMachine = BoardMachine.TestCase
