"""A group's memory whose file was removed while ranks have it mapped, found again through those ranks.

systemd-logind removes what a user has in /dev/shm when that user logs out, and other cleaners exist. The
ranks do not notice, but a rank that starts afterwards would form a second group.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path


def find(path: Path, user: int, flags: int) -> int | None:
    """Return a descriptor of the file that had this path, opened with `flags`; None if no process has it.

    Processes of other users than `user` do not count.
    """
    for link in _links(f"{path} (deleted)", user):
        with suppress(OSError):
            # Another user's process may name its pipe so: the opening of one must not block.
            descriptor = os.open(link, flags | os.O_CLOEXEC | os.O_NONBLOCK)
            found = os.fstat(descriptor)
            # The name that /proc shows may be the true name of another file.
            if stat.S_ISREG(found.st_mode) and found.st_nlink == 0 and found.st_uid == user:
                return descriptor
            os.close(descriptor)
    return None


def _links(name: str, user: int) -> Iterator[str]:
    for process in os.scandir("/proc"):
        # Processes end while they are examined.
        with suppress(OSError):
            if not process.name.isdecimal() or process.stat().st_uid != user:
                continue
            for link in os.listdir(f"{process.path}/fd"):
                with suppress(OSError):
                    if os.readlink(f"{process.path}/fd/{link}") == name:
                        yield f"{process.path}/fd/{link}"
