"""Workers that share the experts generate the same texts as each would alone, whatever happens to others."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from fastdeploy.common.messages import ExpertParallelStats, Failed, LoadProgress, Ready, StepOutputs
from fastdeploy.custom_ops import instruction_set
from fastdeploy.expert_parallel.memory_file import group_directory
from fastdeploy.expert_parallel.snapshot import Snapshot, read_snapshot

from ..custom_ops.collectives import mapped
from ..waiting import wait_until
from .expert_ranks import EXPERT_CONFIG, ranks_of, requests_of, undisturbed
from .worker_api import DEADLINE_S, Ranks, Texts, request

SEATS = 8


@pytest.fixture(scope="module")
def expected(model_cache: None, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Texts]:
    """Texts of each seat's requests, without expert parallelism."""
    requests = {seat: requests_of(seat) for seat in range(SEATS)}
    return undisturbed(EXPERT_CONFIG, tmp_path_factory.mktemp("alone"), requests)


def requests_for(ranks: Ranks, *seats: int) -> dict[int, list]:
    return {seat: requests_of(seat) for seat in seats or ranks.apis}


def kill_after(ranks: Ranks, seat: int, tokens: int) -> Callable[[int], None]:
    """Return an `after` for `Ranks.generate` that kills the seat's worker once after that many tokens."""

    def after(so_far: int) -> None:
        if seat in ranks.apis and so_far >= tokens:
            ranks.lose(seat).process.kill()

    return after


def snapshot(ranks: Ranks) -> Snapshot:
    found = read_snapshot(ranks.group)
    assert found is not None
    return found


def members(ranks: Ranks) -> tuple[int, ...]:
    return snapshot(ranks).active


@pytest.mark.parametrize("count", [1, 3, 8])
def test_texts_are_those_of_a_worker_that_has_all_experts(
    count: int, expected: dict[int, Texts], tmp_path: Path
) -> None:
    with ranks_of(count, tmp_path) as ranks:
        ranks.start(*range(count))
        ranks.wait_ready()
        assert ranks.generate(requests_for(ranks)) == {seat: expected[seat] for seat in range(count)}
        # One rank is busy, the others are idle.
        last = count - 1
        assert ranks.generate(requests_for(ranks, last)) == {last: expected[last]}


def test_replicas_of_experts_and_their_moving_change_no_text(
    expected: dict[int, Texts], tmp_path: Path
) -> None:
    config = replace(EXPERT_CONFIG, redundant_experts=5, enable_eplb=True)
    with ranks_of(3, tmp_path, config) as ranks:
        ranks.start(0, 1, 2)
        ranks.wait_ready()
        assert ranks.generate(requests_for(ranks)) == {seat: expected[seat] for seat in range(3)}


def test_late_rank_joins_between_two_steps(expected: dict[int, Texts], tmp_path: Path) -> None:
    with ranks_of(3, tmp_path) as ranks:
        ranks.start(0)
        ranks.wait_ready()
        asked = requests_for(ranks, 0)

        def after(tokens: int) -> None:
            if tokens >= 20 and 1 not in ranks.apis:
                ranks.start(1, 2)

        rounds = 0
        while 1 not in ranks.apis or members(ranks) != (0, 1, 2):
            assert ranks.generate(asked, after) == {0: expected[0]}
            rounds += 1
            assert rounds < 200
        ranks.wait_ready(1, 2)
        assert ranks.generate(requests_for(ranks)) == {seat: expected[seat] for seat in range(3)}
        assert last_stats(ranks, 0).restarted_steps_total == 0


def test_survivors_of_a_kill_continue_and_the_seat_is_reusable(
    expected: dict[int, Texts], tmp_path: Path
) -> None:
    with ranks_of(4, tmp_path) as ranks:
        ranks.start(*range(4))
        ranks.wait_ready()
        asked = requests_for(ranks)
        for seat in (2, 0):
            survivors = set(range(4)) - {seat}
            assert ranks.generate(asked, kill_after(ranks, seat, 50)) == {s: expected[s] for s in survivors}
            assert members(ranks) == tuple(sorted(survivors))
            ranks.start(seat)
            ranks.wait_ready(seat)
            assert ranks.generate(asked) == {s: expected[s] for s in range(4)}


