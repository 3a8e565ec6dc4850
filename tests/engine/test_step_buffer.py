"""The encoding of a batch as integers."""

from __future__ import annotations

from itertools import accumulate

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from fastdeploy.common.request import Batch, SamplingParams, ScheduledSequence, Sequence
from fastdeploy.device.step_buffer import StepBuffer

BLOCK_SIZE = 4


def sequence(prompt: list[int], block_ids: list[int]) -> Sequence:
    return Sequence("test", prompt, SamplingParams(max_tokens=99), block_ids=block_ids)


def fields(array: np.ndarray, batch: Batch) -> list[list[int]]:
    """Return header, first tokens, starts, token ids, tokens of logits, and the blocks of each sequence."""
    count, num_tokens, width, num_logits = array[:4].tolist()
    sizes = [4, count + 1, count, count * width, num_tokens, num_logits]
    header, first, start, tables, ids, logits = (
        array[end - size : end] for end, size in zip(accumulate(sizes), sizes, strict=True)
    )
    blocks = [
        table[: -(-row.end // BLOCK_SIZE)].tolist()
        for table, row in zip(tables.reshape(count, width), batch.rows, strict=True)
    ]
    return [*(part.tolist() for part in (header, first, start, ids, logits)), *blocks]


@given(data=st.data())
def test_a_reused_buffer_holds_what_a_new_one_holds(data: st.DataObject) -> None:
    free = iter(range(10_000))

    def blocks(length: int) -> list[int]:
        return [next(free) for _ in range(-(-length // BLOCK_SIZE))]

    lengths = data.draw(st.lists(st.integers(1, 20), min_size=1, max_size=4))
    sequences = [sequence([7] * length, blocks(length)) for length in lengths]
    reused = StepBuffer(BLOCK_SIZE)
    for _ in range(data.draw(st.integers(1, 12))):
        rows: list[ScheduledSequence] = []
        for index, one in enumerate(sequences):
            what = data.draw(st.sampled_from(["decode", "decode", "decode", "chunk", "leave", "preempt"]))
            if what == "leave" and rows:
                continue
            if what == "preempt":
                # Recomputed in other blocks.
                one.block_ids = blocks(one.num_tokens)
            count = 1 if what != "chunk" else one.num_tokens
            ahead = what == "decode" and data.draw(st.booleans())
            if what == "decode":
                one.output_token_ids += [] if ahead else [len(rows)]
            end = one.num_tokens + ahead
            one.block_ids += blocks(end)[len(one.block_ids) :]
            rows.append(ScheduledSequence(one, end - count, count, True, drawn_by=index if ahead else None))
            if ahead:
                one.output_token_ids.append(index)
        batch = Batch(tuple(rows))
        every_position = data.draw(st.integers(0, 9)) == 0
        found, expected = (
            fields(buffer.write(batch, every_position=every_position), batch)
            for buffer in (reused, StepBuffer(BLOCK_SIZE))
        )
        assert found == expected


def test_a_token_that_is_not_known_yet_is_named_by_its_row() -> None:
    one, other = (sequence([7, 8], [block]) for block in (4, 5))
    rows = (
        ScheduledSequence(one, 2, 1, samples=True, drawn_by=3),
        ScheduledSequence(other, 2, 1, samples=True, drawn_by=0),
    )
    step = StepBuffer(16).write(Batch(rows))
    # num_sequences, num_tokens, table_width, num_logits, first_token, start, block_tables, token_ids
    assert step[:13].tolist() == [2, 2, 1, 2, 0, 1, 2, 2, 2, 4, 5, -4, -1]
