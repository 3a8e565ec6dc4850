"""Allocation of the blocks of the KV cache, and the prefix cache."""

from __future__ import annotations

import hashlib
import heapq
from array import array
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence

#: Parent hash of the first block of a text.
ROOT_HASH = bytes(32)


def root_hash(salt: str) -> bytes:
    """Return the parent hash of the first block of a text that only requests with this salt share."""
    if not salt:
        return ROOT_HASH
    return hashlib.blake2b(salt.encode(), digest_size=32, person=b"cache salt").digest()


def hash_block(parent: bytes, token_ids: list[int]) -> bytes:
    """Return the hash of a full block and all text before it; `parent` is the hash of the preceding block.

    The hash is cryptographic, because a collision would serve one client the cached text of another.
    """
    return hashlib.blake2b(parent + array("I", token_ids).tobytes(), digest_size=32).digest()


class BlockPool:
    """Allocates block ids, without access to the memory of the blocks.

    A block is free or held by one or more sequences. A free block with published content can be found until
    it is reused. Blocks without content are allocated first, lowest id first, so that unused cache memory is
    never touched; then published blocks, least recently held first.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._holders = [0] * num_blocks
        self._hash_of: list[bytes | None] = [None] * num_blocks
        self._block_of: dict[bytes, int] = {}
        # Free and without content. Ascending, and therefore already a heap.
        self._blank = list(range(num_blocks))
        # Free with published content. A plain dict would scan over deleted entries to find its first key.
        self._evictable: OrderedDict[int, None] = OrderedDict()

    @property
    def num_free(self) -> int:
        return len(self._blank) + len(self._evictable)

    @property
    def num_tokens(self) -> int:
        """Capacity of the whole cache in tokens."""
        return self.num_blocks * self.block_size

    def allocate(self, count: int) -> list[int]:
        """Allocate `count` blocks with one holder each; their former content can no longer be found."""
        assert count <= self.num_free, f"{count} blocks requested, {self.num_free} free"
        return [self._take_one() for _ in range(count)]

    def find(self, hashes: Iterable[bytes]) -> list[int]:
        """Return the blocks of the longest known prefix. `share` them before the next allocation."""
        found = []
        for block_hash in hashes:
            block = self._block_of.get(block_hash)
            if block is None:
                break
            found.append(block)
        return found

    def num_free_among(self, blocks: Sequence[int]) -> int:
        """Return how many of `blocks` have no holder."""
        return sum(self._holders[block] == 0 for block in blocks)

    def share(self, blocks: Sequence[int]) -> None:
        """Add a holder to blocks that `find` returned."""
        for block in blocks:
            assert self._hash_of[block] is not None, f"block {block} has no published content to share"
            if self._holders[block] == 0:
                del self._evictable[block]
            self._holders[block] += 1

    def publish(self, block: int, block_hash: bytes) -> None:
        """Make a full, computed block findable. If its content is already published, keep the first block."""
        assert self._holders[block] > 0, f"block {block} is published but not held"
        assert self._hash_of[block] in (None, block_hash), f"block {block} is published with two contents"
        if block_hash not in self._block_of:
            self._block_of[block_hash] = block
            self._hash_of[block] = block_hash

    def release(self, blocks: Sequence[int]) -> None:
        """Remove one holder from each block of a sequence.

        The last block becomes free first: a prefix is found from its head, so its tail should be evicted
        first.
        """
        for block in reversed(blocks):
            assert self._holders[block] > 0, f"block {block} is released but not held"
            self._holders[block] -= 1
            if self._holders[block] > 0:
                continue
            if self._hash_of[block] is None:
                heapq.heappush(self._blank, block)
            else:
                self._evictable[block] = None

    def check(self, held: Iterable[Sequence[int]]) -> None:
        """Check the bookkeeping against the blocks that the live sequences hold.

        Raises:
            AssertionError: it is inconsistent, also under ``python -O``; the message names the block.
        """
        expected = Counter(block for blocks in held for block in blocks)
        blank, evictable = set(self._blank), set(self._evictable)
        if len(blank) != len(self._blank):
            raise AssertionError("KV cache: a block is in the free list twice")
        for block, holders in enumerate(self._holders):
            if holders != expected[block]:
                raise AssertionError(
                    f"KV cache: block {block} has {holders} holders, but sequences hold it {expected[block]}x"
                )
            block_hash = self._hash_of[block]
            if block_hash is not None and self._block_of.get(block_hash) != block:
                raise AssertionError(f"KV cache: block {block} is published under a hash of another block")
            is_free = (block in blank, block in evictable)
            if is_free != (holders == 0 and block_hash is None, holders == 0 and block_hash is not None):
                raise AssertionError(
                    f"KV cache: block {block} with {holders} holders is on the wrong free list"
                )
        if len(self._block_of) != sum(block_hash is not None for block_hash in self._hash_of):
            raise AssertionError("KV cache: a hash is registered for a block without it")

    def _take_one(self) -> int:
        if self._blank:
            block = heapq.heappop(self._blank)
        else:
            block, _ = self._evictable.popitem(last=False)
            block_hash = self._hash_of[block]
            assert block_hash is not None, f"block {block} is evictable but was never published"
            del self._block_of[block_hash]
            self._hash_of[block] = None
        assert self._holders[block] == 0, f"block {block} is allocated but still held"
        self._holders[block] = 1
        return block
