from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from fastdeploy.core.block_pool import ROOT_HASH, BlockPool, hash_block, root_hash


def test_each_salt_has_its_own_root() -> None:
    roots = [root_hash(salt) for salt in ("", "a", "b", "ab", "\x00" * 32)]
    assert roots[0] == ROOT_HASH
    assert len(set(roots)) == len(roots)


def test_untouched_memory_is_used_last() -> None:
    pool = BlockPool(8, 4)
    first = pool.allocate(3)
    pool.release(first)
    assert pool.allocate(3) == first == [0, 1, 2]


def test_blocks_without_content_are_used_before_cached_ones() -> None:
    pool = BlockPool(3, 4)
    cached, blank = pool.allocate(2)
    pool.publish(cached, b"a")
    pool.release([cached, blank])
    assert pool.allocate(2) == [blank, 2]
    assert pool.find([b"a"]) == [cached]


def test_eviction_takes_least_recently_held_and_tails_before_heads() -> None:
    pool = BlockPool(4, 4)
    old, new = pool.allocate(2), pool.allocate(2)
    for block, name in zip(old + new, (b"old0", b"old1", b"new0", b"new1"), strict=True):
        pool.publish(block, name)
    pool.release(old)
    pool.release(new)
    assert pool.allocate(4) == [old[1], old[0], new[1], new[0]]


def test_a_found_prefix_ends_at_the_first_gap() -> None:
    pool = BlockPool(4, 4)
    blocks = pool.allocate(3)
    for block, name in zip(blocks, (b"a", b"b", b"d"), strict=True):
        pool.publish(block, name)
    assert pool.find([b"a", b"b", b"c", b"d"]) == blocks[:2]


def test_a_shared_block_is_free_only_when_the_last_holder_has_gone() -> None:
    pool = BlockPool(1, 4)
    blocks = pool.allocate(1)
    pool.publish(blocks[0], b"a")
    pool.share(blocks)
    pool.release(blocks)
    assert pool.num_free == 0
    pool.release(blocks)
    assert pool.num_free == 1


def test_equal_blocks_computed_twice_are_published_once() -> None:
    pool = BlockPool(2, 4)
    first, second = pool.allocate(2)
    pool.publish(first, b"a")
    pool.publish(second, b"a")
    assert pool.find([b"a"]) == [first]
    pool.release([second])
    pool.check([[first]])


def test_a_hash_tells_texts_apart_that_share_a_block() -> None:
    assert hash_block(ROOT_HASH, [1, 2]) == hash_block(ROOT_HASH, [1, 2])
    assert hash_block(ROOT_HASH, [1, 2]) != hash_block(ROOT_HASH, [2, 1])
    assert hash_block(hash_block(ROOT_HASH, [1, 2]), [3, 4]) != hash_block(
        hash_block(ROOT_HASH, [2, 1]), [3, 4]
    )


def test_misuse_is_stopped_where_ownership_changes() -> None:
    pool = BlockPool(2, 4)
    block = pool.allocate(1)
    with pytest.raises(AssertionError, match="2 blocks requested, 1 free"):
        pool.allocate(2)
    with pytest.raises(AssertionError, match="no published content"):
        pool.share(block)
    pool.release(block)
    with pytest.raises(AssertionError, match="released but not held"):
        pool.release(block)
    with pytest.raises(AssertionError, match="published but not held"):
        pool.publish(block[0], b"a")


def test_the_audit_names_a_leaked_block() -> None:
    pool = BlockPool(2, 4)
    pool.allocate(1)
    with pytest.raises(AssertionError, match="block 0 has 1 holders, but sequences hold it 0x"):
        pool.check([])


class PoolAgainstModel(RuleBasedStateMachine):
    """Random holders of chains of contents, checked against a dictionary of the published contents."""

    NUM_BLOCKS = 6

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(self.NUM_BLOCKS, 4)
        self.holders: list[list[int]] = []
        self.content: dict[int, bytes] = {}

    @rule(count=st.integers(1, NUM_BLOCKS))
    def allocate(self, count: int) -> None:
        if count > self.pool.num_free:
            return
        blocks = self.pool.allocate(count)
        held = {block for holder in self.holders for block in holder}
        assert held.isdisjoint(blocks)
        assert len(set(blocks)) == count
        for block in blocks:
            self.content.pop(block, None)
        self.holders.append(blocks)

    @precondition(lambda self: self.holders)
    @rule(data=st.data(), names=st.lists(st.sampled_from([b"a", b"b", b"c", b"d"]), unique=True, min_size=1))
    def publish(self, data: st.DataObject, names: list[bytes]) -> None:
        holder = data.draw(st.sampled_from(self.holders))
        for block, name in zip(holder, names, strict=False):
            if block in self.content:
                continue
            self.pool.publish(block, name)
            if name not in self.content.values():
                self.content[block] = name

    @precondition(lambda self: self.content)
    @rule(names=st.lists(st.sampled_from([b"a", b"b", b"c", b"d"]), unique=True, min_size=1))
    def share(self, names: list[bytes]) -> None:
        blocks = self.pool.find(names)
        assert [self.content[block] for block in blocks] == names[: len(blocks)]
        assert len(blocks) == len(names) or names[len(blocks)] not in self.content.values()
        self.pool.share(blocks)
        self.holders.append(blocks)

    @precondition(lambda self: self.holders)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        index = data.draw(st.integers(0, len(self.holders) - 1))
        self.pool.release(self.holders.pop(index))

    @invariant()
    def books_are_balanced(self) -> None:
        self.pool.check(self.holders)
        held = {block for holder in self.holders for block in holder}
        assert self.pool.num_free + len(held) == self.NUM_BLOCKS


TestPoolAgainstModel = PoolAgainstModel.TestCase
TestPoolAgainstModel.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
