"""A rank's reaction to impossible values in its part of the group's memory."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from fastdeploy.custom_ops.expert_group import CHANGED, FAULTY, GOING, NativeGroup
from fastdeploy.expert_parallel import memory_file
from fastdeploy.expert_parallel.layout import GroupLayout
from fastdeploy.expert_parallel.member import group_shape
from fastdeploy.expert_parallel.memory import Memory
from fastdeploy.expert_parallel.snapshot import read_snapshot
from tests.waiting import wait_until

from .collectives import EXPERTS as GROUP_EXPERTS
from .collectives import mapped
from .ranks import RankFailed, RankProcess, Ranks, group_of_its_own, repeating
from .test_expert_group import PATIENCE, assert_as_reference, finish, load, start, wait_for_steps

SEATS, EXPERTS, MAX_TOKENS, K, HIDDEN, TOKENS = 2, 4, 4, 2, 8, 3
ELEMENT = 4
EPOCH = 1


class Pair:
    """A real rank 0, and a rank 1 whose part of the memory the test writes, initially without faults."""

    def __init__(self, memory: Memory) -> None:
        layout = memory.layout
        self.memory, self.row = memory, memory.rows[1]
        memory.words.epoch = EPOCH
        stamp = EPOCH << 40 | 1
        self.row.arrived, self.row.begun, self.row.dispatched, self.row.combined = EPOCH, stamp, stamp, stamp
        self.row.step_tokens[1] = TOKENS
        self.row.tokens = TOKENS << 8 | ELEMENT
        self.targets = self._numbers(1, layout.dispatch_targets, MAX_TOKENS * K)
        self.places = self._numbers(1, layout.return_slots, SEATS * MAX_TOKENS * K)
        # Targets are the four experts in turn, which alternate between the two seats.
        self.targets[:] = [expert % EXPERTS << 6 | expert % SEATS for expert in range(MAX_TOKENS * K)]
        self.places[:] = np.arange(SEATS * MAX_TOKENS * K) % (MAX_TOKENS * K)
        self.own_targets = self._numbers(0, layout.dispatch_targets, MAX_TOKENS * K)
        self._pidfd = os.pidfd_open(os.getpid())
        self.native = NativeGroup(
            group_shape(layout, 0), memory.address, memory.file, lambda *_: None, 1000, 1000
        )
        homes = [1 << expert % SEATS for expert in range(EXPERTS)]
        self.native.set_members(EPOCH, 0b11, homes, [-1, self._pidfd], 0.0)

    def begin(self) -> int:
        self.native.announce(TOKENS)
        return self.native.begin()

    def dispatch(self) -> int:
        self._x = np.ones((TOKENS, HIDDEN), np.float32)
        self._picks = np.array([[0, 1], [2, 3], [1, 2]], np.int32)
        self._rows = np.zeros((SEATS * MAX_TOKENS * K, HIDDEN), np.float32)
        pointers = self._x.ctypes.data, self._picks.ctypes.data
        return self.native.dispatch(0, *pointers, TOKENS, ELEMENT, self._rows.ctypes.data)

    def combine(self, count: int) -> int:
        weights = np.ones((TOKENS, K), np.float32)
        out = np.zeros((TOKENS, HIDDEN), np.float32)
        return self.native.combine(
            self._rows.ctypes.data, count, weights.ctypes.data, TOKENS, ELEMENT, out.ctypes.data
        )

    def close(self) -> None:
        self.native.close()
        os.close(self._pidfd)

    def _numbers(self, seat: int, offset: int, count: int) -> np.ndarray:
        return np.frombuffer(
            self.memory.pages, np.int32, count, self.memory.layout.rank_offset(seat) + offset
        )


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Pair]:
    layout = GroupLayout(SEATS, 1, EXPERTS, MAX_TOKENS, K, HIDDEN)
    with memory_file.open_locked("pair", layout, {}, 60.0, tmp_path) as memory:
        for seat in range(SEATS):
            memory.allocate(seat)
        made = Pair(memory)
    yield made
    made.close()


def test_a_part_without_fault_is_read_to_the_end(pair: Pair) -> None:
    assert pair.begin() == GOING
    # Three picks of rank 0 and three of rank 1 are for rank 0's experts.
    assert (count := pair.dispatch()) == 6
    assert pair.combine(count) == 6
    assert pair.native.status == GOING


@pytest.mark.parametrize("tokens", [(1 << 48) - 1, 1 << 63, 1 << 31, (1 << 20) + 1])
def test_a_step_of_impossibly_many_tokens_is_a_fault(pair: Pair, tokens: int) -> None:
    pair.row.step_tokens[1] = tokens
    assert pair.begin() == FAULTY
    assert pair.native.fault == (1, "the token count of its step")
    assert not pair.native.busy


@pytest.mark.parametrize("word", ["begun", "dispatched", "combined"])
def test_impossible_step_number_is_a_fault(pair: Pair, word: str) -> None:
    setattr(pair.row, word, EPOCH << 40 | 3)
    if pair.begin() == GOING and (count := pair.dispatch()) >= 0:
        pair.combine(count)
    assert pair.native.status == FAULTY
    assert pair.native.fault == (1, "its step number")


@pytest.mark.parametrize("target", [EXPERTS << 6, 300_000 << 6, 1_000_000 << 6, 0x7FFFFFC0])
@pytest.mark.parametrize("index", [0, TOKENS * K - 1])
def test_a_token_for_an_expert_that_does_not_exist_is_a_fault(pair: Pair, index: int, target: int) -> None:
    pair.begin()
    pair.targets[index] = target
    assert pair.dispatch() == -1
    assert pair.native.status == FAULTY
    assert pair.native.fault == (1, "the target expert of a token")


@pytest.mark.parametrize("tokens", [MAX_TOKENS + 1, 9, 100_000, (1 << 56) - 1])
def test_more_tokens_than_a_collective_has_are_a_fault(pair: Pair, tokens: int) -> None:
    pair.begin()
    pair.row.tokens = tokens << 8 | ELEMENT
    assert pair.dispatch() == -1
    assert pair.native.fault == (1, "its token count")


@pytest.mark.parametrize("element", [0, 2, 255])
def test_elements_of_another_size_are_a_fault(pair: Pair, element: int) -> None:
    pair.begin()
    pair.row.tokens = TOKENS << 8 | element
    assert pair.dispatch() == -1
    assert pair.native.fault == (1, "the element size of its tokens")


@pytest.mark.parametrize("place", [SEATS * MAX_TOKENS * K, 1_000_000, -1, -5_000_000, -(1 << 31)])
def test_result_at_an_invalid_place_is_a_fault(pair: Pair, place: int) -> None:
    pair.begin()
    count = pair.dispatch()
    pair.places[1] = place
    assert pair.combine(count) == -1
    assert pair.native.status == FAULTY
    assert pair.native.fault == (1, "the return slot of a result")


def test_a_rank_finds_the_fault_in_its_own_part(pair: Pair) -> None:
    pair.begin()
    count = pair.dispatch()
    pair.own_targets[0] = 1 << 6 | 63
    assert pair.combine(count) == -1
    assert pair.native.fault == (0, "the target rank of a token")


@pytest.mark.parametrize("word", ["arrived", "begun", "dispatched", "combined"])
def test_a_rank_with_a_damaged_stamp_accuses_no_healthy_rank(pair: Pair, word: str) -> None:
    assert pair.begin() == GOING
    # The damage has let rank 1 run ahead, and this rank publishes before it compares.
    setattr(pair.memory.rows[0], word, EPOCH << 40 | 2)
    pair.row.begun = pair.row.dispatched = EPOCH << 40 | 3
    assert pair.dispatch() == -1
    assert pair.native.status == FAULTY
    assert pair.native.fault == (0, "its step number")


@pytest.mark.parametrize("number", [0, 2])
def test_a_stamp_damaged_during_a_wait_is_this_ranks_fault(pair: Pair, number: int) -> None:
    pair.row.begun = 0

    def damage() -> None:
        wait_until(lambda: pair.memory.rows[0].waiting_for, deadline=PATIENCE)
        pair.memory.rows[0].begun = EPOCH << 40 | number
        pair.row.begun = EPOCH << 40 | 3

    with ThreadPoolExecutor(1) as pool:
        damaged = pool.submit(damage)
        assert pair.begin() == FAULTY
        damaged.result()
    assert pair.native.fault == (0, "its step number")


def test_damage_of_a_rank_that_was_removed_is_a_change(pair: Pair) -> None:
    assert pair.begin() == GOING
    pair.memory.rows[0].dispatched = EPOCH << 40 | 7
    pair.memory.words.epoch = EPOCH + 1
    assert pair.dispatch() == -1
    assert pair.native.status == CHANGED


def test_a_fault_is_forgotten_with_the_next_members(pair: Pair) -> None:
    pair.row.step_tokens[1] = 1 << 48
    assert pair.begin() == FAULTY
    pair.native.set_members(EPOCH, 0b01, [1] * EXPERTS, [-1, -1], 0.0)
    assert pair.begin() == GOING
    assert pair.dispatch() == TOKENS * K


# ---- rank processes


Corrupt = Callable[[Memory, int], None]


def _far(word: str) -> Corrupt:
    def corrupt(memory: Memory, seat: int) -> None:
        setattr(memory.rows[seat], word, memory.words.epoch << 40 | 1 << 39)

    return corrupt


def _many_tokens(memory: Memory, seat: int) -> None:
    memory.rows[seat].tokens = 100_000 << 8 | 4


def _many_step_tokens(memory: Memory, seat: int) -> None:
    memory.rows[seat].step_tokens[0] = memory.rows[seat].step_tokens[1] = (1 << 48) - 1


def _fill(begin: str, end: str, number: int) -> Corrupt:
    def corrupt(memory: Memory, seat: int) -> None:
        layout = memory.layout
        first, last = (layout.rank_offset(seat) + getattr(layout, offset) for offset in (begin, end))
        memory.pages[first:last] = number.to_bytes(4, "little", signed=True) * ((last - first) // 4)

    return corrupt


CORRUPTED: dict[str, Corrupt] = {
    "begun": _far("begun"),
    "dispatched": _far("dispatched"),
    "combined": _far("combined"),
    "tokens": _many_tokens,
    "step_tokens": _many_step_tokens,
    # The other two ranks cannot find their inputs, and the rank cannot find its own results.
    "targets": _fill("dispatch_targets", "return_slots", GROUP_EXPERTS << 6),
    "places": _fill("return_slots", "tokens", -5_000_000),
}


def assert_steps_as_reference(files: Sequence[Path], faulty: Collection[int]) -> None:
    seen = load(files)
    told = defaultdict(set)
    for one in seen:
        told[one.stamp].add(one.seat)
    # Some ranks may have finished a step that others restarted.
    whole = [one for one in seen if told[one.stamp] == set(one.members)]
    assert assert_as_reference(1, 3, whole, faulty) > 30


@contextmanager
def three_ranks(
    ranks: Ranks, tmp_path: Path, faulty: Collection[int] = ()
) -> Iterator[tuple[list[RankProcess], Memory]]:
    """Run steps on three ranks until the block ends, then compare all their records with the reference.

    Results of `faulty` seats are skipped.
    """
    started = ranks.take(3)
    with group_of_its_own() as name:
        files = [
            start(rank, seat, 3, name, tmp_path / str(seat), 1, lives=[None], together=3)
            for seat, rank in enumerate(started)
        ]
        wait_until(lambda: read_snapshot(name) is not None, deadline=PATIENCE)
        memory = mapped(name)
        wait_until(lambda: memory.rows[0].steps > 20, deadline=PATIENCE)
        yield started, memory
    assert_steps_as_reference(files, faulty)


@pytest.mark.parametrize("corrupted", CORRUPTED)
def test_rank_with_corrupted_memory_is_removed_and_affects_no_sum(
    ranks: Ranks, tmp_path: Path, corrupted: str
) -> None:
    with three_ranks(ranks, tmp_path, faulty=[1]) as (started, memory):
        # Continuously, because the rank overwrites the same words.
        with repeating(lambda: CORRUPTED[corrupted](memory, 1)):
            with pytest.raises(RankFailed, match=r"RankLost.*(continued without rank 1|this rank wrote)"):
                started[1].finish(PATIENCE)
            wait_for_steps(memory, 20)
        finish([started[0], started[2]])


@pytest.mark.parametrize("epoch", [0, 1, 1 << 22, (1 << 64) - 1])
def test_epoch_without_a_record_is_repaired(ranks: Ranks, tmp_path: Path, epoch: int) -> None:
    with three_ranks(ranks, tmp_path) as (started, memory):
        before = memory.words.epoch
        memory.words.epoch = epoch
        wait_until(lambda: before < memory.words.epoch < before + 9, deadline=PATIENCE)
        wait_for_steps(memory, 20)
        finish(started)


@pytest.mark.parametrize("begin", [0, 16], ids=["all", "places of experts"])
def test_damaged_record_is_rewritten_by_a_member_that_knows_it(
    ranks: Ranks, tmp_path: Path, begin: int
) -> None:
    with three_ranks(ranks, tmp_path) as (started, memory):
        for start in (memory.layout.records, memory.layout.records + memory.layout.record_bytes):
            end = start + memory.layout.record_bytes
            memory.pages[start + begin : end] = b"\xff" * (end - start - begin)
        started[1].end()
        wait_until(lambda: memory.header.losses == 1, deadline=PATIENCE)
        wait_for_steps(memory, 20)
        finish([started[0], started[2]])
