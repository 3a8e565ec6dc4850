"""The blocks of the KV cache: who holds which, and which still carry a text worth finding again."""

from __future__ import annotations

import hashlib
import heapq
from array import array
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence

#: Parent of a text's first block.
ROOT_HASH = bytes(32)


def hash_block(parent: bytes, token_ids: list[int]) -> bytes:
    """Names a full block by its tokens and, through `parent`, by everything before them.

    A cryptographic hash, because a client who could build a collision would be served another client's text.
    """
    return hashlib.blake2b(parent + array("I", token_ids).tobytes(), digest_size=32).digest()


class BlockPool:
    """Hands out block ids. It never sees the memory behind them.

    A block is held by one or more sequences, or free. A free block whose content was published stays findable
    until its memory is needed: such blocks are given out last, least recently held first. Before them go
    blocks without content, lowest id first, so that cache memory nobody has needed is never touched.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._holders = [0] * num_blocks
        self._hash_of: list[bytes | None] = [None] * num_blocks
        self._block_of: dict[bytes, int] = {}
        # Ascending, hence already a heap.
        self._blank = list(range(num_blocks))
        # Free but published. An OrderedDict: taking the first of a plain dict scans over its deletions.
        self._evictable: OrderedDict[int, None] = OrderedDict()

    @property
    def num_free(self) -> int:
        return len(self._blank) + len(self._evictable)

    @property
    def num_tokens(self) -> int:
        """What the whole cache can hold."""
        return self.num_blocks * self.block_size

    def allocate(self, count: int) -> list[int]:
        """Gives out `count` blocks with one holder each; their former content can no longer be found."""
        assert count <= self.num_free, f"{count} blocks wanted, {self.num_free} free"
        return [self._take_one() for _ in range(count)]

    def find(self, hashes: Iterable[bytes]) -> list[int]:
        """Blocks of the longest known prefix, not held yet: `share` them before anything is allocated."""
        found = []
        for block_hash in hashes:
            block = self._block_of.get(block_hash)
            if block is None:
                break
            found.append(block)
        return found

    def num_free_among(self, blocks: Sequence[int]) -> int:
        return sum(self._holders[block] == 0 for block in blocks)

    def share(self, blocks: Sequence[int]) -> None:
        """Adds a holder to blocks that `find` returned."""
        for block in blocks:
            assert self._hash_of[block] is not None, f"block {block} has no published content to share"
            if self._holders[block] == 0:
                del self._evictable[block]
            self._holders[block] += 1

    def publish(self, block: int, block_hash: bytes) -> None:
        """Makes a full, computed block findable. The first block of a content keeps the name."""
        assert self._holders[block] > 0, f"block {block} is published but nobody holds it"
        assert self._hash_of[block] in (None, block_hash), f"block {block} is published with two contents"
        if block_hash not in self._block_of:
            self._block_of[block_hash] = block
            self._hash_of[block] = block_hash

    def release(self, blocks: Sequence[int]) -> None:
        """Takes one holder from each block of a sequence.

        The last block becomes free first: a chain is found from its head, so its tail must be evicted before.
        """
        for block in reversed(blocks):
            assert self._holders[block] > 0, f"block {block} is released but nobody holds it"
            self._holders[block] -= 1
            if self._holders[block] > 0:
                continue
            if self._hash_of[block] is None:
                heapq.heappush(self._blank, block)
            else:
                self._evictable[block] = None

    def check(self, held: Iterable[Sequence[int]]) -> None:
        """Audits the books against the blocks that each live sequence says it holds.

        Raises:
            AssertionError: explicitly, so that it also does under ``python -O``; one line naming the block.
        """
        expected = Counter(block for blocks in held for block in blocks)
        blank, evictable = set(self._blank), set(self._evictable)
        if len(blank) != len(self._blank):
            raise AssertionError("KV cache: a block is in the free list twice")
        for block, holders in enumerate(self._holders):
            if holders != expected[block]:
                raise AssertionError(
                    f"KV cache: block {block} counts {holders} holders, sequences hold it {expected[block]}x"
                )
            block_hash = self._hash_of[block]
            if block_hash is not None and self._block_of.get(block_hash) != block:
                raise AssertionError(
                    f"KV cache: block {block} is published under a name that leads elsewhere"
                )
            is_free = (block in blank, block in evictable)
            if is_free != (holders == 0 and block_hash is None, holders == 0 and block_hash is not None):
                raise AssertionError(
                    f"KV cache: block {block} with {holders} holders is on the wrong free list"
                )
        if len(self._block_of) != sum(block_hash is not None for block_hash in self._hash_of):
            raise AssertionError("KV cache: a name leads to a block that does not carry it")

    def _take_one(self) -> int:
        if self._blank:
            block = heapq.heappop(self._blank)
        else:
            block, _ = self._evictable.popitem(last=False)
            block_hash = self._hash_of[block]
            assert block_hash is not None, f"block {block} is evictable but was never published"
            del self._block_of[block_hash]
            self._hash_of[block] = None
        assert self._holders[block] == 0, f"block {block} is given out but still held"
        self._holders[block] = 1
        return block
