"""The state of a group, read from outside: `fdctl ep`."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import pytest

from fastdeploy.common.errors import ConfigError
from fastdeploy.expert_parallel.layout import GroupLayout
from fastdeploy.expert_parallel.memory import FILE
from fastdeploy.expert_parallel.snapshot import RankSnapshot, Snapshot, read_snapshot

from ..quiet_group import QuietGroup


def look_at(group: QuietGroup) -> Snapshot:
    found = read_snapshot(group.name, root=group.root)
    assert found is not None
    return found


def seat_of(group: QuietGroup, seat: int) -> RankSnapshot:
    return next(one for one in look_at(group).seats if one.seat == seat)


@pytest.fixture
def group(tmp_path: Path) -> Iterator[QuietGroup]:
    made = QuietGroup("test", root=tmp_path)
    yield made
    made.close()


def test_group_has_the_newest_epoch_and_the_held_seats(group: QuietGroup) -> None:
    group.join(0, 2)
    group.join(3)
    found = look_at(group)
    assert (found.name, found.epoch, found.active, found.num_seats) == ("test", 2, (0, 2, 3), 4)
    assert (found.joins, found.leaves, found.losses) == (3, 0, 0)
    assert [(seat.seat, seat.pid, seat.state) for seat in found.seats] == [
        (seat, process.pid, "active") for seat, process in zip((0, 2, 3), group.processes, strict=True)
    ]


def test_seat_shows_its_phase_and_layer(group: QuietGroup) -> None:
    group.join(0, 1)
    row = group.memory.rows[1]
    row.arrived, row.begun, row.steps = 1, 1 << 40 | 7, 42
    row.step_tokens[0], row.step_tokens[1] = 5, 3
    group.note(1, "experts", layer=1, seconds=10)
    seat = seat_of(group, 1)
    assert (seat.epoch, seat.steps, seat.phase, seat.layer, seat.tokens) == (1, 42, "experts", 1, 3)
    assert seat.seconds == pytest.approx(10, abs=5)
    group.note(1, "beginning", waits_for=0b1)
    assert (seat_of(group, 1).layer, seat_of(group, 1).tokens, seat_of(group, 1).waits_for) == (None, 3, (0,))
    group.note(1, "idle")
    assert (seat_of(group, 1).phase, seat_of(group, 1).layer, seat_of(group, 1).tokens) == (
        "idle",
        None,
        None,
    )


def test_data_of_a_previous_holder_is_not_shown_for_a_seat(group: QuietGroup) -> None:
    group.join(0)
    group.note(1, "experts", layer=1, waits_for=0b1)
    group.request(1)
    seat = seat_of(group, 1)
    assert (seat.state, seat.phase, seat.layer, seat.seconds) == ("joining", None, None, None)
    assert seat.waits_for == ()
    assert look_at(group).awaited is None


def test_dead_seats_are_shown_at_once_and_wait_for_no_seat(group: QuietGroup) -> None:
    group.join(0, 1)
    group.note(1, "sent", waits_for=0b1)
    group.kill(1)
    assert seat_of(group, 1).state == "dead"
    assert look_at(group).awaited is None
    group.kill(0)
    assert read_snapshot("test", root=group.root) is None


def test_awaited_seat_has_most_waiters_and_preferably_waits_for_none(
    group: QuietGroup,
) -> None:
    group.join(0, 1, 2, 3)
    group.note(1, "returned", waits_for=0b1)
    assert (awaited := look_at(group).awaited)
    assert (awaited.seat, awaited.by) == (0, (1,))
    group.note(0, "sent", waits_for=0b1100, seconds=20)
    group.note(1, "sent", waits_for=0b1101)
    group.note(2, "sent", waits_for=0b1000)
    assert (awaited := look_at(group).awaited)
    assert (awaited.seat, awaited.by) == (3, (0, 1, 2))
    assert awaited.seconds == pytest.approx(20, abs=5)
    # Seats 2 and 3 are awaited by two ranks each.
    group.note(2, "sent", waits_for=0b0001)
    assert (awaited := look_at(group).awaited)
    assert (awaited.seat, awaited.by) == (3, (0, 1))


def test_missing_or_unfinished_group_has_no_snapshot(group: QuietGroup, tmp_path: Path) -> None:
    assert read_snapshot("other", root=tmp_path) is None
    group.memory.header.magic = b""
    assert read_snapshot("test", root=tmp_path) is None


def test_another_protocol_is_one_line(group: QuietGroup) -> None:
    group.memory.header.version = 99
    with pytest.raises(ConfigError, match="speaks protocol 99, this process 2"):
        read_snapshot("test", root=group.root)


def test_numbers_that_no_rank_writes_are_unknown(group: QuietGroup) -> None:
    group.join(0, 1)
    group.note(1, "experts", waits_for=0b1)
    group.memory.rows[1].phase = 10
    group.memory.rank_slots[0].state = 4
    assert (seat_of(group, 1).phase, seat_of(group, 0).state) == ("unknown", "unknown")
    row = group.memory.rows[1]
    row.phase = row.waiting_for = row.since_ns = row.layer = (1 << 64) - 1
    assert seat_of(group, 1).waits_for == (0, 1, 2, 3)


def test_an_epoch_without_a_record_has_no_members(group: QuietGroup) -> None:
    group.join(0, 1)
    group.memory.words.epoch = 3
    found = look_at(group)
    assert (found.epoch, found.active) == (3, ())
    assert [seat.state for seat in found.seats] == ["active", "active"]


@pytest.mark.parametrize("field", [field.name for field in fields(GroupLayout)])
@pytest.mark.parametrize("number", [0, 1 << 20, (1 << 63) - 1])
def test_a_damaged_header_is_one_line(group: QuietGroup, field: str, number: int) -> None:
    setattr(group.memory.header, field, number)
    with pytest.raises(ConfigError, match=r"/memory: the header of the expert group is damaged; stop all"):
        read_snapshot("test", root=group.root)


def test_snapshot_allocates_no_memory_and_takes_no_lock() -> None:
    # In /dev/shm, as only there an access may allocate pages.
    group = QuietGroup(f"test-{os.getpid()}", 0)
    try:
        file = group.memory.directory / FILE
        before = file.stat().st_blocks
        with group.memory.locked():
            assert len(look_at(group).seats) == 1
        assert file.stat().st_blocks == before
    finally:
        group.close()


def test_snapshot_needs_neither_paddle_nor_numpy() -> None:
    program = "import fastdeploy.expert_parallel.snapshot, sys; print({'paddle', 'numpy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
