"""A batch in the integers that the compiled operations read."""

from __future__ import annotations

import math

import numpy as np
import paddle

from ..common.request import Batch


class StepBuffer:
    """One int32 tensor, written anew for each step; custom_ops/include/step.h says what is where.

    A tensor of its own for each array and step would cost more than all the rest of a step's Python.
    """

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._grow(1 << 14)

    def write(self, batch: Batch, *, every_position: bool = False) -> paddle.Tensor:
        """
        Args:
            every_position: logits of all tokens are wanted, rather than of the last token of each row that
                samples and then of the scored positions.

        Returns:
            The step, valid until the next call.
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
            self._grow(2 * sum(sizes))
        header, first, start, tables, token_ids, logit_tokens, _ = np.split(self._array, np.cumsum(sizes))
        header[:] = len(rows), num_tokens, width, len(wanted)
        first[0] = 0
        first[1:] = ends
        start[:] = [row.start for row in rows]
        tables = tables.reshape(len(rows), width)
        ids: list[int] = []
        for table, count, row in zip(tables, widths, rows, strict=True):
            table[:count] = row.sequence.block_ids[:count]
            ids += row.sequence.token_ids(row.start, row.end)
        token_ids[:] = ids
        logit_tokens[:] = wanted
        return self._tensor

    def _grow(self, size: int) -> None:
        self._array = np.zeros(size, dtype=np.int32)
        # The same memory.
        self._tensor = paddle.utils.dlpack.from_dlpack(self._array)
