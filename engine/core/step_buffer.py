"""Encodes a batch as the integers that the compiled operations read."""

from __future__ import annotations

import math

import numpy as np
import paddle

from ..common.request import Batch


class StepBuffer:
    """An int32 tensor that is reused for each step; custom_ops/include/step.h defines its layout.

    One tensor per array and step would cost more time than all other Python code of a step.
    """

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._grow(1 << 14)

    def write(self, batch: Batch, *, every_position: bool = False) -> paddle.Tensor:
        """Encode a batch, which must not be empty.

        Args:
            every_position: select the logits of all tokens instead of those of the sampling rows and scored
                positions.

        Returns:
            The step tensor, valid until the next call.
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
        # Shares the memory of the array.
        self._tensor = paddle.utils.dlpack.from_dlpack(self._array)
