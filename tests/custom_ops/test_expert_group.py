"""Collectives of groups of real processes, compared with a numpy reference of all ranks at once."""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import time
from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastdeploy import custom_ops
from fastdeploy.custom_ops import reference
from fastdeploy.expert_parallel.membership import Membership, planner
from fastdeploy.expert_parallel.memory import Memory
from fastdeploy.expert_parallel.memory_file import group_directory
from tests.waiting import wait_until

from .collectives import EXPERTS, MAX_TOKENS, K, Plan, Seen, Share, computed, mapped
from .ep_rank import PLACES
from .ranks import RankFailed, RankProcess, Ranks, group_of_its_own, repeating

#: Seconds; longer than any working operation takes on a busy machine.
PATIENCE = 60.0
#: Seconds; a rank that was called has to wake up well before.
CALL_PATIENCE = 20.0


@pytest.fixture
def name(ranks: Ranks) -> Iterator[str]:
    with group_of_its_own() as name:
        yield name


@pytest.fixture
def seed() -> int:
    # Same split as in conftest.py: developers look for new counterexamples, CI repeats one seed.
    return 1 if os.environ.get("CI") else int(np.random.SeedSequence().generate_state(1)[0])


# ---- the reference


def test_the_fma_of_the_reference_rounds_once() -> None:
    random = np.random.default_rng(1)
    tiny = random.integers(-9, 10, 5000) * 2.0**-23
    # The products are near half the last bit of `c`, where float64 rounds the sum to exactly half.
    a, b, c = (
        values.astype(np.float32)
        for values in (1 + tiny, (1 - tiny) * 2.0**-24, 1 + random.integers(0, 99, 5000) * 2.0**-23)
    )
    found = reference.fma(a, b, c)
    rounded_twice = (a.astype(np.float64) * b + c).astype(np.float32)
    assert (found != rounded_twice).any()
    for x, y, z, it in zip(a.tolist(), b.tolist(), c.tolist(), found, strict=True):
        exact = Fraction(x) * Fraction(y) + Fraction(z)
        below, above = (float(np.nextafter(it, np.float32(end))) for end in (-np.inf, np.inf))
        off = abs(Fraction(float(it)) - exact)
        assert off <= min(abs(Fraction(below) - exact), abs(Fraction(above) - exact))


# ---- steps


def start(
    rank: RankProcess, seat: int, num_seats: int, name: str, file: Path, seed: int, **options: Any
) -> Path:
    """Start the steps of a rank at a seat of the group. Returns the file of its records."""
    rank.start("steps", name=name, seat=seat, num_seats=num_seats, seed=seed, file=str(file), **options)
    return file


def load(files: Sequence[Path]) -> list[Seen]:
    found: list[Seen] = []
    for file in files:
        with file.open("rb") as stream, contextlib.suppress(EOFError):
            while True:
                found += pickle.load(stream)
    return found


def assert_as_reference(seed: int, num_seats: int, seen: Sequence[Seen], faulty: Collection[int] = ()) -> int:
    """Compare every collective that ranks have finished; return the number of steps.

    Results of `faulty` seats are skipped: their own part of the memory is damaged.
    """
    collectives: dict[tuple[int, int], dict[int, Seen]] = defaultdict(dict)
    for one in seen:
        assert one.seat not in collectives[one.stamp, one.number], "a rank is in a step once"
        collectives[one.stamp, one.number][one.seat] = one
    last = {(one.stamp >> 40, one.seat): one.stamp for one in sorted(seen, key=lambda one: one.stamp)}
    for (stamp, index), members in collectives.items():
        assert_collective(seed, num_seats, stamp, index, members, faulty)
        # A leaving rank has no tokens. It drops its last step if the others finish it before the rank looks.
        for seat in set(next(iter(members.values())).members) - members.keys():
            assert last.get((stamp >> 40, seat), 0) < stamp, f"step {stamp:x} is not seat {seat}'s last"
    return len({stamp for stamp, _ in collectives})


