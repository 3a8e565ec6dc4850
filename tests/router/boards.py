"""Boards with replicas, and a clock that moves only by hand."""

from __future__ import annotations

from collections.abc import Collection

from fastdeploy.daemon.router.board.board import Board, Lease, ReplicaState
from fastdeploy.daemon.router.instance import Instance, ReplicaHandle
from fastdeploy.daemon.router.policy.policies import policy_named
from fastdeploy.daemon.router.policy.policy import Policy, RequestFacts

FACTS = RequestFacts(0)
REQUEST_NUM = policy_named("request_num")


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def instance(number: int, start: str = "", limit: int | None = None) -> Instance:
    return Instance("127.0.0.1", 1000 + number, replica=number, instance=start, max_concurrency=limit)


def seat_replicas(board: Board, count: int, start: str = "", limit: int | None = None) -> None:
    for number in range(count):
        board.admit(instance(number, start, limit))


def pick(
    board: Board,
    policy: Policy = REQUEST_NUM,
    facts: RequestFacts = FACTS,
    exclude: Collection[ReplicaHandle] = (),
) -> Lease:
    lease = board.pick(policy, facts, exclude)
    assert isinstance(lease, Lease)
    return lease


def in_flight(board: Board) -> list[int]:
    return [row.in_flight for row in board.status()]


def states(board: Board) -> list[ReplicaState]:
    return [row.state for row in board.status()]
