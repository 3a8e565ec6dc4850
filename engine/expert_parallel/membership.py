"""Members and expert placement of an expert-parallel group: a record in shared memory.

Every change is a commit: under the group's lock a new record is written beside the one in force, then the
epoch is raised. If the writer dies in between, the old record stays in force. The first rank commits itself,
the lowest member commits joins and leaves, and any rank commits the removal of dead members.
"""

from __future__ import annotations

import array
import ctypes
import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..common.errors import ConfigError, FastDeployError
from .layout import RankSlotState
from .memory import Memory
from .placement import ExpertReplica, Placement, plan
from .processes import is_alive, own_start_time

#: (ranks, load of each layer's experts, previous placements or None, rebalance) -> placement of each layer.
Planner = Callable[
    [Sequence[int], Sequence[Sequence[float]], Sequence[Placement] | None, bool], list[Placement]
]

_log = logging.getLogger(__name__)

#: Limit of epochs. A stamp has an epoch in its upper bits, and a step number in its lower 40.
_MAX_EPOCHS = 1 << 23


class RankLost(FastDeployError):
    """This rank cannot continue in its group and must exit; the others continue without it."""


class RankTaken(ConfigError):
    """A living process already has this rank."""

    def __init__(self, rank: int, pid: int, group: str) -> None:
        super().__init__(
            f"rank {rank} of expert group {group} is held by pid {pid}, which is alive; end it, "
            "or give this deployment a group of its own with --expert-parallel-group"
        )
        self.pid = pid


@dataclass(frozen=True, slots=True)
class Record:
    """Members and placement of one epoch."""

    epoch: int
    ranks: tuple[int, ...]
    placements: tuple[Placement, ...]

    @property
    def bitmap(self) -> int:
        return bitmap_of(self.ranks)


