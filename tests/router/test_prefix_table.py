"""The prefix table never matches more than was recorded, and drops old entries when it is full."""

from hypothesis import given
from hypothesis import strategies as st

from fastdeploy.daemon.router.policy.prefix_table import BUCKETS, WAYS, PrefixTable


def new_table() -> PrefixTable:
    return PrefixTable(memoryview(bytearray(PrefixTable.BYTES)))


def chain(*text: int) -> tuple[int, ...]:
    """Return the hashes of a text of these blocks; each hash covers its block and all before it."""
    hashes, so_far = [], 1
    for block in text:
        so_far = (so_far * 1_000_003 + block + 1) % 2**64
        hashes.append(so_far)
    return tuple(hashes)


#: Few distinct blocks, so that texts often share a prefix.
texts = st.lists(st.integers(0, 2), max_size=6)
rows = st.sampled_from([0, 1, 7, 8, 63, 64, 255])


@given(st.lists(st.tuples(texts, rows)), texts)
def test_row_matches_the_longest_recorded_common_prefix(
    sent: list[tuple[list[int], int]], text: list[int]
) -> None:
    table = new_table()
    for other, row in sent:
        table.insert(chain(*other), row)
    longest: dict[int, int] = {}
    for other, row in sent:
        alike = next((i for i, (a, b) in enumerate(zip(other, text, strict=False)) if a != b), None)
        alike = min(len(other), len(text)) if alike is None else alike
        longest[row] = max(longest.get(row, 0), alike)
    assert table.match(chain(*text)) == {row: blocks for row, blocks in longest.items() if blocks}


@given(st.lists(st.tuples(texts, rows)), rows, texts)
def test_cleared_row_matches_nothing_and_others_are_unchanged(
    sent: list[tuple[list[int], int]], gone: int, text: list[int]
) -> None:
    table, without = new_table(), new_table()
    for other, row in sent:
        table.insert(chain(*other), row)
        if row != gone:
            without.insert(chain(*other), row)
    table.forget_row(gone)
    assert table.match(chain(*text)) == without.match(chain(*text))


def in_one_bucket(count: int) -> list[int]:
    return [3 + i * BUCKETS for i in range(count)]


def test_full_bucket_evicts_the_least_recently_used_block() -> None:
    table = new_table()
    blocks = in_one_bucket(WAYS + 1)
    for block in blocks[:WAYS]:
        table.insert([block], 5)
    table.insert([blocks[0]], 6)
    table.insert([blocks[WAYS]], 7)
    assert table.match([blocks[0]]) == {5: 1, 6: 1}
    assert table.match([blocks[1]]) == {}
    assert table.match([blocks[WAYS]]) == {7: 1}


@given(st.lists(st.tuples(st.integers(0, 3 * WAYS), rows), max_size=100))
def test_full_bucket_never_matches_unrecorded_blocks(sent: list[tuple[int, int]]) -> None:
    table, told = new_table(), set()
    blocks = in_one_bucket(3 * WAYS + 1)
    for index, row in sent:
        table.insert([blocks[index]], row)
        told.add((index, row))
        assert row in table.match([blocks[index]])
    known = [(i, row) for i, block in enumerate(blocks) for row in table.match([block])]
    assert set(known) <= told
    assert len({i for i, _ in known}) <= WAYS


def test_blocks_after_a_lost_one_do_not_match() -> None:
    table = new_table()
    lost, *others = in_one_bucket(WAYS + 1)
    prefix = [11, lost, 13]
    table.insert(prefix, 1)
    for block in others:
        table.insert([block], 2)
    assert table.match(prefix) == {1: 1}


def test_all_tables_over_the_same_memory_are_one() -> None:
    memory = bytearray(PrefixTable.BYTES)
    PrefixTable(memoryview(memory)).insert(chain(1, 2), 9)
    assert PrefixTable(memoryview(memory)).match(chain(1, 2, 3)) == {9: 2}
