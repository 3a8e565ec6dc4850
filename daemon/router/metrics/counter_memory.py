"""Metrics of all workers in shared memory: there is no directory that could be removed or fill up.

    header     magic number and version of the layout
    totals     sums of workers that have ended
    sections   one per worker, which is its only writer while it lives

A section has the number of its cells in use, then entries: length of the key, key, value. A value is one
aligned cell, so that a reader never sees a part of it. Zeroed memory is an empty section.
"""

from __future__ import annotations

import logging
import mmap
import os
import sys
import threading
from collections.abc import Iterable, Iterator

import msgspec

from ..board.locks import KernelLocks
from ..board.memory import WORKERS, BoardError

logger = logging.getLogger(__name__)

_MAGIC = int.from_bytes(b"fd-count", "little")
_LAYOUT = 1
#: Room for about twenty thousand series; untouched pages use no memory.
_SECTION_BYTES = 4 << 20
_TOTALS = WORKERS
_BYTES = mmap.PAGESIZE + (WORKERS + 1) * _SECTION_BYTES


class CounterMemory:
    """One process's access to the metrics of all workers."""

    def __init__(self, descriptor: int) -> None:
        """Map the counters. Raises BoardError if the descriptor has no counters of this version."""
        self.descriptor = descriptor
        try:
            whole = memoryview(mmap.mmap(descriptor, _BYTES))
        except (OSError, ValueError) as error:
            raise BoardError(f"descriptor {descriptor} has no counters: {error}") from None
        if tuple(whole[:16].cast("q")) != (_MAGIC, _LAYOUT):
            raise BoardError(f"descriptor {descriptor} has no counters of this version")
        starts = range(mmap.PAGESIZE, _BYTES, _SECTION_BYTES)
        self._sections = [Section(whole[start : start + _SECTION_BYTES]) for start in starts]
        self._totals = self._sections[_TOTALS]
        self._own: int | None = None
        self._lock = KernelLocks(descriptor, after_fork=self._disown)

    def close(self) -> None:
        self._lock.close()
        os.close(self.descriptor)

    def own_section(self) -> Section:
        """Return the section of this process, which it keeps until it ends.

        Raises BoardError if all sections are taken.
        """
        with self._lock:
            if self._own is None:
                self._collect_from_dead()
                free = (number for number in range(WORKERS) if self._lock.take_liveness(number))
                self._own = next(free, None)
            if self._own is None:
                raise BoardError(f"the counters for {WORKERS} workers are all taken")
            return self._sections[self._own]

    def collect_from_dead(self) -> None:
        """Add the counts of workers that have ended to the totals."""
        with self._lock:
            self._collect_from_dead()

    def read(self) -> dict[bytes, float]:
        """Return each counter's sum over all workers, including those that have ended."""
        values: dict[bytes, float] = {}
        # Under the lock, so that no count moves from one section to another meanwhile.
        with self._lock:
            for section in self._sections:
                for key, value in section.items():
                    values[key] = values.get(key, 0.0) + value
        return values

    def _collect_from_dead(self) -> None:
        for number, section in enumerate(self._sections[:WORKERS]):
            if section.is_empty or number == self._own or self._lock.is_held_elsewhere(number):
                continue
            section.move_to(self._totals)

    def _disown(self) -> None:
        self._own = None
        for section in self._sections:
            section.forget()


def create() -> int:
    """Return the descriptor of new, empty memory. It is inherited over exec, and freed with its last user."""
    descriptor = os.memfd_create("fd-counters", os.MFD_CLOEXEC)
    os.set_inheritable(descriptor, True)
    os.ftruncate(descriptor, _BYTES)
    for cell, value in enumerate((_MAGIC, _LAYOUT)):
        os.pwrite(descriptor, value.to_bytes(8, sys.byteorder), 8 * cell)
    return descriptor


class Section:
    """Counters of one worker by key. Any thread may add a counter; a single thread increments it."""

    def __init__(self, memory: memoryview) -> None:
        self._bytes = memory
        self._integers = memory.cast("q")
        self._floats = memory.cast("d")
        self._is_full = False
        self.forget()

    def forget(self) -> None:
        """Drop the state of the parent process after a fork, whose lock another thread may have held."""
        self._lock = threading.Lock()
        self._positions: dict[bytes, int] = {}

    @property
    def is_empty(self) -> bool:
        return self._integers[0] == 0

    def cell(self, key: bytes) -> memoryview[float]:
        """Return the cell with the value of `key`; a private cell if there is no room for a new one."""
        with self._lock:
            position = self._positions.get(key)
            if position is None:
                position = self._append(key)
            if position is None:
                return memoryview(bytearray(8)).cast("d")
            return self._floats[position : position + 1]

    def items(self) -> Iterator[tuple[bytes, float]]:
        return ((key, self._floats[position]) for key, position in self._entries())

    def move_to(self, totals: Section) -> None:
        """Move all counts, one by one, so that at most one is lost if the process dies meanwhile."""
        totals._read_positions()
        for key, position in self._entries():
            totals.cell(key)[0] += self._floats[position]
            self._floats[position] = 0.0
        self._integers[0] = 0
        self._positions.clear()

    def _append(self, key: bytes) -> int | None:
        begin = self._integers[0] or 1
        position = begin + 1 + -(-len(key) // 8)
        if position >= len(self._integers):
            if not self._is_full:
                self._is_full = True
                logger.warning(
                    "no room for more counters: /metrics lacks new ones from now on, such as %r", key
                )
            return None
        self._integers[begin] = len(key)
        self._bytes[8 * (begin + 1) : 8 * (begin + 1) + len(key)] = key
        self._floats[position] = 0.0
        # This store makes the entry valid.
        self._integers[0] = position + 1
        self._positions[key] = position
        return position

    def _read_positions(self) -> None:
        """Find the entries that other processes have added."""
        self._positions = dict(self._entries())

    def _entries(self) -> Iterator[tuple[bytes, int]]:
        begin, end = 1, min(self._integers[0], len(self._integers))
        while begin < end:
            length = self._integers[begin]
            position = begin + 1 + -(-length // 8)
            if length < 0 or position >= end:
                raise BoardError(f"the counters are damaged: a key of {length} bytes")
            yield bytes(self._bytes[8 * (begin + 1) : 8 * (begin + 1) + length]), position
            begin = position + 1


def value_class(section: Section) -> type:
    """Return a class for `prometheus_client.values.ValueClass` that keeps its values in that section."""

    class SharedValue:
        _multiprocess = True

        def __init__(
            self,
            kind: str,
            metric: str,
            sample: str,
            label_names: Iterable[str],
            label_values: Iterable[str],
            help_text: str,
            **_: object,
        ) -> None:
            labels = dict(zip(label_names, label_values, strict=True))
            self._cell = section.cell(msgspec.json.encode((kind, metric, help_text, sample, labels)))

        def inc(self, amount: float) -> None:
            self._cell[0] += amount

        def set(self, value: float, timestamp: float | None = None) -> None:
            self._cell[0] = value

        def get(self) -> float:
            return self._cell[0]

        def set_exemplar(self, exemplar: object) -> None:
            """Do nothing: exemplars are not kept."""

        def get_exemplar(self) -> None:
            return None

    return SharedValue