class Membership:
    """Reads and commits records.

    Hold `memory.locked()` for everything except `epoch` and `pending`.
    """

    def __init__(self, memory: Memory, planner: Planner) -> None:
        self._memory = memory
        self._planner = planner
        #: The last intact record that this process has read or written.
        self._last = Record(0, (), ())

    @property
    def epoch(self) -> int:
        return self._memory.words.epoch

    @property
    def pending(self) -> bool:
        """True if a rank requests to join or to leave."""
        return self._memory.header.pending != 0

    def read(self) -> Record:
        """Return the record in force. If it is damaged, commit the newest intact record as a new epoch.

        Raises:
            RankLost: no record is intact.
        """
        epoch = self.epoch
        record = self._last if epoch == self._last.epoch == 0 else None
        if max(1, self._last.epoch) <= epoch < _MAX_EPOCHS:
            record = self._intact(epoch)
        if record is None:
            record = self._repair(epoch)
        self._last = record
        return record

    def _intact(self, epoch: int) -> Record | None:
        """Return the record of this epoch; None if it is damaged or overwritten."""
        memory, layout = self._memory, self._memory.layout
        start = self._offset(epoch)
        if int.from_bytes(memory.pages[start : start + 8], "little") != epoch:
            return None
        ranks = ranks_of(int.from_bytes(memory.pages[start + 8 : start + 16], "little"))
        slots = array.array("h", memory.pages[start + 16 : start + 16 + layout.placement_bytes])
        placements = []
        for layer in range(layout.num_layers):
            first = layer * layout.num_experts * layout.num_ranks
            placements.append(_placement(slots, first, layout.num_experts, layout.num_ranks))
        members = set(ranks)
        are_placed = all(
            replicas and members.issuperset(replica.rank for replica in replicas)
            for placement in placements
            for replicas in placement.replicas
        )
        if not members <= set(range(layout.num_ranks)) or (ranks and not are_placed):
            return None
        return Record(epoch, ranks, tuple(placements))

    def _repair(self, epoch: int) -> Record:
        memory = self._memory
        written = (
            int.from_bytes(memory.pages[start : start + 8], "little") for start in map(self._offset, (0, 1))
        )
        found = [self._intact(number) for number in written if 0 < number < _MAX_EPOCHS]
        whole = [record for record in found if record is not None and record.ranks]
        newest = max([*whole, self._last], key=lambda record: record.epoch)
        if not newest.ranks:
            raise RankLost(f"{memory.directory}: the records of the expert group are damaged")
        _log.error(
            "%s: the record of epoch %d of the expert group is damaged; that of epoch %d replaces it",
            *(memory.directory, epoch, newest.epoch),
        )
        # Omit members that have left since; `remove_dead` removes the dead ones.
        held = {rank for rank in newest.ranks if memory.rank_slots[rank].state != RankSlotState.FREE}
        return self._commit(newest, held)

    def register(self, rank: int, group: str) -> None:
        """Take a rank for this process and request to join.

        Raises:
            RankTaken: another process has the rank.
        """
        slot = self._memory.rank_slots[rank]
        if is_alive(slot):
            raise RankTaken(rank, slot.pid, group)
        self.remove_dead()
        slot.pid, slot.start_time = os.getpid(), own_start_time()
        self.request(rank, RankSlotState.JOINING)

    def request(self, rank: int, state: int) -> None:
        """Request to join (JOINING) or to leave (LEAVING). The lowest member commits it before a step."""
        self._memory.rank_slots[rank].state = state
        self._memory.header.pending |= 1 << rank

    def release(self, rank: int) -> bool:
        """Free this process's rank. Return True if no living process is left.

        If it is a member, the others repeat the step under way.
        """
        record, slot = self.read(), self._memory.rank_slots[rank]
        if slot.pid == os.getpid():
            if rank in record.ranks:
                self._commit(record, set(record.ranks) - {rank})
            slot.state = RankSlotState.FREE
            self._memory.header.pending &= ~(1 << rank)
        # Not by `state`: a dead process cannot remove the group's files, even if its slot is not free yet.
        return not any(map(is_alive, self._memory.rank_slots))

    def apply_requests(self) -> Record:
        """Commit all requests to join and to leave."""
        header, rank_slots = self._memory.header, self._memory.rank_slots
        record = self.read()
        pending = [rank for rank in ranks_of(header.pending) if rank < self._memory.layout.num_ranks]
        joining = [
            rank
            for rank in pending
            if rank_slots[rank].state == RankSlotState.JOINING and is_alive(rank_slots[rank])
        ]
        leaving = [rank for rank in pending if rank_slots[rank].state == RankSlotState.LEAVING]
        header.pending = 0
        header.joins += len(joining)
        header.leaves += len(leaving)
        for rank in joining:
            rank_slots[rank].state = RankSlotState.ACTIVE
        return self._commit(record, (set(record.ranks) | set(joining)) - set(leaving))

    def remove_dead(self) -> list[tuple[int, int]]:
        """Free all dead slots and commit the group without its dead members; return (rank, pid) of those."""
        record = self.read()
        dead: list[tuple[int, int]] = []
        for rank, slot in enumerate(self._memory.rank_slots):
            if slot.state == RankSlotState.FREE or is_alive(slot):
                continue
            if rank in record.ranks:
                dead.append((rank, slot.pid))
            slot.state = RankSlotState.FREE
            self._memory.header.pending &= ~(1 << rank)
            self._memory.words.sleepers &= ~(1 << rank)
        if dead:
            self._memory.header.losses += len(dead)
            self._commit(record, set(record.ranks) - {rank for rank, _ in dead})
        return dead

    def expel(self, rank: int) -> None:
        """Commit the group without a member whose part of the memory is faulty."""
        record = self.read()
        self._memory.rank_slots[rank].state = RankSlotState.FREE
        self._memory.header.pending &= ~(1 << rank)
        self._memory.words.sleepers &= ~(1 << rank)
        self._memory.header.losses += 1
        self._commit(record, set(record.ranks) - {rank})

    def restart_step(self) -> None:
        """Commit a new epoch with the same members, so that all ranks repeat the step under way."""
        record = self.read()
        self._write(Record(record.epoch + 1, record.ranks, record.placements))

    def rebalance(self) -> bool:
        """Place the experts by their measured load. Return False if that changes nothing."""
        record = self.read()
        placements = tuple(self._planner(record.ranks, self.load(record.ranks), record.placements, True))
        if placements == record.placements:
            return False
        self._write(Record(record.epoch + 1, record.ranks, placements))
        return True

    def load(self, ranks: Iterable[int]) -> list[list[int]]:
        """Return the tokens that each expert of each layer has computed, summed over `ranks`."""
        layout = self._memory.layout
        count = layout.num_layers * layout.num_experts
        total = [0] * count
        for rank in ranks:
            expert_token_counts = (ctypes.c_uint64 * count).from_buffer(
                self._memory.pages, layout.rank_offset(rank) + layout.expert_token_counts
            )
            total = [sum(pair) for pair in zip(total, expert_token_counts, strict=True)]
        return [total[i : i + layout.num_experts] for i in range(0, count, layout.num_experts)]

    def _commit(self, record: Record, ranks: set[int]) -> Record:
        members = tuple(sorted(ranks))
        placements: Sequence[Placement] = ()
        if members:
            before = record.placements if record.ranks else None
            placements = self._planner(members, self.load(record.ranks or members), before, False)
        new = Record(record.epoch + 1, members, tuple(placements))
        self._write(new)
        return new

    def _write(self, record: Record) -> None:
        memory, layout = self._memory, self._memory.layout
        slots = array.array("h", [-1]) * (layout.placement_bytes // 2)
        for layer, placement in enumerate(record.placements):
            for expert, replicas in enumerate(placement.replicas):
                for replica in replicas:
                    slots[(layer * layout.num_experts + expert) * layout.num_ranks + replica.rank] = (
                        replica.slot
                    )
        start = self._offset(record.epoch)
        memory.pages[start : start + 8] = record.epoch.to_bytes(8, "little")
        memory.pages[start + 8 : start + 16] = record.bitmap.to_bytes(8, "little")
        memory.pages[start + 16 : start + 16 + layout.placement_bytes] = slots.tobytes()
        # The commit: one aligned word, written after the record.
        memory.words.epoch = record.epoch
        self._last = record

    def _offset(self, epoch: int) -> int:
        return self._memory.layout.records + epoch % 2 * self._memory.layout.record_bytes


def planner(num_experts: int, redundant: int) -> Planner:
    """Return a planner that places the experts of each layer by that layer's load."""

    def plan_layers(
        ranks: Sequence[int],
        load: Sequence[Sequence[float]],
        previous: Sequence[Placement] | None,
        rebalance: bool,
    ) -> list[Placement]:
        return [
            plan(
                num_experts,
                ranks,
                load=layer_load,
                redundant=redundant,
                previous=None if previous is None else previous[layer],
                rebalance=rebalance,
            )
            for layer, layer_load in enumerate(load)
        ]

    return plan_layers


def disagreement(
    rank: int, mine: Mapping[str, Any], theirs: Mapping[str, Any], members: Sequence[tuple[int, int]]
) -> str | None:
    """Return one line that says how two fingerprints differ; None if they are equal.

    Args:
        mine: fingerprint of `rank`.
        theirs: fingerprint of the group.
        members: (rank, pid) of the living ranks of the group.
    """
    differences = [
        f"{key} is {mine.get(key)!r} here and {theirs.get(key)!r} there"
        for key in sorted(mine.keys() | theirs.keys())
        if mine.get(key) != theirs.get(key)
    ]
    if not differences:
        return None
    there = ", ".join(f"rank {other} (pid {pid})" for other, pid in members)
    return (
        f"rank {rank} (pid {os.getpid()}) cannot join the expert group of {there}: {'; '.join(differences)}; "
        "start all ranks with the same model and options, or in groups of their own (--expert-parallel-group)"
    )


def bitmap_of(ranks: Iterable[int]) -> int:
    return sum(1 << rank for rank in ranks)


def ranks_of(bitmap: int) -> tuple[int, ...]:
    return tuple(rank for rank in range(bitmap.bit_length()) if bitmap >> rank & 1)


def _placement(slots: Sequence[int], first: int, num_experts: int, num_ranks: int) -> Placement:
    replicas = []
    for start in range(first, first + num_experts * num_ranks, num_ranks):
        row = slots[start : start + num_ranks]
        replicas.append(tuple(ExpertReplica(rank, slot) for rank, slot in enumerate(row) if slot >= 0))
    return Placement(tuple(replicas))