def test_the_last_survivor_has_all_experts(expected: dict[int, Texts], tmp_path: Path) -> None:
    with ranks_of(3, tmp_path) as ranks:
        ranks.start(*range(3))
        ranks.wait_ready()

        def after(tokens: int) -> None:
            for seat, limit in ((0, 30), (2, 60)):
                kill_after(ranks, seat, limit)(tokens)

        assert ranks.generate(requests_for(ranks), after) == {1: expected[1]}
        assert members(ranks) == (1,)


def test_rank_that_dies_while_all_are_idle_is_removed_at_once(tmp_path: Path) -> None:
    with ranks_of(3, tmp_path) as ranks:
        ranks.start(*range(3))
        ranks.wait_ready()
        ranks.lose(1).process.kill()
        wait_until(lambda: members(ranks) == (0, 2), "the others have noticed", deadline=5)


def test_rank_stopped_by_sigterm_repeats_no_step(expected: dict[int, Texts], tmp_path: Path) -> None:
    with ranks_of(3, tmp_path) as ranks:
        ranks.start(*range(3))
        ranks.wait_ready()
        leaving = ranks.apis[1]

        def after(tokens: int) -> None:
            if tokens > 30 and 1 in ranks.apis:
                ranks.lose(1).process.terminate()

        seats = (0, 2)
        asked = requests_for(ranks, *seats) | {1: []}
        texts = ranks.generate(asked, after)
        assert {seat: texts[seat] for seat in seats} == {seat: expected[seat] for seat in seats}
        assert leaving.process.wait(DEADLINE_S) == 0
        assert members(ranks) == seats
        assert (snapshot(ranks).leaves, snapshot(ranks).losses) == (1, 0)
        for seat in seats:
            assert last_stats(ranks, seat).restarted_steps_total == 0


def test_nothing_is_left_when_all_have_ended(tmp_path: Path) -> None:
    with ranks_of(2, tmp_path) as ranks:
        ranks.start(0, 1)
        ranks.wait_ready()
        for api in ranks.apis.values():
            api.process.terminate()
        for api in ranks.apis.values():
            assert api.process.wait(DEADLINE_S) == 0
        assert not group_directory(ranks.group).exists()


def test_leftovers_of_a_killed_group_are_removed_by_the_next_group(tmp_path: Path) -> None:
    with ranks_of(2, tmp_path / "killed") as killed, ranks_of(1, tmp_path / "next") as following:
        killed.start(0, 1)
        killed.wait_ready()
        assert group_directory(killed.group).exists()
        for api in killed.apis.values():
            api.process.kill()
            api.process.wait()
        # A group that another test starts may come first.
        following.start(0)
        following.wait_ready()
        assert not group_directory(killed.group).exists()
        assert members(following) == (0,)


def test_a_stopped_rank_is_killed_when_others_wait_for_it(expected: dict[int, Texts], tmp_path: Path) -> None:
    config = replace(EXPERT_CONFIG, expert_parallel_stall_kill=1.0)
    with ranks_of(3, tmp_path, config) as ranks:
        ranks.start(*range(3))
        ranks.wait_ready()

        def after(tokens: int) -> None:
            if tokens > 30 and 1 in ranks.apis:
                ranks.lose(1).process.send_signal(signal.SIGSTOP)

        texts = ranks.generate(requests_for(ranks), after)
        assert texts == {seat: expected[seat] for seat in (0, 2)}
        assert ranks.all[1].process.wait(DEADLINE_S) == -signal.SIGKILL
        assert "has made no progress" in ranks.logs()