def assert_collective(
    seed: int, num_seats: int, stamp: int, index: int, members: dict[int, Seen], faulty: Collection[int]
) -> None:
    plan = Plan.draw(seed, stamp)
    layer = plan.layers[index]
    shares = [
        Share.draw(seed, stamp, index, seat, len(members[seat].sums) if seat in members else 0, plan.wide)
        for seat in range(num_seats)
    ]
    nothing = np.empty((0, K), int)
    targets = [members[seat].dispatch_targets if seat in members else nothing for seat in range(num_seats)]
    received = reference.ep_dispatch([share.x for share in shares], targets, EXPERTS)
    results = [computed(part.rows, part.offsets, layer, plan.wide) for part in received]
    sums = reference.ep_combine(received, results, [share.weights for share in shares])
    for seat, one in members.items():
        if seat in faulty:
            continue
        where = f"seed {seed}, seats {sorted(members)}, step {stamp:x}, collective {index}, seat {seat}"
        assert (one.layer, one.wide) == (layer, plan.wide), where
        topk_ids = shares[seat].topk_ids
        same(np.where(one.dispatch_targets < 0, -1, one.dispatch_targets >> 6), topk_ids, where)
        assert members.keys() <= set(one.members), where
        assert {target & 63 for target in one.dispatch_targets.flat if target >= 0} <= set(one.members), where
        same(one.rows, received[seat].rows, where)
        same(one.offsets, received[seat].offsets, where)
        same(one.source_token_index, received[seat].source_token_index, where)
        if custom_ops.instruction_set() == "generic":
            # The generic kernels round between product and sum.
            np.testing.assert_allclose(one.sums, sums[seat], rtol=1e-5, atol=1e-4, err_msg=where)
        else:
            same(one.sums, sums[seat], where)


def same(one: np.ndarray, other: np.ndarray, where: str) -> None:
    # Ten times as fast as numpy's assertion, which would run 100,000 times.
    if not np.array_equal(one, other):
        np.testing.assert_array_equal(one, other, err_msg=where)


@pytest.mark.parametrize(("num_seats", "steps"), [(1, 400), (2, 700), (3, 500), (5, 300), (8, 200)])
@pytest.mark.parametrize("redundant", [0, 3])
def test_every_step_is_as_the_reference_says(
    ranks: Ranks, name: str, seed: int, tmp_path: Path, num_seats: int, steps: int, redundant: int
) -> None:
    """Steps have tokens of all ranks, of some or of none, float32 or bfloat16, and one layer or two."""
    started = ranks.take(num_seats)
    options = {"lives": [steps], "together": num_seats, "redundant": redundant}
    files = [
        start(rank, seat, num_seats, name, tmp_path / str(seat), seed, **options)
        for seat, rank in enumerate(started)
    ]
    for rank in started:
        rank.finish(PATIENCE)
    assert assert_as_reference(seed, num_seats, load(files)) > 0.5 * steps
    assert not group_directory(name).exists()


def test_ranks_join_and_leave_while_others_compute(
    ranks: Ranks, name: str, seed: int, tmp_path: Path
) -> None:
    started, random = ranks.take(5), np.random.default_rng(seed)
    files = []
    for seat, rank in enumerate(started):
        # One rank stays: a group that everyone has left restarts at epoch 1.
        lives = [None] if seat == 0 else random.integers(1, 60, 12).tolist()
        files.append(start(rank, seat, 5, name, tmp_path / str(seat), seed, lives=lives))
        time.sleep(random.random() / 10)
    for rank in started[1:]:
        rank.finish(PATIENCE)
    started[0].tell("enough")
    started[0].finish(PATIENCE)
    assert assert_as_reference(seed, 5, load(files)) > 300
    assert not group_directory(name).exists()


def test_experts_move_while_ranks_compute(ranks: Ranks, name: str, seed: int, tmp_path: Path) -> None:
    started = ranks.take(3)
    options = {"lives": [600], "together": 3, "redundant": 2, "rebalance": True}
    files = [
        start(rank, seat, 3, name, tmp_path / str(seat), seed, **options) for seat, rank in enumerate(started)
    ]
    for rank in started:
        rank.finish(PATIENCE)
    seen = load(files)
    assert assert_as_reference(seed, 3, seen) > 300
    # Three epochs for joins and three for leaves; the others are of moved experts.
    assert len({one.stamp >> 40 for one in seen}) > 8


def test_group_removal_by_the_last_rank_may_race_with_the_next_join(
    ranks: Ranks, name: str, seed: int, tmp_path: Path
) -> None:
    """One rank removes the group's memory while the other creates it."""
    started = ranks.take(3)
    for seat, rank in enumerate(started):
        start(rank, seat, 3, name, tmp_path / str(seat), seed, lives=[1] * 200)
    for rank in started:
        rank.finish(PATIENCE)
    assert not group_directory(name).exists()


