"""Encodes a batch as the integers that the compiled operations read."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from ..common.request import Batch


class StepBuffer:
    """An int32 array that is reused for each step; custom_ops/include/step.h defines its layout.

    One array per field and step would cost more time than all other Python code of a step.
    """

    def __init__(self, block_size: int, array: NDArray[np.int32] | None = None) -> None:
        """
        Args:
            array: memory that is large enough for any step; None: an array that grows with them.
        """
        self._block_size = block_size
        self._array = np.zeros(1 << 14, dtype=np.int32) if array is None else array
        self._may_grow = array is None

    def write(self, batch: Batch, *, every_position: bool = False) -> NDArray[np.int32]:
        """Encode a batch, which must not be empty.

        Args:
            every_position: select the logits of all tokens instead of those of the sampling rows and scored
                positions.

        Returns:
            The array, valid until the next call. It is another one only if it had to grow.
        """
        rows = batch.rows
        widths = [math.ceil(row.end / self._block_size) for row in rows]
        counts = [row.num_tokens for row in rows]
        num_tokens, width = sum(counts), max(widths)
        ends = np.cumsum(counts)
        if every_position:
            wanted = np.arange(num_tokens)
        else:
            wanted = ends[[index for index, row in enumerate(rows) if row.samples]] - 1
            scored = [
                np.arange(row.scored.start, row.scored.stop) + (end - row.end)
                for end, row in zip(ends, rows, strict=True)
                if row.scored
            ]
            if scored:
                wanted = np.concatenate([wanted, *scored])
        sizes = [4, len(rows) + 1, len(rows), len(rows) * width, num_tokens, len(wanted)]
        if sum(sizes) > len(self._array):
            assert self._may_grow, f"a step of {sum(sizes)} integers in an array of {len(self._array)}"
            self._array = np.zeros(2 * sum(sizes), dtype=np.int32)
        header, first, start, tables, token_ids, logit_tokens, _ = np.split(self._array, np.cumsum(sizes))
        header[:] = len(rows), num_tokens, width, len(wanted)
        first[0] = 0
        first[1:] = ends
        start[:] = [row.start for row in rows]
        tables = tables.reshape(len(rows), width)
        ids: list[int] = []
        for table, count, row in zip(tables, widths, rows, strict=True):
            table[:count] = row.sequence.block_ids[:count]
            if row.drawn_by is None:
                ids += row.sequence.token_ids(row.start, row.end)
            else:
                ids.append(-1 - row.drawn_by)
        token_ids[:] = ids
        logit_tokens[:] = wanted
        return self._array
