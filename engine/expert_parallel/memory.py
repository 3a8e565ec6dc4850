"""Shared memory that all ranks of an expert-parallel group map."""

from __future__ import annotations

import ctypes
import json
import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

from ..common.errors import ConfigError
from . import group_lock
from .layout import (
    FINGERPRINT_BYTES,
    MAX_RANKS,
    PROTOCOL_VERSION,
    GroupHeader,
    GroupLayout,
    GroupWords,
    RankRow,
    RankSlot,
)

#: File name in the directory of a group.
FILE = "memory"
MAGIC = b"FDEXPERT"


class Memory:
    """A mapping of the group's file.

    Args:
        patience: seconds after which a process that holds the group's lock is killed.
    """

    def __init__(self, directory: Path, descriptor: int, layout: GroupLayout, patience: float) -> None:
        self.directory = directory
        self.file = descriptor
        self.layout = layout
        self._patience = patience
        self.pages = mmap.mmap(descriptor, layout.file_bytes, mmap.MAP_SHARED)
        self.header = GroupHeader.from_buffer(self.pages, 0)
        self.words = GroupWords.from_buffer(self.pages, layout.words)
        self.rank_slots = (RankSlot * MAX_RANKS).from_buffer(self.pages, layout.rank_slots)
        self.rows = [
            RankRow.from_buffer(self.pages, layout.rank_offset(rank)) for rank in range(layout.num_ranks)
        ]

    @property
    def address(self) -> int:
        return ctypes.addressof(self.header)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the group's lock for the duration of the block.

        Raises:
            LockStuck: another process does not release the lock.
        """
        group_lock.acquire(self.file, self._patience, lambda: group_lock.holder_in(self.header))
        group_lock.sign(self.header)
        try:
            yield
        finally:
            group_lock.unsign(self.header)
            group_lock.release(self.file)

    def read_fingerprint(self) -> dict[str, Any]:
        """Return the fingerprint of the group. Raise ConfigError if it is damaged."""
        start, size = self.layout.fingerprint, self.header.fingerprint_bytes
        try:
            found = json.loads(self.pages[start : start + min(size, FINGERPRINT_BYTES)])
        except (ValueError, RecursionError):
            found = None
        if not isinstance(found, dict):
            raise _damaged(self.directory, "the fingerprint")
        return found

    def doorbell(self, rank: int) -> str:
        """Return the path of a rank's doorbell socket. Protocol 2 calls a rank a seat."""
        return str(self.directory / f"seat-{rank}")

    def allocate(self, rank: int) -> None:
        """Allocate what a rank needs at once, and check that there is room for all that it may need later.

        Raises:
            ConfigError: there is not enough room. Later, a write without memory would kill the process
            (SIGBUS).
        """
        root, needed, begin = self.directory.parent, self.layout.rank_bytes, self.layout.rank_offset(rank)
        # Not of the directory, which another program may have removed.
        file_system = os.statvfs(root)
        free = file_system.f_bavail * file_system.f_frsize
        # A previous process of this rank may have allocated a part.
        others = _written(self.file, 0, begin) + _written(self.file, begin + needed, self.layout.file_bytes)
        if free + os.fstat(self.file).st_blocks * 512 - others < needed:
            raise no_room(root, needed, f"{free >> 20} MB are free")
        try:
            os.posix_fallocate(self.file, begin, self.layout.tokens)
        except OSError as error:
            raise no_room(root, needed, error.strerror or str(error)) from None


def read_header(descriptor: int) -> GroupHeader:
    """Read the header of an unmapped file; missing bytes are zero."""
    size = ctypes.sizeof(GroupHeader)
    return GroupHeader.from_buffer_copy(os.pread(descriptor, size, 0).ljust(size, b"\0"))


def layout_of(descriptor: int, directory: Path) -> GroupLayout:
    """Return the layout of an existing group, which may differ from that of a rank that wants to join.

    Raises:
        ConfigError: the group has another protocol version, or its header is damaged.
    """
    header = read_header(descriptor)
    if header.magic != MAGIC or header.version != PROTOCOL_VERSION:
        raise ConfigError(
            f"the expert group speaks protocol {header.version}, this process {PROTOCOL_VERSION}; "
            "all ranks must run one version, or be in groups of their own (--expert-parallel-group)"
        )
    sizes = [getattr(header, field.name) for field in fields(GroupLayout)]
    layout = GroupLayout(*sizes)
    # If the size matches, all offsets lie within the file.
    is_intact = layout.num_ranks <= MAX_RANKS and layout.file_bytes == os.fstat(descriptor).st_size
    if not is_intact or 0 in sizes:
        raise _damaged(directory, "the header")
    return layout


def no_room(root: Path, needed: int, why: str) -> ConfigError:
    """Return the error for a file system without room for `needed` bytes."""
    return ConfigError(
        f"{root} has no room for this rank's part of the expert group: {-(-needed >> 20)} MB are needed "
        f"({why}); make it larger (docker: --shm-size)"
    )


def _damaged(directory: Path, what: str) -> ConfigError:
    return ConfigError(
        f"{directory / FILE}: {what} of the expert group is damaged; stop all ranks of the group, "
        "then start them again"
    )


def _written(descriptor: int, begin: int, end: int) -> int:
    """Return the size of the written pages between two offsets; unwritten ones may be allocated too."""
    total = 0
    # lseek is safe here: the file offset is not used otherwise.
    with suppress(OSError):
        while begin < end:
            begin = os.lseek(descriptor, begin, os.SEEK_DATA)
            hole = os.lseek(descriptor, begin, os.SEEK_HOLE)
            total += max(0, min(hole, end) - begin)
            begin = hole
    return total
