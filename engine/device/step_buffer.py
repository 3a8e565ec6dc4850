"""Encodes a batch as the integers that the compiled operations read."""

from __future__ import annotations

from itertools import accumulate
from operator import is_

import numpy as np
from numpy.typing import NDArray

from ..common.request import Batch, ScheduledSequence

_Integers = NDArray[np.int32]
_HEADER = 4


class StepBuffer:
    """An int32 array that is reused for each step; custom_ops/include/step.h defines its layout.

    One array per field and step would cost more time than all other Python code of a step. While the same
    sequences decode, only what changes from step to step is written.
    """

    def __init__(self, block_size: int, array: _Integers | None = None) -> None:
        """
        Args:
            array: memory that is large enough for any step; None: an array that grows with them.
        """
        self._block_size = block_size
        self._array = np.zeros(1 << 14, dtype=np.int32) if array is None else array
        self._may_grow = array is None
        #: Blocks of the sequences of the latest batch if all of them decoded; otherwise empty. The list of a
        #: sequence only grows: a sequence that loses its blocks gets another list.
        self._decoding: list[list[int]] = []
        #: Blocks of each sequence in the latest batch.
        self._widths: list[int] = []

    def write(self, batch: Batch, *, every_position: bool = False) -> _Integers:
        """Encode a batch, which must not be empty.

        Args:
            every_position: select the logits of all tokens instead of those of the sampling rows and scored
                positions.

        Returns:
            The array, valid until the next call. It is another one only if it had to grow.
        """
        rows = batch.rows
        blocks = [row.sequence.block_ids for row in rows]
        widths = [-(-row.end // self._block_size) for row in rows]
        decode = not every_position and all(row.samples and row.num_tokens == 1 for row in rows)
        if decode and self._has_tables(blocks, max(widths)):
            self._extend_tables(blocks, widths)
        else:
            self._lay_out(rows, widths, every_position=every_position)
        self._decoding, self._widths = blocks if decode else [], widths
        self._start[:] = [row.start for row in rows]
        ids: list[int] = []
        for row in rows:
            if row.drawn_by is None:
                ids += row.sequence.token_ids(row.start, row.end)
            else:
                ids.append(-1 - row.drawn_by)
        self._token_ids[:] = ids
        return self._array

    def _has_tables(self, blocks: list[list[int]], width: int) -> bool:
        """Return True if the array has the tables of these sequences, but for new blocks."""
        before = self._decoding
        return len(blocks) == len(before) and all(map(is_, blocks, before)) and width == max(self._widths)

    def _extend_tables(self, blocks: list[list[int]], widths: list[int]) -> None:
        for index, (filled, width) in enumerate(zip(self._widths, widths, strict=True)):
            if width > filled:
                self._tables[index, filled:width] = blocks[index][filled:width]

    def _lay_out(
        self, rows: tuple[ScheduledSequence, ...], widths: list[int], *, every_position: bool
    ) -> None:
        """Write everything but starts and token ids."""
        first = [0, *accumulate(row.num_tokens for row in rows)]
        wanted = list(range(first[-1])) if every_position else _logit_tokens(rows, first)
        count, num_tokens, width = len(rows), first[-1], max(widths)
        start = _HEADER + count + 1
        tables = start + count
        token_ids = tables + count * width
        logit_tokens = token_ids + num_tokens
        end = logit_tokens + len(wanted)
        if end > len(self._array):
            assert self._may_grow, f"a step of {end} integers in an array of {len(self._array)}"
            self._array = np.zeros(2 * end, dtype=np.int32)
        array = self._array
        array[:_HEADER] = count, num_tokens, width, len(wanted)
        array[_HEADER:start] = first
        array[logit_tokens:end] = wanted
        self._start = array[start:tables]
        self._tables = array[tables:token_ids].reshape(count, width)
        self._token_ids = array[token_ids:logit_tokens]
        for table, filled, row in zip(self._tables, widths, rows, strict=True):
            table[:filled] = row.sequence.block_ids[:filled]


def _logit_tokens(rows: tuple[ScheduledSequence, ...], first: list[int]) -> list[int]:
    """Return the tokens of the step whose logits are needed: of sampling rows, then of scored positions."""
    sampled = [end - 1 for row, end in zip(rows, first[1:], strict=True) if row.samples]
    scored = [
        position - row.start + begin
        for row, begin in zip(rows, first[:-1], strict=True)
        for position in row.scored
    ]
    return sampled + scored
