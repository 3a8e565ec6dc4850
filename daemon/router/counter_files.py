"""The files in which the workers count for Prometheus; those of the dead are kept in one pair of files.

prometheus_client would leave a dead worker's files as they are, and read them all whenever somebody looks:
some more after each reload, for as long as the router runs.
"""

from __future__ import annotations

import fcntl
import glob
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from prometheus_client.core import Metric
from prometheus_client.mmap_dict import MmapedDict
from prometheus_client.multiprocess import MultiProcessCollector

#: In place of a pid in the names of the files.
_DEAD = 0


class CounterFiles(MultiProcessCollector):
    """What all workers have counted, the dead included."""

    def collect(self) -> Iterable[Metric]:
        """While nothing moves from one file to another; it may have to wait for that, some milliseconds."""
        with _locked(self._path, fcntl.LOCK_SH):
            files = glob.glob(f"{glob.escape(self._path)}/*.db")
            # One that is being made is empty for a moment.
            return list(self.merge([file for file in files if os.path.getsize(file)]))


def bury(directory: Path, pid: int) -> None:
    """Adds the counts of that worker, which has ended, to those of all that have. Raises OSError."""
    with _locked(directory, fcntl.LOCK_EX):
        for file in directory.glob(f"*_{pid}.db"):
            if file.stat().st_size:
                _add(file, file.with_name(f"{file.name.rpartition('_')[0]}_{_DEAD}.db"))
            file.unlink()


def _add(file: Path, total_file: Path) -> None:
    total = MmapedDict(str(total_file))
    try:
        for key, value, timestamp, _ in MmapedDict.read_all_values_from_file(str(file)):
            total.write_value(key, total.read_value(key)[0] + value, timestamp)
    finally:
        total.close()


@contextmanager
def _locked(directory: Path | str, kind: int) -> Iterator[None]:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, kind)
        yield
    finally:
        os.close(descriptor)
