"""Which replica has seen the beginning of a prompt before, and so probably has it in its prefix cache.

An open hash table in shared memory: a block of a prompt -> the replicas that were sent a prompt with it.
Blocks are named by hashes that stand for all text up to their end (request_facts.py), so a chain of them
needs no links. The table has a fixed size: in a full bucket the block that was used longest ago makes room.

It is a guess. A replica may have dropped a block since, and nobody tells the router; the price is a prompt
computed again. All calls come under the board's lock. A holder of it that dies in the middle of a call leaves
at worst a block with too few replicas.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from typing import ClassVar

WAYS = 8
BUCKETS = 1 << 14


class PrefixTable:
    """128k blocks, for up to 256 replicas. Zeroed memory is an empty table."""

    ROWS: ClassVar[int] = 256
    #: A clock, then all hashes, then when each was used last, then a bit for each replica.
    BYTES: ClassVar[int] = 8 + BUCKETS * WAYS * (8 + 8 + ROWS // 8)

    def __init__(self, memory: memoryview) -> None:
        blocks = BUCKETS * WAYS
        words = memory[: 8 + 16 * blocks].cast("Q")
        self._clock = words[:1]
        self._hashes = words[1 : 1 + blocks]
        self._used = words[1 + blocks :]
        self._rows = memory[8 + 16 * blocks : self.BYTES]

    def match(self, prefix: Sequence[int]) -> Mapping[int, int]:
        """How many leading blocks each row has: rows with none of them are missing."""
        matched: dict[int, int] = {}
        rows = (1 << self.ROWS) - 1
        for depth, block in enumerate(prefix):
            slot = self._find(block)
            # Nothing after a gap counts: a replica's cache has no use for it either.
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
        """A prompt with these blocks has been sent to that row."""
        byte, bit = row >> 3, 1 << (row & 7)
        now = self._clock[0] = self._clock[0] + 1
        for block in prefix:
            slot = self._find(block)
            if slot is None:
                slot = self._make_room(block)
                self._rows[_WIDTH * slot : _WIDTH * (slot + 1)] = _NO_ROWS
                self._hashes[slot] = block
            self._used[slot] = now
            self._rows[_WIDTH * slot + byte] |= bit

    def forget_row(self, row: int) -> None:
        """Nothing is known of that row any more: somebody else will have it."""
        # The row's byte of every block at once: about a millisecond, under the lock that every pick takes.
        column = self._rows[row >> 3 :: _WIDTH]
        self._rows[row >> 3 :: _WIDTH] = column.tobytes().translate(_WITHOUT_BIT[row & 7])

    def _find(self, block: int) -> int | None:
        first = block % BUCKETS * WAYS
        bucket = _BUCKET.unpack_from(self._hashes, 8 * first)
        return first + bucket.index(block) if block in bucket else None

    def _make_room(self, block: int) -> int:
        """A free slot has never been used and so is the oldest."""
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
    """matched[row] = depth for every bit of `rows`."""
    while rows:
        lowest = rows & -rows
        matched[lowest.bit_length() - 1] = depth
        rows ^= lowest
