"""A file is replaced completely or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from fastdeploy.common import atomic_file
from fastdeploy.common.atomic_file import write_atomically


@pytest.mark.parametrize("fsync", [False, True])
def test_a_file_is_created_and_replaced(tmp_path: Path, fsync: bool) -> None:
    file = tmp_path / "f"
    for content in (b"old", b"new"):
        write_atomically(file, content, fsync=fsync)
        assert file.read_bytes() == content
    assert list(tmp_path.iterdir()) == [file]
    assert file.stat().st_mode & 0o777 == 0o600


def test_the_mode_is_subject_to_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_atomically(tmp_path / "f", b"", mode=0o666)
    finally:
        os.umask(before)
    assert (tmp_path / "f").stat().st_mode & 0o777 == 0o640


def test_a_failure_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "f"
    file.write_bytes(b"old")

    def fail(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(atomic_file.os, "fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(file, b"new", fsync=True)
    assert file.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [file]


def test_a_leftover_draft_does_not_keep_its_permissions_or_target(tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.write_bytes(b"other")
    (tmp_path / f".f.{os.getpid()}").symlink_to(other)
    write_atomically(tmp_path / "f", b"new")
    assert (tmp_path / "f").read_bytes() == b"new"
    assert not (tmp_path / "f").is_symlink()
    assert other.read_bytes() == b"other"
