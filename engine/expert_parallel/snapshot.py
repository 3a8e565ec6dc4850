"""Snapshot of an expert-parallel group for `fdctl ep` and for hang detection.

It is read from the group's file without a mapping: touching an unused page would allocate memory that the
ranks may need, and a process that has the file mapped dies (SIGBUS) if a new group truncates it.

`fdctl ep --json` prints these classes, so their fields are a stable interface: there a rank is a `seat`.
"""

from __future__ import annotations

import ctypes
import os
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from . import removed_memory
from .layout import GroupHeader, GroupLayout, GroupWords, RankRow, RankSlot, RankSlotState, phase_name
from .membership import ranks_of
from .memory import FILE, layout_of
from .memory_file import SHARED_MEMORY, group_directory
from .processes import is_alive

#: Limit of attempts to read the record of an epoch before two commits overwrite it.
_MAX_TRIES = 100

Structure = TypeVar("Structure", bound=ctypes.Structure)


@dataclass(frozen=True, slots=True)
class RankSnapshot:
    """State of a rank's process; fields that do not apply are None."""

    seat: int
    pid: int
    #: joining, active, leaving, dead (until another rank removes it), or unknown (the memory is damaged).
    state: str
    #: The newest epoch that it has adopted.
    epoch: int
    #: Steps with work since the group was created, including those of previous processes of the rank.
    steps: int
    phase: str | None
    layer: int | None
    #: Time in this phase, in seconds.
    seconds: float | None
    #: Its tokens in the step under way.
    tokens: int | None
    waits_for: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Awaited:
    """The rank that most others wait for, the ranks that wait, and the longest of their waits in seconds."""

    seat: int
    by: tuple[int, ...]
    seconds: float


@dataclass(frozen=True, slots=True)
class Snapshot:
    """State of a group; counters since it was created."""

    name: str
    epoch: int
    #: Members of the epoch.
    active: tuple[int, ...]
    joins: int
    leaves: int
    losses: int
    num_seats: int
    seats: tuple[RankSnapshot, ...]
    awaited: Awaited | None


def read_snapshot(name: str, user: int | None = None, root: Path = SHARED_MEMORY) -> Snapshot | None:
    """Return the state of a group; None if there is none, or none of its ranks is alive.

    Args:
        user: owner of the group; None: this process's user.

    Raises:
        ConfigError: the name is not valid, the group has another protocol version, or its memory is damaged.
        OSError: its memory cannot be read.
    """
    path = group_directory(name, root, user) / FILE
    file = _open(path, os.getuid() if user is None else user)
    if file is None:
        return None
    try:
        header = _read(file, GroupHeader, 0)
        if not header.magic:
            # The file is being initialised.
            return None
        layout = layout_of(file, path.parent)
        epoch, active = _members(file, layout)
        found = (_rank_snapshot(file, layout, rank, rank in active) for rank in range(layout.num_ranks))
        ranks = tuple(one for one in found if one is not None)
    finally:
        os.close(file)
    if all(one.state == "dead" for one in ranks):
        return None
    return Snapshot(
        name=name,
        epoch=epoch,
        active=active,
        joins=header.joins,
        leaves=header.leaves,
        losses=header.losses,
        num_seats=layout.num_ranks,
        seats=ranks,
        awaited=_awaited(ranks),
    )


def _open(path: Path, user: int) -> int | None:
    """Open the group's memory at its path, or through a rank that has it mapped if the file was removed."""
    with suppress(FileNotFoundError):
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        if _read(file, GroupHeader, 0).magic:
            return file
        os.close(file)
    return removed_memory.find(path, user, os.O_RDONLY)


def _members(file: int, layout: GroupLayout) -> tuple[int, tuple[int, ...]]:
    """Return the epoch in force and its members; no members if its record is damaged."""
    for _ in range(_MAX_TRIES):
        epoch = _read(file, GroupWords, layout.words).epoch
        record = os.pread(file, 16, layout.records + epoch % 2 * layout.record_bytes)
        # False if a later epoch has overwritten the record.
        if int.from_bytes(record[:8], "little") == epoch:
            break
    else:
        return epoch, ()
    return epoch, _ranks_in(int.from_bytes(record[8:], "little"), layout)


def _ranks_in(bitmap: int, layout: GroupLayout) -> tuple[int, ...]:
    return ranks_of(bitmap & (1 << layout.num_ranks) - 1)


def _rank_snapshot(file: int, layout: GroupLayout, rank: int, is_member: bool) -> RankSnapshot | None:
    slot = _read(file, RankSlot, layout.rank_slots + rank * ctypes.sizeof(RankSlot))
    if slot.state == RankSlotState.FREE:
        return None
    row = _read(file, RankRow, layout.rank_offset(rank))
    alive = is_alive(slot)
    phase = phase_name(row.phase)
    # Until a rank is a member, the row has values of a previous process.
    is_valid = is_member and row.since_ns > 0
    in_step = is_valid and phase not in ("idle", "arriving")
    return RankSnapshot(
        seat=rank,
        pid=slot.pid,
        state=RankSlotState.name_of(slot.state) if alive else "dead",
        epoch=row.arrived,
        steps=row.steps,
        phase=phase if is_valid else None,
        layer=row.layer if in_step and phase != "beginning" else None,
        seconds=max(0, time.monotonic_ns() - row.since_ns) * 1e-9 if is_valid else None,
        tokens=row.step_tokens[row.begun % 2] if in_step else None,
        waits_for=_ranks_in(row.waiting_for, layout) if is_valid and alive else (),
    )


def _awaited(ranks: tuple[RankSnapshot, ...]) -> Awaited | None:
    """Return the rank that most others wait for; of several, one that waits for no rank."""
    by: dict[int, list[RankSnapshot]] = {}
    for one in ranks:
        for other in one.waits_for:
            by.setdefault(other, []).append(one)
    if not by:
        return None
    waiting = {one.seat for one in ranks if one.waits_for}
    most = max(by, key=lambda rank: (len(by[rank]), rank not in waiting))
    return Awaited(most, tuple(one.seat for one in by[most]), max(one.seconds or 0.0 for one in by[most]))


def _read(file: int, kind: type[Structure], offset: int) -> Structure:
    size = ctypes.sizeof(kind)
    return kind.from_buffer_copy(os.pread(file, size, offset).ljust(size, b"\0"))
