"""Ranks survive the removal of their group's files from /dev/shm, and remain one group."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from fastdeploy.expert_parallel import removed_memory
from fastdeploy.expert_parallel.memory import FILE
from fastdeploy.expert_parallel.memory_file import SHARED_MEMORY, group_directory
from fastdeploy.expert_parallel.snapshot import read_snapshot

from ..small_disk import SmallDisk
from ..waiting import wait_until
from .expert_ranks import EXPERT_CONFIG, ranks_of, requests_of, undisturbed
from .worker_api import DEADLINE_S, Ranks


@pytest.fixture
def ranks(tmp_path: Path) -> Iterator[Ranks]:
    with ranks_of(2, tmp_path) as ranks:
        ranks.start(0, 1)
        ranks.wait_ready()
        yield ranks


def active(ranks: Ranks) -> tuple[int, ...]:
    snapshot = read_snapshot(ranks.group)
    return snapshot.active if snapshot is not None else ()


def test_a_rank_that_starts_after_the_removal_joins_the_others(ranks: Ranks, tmp_path: Path) -> None:
    directory = group_directory(ranks.group)
    requests = {seat: requests_of(seat, count=2, tokens=20) for seat in range(2)}
    expected = undisturbed(EXPERT_CONFIG, tmp_path / "alone", requests)
    shutil.rmtree(directory)
    assert active(ranks) == (0, 1), "fd-dp still sees the group"
    wait_until(lambda: len(list(directory.glob("seat-*"))) == 2, "doorbells", deadline=DEADLINE_S)
    assert ranks.generate(requests) == expected
    lost = ranks.lose(1)
    lost.process.kill()
    lost.process.wait()
    ranks.start(1)
    ranks.wait_ready(1)
    wait_until(lambda: active(ranks) == (0, 1), "one group", deadline=DEADLINE_S)
    assert ranks.generate(requests) == expected
    assert ranks.logs().count("was removed and has been created again") == 2
    ranks.stop()
    assert not directory.exists(), "nothing of the group stays behind"


def test_ranks_work_without_doorbells_on_a_full_disk(tmp_path: Path) -> None:
    disk = SmallDisk(SHARED_MEMORY, size="512m", inodes=16)
    ranks = Ranks(EXPERT_CONFIG, 2, "full", tmp_path, launcher=disk.prefix)
    try:
        ranks.start(0, 1)
        ranks.wait_ready()
        requests = {0: requests_of(0, count=2, tokens=10)}
        expected = ranks.generate(requests)
        directory = group_directory("full", disk.path)
        disk.use_up_inodes()
        for seat in range(2):
            # Rename rather than remove: a removed socket would free its inode for another.
            (directory / f"seat-{seat}").rename(directory / f"old-{seat}")
        said = "was removed and cannot be created again (No space left on device)"
        wait_until(lambda: ranks.logs().count(said) == 2, "both report it", deadline=DEADLINE_S)
        assert ranks.generate(requests) == expected
        disk.make_room()
        wait_until(lambda: len(list(directory.glob("seat-*"))) == 2, "doorbells", deadline=DEADLINE_S)
        assert ranks.generate(requests) == expected
        assert ranks.logs().count(said) == 2
    finally:
        ranks.close()
        disk.close()


def test_memory_that_no_rank_has_is_not_found(tmp_path: Path) -> None:
    file = tmp_path / FILE
    file.write_bytes(b"x")
    assert removed_memory.find(file, os.getuid(), os.O_RDONLY) is None
    with file.open("rb") as held:
        file.unlink()
        # /proc shows a removed file under this name.
        decoy = tmp_path / f"{FILE} (deleted)"
        with decoy.open("wb"):
            descriptor = removed_memory.find(file, os.getuid(), os.O_RDONLY)
            assert descriptor is not None
            assert os.fstat(descriptor).st_ino == os.fstat(held.fileno()).st_ino
            os.close(descriptor)
        assert removed_memory.find(file, os.getuid() + 1, os.O_RDONLY) is None
    assert removed_memory.find(file, os.getuid(), os.O_RDONLY) is None
