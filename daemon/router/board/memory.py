"""The bytes of the board: what lies where in the memory that all workers of a router map.

    header     what there is once
    rows       one for each replica: a field of all rows lies together, so that one call reads it for all
    columns    one for each worker: counters for each row, which nobody else writes
    texts      two for each row: the replica's registration is written into the one that is not in use
    table      the prefix table's

All cells are 8 bytes at multiples of 8: each is read and written whole. Zeroed memory is an empty board.
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
#: One for each worker; a gunicorn that replaces itself runs twice as many for a while.
WORKERS = 32
RETIRED = 256
ENDINGS = 256
#: The column for what other routers have in flight.
REMOTE = WORKERS
#: More than all cells need; what is not touched takes no memory.
_CELL_BYTES = 1 << 20
_TEXT_BYTES = 8192
_TEXT_AREA = ROWS * 2 * _TEXT_BYTES
BYTES = _CELL_BYTES + _TEXT_AREA + PrefixTable.BYTES
_MAGIC = int.from_bytes(b"fd-board", "little")
#: Changes with everything below: an old router must not hand its board to a new one that reads it otherwise.
_LAYOUT = 3


class State(IntEnum):
    """board.py has the table of moves."""

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
    #: Moves whenever anything else than a counter changes.
    CHANGES = 2
    PICKS = 3
    GENERATION = 4
    #: Rows from here on have never been used.
    ROWS = 5
    RETIRED = 6
    #: A random number: which board this is.
    IDENTITY = 7
    #: Other routers count in the column REMOTE.
    HAS_REMOTE = 8
    ENDINGS = 9


class BoardError(FastDeployError):
    """There is no board there, or none of this version."""


class Column:
    """A worker's counters, by row."""

    def __init__(self, cells: _Cells) -> None:
        self.in_flight = cells.ints(ROWS)
        #: Prompt tokens of the requests in flight.
        self.tokens = cells.ints(ROWS)
        #: Requests in flight that try a replica out.
        self.probes = cells.ints(ROWS)
        #: Of streams: tokens that were passed on, and the seconds that took.
        self.passed = cells.ints(ROWS)
        self.seconds = cells.floats(ROWS)
        #: When a replica was reserved for one request of this worker; 0 if it is not reserved.
        self.reserved = cells.floats(ROWS)
        # A cache line of its own.
        own = cells.ints(8)
        #: Whose column it is; 0 if nobody's.
        self.pid = own[:1]
        #: Requests that have ended, of all rows.
        self.ended = own[1:2]

    def clear(self) -> None:
        for cells in (
            *(self.in_flight, self.tokens, self.probes, self.passed, self.seconds, self.reserved),
            self.ended,
        ):
            cells.cast("B")[:] = bytes(cells.nbytes)


class BoardMemory:
    """Views of the mapped file. Knows where things are, not what they mean."""

    def __init__(self, descriptor: int) -> None:
        """Raises BoardError if the descriptor is no board of this version."""
        self.descriptor = descriptor
        try:
            self._map = mmap.mmap(descriptor, BYTES)
        except (OSError, ValueError) as error:
            raise BoardError(f"descriptor {descriptor} is no board: {error}") from None
        whole = memoryview(self._map)
        cells = _Cells(whole[:_CELL_BYTES])
        self.header = cells.ints(len(Header))
        #: A ring: hashes of instances that are not admitted again for a while, and since when.
        self.retired, self.retired_at = cells.ints(RETIRED), cells.floats(RETIRED)
        #: A ring: hashes of starts of replicas, and how they ended.
        self.ended_start, self.ending = cells.ints(ENDINGS), cells.ints(ENDINGS)
        #: When a replica was last lost; 0 if none ever was.
        self.lost_at = cells.floats(1)
        #: Requests that ended per second, lately.
        self.drain_rate = cells.floats(1)
        self.state, self.flags, self.generation, self.text = (cells.ints(ROWS) for _ in range(4))
        self.failures, self.last_pick, self.picks = (cells.ints(ROWS) for _ in range(3))
        self.running, self.waiting, self.in_flight_then = (cells.ints(ROWS) for _ in range(3))
        self.heard_at, self.failed_at, self.since = (cells.floats(ROWS) for _ in range(3))
        self.probe_at, self.probe_wait, self.weight = (cells.floats(ROWS) for _ in range(3))
        #: Decayed sums of what the columns have of it.
        self.passed, self.seconds = (cells.floats(ROWS) for _ in range(2))
        self.columns = [Column(cells) for _ in range(WORKERS + 1)]
        self._texts = whole[_CELL_BYTES : _CELL_BYTES + _TEXT_AREA]
        self.prefix_table = whole[_CELL_BYTES + _TEXT_AREA : BYTES]
        if (self.header[Header.MAGIC], self.header[Header.LAYOUT]) != (_MAGIC, _LAYOUT):
            raise BoardError(f"descriptor {descriptor} is no board of this version")

    def write_text(self, row: int, text: bytes) -> None:
        """Takes effect with its last store, wherever the writer dies."""
        version = (self.text[row] >> 16) + 1
        begin = (2 * row + version % 2) * _TEXT_BYTES
        self._texts[begin : begin + len(text)] = text
        self.text[row] = version << 16 | len(text)

    def read_instance(self, row: int) -> Instance:
        version, length = self.text[row] >> 16, self.text[row] & 0xFFFF
        begin = (2 * row + version % 2) * _TEXT_BYTES
        return msgspec.json.decode(self._texts[begin : begin + length], type=Instance)


def create() -> int:
    """The descriptor of a new, empty board. It is inherited over exec, and freed with its last user."""
    descriptor = os.memfd_create("fd-board", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.set_inheritable(descriptor, True)
    os.ftruncate(descriptor, BYTES)
    # Nobody can pull the memory from under the others.
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
    cells = {Header.MAGIC: _MAGIC, Header.LAYOUT: _LAYOUT, Header.IDENTITY: secrets.randbits(63)}
    for cell, value in cells.items():
        os.pwrite(descriptor, value.to_bytes(8, sys.byteorder), 8 * cell)
    return descriptor


def text_of(instance: Instance) -> bytes:
    """What `write_text` takes. Raises RegistrationError if it is too long."""
    text = msgspec.json.encode(instance)
    if len(text) > _TEXT_BYTES:
        raise RegistrationError("invalid InstanceInfo format: too long")
    return text


class _Cells:
    """Cuts memory into views, one after the other."""

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
