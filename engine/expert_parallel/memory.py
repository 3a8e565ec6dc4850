"""The file behind the memory that all ranks of an expert-parallel group map, and the group's lock on it."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import json
import mmap
import os
import re
import signal
import stat
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path
from typing import Any

from ..common.errors import ConfigError, FastDeployError
from . import removed_memory
from .layout import (
    FINGERPRINT_BYTES,
    MOST_SEATS,
    PROTOCOL_VERSION,
    GroupWords,
    Header,
    Layout,
    SeatEntry,
    SeatRow,
    SeatState,
)

SHARED_MEMORY = Path("/dev/shm")
#: In the directory of a group.
FILE = "memory"

_MAGIC = b"FDEXPERT"
_LOCK_POLL_SECONDS = 0.001
_INITIAL_PID_NAMESPACE = 0xEFFFFFFC


class LockStuck(FastDeployError):
    """The process that holds the group's lock neither goes on nor dies."""


class Memory:
    """The file, mapped."""

    def __init__(self, directory: Path, descriptor: int, layout: Layout, patience: float) -> None:
        self.directory = directory
        self.file = descriptor
        self.layout = layout
        self._patience = patience
        self.pages = mmap.mmap(descriptor, layout.file_bytes, mmap.MAP_SHARED)
        self.header = Header.from_buffer(self.pages, 0)
        self.words = GroupWords.from_buffer(self.pages, layout.words)
        self.entries = (SeatEntry * MOST_SEATS).from_buffer(self.pages, layout.entries)
        self.rows = [SeatRow.from_buffer(self.pages, layout.seat(seat)) for seat in range(layout.num_seats)]

    @property
    def address(self) -> int:
        return ctypes.addressof(self.header)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """The group's lock. Who holds it and is stopped is killed after a while: the others wait for it.

        Raises:
            LockStuck: not even that has helped.
        """
        _lock(self.file, self._patience, lambda: _holder_in(self.header))
        _sign(self.header)
        try:
            yield
        finally:
            self.header.holder = 0
            fcntl.flock(self.file, fcntl.LOCK_UN)

    def read_fingerprint(self) -> dict[str, Any]:
        """Raises ConfigError if it is damaged."""
        start, size = self.layout.fingerprint, self.header.fingerprint_bytes
        try:
            found = json.loads(self.pages[start : start + min(size, FINGERPRINT_BYTES)])
        except (ValueError, RecursionError):
            found = None
        if not isinstance(found, dict):
            raise _damaged(self.directory, "the fingerprint")
        return found

    def doorbell(self, seat: int) -> str:
        return str(self.directory / f"seat-{seat}")

    def take_part(self, seat: int) -> None:
        """Takes the memory that a seat needs at once, where there is room for all that it may need later.

        Raises:
            ConfigError: there is not. A write where there is no memory would be fatal.
        """
        root, needed, begin = self.directory.parent, self.layout.seat_bytes, self.layout.seat(seat)
        file_system = os.statvfs(self.directory)
        free = file_system.f_bavail * file_system.f_frsize
        # The part is there, as far as the process needed it that had the seat before.
        others = _written(self.file, 0, begin) + _written(self.file, begin + needed, self.layout.file_bytes)
        if free + os.fstat(self.file).st_blocks * 512 - others < needed:
            raise _no_room(root, needed, f"{free >> 20} MB are free")
        try:
            os.posix_fallocate(self.file, begin, self.layout.tokens)
        except OSError as error:
            raise _no_room(root, needed, error.strerror or str(error)) from None


@contextmanager
def opened(
    name: str, layout: Layout, fingerprint: Mapping[str, Any], patience: float, root: Path = SHARED_MEMORY
) -> Iterator[Memory]:
    """Opens the group's memory, or makes it, and leaves it locked: nobody comes or goes within the block.

    Memory of a group that nobody is alive of is made anew. Whether `fingerprint` is that of a living group
    is for the caller to see.

    Raises:
        ConfigError: there is no shared memory, or no room in it.
    """
    text = json.dumps(fingerprint, sort_keys=True).encode()
    assert len(text) <= FINGERPRINT_BYTES, "a fingerprint is a few lines"
    directory = group_directory(name, root)
    _remove_remains(directory)
    descriptor = _open_locked(directory, patience)
    try:
        if not _has_living(descriptor) and (removed := _locked_removed(directory, patience)) is not None:
            os.close(descriptor)
            descriptor = removed
        if not _has_living(descriptor):
            _format(descriptor, layout, text, root)
        memory = Memory(directory, descriptor, layout_of(descriptor, directory), patience)
        _sign(memory.header)
        try:
            yield memory
        finally:
            memory.header.holder = 0
    except BaseException:
        if not _has_living(descriptor):
            _remove(directory, descriptor)
        # Not only closed: a mapping has a descriptor of its own, and so the lock.
        fcntl.flock(descriptor, fcntl.LOCK_UN)
        os.close(descriptor)
        raise
    fcntl.flock(descriptor, fcntl.LOCK_UN)


