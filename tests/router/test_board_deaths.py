"""A board stays usable when workers die at any instruction and at any time."""

import os
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from types import FrameType
from typing import Any

import pytest

from fastdeploy.daemon.router.board.board import Board, Ending, Lease, ReplicaState
from fastdeploy.daemon.router.board.memory import WORKERS, Flag
from fastdeploy.daemon.router.instance import Instance
from fastdeploy.daemon.router.policy.policies import policy_named
from fastdeploy.daemon.router.policy.policy import RequestFacts

from .forked import Forked

REQUEST_NUM = policy_named("request_num")
FACTS = RequestFacts(0, prompt_tokens=10)
pytestmark = pytest.mark.timeout(300)


@pytest.fixture
def board() -> Iterator[Board]:
    board = Board.create()
    yield board
    board.close()


def instance(number: int, start: str = "a") -> Instance:
    return Instance("127.0.0.1", 1000 + number, replica=number, instance=start)


def prepared() -> Board:
    """Replicas 0, 3 and 4 have a request of the parent; 2 is on probation, 3 is leaving, 4 was restarted."""
    board = Board.create()
    board.open_counters()
    for number in range(5):
        board.admit(instance(number))
    handles = board.handles()
    board.pick(REQUEST_NUM, FACTS, handles[1:])
    board.unreachable(handles[2], "refused")
    board._memory.probe_at[handles[2].row] = 0.0
    board.healthy(handles[2], time.monotonic())
    board.pick(REQUEST_NUM, FACTS, [*handles[:3], handles[4]])
    board.deregister(instance(3).url, "a")
    board.pick(REQUEST_NUM, FACTS, handles[:4])
    board.admit(instance(4, "b"))
    return board


PREFIX_FACTS = RequestFacts(0, 10, prefix=(5, 6, 7))
OPERATIONS = {
    "a new replica": lambda board: board.admit(instance(5)),
    "a new instance": lambda board: board.admit(instance(1, "b")),
    "another text": lambda board: board.admit(Instance("127.0.0.1", 1001, replica=9, instance="a")),
    "farewell": lambda board: board.deregister(instance(1).url, "a"),
    "drain": lambda board: board.drain(board.handles()[1]),
    "remove": lambda board: board.remove(board.handles()[1]),
    "pick and release": lambda board: board.pick(REQUEST_NUM, FACTS).release(),
    "reserve": lambda board: board.reserve(),
    "reserve and pick": lambda board: board.pick_reserved(board.reserve(), FACTS),
    "reserve and give back": lambda board: board.unreserve(board.reserve()),
    "word of an end": lambda board: board.record_ending(instance(1).url, "a", Ending.ITS_OWN),
    "pick by prefix": lambda board: board.pick(policy_named("cache_aware"), PREFIX_FACTS),
    "failures": lambda board: [board.failed(board.handles()[1], "why") for _ in range(2)],
    "recovery": lambda board: board.succeeded(board.handles()[2]),
    "load": lambda board: board.set_load(board.handles()[1], 3, 4),
    "remote counts": lambda board: board.set_remote({board.handles()[1]: (3, 4)}),
    "measuring": lambda board: [board.measure(time.monotonic() + second) for second in range(2)],
    "forgetting": lambda board: board.forget_lost(),
}


def run_until(step: int, board: Board, operation: str) -> int:
    """Kill this process before bytecode instruction `step` of the router, or return the instruction count."""
    count = 0

    def trace(frame: FrameType, event: str, _: object) -> Callable[..., Any] | None:
        nonlocal count
        if "/daemon/router/" not in frame.f_code.co_filename:
            return None
        frame.f_trace_opcodes = True
        if event == "opcode":
            if count == step:
                os.kill(os.getpid(), signal.SIGKILL)
            count += 1
        return trace

    sys.settrace(trace)
    OPERATIONS[operation](board)
    sys.settrace(None)
    return count


def instructions(operation: str) -> int:
    board = prepared()

    def work(child: Forked) -> None:
        board.open_counters()
        child.send(run_until(-1, board, operation))

    child = Forked(work)
    count = child.receive()
    child.wait()
    board.close()
    return count


@pytest.mark.parametrize("operation", OPERATIONS)
def test_death_at_any_instruction_leaves_a_working_board(operation: str) -> None:
    total = instructions(operation)
    assert total > 50
    # Each death takes a process; over many runs every instruction is tried.
    for step in sorted(random.sample(range(total), min(total, 8))):
        board = prepared()

        def work(child: Forked, board: Board = board, step: int = step) -> None:
            board.open_counters()
            run_until(step, board, operation)

        child = Forked(work)
        assert child.wait() == -signal.SIGKILL, f"{operation}: step {step}"
        board.drop_dead_workers()
        check(board, f"{operation}: died at instruction {step} of {total}")
        board.close()