@pytest.mark.parametrize("word", ["tokens", "targets"])
def test_survivors_of_corrupted_rank_memory_continue(
    word: str, expected: dict[int, Texts], tmp_path: Path
) -> None:
    with ranks_of(3, tmp_path) as ranks:
        ranks.start(*range(3))
        ranks.wait_ready()
        memory, lost, ended = mapped(ranks.group), ranks.apis[1], threading.Event()
        first, last = (
            memory.layout.rank_offset(1) + at
            for at in (memory.layout.dispatch_targets, memory.layout.return_slots)
        )
        nonsense = (1 << 30).to_bytes(4, "little") * ((last - first) // 4)

        def scribble() -> None:
            while not ended.is_set():
                if word == "tokens":
                    memory.rows[1].tokens = 100_000 << 8 | 4
                else:
                    # Tokens for an expert that does not exist, at seat 0.
                    memory.pages[first:last] = nonsense

        thread = threading.Thread(target=scribble)

        def after(tokens: int) -> None:
            if tokens > 30 and 1 in ranks.apis:
                ranks.lose(1)
                thread.start()

        try:
            texts = ranks.generate(requests_for(ranks), after)
            assert lost.process.wait(DEADLINE_S) == 1
        finally:
            ended.set()
            thread.join()
        assert texts == {seat: expected[seat] for seat in (0, 2)}
        assert members(ranks) == (0, 2)
        # Another rank may find the fault, or the rank itself.
        assert "is out of range in its part of the shared memory" in ranks.logs()


def test_rank_with_another_model_is_refused_and_others_continue(
    expected: dict[int, Texts], tmp_path: Path
) -> None:
    with ranks_of(2, tmp_path) as ranks:
        ranks.start(0)
        ranks.wait_ready()
        ranks.start(1, dtype="bfloat16")
        message = first_failure(ranks, 1)
        assert f"rank 1 (pid {ranks.apis[1].process.pid}) cannot join" in message
        assert f"rank 0 (pid {ranks.apis[0].process.pid})" in message
        assert "weight_format is 'bfloat16' here and 'float32' there" in message
        ranks.lose(1)
        assert ranks.generate(requests_for(ranks, 0)) == {0: expected[0]}


def test_rank_with_another_numeric_version_is_refused(tmp_path: Path) -> None:
    if instruction_set() == "generic":
        pytest.skip("this processor has no other instruction set")
    with ranks_of(2, tmp_path) as ranks:
        ranks.start(0)
        ranks.wait_ready()
        ranks.start(1, isa="generic")
        message = first_failure(ranks, 1)
        assert f"numeric_version is 'cpu-1-generic' here and 'cpu-1-{instruction_set()}' there" in message
        ranks.lose(1)


def test_idle_ranks_use_no_processor(tmp_path: Path) -> None:
    with ranks_of(4, tmp_path) as ranks:
        ranks.start(*range(4))
        ranks.wait_ready()
        ranks.generate({2: [request("one", [5, 6, 7], max_tokens=5)]})
        time.sleep(0.5)
        before = processor_seconds(ranks)
        time.sleep(2)
        assert processor_seconds(ranks) - before < 0.05


def processor_seconds(ranks: Ranks) -> float:
    ticks = 0
    for api in ranks.apis.values():
        fields = Path(f"/proc/{api.process.pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def last_stats(ranks: Ranks, seat: int) -> ExpertParallelStats:
    """Return the latest statistics that this rank has sent about its group."""
    found = None
    while found is None or ranks.apis[seat].socket.poll(200):
        message = ranks.apis[seat].receive()
        if isinstance(message, StepOutputs) and message.stats.expert_parallel is not None:
            found = message.stats.expert_parallel
    return found


def first_failure(ranks: Ranks, seat: int) -> str:
    while not isinstance(message := ranks.apis[seat].receive(), Failed):
        assert not isinstance(message, Ready)
        assert isinstance(message, LoadProgress) or message
    return message.message
