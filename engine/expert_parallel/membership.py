"""Who is in an expert-parallel group, and who holds which experts: the record that all ranks go by.

Every change is a commit: under the group's lock a new record is written beside the one in force, and then
the epoch is raised to it. Who dies in the middle of that leaves the old one in force. Whoever has a reason
commits: a newcomer when nobody is there, the lowest seat for those that want to join or to leave, anybody
for the dead.
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
from .layout import SeatState
from .memory import Memory, is_alive, start_time
from .placement import Home, Placement, plan

#: (seats, load of each layer's experts, placements before or None, by load rather than by few moves) -> one
#: for each layer.
Planner = Callable[
    [Sequence[int], Sequence[Sequence[float]], Sequence[Placement] | None, bool], list[Placement]
]


_log = logging.getLogger(__name__)

#: The other 40 bits of a word are the step number.
_MOST_EPOCHS = 1 << 23


class RankLost(FastDeployError):
    """This rank cannot continue in its group and has to exit; the others continue without it."""


class SeatTaken(ConfigError):
    """A living process holds the seat."""

    def __init__(self, seat: int, pid: int, group: str) -> None:
        super().__init__(
            f"seat {seat} of expert group {group} is held by pid {pid}, which is alive; end it, "
            "or give this deployment a group of its own with --expert-parallel-group"
        )
        self.pid = pid


@dataclass(frozen=True, slots=True)
class Record:
    """Members and placement of one epoch."""

    epoch: int
    seats: tuple[int, ...]
    placements: tuple[Placement, ...]

    @property
    def bitmap(self) -> int:
        return bitmap_of(self.seats)


class Membership:
    """Reads and commits records.

    Every method but `epoch` and `pending` is to be called under `memory.locked()`.
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
        """Somebody wants to join or to leave."""
        return self._memory.header.pending != 0

    def read(self) -> Record:
        """Return the record in force. If it is damaged, put the newest intact one into force again.

        Raises:
            RankLost: no record is intact.
        """
        epoch = self.epoch
        record = self._last if epoch == self._last.epoch == 0 else None
        if max(1, self._last.epoch) <= epoch < _MOST_EPOCHS:
            record = self._whole(epoch)
        if record is None:
            record = self._repair(epoch)
        self._last = record
        return record

    def _whole(self, epoch: int) -> Record | None:
        """Return the record of this epoch; None if it is damaged or overwritten."""
        memory, layout = self._memory, self._memory.layout
        start = self._offset(epoch)
        if int.from_bytes(memory.pages[start : start + 8], "little") != epoch:
            return None
        seats = seats_of(int.from_bytes(memory.pages[start + 8 : start + 16], "little"))
        slots = array.array("h", memory.pages[start + 16 : start + 16 + layout.slots_bytes])
        placements = []
        for layer in range(layout.num_layers):
            first = layer * layout.num_experts * layout.num_seats
            placements.append(_placement(slots, first, layout.num_experts, layout.num_seats))
        members = set(seats)
        are_placed = all(
            homes and members.issuperset(home.seat for home in homes)
            for placement in placements
            for homes in placement.homes
        )
        if not members <= set(range(layout.num_seats)) or (seats and not are_placed):
            return None
        return Record(epoch, seats, tuple(placements))

    def _repair(self, epoch: int) -> Record:
        memory = self._memory
        written = (
            int.from_bytes(memory.pages[start : start + 8], "little") for start in map(self._offset, (0, 1))
        )
        found = [self._whole(number) for number in written if 0 < number < _MOST_EPOCHS]
        whole = [record for record in found if record is not None and record.seats]
        newest = max([*whole, self._last], key=lambda record: record.epoch)
        if not newest.seats:
            raise RankLost(f"{memory.directory}: the records of the expert group are damaged")
        _log.error(
            "%s: the record of epoch %d of the expert group is damaged; that of epoch %d takes its place",
            *(memory.directory, epoch, newest.epoch),
        )
        # Without members that have left since; `remove_dead` removes the dead ones.
        held = {seat for seat in newest.seats if memory.entries[seat].state != SeatState.FREE}
        return self._commit(newest, held)

    def register(self, seat: int, group: str) -> None:
        """Takes the seat for this process, which is to be admitted.

        Raises:
            SeatTaken: another process has it.
        """
        entry = self._memory.entries[seat]
        if is_alive(entry):
            raise SeatTaken(seat, entry.pid, group)
        self.remove_dead()
        started = start_time(os.getpid())
        assert started is not None, "this process runs"
        entry.pid, entry.start_time = os.getpid(), started
        self.request(seat, SeatState.JOINING)

    def request(self, seat: int, state: int) -> None:
        """JOINING or LEAVING: the lowest member grants it before its next step."""
        self._memory.entries[seat].state = state
        self._memory.header.pending |= 1 << seat

    def free(self, seat: int) -> bool:
        """Gives the seat back; True if it was the last that anybody held.

        It costs the others a step if it is a member's.
        """
        record, entry = self.read(), self._memory.entries[seat]
        if entry.pid == os.getpid():
            if seat in record.seats:
                self._commit(record, set(record.seats) - {seat})
            entry.state = SeatState.FREE
            self._memory.header.pending &= ~(1 << seat)
        # Who is dead and not buried yet will not remove what is left of the group.
        return not any(map(is_alive, self._memory.entries))

    def grant(self) -> Record:
        """Admits who wants to join and lets go who wants to leave, in one commit."""
        header, entries = self._memory.header, self._memory.entries
        record = self.read()
        pending = [seat for seat in seats_of(header.pending) if seat < self._memory.layout.num_seats]
        joining = [
            seat for seat in pending if entries[seat].state == SeatState.JOINING and is_alive(entries[seat])
        ]
        leaving = [seat for seat in pending if entries[seat].state == SeatState.LEAVING]
        header.pending = 0
        header.joins += len(joining)
        header.leaves += len(leaving)
        for seat in joining:
            entries[seat].state = SeatState.ACTIVE
        return self._commit(record, (set(record.seats) | set(joining)) - set(leaving))

    def remove_dead(self) -> list[tuple[int, int]]:
        """Commits the group without its dead members: (seat, pid) of each. Frees other dead seats, too."""
        record = self.read()
        dead: list[tuple[int, int]] = []
        for seat, entry in enumerate(self._memory.entries):
            if entry.state == SeatState.FREE or is_alive(entry):
                continue
            if seat in record.seats:
                dead.append((seat, entry.pid))
            entry.state = SeatState.FREE
            self._memory.header.pending &= ~(1 << seat)
            self._memory.words.sleepers &= ~(1 << seat)
        if dead:
            self._memory.header.losses += len(dead)
            self._commit(record, set(record.seats) - {seat for seat, _ in dead})
        return dead

    def expel(self, seat: int) -> None:
        """Commit the group without a member whose part of the memory is faulty."""
        record = self.read()
        self._memory.entries[seat].state = SeatState.FREE
        self._memory.header.pending &= ~(1 << seat)
        self._memory.words.sleepers &= ~(1 << seat)
        self._memory.header.losses += 1
        self._commit(record, set(record.seats) - {seat})

    def restart_step(self) -> None:
        """The same members in a new epoch: whatever step is under way is begun again by all."""
        record = self.read()
        self._write(Record(record.epoch + 1, record.seats, record.placements))

    def rebalance(self) -> bool:
        """Places the experts by the load that was measured; False if that would change nothing."""
        record = self.read()
        placements = tuple(self._planner(record.seats, self.load(record.seats), record.placements, True))
        if placements == record.placements:
            return False
        self._write(Record(record.epoch + 1, record.seats, placements))
        return True

    def load(self, seats: Iterable[int]) -> list[list[int]]:
        """Tokens that the experts of each layer have computed, at all of `seats` together."""
        layout = self._memory.layout
        count = layout.num_layers * layout.num_experts
        total = [0] * count
        for seat in seats:
            served = (ctypes.c_uint64 * count).from_buffer(
                self._memory.pages, layout.seat(seat) + layout.expert_token_counts
            )
            total = [sum(pair) for pair in zip(total, served, strict=True)]
        return [total[i : i + layout.num_experts] for i in range(0, count, layout.num_experts)]

    def _commit(self, record: Record, seats: set[int]) -> Record:
        members = tuple(sorted(seats))
        placements: Sequence[Placement] = ()
        if members:
            before = record.placements if record.seats else None
            placements = self._planner(members, self.load(record.seats or members), before, False)
        new = Record(record.epoch + 1, members, tuple(placements))
        self._write(new)
        return new

    def _write(self, record: Record) -> None:
        memory, layout = self._memory, self._memory.layout
        slots = array.array("h", [-1]) * (layout.slots_bytes // 2)
        for layer, placement in enumerate(record.placements):
            for expert, homes in enumerate(placement.homes):
                for home in homes:
                    slots[(layer * layout.num_experts + expert) * layout.num_seats + home.seat] = home.slot
        start = self._offset(record.epoch)
        memory.pages[start : start + 8] = record.epoch.to_bytes(8, "little")
        memory.pages[start + 8 : start + 16] = record.bitmap.to_bytes(8, "little")
        memory.pages[start + 16 : start + 16 + layout.slots_bytes] = slots.tobytes()
        # The commit: one aligned word, after everything that it stands for.
        memory.words.epoch = record.epoch
        self._last = record

    def _offset(self, epoch: int) -> int:
        return self._memory.layout.records + epoch % 2 * self._memory.layout.record_bytes


def planner(num_experts: int, redundant: int) -> Planner:
    """Places the experts of each layer by that layer's load."""

    def plan_layers(
        seats: Sequence[int],
        load: Sequence[Sequence[float]],
        previous: Sequence[Placement] | None,
        rebalance: bool,
    ) -> list[Placement]:
        return [
            plan(
                num_experts,
                seats,
                load=layer_load,
                redundant=redundant,
                previous=None if previous is None else previous[layer],
                rebalance=rebalance,
            )
            for layer, layer_load in enumerate(load)
        ]

    return plan_layers


def disagreement(
    seat: int, mine: Mapping[str, Any], theirs: Mapping[str, Any], members: Sequence[tuple[int, int]]
) -> str | None:
    """What keeps a rank from joining those that are there, in one line that names both sides.

    None if nothing does.
    """
    differences = [
        f"{key} is {mine.get(key)!r} here and {theirs.get(key)!r} there"
        for key in sorted(mine.keys() | theirs.keys())
        if mine.get(key) != theirs.get(key)
    ]
    if not differences:
        return None
    there = ", ".join(f"seat {other} (pid {pid})" for other, pid in members)
    return (
        f"seat {seat} (pid {os.getpid()}) cannot join the expert group of {there}: {'; '.join(differences)}; "
        "start all ranks with the same model and options, or in groups of their own (--expert-parallel-group)"
    )


def bitmap_of(seats: Iterable[int]) -> int:
    return sum(1 << seat for seat in seats)


def seats_of(bitmap: int) -> tuple[int, ...]:
    return tuple(seat for seat in range(bitmap.bit_length()) if bitmap >> seat & 1)


def _placement(slots: Sequence[int], first: int, num_experts: int, num_seats: int) -> Placement:
    homes = []
    for start in range(first, first + num_experts * num_seats, num_seats):
        row = slots[start : start + num_seats]
        homes.append(tuple(Home(seat, slot) for seat, slot in enumerate(row) if slot >= 0))
    return Placement(tuple(homes))
