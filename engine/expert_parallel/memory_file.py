"""File of an expert-parallel group's shared memory: created by the first rank, removed by the last."""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import re
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..common.errors import ConfigError
from . import group_lock, removed_memory
from .layout import FINGERPRINT_BYTES, MAX_RANKS, PROTOCOL_VERSION, GroupHeader, GroupLayout, RankSlot
from .memory import FILE, MAGIC, Memory, layout_of, no_room, read_header
from .processes import is_alive

SHARED_MEMORY = Path("/dev/shm")
_INITIAL_PID_NAMESPACE = 0xEFFFFFFC


@contextmanager
def open_locked(
    name: str,
    layout: GroupLayout,
    fingerprint: Mapping[str, Any],
    patience: float,
    root: Path = SHARED_MEMORY,
) -> Iterator[Memory]:
    """Open or create the group's memory, locked for the duration of the block.

    Memory of a group without living ranks is initialised again. The caller compares `fingerprint` with that
    of a living group.

    Raises:
        ConfigError: there is no shared memory, or not enough room.
    """
    text = json.dumps(fingerprint, sort_keys=True).encode()
    assert len(text) <= FINGERPRINT_BYTES, "a fingerprint is a few lines"
    directory = group_directory(name, root)
    _remove_abandoned_groups(directory)
    descriptor = _open_file(directory, patience)
    try:
        if not _has_living(descriptor) and (removed := _open_removed(directory, patience)) is not None:
            os.close(descriptor)
            descriptor = removed
        if not _has_living(descriptor):
            _format(descriptor, layout, text, root)
        memory = Memory(directory, descriptor, layout_of(descriptor, directory), patience)
        group_lock.sign(memory.header)
        try:
            yield memory
        finally:
            group_lock.unsign(memory.header)
    except BaseException:
        if not _has_living(descriptor):
            _remove(directory, descriptor)
        # Closing is not enough: a mapping duplicates the descriptor, which keeps the lock.
        group_lock.release(descriptor)
        os.close(descriptor)
        raise
    group_lock.release(descriptor)


def group_directory(name: str, root: Path = SHARED_MEMORY, user: int | None = None) -> Path:
    """Return the directory of a group of `user`; None: of this process's user.

    Raises:
        ConfigError: the name is not valid.
    """
    if not re.fullmatch(r"[A-Za-z0-9._-]{1,40}", name):
        raise ConfigError(
            f"--expert-parallel-group is {name!r}; it must be 1 to 40 letters, digits, dots, dashes or "
            "underscores"
        )
    # A pid is valid in its namespace only, so containers with shared memory must not share a group.
    namespace = os.stat("/proc/self/ns/pid").st_ino
    suffix = "" if namespace == _INITIAL_PID_NAMESPACE else f"@{namespace}"
    return root / f"fd-ep-{os.getuid() if user is None else user}-{name}{suffix}"


def remove(memory: Memory) -> None:
    """Remove the group's files. The last rank calls this with the lock held."""
    _remove(memory.directory, memory.file)


def _open_file(directory: Path, patience: float) -> int:
    """Return a descriptor of the group's file, locked; create the file if it is missing."""
    root = directory.parent
    while True:
        try:
            # Not `exist_ok`, which checks again and fails if another rank removes the directory meanwhile.
            with suppress(FileExistsError):
                directory.mkdir(mode=0o700)
            status = directory.lstat()
            if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o077:
                raise ConfigError(f"{directory} is not a directory of this user alone; remove it")
            flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
            descriptor = os.open(directory / FILE, flags, 0o600)
        except FileNotFoundError:
            if root.is_dir():
                # The last rank of an old group has just removed the directory.
                continue
            raise ConfigError(
                f"{root} is missing; expert parallelism needs shared memory there: mount a tmpfs on it"
            ) from None
        except OSError as error:
            raise ConfigError(
                f"{directory}: no shared memory ({error.strerror}); expert parallelism needs "
                f"a writable tmpfs on {root}"
            ) from None
        _lock(descriptor, patience)
        if os.fstat(descriptor).st_nlink:
            return descriptor
        os.close(descriptor)


def _open_removed(directory: Path, patience: float) -> int | None:
    """Return the memory of living ranks whose file was removed, locked; None if there is none."""
    descriptor = removed_memory.find(directory / FILE, os.getuid(), os.O_RDWR)
    if descriptor is None:
        return None
    try:
        _lock(descriptor, patience)
    except BaseException:
        os.close(descriptor)
        raise
    if _has_living(descriptor):
        return descriptor
    os.close(descriptor)
    return None


def _lock(descriptor: int, patience: float) -> None:
    group_lock.acquire(descriptor, patience, lambda: group_lock.holder_in(read_header(descriptor)))


def _has_living(descriptor: int) -> bool:
    if read_header(descriptor).magic != MAGIC:
        return False
    data = os.pread(descriptor, MAX_RANKS * ctypes.sizeof(RankSlot), GroupLayout.rank_slots)
    return any(map(is_alive, (RankSlot * MAX_RANKS).from_buffer_copy(data)))


def _format(descriptor: int, layout: GroupLayout, fingerprint: bytes, root: Path) -> None:
    os.ftruncate(descriptor, 0)
    try:
        os.ftruncate(descriptor, layout.file_bytes)
        os.posix_fallocate(descriptor, 0, layout.first_rank_offset)
    except OSError as error:
        raise no_room(root, layout.first_rank_offset, error.strerror or str(error)) from None
    os.pwrite(descriptor, fingerprint, layout.fingerprint)
    header = GroupHeader(
        magic=MAGIC,
        version=PROTOCOL_VERSION,
        fingerprint_bytes=len(fingerprint),
        **asdict(layout),
    )
    os.pwrite(descriptor, bytes(header), 0)


def _remove_abandoned_groups(own: Path) -> None:
    """Remove other groups of this user whose ranks were all killed before one could remove the files."""
    namespace = own.name.partition("@")[2]
    for directory in own.parent.glob(f"fd-ep-{os.getuid()}-*"):
        # Pids of other namespaces cannot be checked.
        if directory == own or directory.name.partition("@")[2] != namespace:
            continue
        # OSError: it was removed, belongs to another user, or is locked and therefore alive.
        with suppress(OSError):
            descriptor = os.open(directory / FILE, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if _is_abandoned(directory, descriptor):
                    _remove(directory, descriptor)
            finally:
                os.close(descriptor)


def _is_abandoned(directory: Path, descriptor: int) -> bool:
    version = read_header(descriptor).version
    if version not in (0, PROTOCOL_VERSION) or _has_living(descriptor):
        return False
    if version == PROTOCOL_VERSION:
        return True
    # An empty file: its creator was killed, or joined living ranks whose file was removed.
    removed = removed_memory.find(directory / FILE, os.getuid(), os.O_RDONLY)
    if removed is None:
        return True
    try:
        return not _has_living(removed)
    finally:
        os.close(removed)


def _remove(directory: Path, descriptor: int) -> None:
    if os.fstat(descriptor).st_nlink == 0 and not _is_unused(directory / FILE):
        # This file is already removed; the one there now belongs to another group.
        return
    for doorbell in directory.glob("seat-*"):
        doorbell.unlink(missing_ok=True)
    (directory / FILE).unlink(missing_ok=True)
    # From here on another process may create the group again.
    with suppress(OSError):
        directory.rmdir()


def _is_unused(path: Path) -> bool:
    """Return True if the file is missing or empty; ranks that join removed memory leave an empty one."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return not read_header(descriptor).magic
    except BlockingIOError:
        return False
    finally:
        os.close(descriptor)
