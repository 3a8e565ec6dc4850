"""State transitions of a replica, by the table in rows.py, and in random order."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from fastdeploy.daemon.router.board.board import FORGET_AFTER, Board, Lease, PickFailure, ReplicaState
from fastdeploy.daemon.router.policy.policies import policy_named
from fastdeploy.daemon.router.policy.policy import RequestFacts

from .boards import FACTS, REQUEST_NUM, Clock, in_flight, instance, pick, seat_replicas, states


def test_d6_two_failures_in_a_row_take_a_replica_down(board: Board, clock: Clock) -> None:
    """Upstream removed an instance at its first failed probe."""
    seat_replicas(board, 1)
    [handle] = board.handles()
    board.failed(handle, "timeout")
    assert states(board) == [ReplicaState.UP]
    clock.now += 1
    board.healthy(handle, clock.now)
    board.failed(handle, "timeout")
    assert states(board) == [ReplicaState.UP]
    board.succeeded(handle)
    board.failed(handle, "timeout")
    assert states(board) == [ReplicaState.UP]
    board.failed(handle, "timeout")
    assert states(board) == [ReplicaState.DOWN]
    assert board.pick(REQUEST_NUM, FACTS) is PickFailure.DOWN


def test_replica_from_the_registry_file_is_up_after_first_health_check(board: Board, clock: Clock) -> None:
    board.admit(instance(0), up=False)
    [handle] = board.handles()
    assert states(board) == [ReplicaState.DOWN]
    board.healthy(handle, clock.now)
    assert states(board) == [ReplicaState.UP]


def test_replica_that_was_down_gets_one_trial_request_at_a_time(board: Board, clock: Clock) -> None:
    seat_replicas(board, 1)
    [handle] = board.handles()
    board.unreachable(handle, "refused")
    board.healthy(handle, clock.now - 1)  # started before the failure, so it proves nothing
    assert states(board) == [ReplicaState.DOWN]
    clock.now += 1
    board.healthy(handle, clock.now)
    assert states(board) == [ReplicaState.PROBING]
    assert [row.up for row in board.status()] == [True]
    probe = pick(board)
    assert probe.probing
    assert board.pick(REQUEST_NUM, FACTS) is PickFailure.BUSY
    probe.release()  # the client left, so the outcome is unknown
    probe = pick(board)
    board.succeeded(handle)
    assert states(board) == [ReplicaState.UP]
    assert not pick(board).probing
    probe.release()
    assert in_flight(board) == [1]


def test_replica_is_probed_despite_requests_from_before_it_went_down(board: Board, clock: Clock) -> None:
    seat_replicas(board, 1)
    old = pick(board)
    board.unreachable(old.handle, "refused")
    clock.now += 1
    board.healthy(old.handle, clock.now)
    assert pick(board).probing


def test_delay_before_a_trial_request_doubles_up_to_30_s(board: Board, clock: Clock) -> None:
    seat_replicas(board, 1)
    [handle] = board.handles()
    board.unreachable(handle, "refused")
    waits = []
    for _ in range(7):
        since = clock.now
        while states(board) == [ReplicaState.DOWN]:
            clock.now += 0.5
            board.healthy(handle, clock.now)
        waits.append(clock.now - since)
        board.failed(handle, "probe failed")
        assert states(board) == [ReplicaState.DOWN]
    assert waits == [1, 2, 4, 8, 16, 30, 30]


def test_flaky_replica_is_tried_ever_less_often(board: Board, clock: Clock) -> None:
    seat_replicas(board, 1)
    [handle] = board.handles()
    waits = []
    for _ in range(3):
        board.unreachable(handle, "reset")
        since = clock.now
        while states(board) == [ReplicaState.DOWN]:
            clock.now += 0.5
            board.healthy(handle, clock.now)
        waits.append(clock.now - since)
        board.succeeded(handle)
        assert states(board) == [ReplicaState.UP]
        clock.now += 10
    assert waits == [1, 2, 4]
    clock.now += 30  # without a failure
    board.unreachable(handle, "reset")
    clock.now += 1
    board.healthy(handle, clock.now)
    assert states(board) == [ReplicaState.PROBING]


def test_healthy_replica_without_requests_is_up_after_a_while(board: Board, clock: Clock) -> None:
    seat_replicas(board, 1)
    [handle] = board.handles()
    board.unreachable(handle, "refused")
    for expected in (ReplicaState.PROBING, ReplicaState.PROBING, ReplicaState.PROBING, ReplicaState.UP):
        clock.now += 2
        board.healthy(handle, clock.now)
        assert states(board) == [expected]


def test_a_healthy_replica_without_heartbeats_is_kept(board: Board, clock: Clock) -> None:
    seat_replicas(board, 1)
    clock.now += FORGET_AFTER + 1
    assert not board.forget_lost()
    assert states(board) == [ReplicaState.UP]


def test_a_heartbeat_keeps_a_replica_that_is_down_on_the_board(board: Board, clock: Clock) -> None:
    seat_replicas(board, 1)
    [handle] = board.handles()
    board.unreachable(handle, "refused")
    clock.now += FORGET_AFTER - 1
    board.record_heartbeat(handle)
    clock.now += FORGET_AFTER - 1
    assert not board.forget_lost()


class BoardMachine(RuleBasedStateMachine):
    """In any order of events, a seat's count equals the number of its leases that are held."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.board = Board.create(self.clock)
        self.board.open_counters()
        self.held: list[Lease] = []

    def teardown(self) -> None:
        self.board.close()

    @rule(number=st.integers(0, 4), up=st.booleans(), start=st.sampled_from(["", "a", "b", "c"]))
    def register(self, number: int, up: bool, start: str) -> None:
        self.board.admit(instance(number, start), up)

    @rule(number=st.integers(0, 4), start=st.sampled_from(["", "a", "b"]))
    def farewell(self, number: int, start: str) -> None:
        self.board.deregister(instance(number).url, start)

    @rule(name=st.sampled_from(["request_num", "round_robin", "process_tokens"]), tokens=st.integers(0, 9))
    def request(self, name: str, tokens: int) -> None:
        lease = self.board.pick(policy_named(name), RequestFacts(0, tokens))
        rows = [row for row in self.board.status() if row.up and not row.draining and not row.leaving]
        assert (lease is PickFailure.DOWN) == (not rows)
        assert lease is not PickFailure.BUSY or all(row.state == ReplicaState.PROBING for row in rows)
        if isinstance(lease, Lease):
            self.held.append(lease)

    @precondition(lambda self: self.held)
    @rule(data=st.data(), twice=st.booleans())
    def end(self, data: st.DataObject, twice: bool) -> None:
        lease = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
        lease.release()
        if twice:
            lease.release()

    @precondition(lambda self: self.board.handles())
    @rule(data=st.data(), kind=st.sampled_from(["failed", "unreachable", "healthy", "succeeded"]))
    def health(self, data: st.DataObject, kind: str) -> None:
        handle = data.draw(st.sampled_from(self.board.handles()))
        if kind == "healthy":
            self.board.healthy(handle, self.clock.now)
        elif kind == "succeeded":
            self.board.succeeded(handle)
        else:
            getattr(self.board, kind)(handle, "why")

    @precondition(lambda self: self.board.handles())
    @rule(data=st.data(), order=st.sampled_from(["drain", "undrain", "remove"]))
    def order(self, data: st.DataObject, order: str) -> None:
        assert getattr(self.board, order)(data.draw(st.sampled_from(self.board.handles())))

    @rule(seconds=st.sampled_from([1.0, 10.0, FORGET_AFTER + 1]))
    def time_passes(self, seconds: float) -> None:
        self.clock.now += seconds
        self.board.measure(self.clock.now)
        self.board.forget_lost()

    @invariant()
    def counts_are_exact(self) -> None:
        for row in self.board.status():
            held = [lease for lease in self.held if lease.handle == row.handle]
            assert row.in_flight == len(held)
            assert row.tokens == sum(lease.tokens for lease in held)

    @invariant()
    def each_url_is_there_once(self) -> None:
        urls = [row.instance.url for row in self.board.status()]
        assert len(urls) == len(set(urls))


BoardMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestBoardMachine = BoardMachine.TestCase