# ---- lost ranks


def start_with_trap(
    started: Sequence[RankProcess], name: str, directory: Path, seed: int, place: str, signal: int
) -> list[Path]:
    """Start three ranks in endless steps; the second sends itself `sig` at `place`."""
    return [
        start(
            rank,
            seat,
            3,
            name,
            directory / str(seat),
            seed,
            lives=[None],
            together=3,
            trap=(20, place, signal) if seat == 1 else None,
        )
        for seat, rank in enumerate(started)
    ]


def wait_for_steps(memory: Memory, count: int) -> None:
    row = memory.rows[0]
    before = row.steps
    wait_until(lambda: row.steps > before + count, deadline=PATIENCE)


def finish(started: Sequence[RankProcess]) -> None:
    for rank in started:
        rank.tell("enough")
    for rank in started:
        rank.finish(PATIENCE)


def told_of_by_all(seen: Sequence[Seen], lost: int) -> list[Seen]:
    """Drop the step that the survivors may have finished without a record from the lost seat."""
    last = max(one.stamp for one in seen if one.seat == lost)
    known = [one for one in seen if one.stamp <= last or one.stamp >> 40 != last >> 40]
    assert len({one.stamp for one in seen} - {one.stamp for one in known}) <= 1
    return known


@pytest.mark.parametrize("place", PLACES)
def test_a_rank_may_die_anywhere_in_a_collective(
    ranks: Ranks, name: str, seed: int, tmp_path: Path, place: str
) -> None:
    started = ranks.take(3)
    files = start_with_trap(started, name, tmp_path, seed, place, signal.SIGKILL)
    assert started[1].process.wait(PATIENCE) == -signal.SIGKILL
    wait_for_steps(mapped(name), 20)
    finish([started[0], started[2]])
    assert assert_as_reference(seed, 3, told_of_by_all(load(files), lost=1)) > 30
    assert not group_directory(name).exists()


def expel(memory: Memory, seat: int) -> None:
    """Remove a seat as if its process were dead and its pid reused."""
    with memory.locked():
        memory.rank_slots[seat].start_time += 1
        assert Membership(memory, planner(EXPERTS, 0)).remove_dead()


@contextlib.contextmanager
def late_writes(memory: Memory, seat: int, epoch: int) -> Iterator[None]:
    """Write continuously that a rank of a past epoch is ahead of all others."""
    layout, row = memory.layout, memory.rows[seat]
    begin, end = (layout.rank_offset(seat) + offset for offset in (layout.dispatch_targets, layout.results))

    def write() -> None:
        row.arrived = epoch
        row.begun = row.dispatched = row.combined = epoch << 40 | 1 << 39
        row.tokens = MAX_TOKENS << 8 | 4
        memory.pages[begin:end] = os.urandom(end - begin)

    with repeating(write):
        yield


@pytest.mark.parametrize("place", PLACES)
def test_expelled_rank_gets_rank_lost_and_its_late_writes_are_ignored(
    ranks: Ranks, name: str, seed: int, tmp_path: Path, place: str
) -> None:
    started = ranks.take(3)
    files = start_with_trap(started, name, tmp_path, seed, place, signal.SIGSTOP)
    wait_until(lambda: started[1].is_stopped, deadline=PATIENCE)
    memory = mapped(name)
    epoch = memory.words.epoch
    expel(memory, 1)
    wait_for_steps(memory, 20)
    with late_writes(memory, 1, epoch):
        wait_for_steps(memory, 20)
        started[1].signal(signal.SIGCONT)
        with pytest.raises(RankFailed, match=r"RankLost.*continued without rank 1"):
            started[1].finish(PATIENCE)
        wait_for_steps(memory, 50)
    finish([started[0], started[2]])
    assert assert_as_reference(seed, 3, told_of_by_all(load(files), lost=1)) > 60
    assert not group_directory(name).exists()


