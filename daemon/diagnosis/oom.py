"""Whether the kernel has just killed for want of memory: the counters of cgroups and of the machine.

It says whom it has killed nowhere but in its log, which few may read. So a count that rises just when a
program dies of signal 9 has to do. Counters that are not there, or may not be read, are left out.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path

#: Between two looks, and how many are kept: a death is noticed well within the time that they cover.
_INTERVAL = 5.0
_KEPT = 3
_MACHINE = "this machine"
_MOUNTS = Path("/sys/fs/cgroup")
_COUNT = re.compile(r"^oom_kill (\d+)$", re.MULTILINE)


class OomWatcher:
    def __init__(self, machine: Path = Path("/proc/vmstat")) -> None:
        #: Where somebody may be killed -> the file that counts it.
        self._files = {_MACHINE: machine}
        self._seen: deque[dict[str, int]] = deque(maxlen=_KEPT)
        self._next = 0.0

    def look(self, pids: Iterable[int], now: float) -> None:
        """To be called again and again with the processes that there are; looks now and then."""
        if now < self._next:
            return
        self._next = now + _INTERVAL
        for pid in pids:
            self._files.update(_counters_of(pid))
        self._seen.append(self._read())

    def risen(self) -> str:
        """Where it has happened within the last seconds, for people; empty if nowhere."""
        before: dict[str, int] = {}
        for seen in reversed(self._seen):
            before |= seen
        rose = [where for where, count in self._read().items() if count > before.get(where, count)]
        # A cgroup says more than the machine does.
        where = min(rose, key=lambda name: name == _MACHINE, default="")
        return where and f"the kernel has just killed a process of {where}"

    def _read(self) -> dict[str, int]:
        found = {}
        for where, file in self._files.items():
            with contextlib.suppress(OSError):
                if count := _COUNT.search(file.read_text(encoding="ascii", errors="replace")):
                    found[where] = int(count[1])
        return found


def _counters_of(pid: int) -> Iterator[tuple[str, Path]]:
    """Of the cgroups that it is in, of either version."""
    try:
        lines = Path(f"/proc/{pid}/cgroup").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            mounts, name = [_MOUNTS, _MOUNTS / "unified"], "memory.events"
        elif "memory" in controllers.split(","):
            mounts, name = [_MOUNTS / "memory"], "memory.oom_control"
        else:
            continue
        for mount in mounts:
            # In a container that does not see the tree above it, its own cgroup is the whole mount.
            for directory in (mount / path.lstrip("/"), mount):
                # Not Path.exists, which raises where we may not look.
                if os.path.exists(directory / name):
                    yield f"cgroup {path}", directory / name
                    break