def group_directory(name: str, root: Path = SHARED_MEMORY, user: int | None = None) -> Path:
    """Of this user's group, or of another's. Raises ConfigError for a name that cannot be a directory's."""
    if not re.fullmatch(r"[A-Za-z0-9._-]{1,40}", name):
        raise ConfigError(
            f"--expert-parallel-group is {name!r}; it must be 1 to 40 letters, digits, dots, dashes or "
            "underscores"
        )
    # Pids mean nothing outside of their namespace: containers that share the memory are not one group.
    namespace = os.stat("/proc/self/ns/pid").st_ino
    suffix = "" if namespace == _INITIAL_PID_NAMESPACE else f"@{namespace}"
    return root / f"fd-ep-{os.getuid() if user is None else user}-{name}{suffix}"


def remove(memory: Memory) -> None:
    """To be called under the lock by the last one: nothing of the group stays."""
    _remove(memory.directory, memory.file)


def start_time(pid: int) -> int | None:
    """When the process was started, in ticks since boot; None if there is none, or only its remains."""
    try:
        fields = (
            Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        )
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])


def is_alive(entry: SeatEntry) -> bool:
    return entry.state != SeatState.FREE and start_time(entry.pid) == entry.start_time


def pidfd_of(pid: int, started: int) -> int | None:
    """Return a pidfd of the process with this pid and start time; None if there is none."""
    try:
        pidfd = os.pidfd_open(pid)
    # Not a possible pid: the memory is faulty.
    except (ProcessLookupError, OverflowError):
        return None
    except OSError as error:
        if error.errno == errno.EINVAL:
            return None
        raise
    # Compared after the opening: from then on the pid cannot pass to another process.
    if start_time(pid) == started:
        return pidfd
    os.close(pidfd)
    return None


# ---- the file


def _open_locked(directory: Path, patience: float) -> int:
    root = directory.parent
    while True:
        try:
            # Not `exist_ok`, which looks again and fails if it has been removed meanwhile.
            with suppress(FileExistsError):
                directory.mkdir(mode=0o700)
            status = directory.lstat()
            if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o077:
                raise ConfigError(f"{directory} is not a directory of this user alone; remove it")
            flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
            descriptor = os.open(directory / FILE, flags, 0o600)
        except FileNotFoundError:
            if root.is_dir():
                # The last rank of an old group has just removed it.
                continue
            raise ConfigError(
                f"{root} is missing; expert parallelism needs shared memory there: mount a tmpfs on it"
            ) from None
        except OSError as error:
            raise ConfigError(
                f"{directory}: no shared memory ({error.strerror}); expert parallelism needs "
                f"a writable tmpfs on {root}"
            ) from None
        _lock(descriptor, patience, partial(_holder, descriptor))
        if os.fstat(descriptor).st_nlink:
            return descriptor
        os.close(descriptor)


def _locked_removed(directory: Path, patience: float) -> int | None:
    """Return the memory of living ranks whose file was removed, locked; None if there is none."""
    descriptor = removed_memory.find(directory / FILE, os.getuid(), os.O_RDWR)
    if descriptor is None:
        return None
    try:
        _lock(descriptor, patience, partial(_holder, descriptor))
    except BaseException:
        os.close(descriptor)
        raise
    if _has_living(descriptor):
        return descriptor
    os.close(descriptor)
    return None


