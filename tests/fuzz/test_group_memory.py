"""Arbitrary words in the memory of an expert group are shown and repaired, or refused in one line."""

from __future__ import annotations

import json
import os
import struct
import tempfile
from dataclasses import asdict
from functools import cache
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from fastdeploy.common.errors import ConfigError
from fastdeploy.daemon.supervision.hang_detection import Stalled, find_hung
from fastdeploy.daemon.supervision.health import group_snapshots
from fastdeploy.expert_parallel import memory_file
from fastdeploy.expert_parallel.group_lock import LockStuck
from fastdeploy.expert_parallel.layout import GroupLayout, RankSlotState
from fastdeploy.expert_parallel.membership import Membership, RankLost, planner
from fastdeploy.expert_parallel.memory import Memory, layout_of
from fastdeploy.expert_parallel.processes import start_time
from fastdeploy.expert_parallel.snapshot import Snapshot, read_snapshot

from .foreign import one_line

_LAYOUT = GroupLayout(num_ranks=3, num_layers=2, num_experts=4, max_tokens=8, k=2, hidden=8)
_DIRECTORY = tempfile.TemporaryDirectory()
_NAME = "fuzz"


@cache
def group() -> tuple[Memory, bytes]:
    """Return a group whose seats all belong to this process, and its intact memory."""
    with memory_file.open_locked(_NAME, _LAYOUT, {"a": 1}, 5.0, Path(_DIRECTORY.name)) as memory:
        membership = Membership(memory, planner(_LAYOUT.num_experts, 0))
        for seat in range(_LAYOUT.num_ranks):
            entry, started = memory.rank_slots[seat], start_time(os.getpid())
            assert started is not None
            entry.pid, entry.start_time = os.getpid(), started
            membership.request(seat, RankSlotState.JOINING)
        membership.apply_requests()
        for row in memory.rows:
            row.phase, row.since_ns, row.waiting_for = 5, 1, 1
    return memory, bytes(memory.pages)


#: Words that are read: of the header, the group's words, entries, records and rows.
_PLACES = [
    *range(0, 256, 8),
    *range(GroupLayout.words, GroupLayout.words + 192, 8),
    *range(GroupLayout.rank_slots, GroupLayout.rank_slots + 4 * 64, 8),
    *range(GroupLayout.fingerprint, GroupLayout.fingerprint + 16, 8),
    *(_LAYOUT.records + record * _LAYOUT.record_bytes + at for record in (0, 1) for at in range(0, 64, 8)),
    *(_LAYOUT.rank_offset(seat) + at for seat in range(_LAYOUT.num_ranks) for at in range(0, 128, 8)),
]
_WORDS = (
    st.integers(0, 2**64 - 1)
    | st.integers(0, 12)
    | st.sampled_from([2**63 - 1, 2**63, 2**64 - 1, 2**32, 2**40])
)
corruptions = st.lists(st.tuples(st.sampled_from(_PLACES), _WORDS), min_size=1, max_size=6)


def corrupted(words: list[tuple[int, int]]) -> Memory:
    memory, whole = group()
    memory.pages[:] = whole
    for place, word in words:
        struct.pack_into("<Q", memory.pages, place, word)
    return memory


@given(corruptions)
def test_snapshot_of_any_memory_is_valid_or_one_line(words: list[tuple[int, int]]) -> None:
    corrupted(words)

    def look_here(name: str) -> Snapshot | None:
        return read_snapshot(name, root=Path(_DIRECTORY.name))

    try:
        found = look_here(_NAME)
    except ConfigError as error:
        one_line(str(error))
    else:
        json.dumps(None if found is None else asdict(found))
    stalled = [Stalled(f"replica{rank}", 99.0, 1, _NAME, rank) for rank in range(_LAYOUT.num_ranks)]
    members = {(_NAME, each.rank): each.name for each in stalled}
    find_hung(stalled, group_snapshots([_NAME], look_here), members, 60.0)


@given(corruptions, st.booleans())
def test_record_is_intact_or_the_rank_is_lost(words: list[tuple[int, int]], knows_it: bool) -> None:
    memory = corrupted([])
    membership = Membership(memory, planner(_LAYOUT.num_experts, 0))
    if knows_it:
        membership.read()
    corrupted(words)
    try:
        record = membership.read()
    except RankLost as error:
        one_line(str(error))
        assert not knows_it
        return
    assert set(record.ranks) <= set(range(_LAYOUT.num_ranks))
    for placement in record.placements if record.ranks else ():
        assert len(placement.replicas) == _LAYOUT.num_experts
        for replicas in placement.replicas:
            assert replicas
            assert {replica.rank for replica in replicas} <= set(record.ranks)
    assert Membership(memory, planner(_LAYOUT.num_experts, 0)).read() == record


@given(corruptions)
def test_joining_a_group_with_any_memory_succeeds_or_is_one_line(words: list[tuple[int, int]]) -> None:
    memory = corrupted(words)
    try:
        layout = layout_of(memory.file, memory.directory)
        with memory_file.open_locked(_NAME, layout, {"a": 1}, 0.1, Path(_DIRECTORY.name)) as found:
            found.read_fingerprint()
    except (ConfigError, LockStuck) as error:
        one_line(str(error))