def check(board: Board, why: str) -> None:
    """Assert that the parent's requests are kept, the dead worker's are gone, and every operation works."""
    rows = board.status()
    urls = [row.instance.url for row in rows]
    assert len(set(urls)) == len(urls), why
    held = {row.instance.url: row.in_flight for row in rows}
    assert held[instance(0).url] == 1, why
    assert held[instance(3).url] == 1, why
    assert sum(held.values()) == 2, why
    assert sum(sum(cells.in_flight) for cells in board._memory.counters[:WORKERS]) == 3, why
    for number in (1, 2, 4, 5):
        board.admit(instance(number, "z"))
        handle = board.handle_of(instance(number).url)
        assert handle is not None
        board.undrain(handle)
        lease = board.pick(REQUEST_NUM, FACTS, [other for other in board.handles() if other != handle])
        assert isinstance(lease, Lease), why
        assert lease.handle == handle, why
        board.unreachable(handle, "refused")
        lease.release()
        assert board.remove(handle), why
    board.measure(time.monotonic())
    assert {row.instance.url for row in board.status()} == {instance(0).url, instance(3).url}, why
    states = board._memory.state.tolist()
    assert sum(state != ReplicaState.FREE for state in states) == 3, why


def act_at_random(_: Forked, board: Board, seed: int) -> None:
    chance = random.Random(seed)
    board.open_counters()
    leases: list[Lease] = []
    policies = [policy_named(name) for name in ("request_num", "cache_aware", "process_tokens")]
    while True:
        number = chance.randrange(6)
        handle = board.handle_of(instance(number).url)
        match chance.choice(["pick"] * 12 + ["release"] * 11 + ["admit", "row", "order", "lead"]):
            case "pick" if len(leases) < 50:
                prefix = (chance.getrandbits(63), 5)
                lease = board.pick(chance.choice(policies), RequestFacts(0, chance.randrange(99), prefix))
                if isinstance(lease, Lease):
                    leases.append(lease)
            case "release" if leases:
                leases.pop(chance.randrange(len(leases))).release()
            case "admit":
                board.admit(instance(number, chance.choice("abcdefgh") * chance.randrange(1, 9)))
            case "row" if handle is not None:
                getattr(board, chance.choice(["failed", "unreachable"]))(handle, "why")
                board.healthy(handle, time.monotonic())
                board.succeeded(handle)
            case "order" if handle is not None:
                match chance.choice(["leave", "drain", "undrain", "remove"]):
                    case "leave":
                        board.deregister(handle.instance.url, handle.instance.instance)
                    case order:
                        getattr(board, order)(handle)
            case "lead":
                if board.try_lead():
                    board.measure(time.monotonic())
                    board.forget_lost()


def test_fuzz_workers_killed_at_any_time_leave_all_counts_zero(
    board: Board, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("ERROR")
    chance = random.Random(5)
    workers = [Forked(partial(act_at_random, board=board, seed=seed)) for seed in range(3)]
    for seed in range(3, 70):
        time.sleep(chance.uniform(0.0, 0.02))
        victim = workers.pop(chance.randrange(len(workers)))
        assert os.waitpid(victim.pid, os.WNOHANG) == (0, 0), "a worker has failed"
        victim.kill()
        if chance.random() < 0.8:
            board.drop_dead_workers()
        assert all(row.in_flight >= 0 for row in board.status())
        workers.append(Forked(partial(act_at_random, board=board, seed=seed)))
    for worker in workers:
        worker.kill()
    board.measure(time.monotonic())
    memory = board._memory
    for counters in memory.counters:
        assert counters.pid[0] == 0
        for cells in (counters.in_flight, counters.tokens, counters.probes):
            assert not any(cells)
    states, flags = memory.state.tolist(), memory.flags.tolist()
    assert ReplicaState.GONE not in states
    # A draining replica stays on the board for the operator to see.
    assert not any(state and flag == Flag.LEAVING for state, flag in zip(states, flags, strict=True))
    board.open_counters()
    board.admit(instance(0, "last"))
    handle = board.handle_of(instance(0).url)
    assert handle is not None
    board.undrain(handle)
    assert isinstance(board.pick(REQUEST_NUM, FACTS), Lease)