def test_expelled_rank_leaves_its_seat_to_the_successor(
    ranks: Ranks, name: str, seed: int, tmp_path: Path
) -> None:
    *started, successor = ranks.take(4)
    files = start_with_trap(started, name, tmp_path, seed, "sent", signal.SIGSTOP)
    wait_until(lambda: started[1].is_stopped, deadline=PATIENCE)
    memory = mapped(name)
    expel(memory, 1)
    files.append(start(successor, 1, 3, name, tmp_path / "successor", seed, lives=[None], together=3))
    wait_until(lambda: memory.header.joins == 4, deadline=PATIENCE)
    wait_for_steps(memory, 20)
    started[1].signal(signal.SIGCONT)
    with pytest.raises(RankFailed, match=r"RankLost.*continued without rank 1"):
        started[1].finish(PATIENCE)
    wait_for_steps(memory, 50)
    assert (memory.header.losses, memory.header.leaves) == (1, 0)
    finish([started[0], successor, started[2]])
    assert assert_as_reference(seed, 3, told_of_by_all(load(files), lost=1)) > 60
    assert not group_directory(name).exists()


# ---- wakeup calls


def serve(ranks: Ranks, name: str, num_seats: int, seed: int) -> list[RankProcess]:
    started = ranks.take(num_seats)
    for seat, rank in enumerate(started):
        rank.start("serve", name=name, seat=seat, num_seats=num_seats, seed=seed)
    for rank in started:
        assert rank.hear(PATIENCE) == "joined"
    return started


def end(started: Sequence[RankProcess]) -> None:
    for rank in started:
        rank.tell("end")
    for rank in started:
        rank.finish(PATIENCE)


def pause(random: np.random.Generator) -> None:
    time.sleep(random.choice([0, 0, 50e-6, 200e-6, 1e-3]))


def compute_tokens(started: Sequence[RankProcess], random: np.random.Generator, count: int) -> None:
    """Send tokens in batches at random moments, each batch once the previous one is computed.

    No token of a later batch can wake a rank whose call was lost, so such a rank keeps sleeping.
    """
    while count > 0:
        batch = random.integers(len(started), size=random.integers(1, len(started) + 2))
        count -= len(batch)
        for seat in batch:
            started[seat].tell("token")
            pause(random)
        for seat in batch:
            assert started[seat].hear(CALL_PATIENCE) == "done"
        pause(random)


def compute_tokens_of_movers(started: Sequence[RankProcess], random: np.random.Generator, count: int) -> None:
    """Let one rank leave and rejoin while a token is computed, then send another token to any rank."""
    for _ in range(count):
        first, mover, last = random.integers(len(started), size=3)
        awaited: list[list[str]] = [[] for _ in started]
        for seat, order, said in ((first, "token", "done"), (mover, "again", "joined")):
            started[seat].tell(order)
            awaited[seat].append(said)
            pause(random)
        for rank, answers in zip(started, awaited, strict=True):
            assert sorted(rank.hear(CALL_PATIENCE) for _ in answers) == sorted(answers)
        pause(random)
        started[last].tell("token")
        assert started[last].hear(CALL_PATIENCE) == "done"


@pytest.mark.parametrize(("num_seats", "tokens"), [(2, 1500), (3, 1000), (5, 700)])
def test_no_call_is_lost(ranks: Ranks, name: str, seed: int, num_seats: int, tokens: int) -> None:
    started = serve(ranks, name, num_seats, seed)
    compute_tokens(started, np.random.default_rng(seed), tokens)
    end(started)
    assert not group_directory(name).exists()


def test_no_call_is_lost_while_members_change(ranks: Ranks, name: str, seed: int) -> None:
    """A rank without tokens that restarts a step also has to call the sleeping ranks, which it needs."""
    started = serve(ranks, name, 3, seed)
    compute_tokens_of_movers(started, np.random.default_rng(seed), 100)
    end(started)
    assert not group_directory(name).exists()


@pytest.mark.slow
@pytest.mark.timeout(0)
def test_no_wakeup_call_is_lost_in_a_hundred_thousand(ranks: Ranks, name: str, seed: int) -> None:
    started, random = serve(ranks, name, 4, seed), np.random.default_rng(seed)
    for _ in range(10):
        compute_tokens(started, random, 10_000)
        compute_tokens_of_movers(started, random, 300)
    end(started)


def test_no_rank_waits_for_a_member_that_has_closed(ranks: Ranks, name: str) -> None:
    started = serve(ranks, name, 3, 1)
    started[2].tell("close")
    started[2].finish(PATIENCE)
    # The others sleep, and the kernel does not wake them because no process has died.
    started[0].tell("token")
    assert started[0].hear(CALL_PATIENCE) == "done"
    end(started[:2])
