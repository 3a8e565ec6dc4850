"""Access to a group's memory whose file was removed, through the ranks that have it mapped.

systemd-logind removes a user's files from /dev/shm when that user logs out, and other cleaners exist. The
ranks continue, but a rank that starts afterwards would form a second group.
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
            # O_NONBLOCK: another process may have a pipe with this name.
            descriptor = os.open(link, flags | os.O_CLOEXEC | os.O_NONBLOCK)
            found = os.fstat(descriptor)
            # The name in /proc may be the real name of another file.
            if stat.S_ISREG(found.st_mode) and found.st_nlink == 0 and found.st_uid == user:
                return descriptor
            os.close(descriptor)
    return None


def _links(name: str, user: int) -> Iterator[str]:
    for process in os.scandir("/proc"):
        # Processes exit while they are examined.
        with suppress(OSError):
            if not process.name.isdecimal() or process.stat().st_uid != user:
                continue
            for link in os.listdir(f"{process.path}/fd"):
                with suppress(OSError):
                    if os.readlink(f"{process.path}/fd/{link}") == name:
                        yield f"{process.path}/fd/{link}"
