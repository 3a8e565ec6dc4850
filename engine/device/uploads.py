"""Splits the matrices of a checkpoint into the parts that are uploaded. Pure: no file is read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from ..weights.checkpoint_matrices import Matrix, MatrixStack
from ..weights.stored_tensors import StoredTensor
from .cuda_library import GATE, PLAIN, UP

#: Rows of gate and up take turns of this many on a GPU.
_TURN = 8


@dataclass(frozen=True, slots=True)
class Part:
    """Adjacent rows of a stored tensor that are adjacent rows of a matrix on the device."""

    tensor: StoredTensor
    #: First element of the part in the tensor, and the distances of rows and columns, in elements.
    offset: int
    row_stride: int
    column_stride: int
    rows: int
    #: PLAIN, or the kind of rows that take turns.
    turn: int
    #: First row in the matrix, counted among the rows of its kind.
    first_row: int


def is_interleaved(stack: MatrixStack) -> bool:
    """Return True for gate and up, whose rows take turns on the device."""
    return stack.name.endswith("gate_up")


def outputs_of(matrix: Matrix) -> int:
    """Return the number of stored rows, without the padding of the CPU's layout."""
    return sum(_rows(matrix, tensor) for tensor in matrix.parts)


def parts_of(matrix: Matrix, *, interleaved: bool) -> Iterator[Part]:
    """Return the parts of a matrix; together they hold each of its rows once."""
    for turn, first_row, start, stop in _runs(matrix, interleaved):
        begin = 0
        for tensor in matrix.parts:
            size = _rows(matrix, tensor)
            first, last = max(start, begin), min(stop, begin + size)
            if first < last:
                row = first - begin
                yield Part(
                    tensor,
                    offset=row * matrix.inputs if matrix.out_in else row,
                    row_stride=matrix.inputs if matrix.out_in else 1,
                    column_stride=1 if matrix.out_in else size,
                    rows=last - first,
                    turn=turn,
                    first_row=first_row + first - start,
                )
            begin += size


def bias_of(matrix: Matrix, *, interleaved: bool) -> NDArray[np.float32] | None:
    """Return the bias in the order of the outputs on a GPU."""
    if not matrix.biases:
        return None
    joined = np.concatenate([bias.float32() for bias in matrix.biases])
    if interleaved:
        gate, up = joined.reshape(2, -1, _TURN)
        return np.ascontiguousarray(np.stack([gate, up], axis=1)).reshape(-1)
    return joined if matrix.order is None else joined[matrix.order]


def _runs(matrix: Matrix, interleaved: bool) -> Iterator[tuple[int, int, int, int]]:
    """Return turn, first row on the device, and the range of stored rows, all adjacent."""
    outputs = outputs_of(matrix)
    if interleaved:
        yield GATE, 0, 0, outputs // 2
        yield UP, 0, outputs // 2, outputs
    elif matrix.order is None:
        yield PLAIN, 0, 0, outputs
    else:
        begins = [0, *(np.flatnonzero(np.diff(matrix.order) != 1) + 1).tolist(), outputs]
        for begin, end in pairwise(begins):
            first = int(matrix.order[begin])
            yield PLAIN, begin, first, first + end - begin


def _rows(matrix: Matrix, tensor: StoredTensor) -> int:
    return tensor.shape[0 if matrix.out_in else 1]
