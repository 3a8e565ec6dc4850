"""Layout of the board in the memory that all workers of a router map.

    header     single cells
    rows       one per replica. Each field is one array over all rows, so that one call reads it for all
    counters   one set per worker, an array over all rows for each counter. Only that worker writes it
    texts      two per row: a registration is written into the one that is not in use
    table      the prefix table

Each cell has 8 bytes at a multiple of 8, so it is read and written in one piece. Zeroed memory is an empty
board.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import secrets
import sys
from enum import IntEnum, IntFlag

import msgspec

from ....common.errors import FastDeployError
from ..instance import Instance, RegistrationError
from ..policy.prefix_table import PrefixTable

ROWS = 256
#: Maximum number of workers. A gunicorn that replaces itself runs twice as many for a while.
WORKERS = 32
RETIRED = 256
ENDINGS = 256
#: Index of the counters that hold what other routers have in flight.
REMOTE = WORKERS
#: More than all cells need; untouched pages use no memory.
_CELL_BYTES = 1 << 20
_TEXT_BYTES = 8192
_TEXT_AREA = ROWS * 2 * _TEXT_BYTES
BYTES = _CELL_BYTES + _TEXT_AREA + PrefixTable.BYTES
_MAGIC = int.from_bytes(b"fd-board", "little")
#: Version of the layout. Increase it with any change below: a router hands its board to its next version.
_LAYOUT = 3


class ReplicaState(IntEnum):
    """State of a row; rows.py has the transitions."""

    FREE = 0
    UP = 1
    DOWN = 2
    PROBING = 3
    GONE = 4


class Flag(IntFlag):
    DRAINING = 1
    LEAVING = 2


class Ending(IntEnum):
    """How a replica ended, as fd-dp reports it."""

    UNKNOWN = 0
    #: It crashed, hung or ran out of memory.
    ITS_OWN = 1
    #: Something else ended it: a signal 9 from outside, or a planned stop.
    FROM_OUTSIDE = 2


class Header(IntEnum):
    """Cells of the header."""

    MAGIC = 0
    LAYOUT = 1
    #: Increases whenever anything but a counter changes.
    CHANGES = 2
    PICKS = 3
    GENERATION = 4
    #: Number of rows that have ever been used.
    ROWS = 5
    RETIRED = 6
    #: Random number that identifies the board.
    IDENTITY = 7
    #: 1 if the counters at REMOTE are in use.
    HAS_REMOTE = 8
    ENDINGS = 9


class BoardError(FastDeployError):
    """The memory is not a board of this version, or has no room."""


class CounterCells:
    """Counters of one worker, by row."""

    def __init__(self, cells: _Cells) -> None:
        self.in_flight = cells.ints(ROWS)
        #: Prompt tokens of the requests in flight.
        self.tokens = cells.ints(ROWS)
        #: Requests in flight that probe a replica.
        self.probes = cells.ints(ROWS)
        #: Tokens of streams that were passed on, and the seconds that took.
        self.passed = cells.ints(ROWS)
        self.seconds = cells.floats(ROWS)
        #: Time at which a replica was reserved for one request of this worker; 0 if it is not reserved.
        self.reserved = cells.floats(ROWS)
        # A cache line of its own.
        own = cells.ints(8)
        #: The worker; 0 if the slot is free.
        self.pid = own[:1]
        #: Requests that have ended, over all rows.
        self.ended = own[1:2]

    def clear(self) -> None:
        for cells in (
            *(self.in_flight, self.tokens, self.probes, self.passed, self.seconds, self.reserved),
            self.ended,
        ):
            cells.cast("B")[:] = bytes(cells.nbytes)


class BoardMemory:
    """Typed views of the mapped file."""

    def __init__(self, descriptor: int) -> None:
        """Map the board. Raises BoardError if the descriptor is not a board of this version."""
        self.descriptor = descriptor
        try:
            self._map = mmap.mmap(descriptor, BYTES)
        except (OSError, ValueError) as error:
            raise BoardError(f"descriptor {descriptor} is not a board: {error}") from None
        whole = memoryview(self._map)
        cells = _Cells(whole[:_CELL_BYTES])
        self.header = cells.ints(len(Header))
        #: Ring of hashes of instances that are not admitted again for a while, and when they were retired.
        self.retired, self.retired_at = cells.ints(RETIRED), cells.floats(RETIRED)
        #: Ring of hashes of starts of replicas, and how they ended.
        self.ended_start, self.ending = cells.ints(ENDINGS), cells.ints(ENDINGS)
        #: Time of the last loss of a replica; 0 before the first.
        self.lost_at = cells.floats(1)
        #: Requests that have ended lately, per second.
        self.drain_rate = cells.floats(1)
        self.state, self.flags, self.generation, self.text = (cells.ints(ROWS) for _ in range(4))
        self.failures, self.last_pick, self.pick_count = (cells.ints(ROWS) for _ in range(3))
        self.running, self.waiting, self.in_flight_at_poll = (cells.ints(ROWS) for _ in range(3))
        self.heartbeat_at, self.failed_at, self.since = (cells.floats(ROWS) for _ in range(3))
        self.probe_at, self.probe_wait, self.weight = (cells.floats(ROWS) for _ in range(3))
        #: Decayed sums of the counters of the same names.
        self.passed, self.seconds = (cells.floats(ROWS) for _ in range(2))
        self.counters = [CounterCells(cells) for _ in range(WORKERS + 1)]
        self._texts = whole[_CELL_BYTES : _CELL_BYTES + _TEXT_AREA]
        self.prefix_table = whole[_CELL_BYTES + _TEXT_AREA : BYTES]
        if (self.header[Header.MAGIC], self.header[Header.LAYOUT]) != (_MAGIC, _LAYOUT):
            raise BoardError(f"descriptor {descriptor} is not a board of this version")

    def write_text(self, row: int, text: bytes) -> None:
        """Store a registration. Only the last store makes it valid, so that the writer may die anywhere."""
        version = (self.text[row] >> 16) + 1
        begin = (2 * row + version % 2) * _TEXT_BYTES
        self._texts[begin : begin + len(text)] = text
        self.text[row] = version << 16 | len(text)

    def read_instance(self, row: int) -> Instance:
        version, length = self.text[row] >> 16, self.text[row] & 0xFFFF
        begin = (2 * row + version % 2) * _TEXT_BYTES
        return msgspec.json.decode(self._texts[begin : begin + length], type=Instance)


def create() -> int:
    """Return the descriptor of a new, empty board. It is inherited over exec and freed with its last user."""
    descriptor = os.memfd_create("fd-board", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.set_inheritable(descriptor, True)
    os.ftruncate(descriptor, BYTES)
    # A process that truncated the file would kill all others that map it.
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
    cells = {Header.MAGIC: _MAGIC, Header.LAYOUT: _LAYOUT, Header.IDENTITY: secrets.randbits(63)}
    for cell, value in cells.items():
        os.pwrite(descriptor, value.to_bytes(8, sys.byteorder), 8 * cell)
    return descriptor


def text_of(instance: Instance) -> bytes:
    """Return the argument of `write_text` for an instance. Raises RegistrationError if it is too long."""
    text = msgspec.json.encode(instance)
    if len(text) > _TEXT_BYTES:
        raise RegistrationError("invalid InstanceInfo format: too long")
    return text


class _Cells:
    """Cuts memory into consecutive views."""

    def __init__(self, memory: memoryview) -> None:
        self._rest = memory

    def ints(self, count: int) -> memoryview[int]:
        return self._cut(count).cast("q")

    def floats(self, count: int) -> memoryview[float]:
        return self._cut(count).cast("d")

    def _cut(self, count: int) -> memoryview:
        cut, self._rest = self._rest[: 8 * count], self._rest[8 * count :]
        assert cut.nbytes == 8 * count, "_CELL_BYTES is too small"
        return cut
