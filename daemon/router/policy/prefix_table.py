"""Table of prompt prefixes and the replicas that were sent them, and so probably have them in their caches.

An open hash table in shared memory: block of a prompt -> replicas that were sent a prompt with it. A block is
identified by the hash of all text up to its end (request_facts.py), so that a chain of blocks needs no links.
The size is fixed: in a full bucket, the least recently used block is replaced.

The table is a guess. A replica may have evicted a block without the router's knowledge; then a prompt is
computed again. All calls come under the board's lock. A process that dies in the middle of a call leaves at
worst a block with too few replicas.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from typing import ClassVar

WAYS = 8
BUCKETS = 1 << 14


class PrefixTable:
    """Table of 128k blocks for up to 256 replicas (rows of the board). Zeroed memory is an empty table."""

    ROWS: ClassVar[int] = 256
    #: A clock, all hashes, the time of each block's last use, then a bit per replica for each block.
    BYTES: ClassVar[int] = 8 + BUCKETS * WAYS * (8 + 8 + ROWS // 8)

    def __init__(self, memory: memoryview) -> None:
        blocks = BUCKETS * WAYS
        words = memory[: 8 + 16 * blocks].cast("Q")
        self._clock = words[:1]
        self._hashes = words[1 : 1 + blocks]
        self._used = words[1 + blocks :]
        self._rows = memory[8 + 16 * blocks : self.BYTES]

    def match(self, prefix: Sequence[int]) -> Mapping[int, int]:
        """Return row -> number of leading blocks that it has; rows with none are missing."""
        matched: dict[int, int] = {}
        rows = (1 << self.ROWS) - 1
        for depth, block in enumerate(prefix):
            slot = self._find(block)
            # Blocks after a gap do not count: a replica's cache cannot use them either.
            still = rows & self._rows_of(slot) if slot is not None else 0
            if depth:
                _set(matched, rows & ~still, depth)
            rows = still
            if not rows:
                return matched
        if prefix:
            _set(matched, rows, len(prefix))
        return matched

    def insert(self, prefix: Sequence[int], row: int) -> None:
        """Record that a prompt with these blocks is sent to a row."""
        byte, bit = row >> 3, 1 << (row & 7)
        now = self._clock[0] = self._clock[0] + 1
        for block in prefix:
            slot = self._find(block)
            if slot is None:
                slot = self._evict(block)
                self._rows[_WIDTH * slot : _WIDTH * (slot + 1)] = _NO_ROWS
                self._hashes[slot] = block
            self._used[slot] = now
            self._rows[_WIDTH * slot + byte] |= bit

    def forget_row(self, row: int) -> None:
        """Remove a row from all blocks, before another replica gets it."""
        # One byte of every block in a single assignment: a millisecond under the lock that every pick takes.
        column = self._rows[row >> 3 :: _WIDTH]
        self._rows[row >> 3 :: _WIDTH] = column.tobytes().translate(_WITHOUT_BIT[row & 7])

    def _find(self, block: int) -> int | None:
        first = block % BUCKETS * WAYS
        bucket = _BUCKET.unpack_from(self._hashes, 8 * first)
        return first + bucket.index(block) if block in bucket else None

    def _evict(self, block: int) -> int:
        """Return the least recently used slot of the block's bucket; a free slot has never been used."""
        first = block % BUCKETS * WAYS
        used = _BUCKET.unpack_from(self._used, 8 * first)
        return first + used.index(min(used))

    def _rows_of(self, slot: int) -> int:
        return int.from_bytes(self._rows[_WIDTH * slot : _WIDTH * (slot + 1)], "little")


#: Bytes of a block's replicas.
_WIDTH = PrefixTable.ROWS // 8
_NO_ROWS = bytes(_WIDTH)
_BUCKET = struct.Struct(f"={WAYS}Q")
_WITHOUT_BIT = tuple(bytes(byte & ~(1 << bit) for byte in range(256)) for bit in range(8))


def _set(matched: dict[int, int], rows: int, depth: int) -> None:
    """Set matched[row] = depth for every bit of `rows`."""
    while rows:
        lowest = rows & -rows
        matched[lowest.bit_length() - 1] = depth
        rows ^= lowest