def _remove_remains(own: Path) -> None:
    """Removes this user's groups whose ranks were all killed together, which left nobody to do it."""
    namespace = own.name.partition("@")[2]
    for directory in own.parent.glob(f"fd-ep-{os.getuid()}-*"):
        # Of other namespaces the dead and the living cannot be told apart.
        if directory == own or directory.name.partition("@")[2] != namespace:
            continue
        # Gone meanwhile, not ours, or somebody is at it: then it is alive.
        with suppress(OSError):
            descriptor = os.open(directory / FILE, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                known = _header(descriptor).version in (0, PROTOCOL_VERSION)
                if known and not _has_living(descriptor):
                    _remove(directory, descriptor)
            finally:
                os.close(descriptor)


def _lock(descriptor: int, patience: float, holder: Callable[[], tuple[int, int]]) -> None:
    """`holder` returns pid and start time of the process that holds the lock."""
    suspect, since = (0, 0), time.monotonic()
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            time.sleep(_LOCK_POLL_SECONDS)
        found, now = holder(), time.monotonic()
        if found != suspect:
            # Patience begins anew with every holder.
            suspect, since = found, now
        if now > since + patience:
            # Another waiting process may have killed it. A holder that was stopped before it signed shows
            # the pid of its predecessor, which any process may have by now.
            pidfd = pidfd_of(*found)
            if pidfd is not None:
                with suppress(ProcessLookupError):
                    signal.pidfd_send_signal(pidfd, signal.SIGKILL)
                os.close(pidfd)
            if now > since + patience + 5:
                if pidfd is None:
                    raise LockStuck(
                        "the lock of the expert group is held by an unknown process; "
                        "kill all ranks of the group"
                    )
                raise LockStuck(
                    f"the lock of the expert group is held by pid {found[0]}, which does not end; kill it"
                )


def _header(descriptor: int) -> Header:
    return Header.from_buffer_copy(
        os.pread(descriptor, ctypes.sizeof(Header), 0).ljust(ctypes.sizeof(Header), b"\0")
    )


def _sign(header: Header) -> None:
    """Record this process as the holder. In this order a pid never stands beside an older start time."""
    started = start_time(os.getpid())
    assert started is not None, "this process runs"
    header.holder_started = 0
    header.holder = os.getpid()
    header.holder_started = started


def _holder_in(header: Header) -> tuple[int, int]:
    return header.holder, header.holder_started


def _holder(descriptor: int) -> tuple[int, int]:
    return _holder_in(_header(descriptor))


def _has_living(descriptor: int) -> bool:
    if _header(descriptor).magic != _MAGIC:
        return False
    data = os.pread(descriptor, MOST_SEATS * ctypes.sizeof(SeatEntry), Layout.entries)
    return any(map(is_alive, (SeatEntry * MOST_SEATS).from_buffer_copy(data)))


def _format(descriptor: int, layout: Layout, fingerprint: bytes, root: Path) -> None:
    os.ftruncate(descriptor, 0)
    try:
        os.ftruncate(descriptor, layout.file_bytes)
        os.posix_fallocate(descriptor, 0, layout.first_seat)
    except OSError as error:
        raise _no_room(root, layout.first_seat, error.strerror or str(error)) from None
    os.pwrite(descriptor, fingerprint, layout.fingerprint)
    header = Header(
        magic=_MAGIC,
        version=PROTOCOL_VERSION,
        fingerprint_bytes=len(fingerprint),
        **asdict(layout),
    )
    os.pwrite(descriptor, bytes(header), 0)


def layout_of(descriptor: int, directory: Path) -> Layout:
    """Of the group as it is: a rank with other sizes must still be able to read who it disagrees with.

    Raises:
        ConfigError: another protocol, or sizes that are not those of the file.
    """
    header = _header(descriptor)
    if header.magic != _MAGIC or header.version != PROTOCOL_VERSION:
        raise ConfigError(
            f"the expert group there speaks protocol {header.version}, this process {PROTOCOL_VERSION}; "
            "all ranks must run one version, or be in groups of their own (--expert-parallel-group)"
        )
    sizes = [getattr(header, field.name) for field in fields(Layout)]
    layout = Layout(*sizes)
    # Then everything that these sizes locate lies within the file.
    is_whole = layout.num_seats <= MOST_SEATS and layout.file_bytes == os.fstat(descriptor).st_size
    if not is_whole or 0 in sizes:
        raise _damaged(directory, "the header")
    return layout


def _remove(directory: Path, descriptor: int) -> None:
    if os.fstat(descriptor).st_nlink == 0 and not _is_unused(directory / FILE):
        # It is removed, and what is there now is of another.
        return
    for doorbell in directory.glob("seat-*"):
        doorbell.unlink(missing_ok=True)
    (directory / FILE).unlink(missing_ok=True)
    # From here on somebody may make the group anew.
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
        return not _header(descriptor).magic
    except BlockingIOError:
        return False
    finally:
        os.close(descriptor)


def _written(descriptor: int, begin: int, end: int) -> int:
    """Bytes between the two, in pages that anybody has written to; others may have memory as well."""
    total = 0
    # The offset of a descriptor is used for nothing else.
    with suppress(OSError):
        while begin < end:
            begin = os.lseek(descriptor, begin, os.SEEK_DATA)
            hole = os.lseek(descriptor, begin, os.SEEK_HOLE)
            total += max(0, min(hole, end) - begin)
            begin = hole
    return total


def _damaged(directory: Path, what: str) -> ConfigError:
    return ConfigError(
        f"{directory / FILE}: {what} of the expert group is damaged; stop all ranks of the group, "
        "then start them again"
    )


def _no_room(root: Path, needed: int, why: str) -> ConfigError:
    return ConfigError(
        f"{root} has no room for this rank's part of the expert group: {-(-needed >> 20)} MB are needed "
        f"({why}); make it larger (docker: --shm-size)"
    )
