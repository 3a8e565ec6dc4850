"""What a group is doing right now, for people.

Read from the group's file, not mapped: to look at a page that nobody has used yet would take memory that the
ranks may be short of, and a group that is made anew at that moment would be fatal to whoever has it mapped.
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
from .layout import GroupWords, Header, Layout, SeatEntry, SeatRow, SeatState, phase_name
from .membership import seats_of
from .memory import FILE, SHARED_MEMORY, group_directory, is_alive, layout_of

#: Of reading an epoch whose record was overwritten meanwhile, which takes two commits.
_MOST_TRIES = 100

Structure = TypeVar("Structure", bound=ctypes.Structure)


@dataclass(frozen=True, slots=True)
class Seat:
    """A seat that a process holds, and what that was doing; None for what does not apply."""

    seat: int
    pid: int
    #: joining, active, leaving; dead until another rank has noticed; unknown for any other number.
    state: str
    #: The newest that it has adopted.
    epoch: int
    #: That had work for somebody, of all that have held the seat.
    steps: int
    phase: str | None
    layer: int | None
    #: In this phase.
    seconds: float | None
    #: Its own in the step that is under way.
    tokens: int | None
    waits_for: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Awaited:
    """The seat that more others wait for than for any other, and how long they have at most."""

    seat: int
    by: tuple[int, ...]
    seconds: float


@dataclass(frozen=True, slots=True)
class Snapshot:
    name: str
    epoch: int
    #: Members of the epoch.
    active: tuple[int, ...]
    joins: int
    leaves: int
    losses: int
    num_seats: int
    seats: tuple[Seat, ...]
    awaited: Awaited | None


def look(name: str, user: int | None = None, root: Path = SHARED_MEMORY) -> Snapshot | None:
    """The group as it is; None if there is none, or nobody alive in it.

    Args:
        user: whose group it is; None: this process's user.

    Raises:
        ConfigError: the name cannot be one, the group speaks another protocol, or its memory is damaged.
        OSError: its memory cannot be read.
    """
    path = group_directory(name, root, user) / FILE
    file = _open(path, os.getuid() if user is None else user)
    if file is None:
        return None
    try:
        header = _read(file, Header, 0)
        if not header.magic:
            # It is being made.
            return None
        layout = layout_of(file, path.parent)
        epoch, active = _members(file, layout)
        found = (_seat(file, layout, seat, seat in active) for seat in range(layout.num_seats))
        seats = tuple(seat for seat in found if seat is not None)
    finally:
        os.close(file)
    if all(seat.state == "dead" for seat in seats):
        return None
    return Snapshot(
        name=name,
        epoch=epoch,
        active=active,
        joins=header.joins,
        leaves=header.leaves,
        losses=header.losses,
        num_seats=layout.num_seats,
        seats=seats,
        awaited=_awaited(seats),
    )


def _open(path: Path, user: int) -> int | None:
    """Open the group's memory at its path, or through a rank that has it mapped if the file was removed."""
    with suppress(FileNotFoundError):
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        if _read(file, Header, 0).magic:
            return file
        os.close(file)
    return removed_memory.find(path, user, os.O_RDONLY)


def _members(file: int, layout: Layout) -> tuple[int, tuple[int, ...]]:
    """Return the epoch in force and its members; no members if its record is damaged."""
    for _ in range(_MOST_TRIES):
        epoch = _read(file, GroupWords, layout.words).epoch
        record = os.pread(file, 16, layout.records + epoch % 2 * layout.record_bytes)
        # Two epochs later another is written over it.
        if int.from_bytes(record[:8], "little") == epoch:
            break
    else:
        return epoch, ()
    return epoch, _seats_in(int.from_bytes(record[8:], "little"), layout)


def _seats_in(bitmap: int, layout: Layout) -> tuple[int, ...]:
    return seats_of(bitmap & (1 << layout.num_seats) - 1)


def _seat(file: int, layout: Layout, seat: int, is_member: bool) -> Seat | None:
    entry = _read(file, SeatEntry, layout.entries + seat * ctypes.sizeof(SeatEntry))
    if entry.state == SeatState.FREE:
        return None
    row = _read(file, SeatRow, layout.seat(seat))
    alive = is_alive(entry)
    phase = phase_name(row.phase)
    # What is in the row of a newcomer is its predecessor's.
    noted = is_member and row.since_ns > 0
    in_step = noted and phase not in ("idle", "arriving")
    return Seat(
        seat=seat,
        pid=entry.pid,
        state=SeatState.name_of(entry.state) if alive else "dead",
        epoch=row.arrived,
        steps=row.steps,
        phase=phase if noted else None,
        layer=row.layer if in_step and phase != "beginning" else None,
        seconds=max(0, time.monotonic_ns() - row.since_ns) * 1e-9 if noted else None,
        tokens=row.step_tokens[row.begun % 2] if in_step else None,
        waits_for=_seats_in(row.waiting_for, layout) if noted and alive else (),
    )


def _awaited(seats: tuple[Seat, ...]) -> Awaited | None:
    """Of several the one that waits for nobody: the others may all be waiting for it."""
    by: dict[int, list[Seat]] = {}
    for seat in seats:
        for other in seat.waits_for:
            by.setdefault(other, []).append(seat)
    if not by:
        return None
    waiting = {seat.seat for seat in seats if seat.waits_for}
    most = max(by, key=lambda seat: (len(by[seat]), seat not in waiting))
    return Awaited(most, tuple(seat.seat for seat in by[most]), max(seat.seconds or 0.0 for seat in by[most]))


def _read(file: int, kind: type[Structure], offset: int) -> Structure:
    size = ctypes.sizeof(kind)
    return kind.from_buffer_copy(os.pread(file, size, offset).ljust(size, b"\0"))
