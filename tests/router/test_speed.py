"""The measured relative speed of replicas."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastdeploy.daemon.router.board.board import Board
from fastdeploy.daemon.router.policy.speed import StreamRate, weights

from .boards import Clock, in_flight, pick, seat_replicas


def stream(board: Board, clock: Clock, rates: list[float], seconds: int) -> None:
    """Run one stream at each replica with these tokens per second, measured once per second."""
    leases = [
        pick(board, exclude=[handle for handle in board.handles() if handle.row != row])
        for row in range(len(rates))
    ]
    sent = [0.0] * len(rates)
    for _ in range(seconds * 10):
        for index, (lease, rate) in enumerate(zip(leases, rates, strict=True)):
            sent[index] += rate / 10
            lease.count_tokens(int(sent[index]))
            sent[index] -= int(sent[index])
        clock.now += 0.1
        if round(clock.now * 10) % 10 == 0:
            board.measure(clock.now)
    for lease in leases:
        lease.release()


def test_replicas_of_nearly_the_same_speed_weigh_the_same(board: Board, clock: Clock) -> None:
    seat_replicas(board, 4)
    stream(board, clock, [100, 90, 110, 80], 20)
    assert [row.weight for row in board.status()] == [1.0] * 4


def test_slow_replica_has_less_weight_until_its_measurements_expire(board: Board, clock: Clock) -> None:
    seat_replicas(board, 4)
    stream(board, clock, [100, 100, 50, 3], 20)
    weights = [row.weight for row in board.status()]
    assert weights[:2] == [1.0, 1.0]
    assert weights[2] == pytest.approx(0.5, abs=0.05)
    assert weights[3] == 0.1
    for _ in range(12):
        pick(board)
    assert in_flight(board)[0] >= 2 * in_flight(board)[2]
    for _ in range(100):
        clock.now += 1
        board.measure(clock.now)
    assert [row.weight for row in board.status()] == [1.0] * 4


def test_unstreamed_answers_do_not_affect_the_measured_speed(board: Board, clock: Clock) -> None:
    seat_replicas(board, 2)
    board.measure(clock.now)
    for _ in range(50):
        lease = pick(board)
        clock.now += 1
        lease.count_tokens(1000 if lease.instance.name == "0" else 1)
        lease.release()
        board.measure(clock.now)
    assert [row.weight for row in board.status()] == [1.0, 1.0]


def test_the_drain_rate_is_that_of_the_last_seconds(board: Board, clock: Clock) -> None:
    seat_replicas(board, 2)
    board.measure(clock.now)
    assert board.drain_rate() == 0.0
    for _ in range(30):
        for _ in range(7):
            pick(board).release()
        clock.now += 1
        board.measure(clock.now)
    assert board.drain_rate() == pytest.approx(7, rel=0.02)
    for _ in range(30):
        clock.now += 1
        board.measure(clock.now)
    assert board.drain_rate() < 0.1


paces = st.lists(st.builds(StreamRate, st.floats(0, 1e6), st.floats(0, 1e4)), min_size=1, max_size=16)


@given(paces)
def test_weights_are_within_a_tenth_and_one_and_one_is_normal(paces: list[StreamRate]) -> None:
    found = weights(paces, [1.0] * len(paces))
    assert all(0.1 <= weight <= 1.0 for weight in found)
    assert 1.0 in found


@given(paces, st.floats(0.01, 100))
def test_only_the_ratio_of_speeds_counts(paces: list[StreamRate], factor: float) -> None:
    before = [1.0] * len(paces)
    faster = [StreamRate(pace.tokens * factor, pace.seconds) for pace in paces]
    for one, other in zip(weights(paces, before), weights(faster, before), strict=True):
        assert one == pytest.approx(other, abs=0.02) or {one, other} <= {1.0, 0.75}


def test_a_slow_replica_is_normal_again_only_when_it_is_clearly_faster() -> None:
    def weight(speed: float, before: float) -> float:
        return weights(
            [StreamRate(100, 10), StreamRate(10 * speed, 10), StreamRate(100, 10)], [1.0, before, 1.0]
        )[1]

    assert weight(8, 1.0) == 1.0
    assert weight(7, 1.0) == 0.7
    assert weight(8, 0.7) == 0.8
    assert weight(9, 0.8) == 1.0


def test_faster_of_two_replicas_is_normal() -> None:
    assert weights([StreamRate(100, 10), StreamRate(50, 10)], [1.0, 1.0]) == [1.0, 0.5]


def test_too_little_is_known_of_a_replica_that_streamed_for_a_moment() -> None:
    assert weights([StreamRate(100, 10), StreamRate(1, 2)], [1.0, 1.0]) == [1.0, 1.0]
