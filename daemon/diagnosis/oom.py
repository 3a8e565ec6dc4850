"""Detection of recent OOM kills from the counters of cgroups and of the machine.

The kernel names the killed process only in its log, which needs privileges to read. So a counter that rises
at the time of an exit by signal 9 has to suffice. Missing and unreadable counters are ignored.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path

#: Seconds between samples, and their number. Exits are noticed well within the time that they cover.
_INTERVAL = 5.0
_SAMPLES = 3
_MACHINE = "this machine"
_MOUNTS = Path("/sys/fs/cgroup")
_COUNT = re.compile(r"^oom_kill (\d+)$", re.MULTILINE)


class OomWatcher:
    """Samples of the counters `oom_kill`.

    Args:
        machine: file with the counter of the whole machine.
    """

    def __init__(self, machine: Path = Path("/proc/vmstat")) -> None:
        #: Machine or cgroup, for people -> file with its counter.
        self._files = {_MACHINE: machine}
        self._samples: deque[dict[str, int]] = deque(maxlen=_SAMPLES)
        self._next = 0.0

    def poll(self, pids: Iterable[int], now: float) -> None:
        """Take a sample if one is due, for the cgroups of these processes as well."""
        if now < self._next:
            return
        self._next = now + _INTERVAL
        for pid in pids:
            self._files.update(_counters_of(pid))
        self._samples.append(self._read())

    def recent_kill(self) -> str:
        """Return a sentence about an OOM kill within the last seconds, or ""."""
        before: dict[str, int] = {}
        for sample in reversed(self._samples):
            before |= sample
        rose = [where for where, count in self._read().items() if count > before.get(where, count)]
        # A cgroup is more specific than the machine.
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
    """Yield the counters of the cgroups of a process, of version 1 and 2."""
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
            # In a container the mount may show only its own cgroup.
            for directory in (mount / path.lstrip("/"), mount):
                # Path.exists would raise PermissionError.
                if os.path.exists(directory / name):
                    yield f"cgroup {path}", directory / name
                    break
