"""Packs the tensors of a network, in pieces that any thread can produce."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import numpy as np
from numpy.typing import NDArray

from ..custom_ops.packed_matrix import PANEL, PackedShape, pack_panels, to_bfloat16
from .checkpoint_matrices import Matrix, MatrixStack, Table
from .packed_file import PackedTensor, Piece

Bytes = NDArray[np.uint8]

#: Bytes of a piece as float32: small enough to balance the load of threads and to hold many in memory.
_PIECE_BYTES = 8 << 20


def packed(tensors: Sequence[MatrixStack | Table], weight_format: str) -> list[PackedTensor]:
    """Return `tensors` as written to a packed file: a blob per stack of matrices, plain rows per table."""
    return [
        _stack(tensor, weight_format) if isinstance(tensor, MatrixStack) else _table(tensor, weight_format)
        for tensor in tensors
    ]


def _stack(stack: MatrixStack, weight_format: str) -> PackedTensor:
    matrix = stack.matrices[0]
    form = "float32" if stack.is_exact else weight_format
    shape = PackedShape(form, matrix.outputs, matrix.inputs, len(stack.matrices))

    def pieces() -> Iterator[Piece]:
        yield partial(np.frombuffer, shape.header(), np.uint8)
        step = max(1, _PIECE_BYTES // (4 * PANEL * shape.inputs)) * PANEL
        for matrix in stack.matrices:
            for start in range(0, shape.outputs, step):
                yield partial(_panels, matrix, start, min(start + step, shape.outputs), form)
            yield partial(np.zeros, shape.matrix_bytes - shape.panels * shape.panel_bytes, np.uint8)

    return PackedTensor(stack.name, "U8", (shape.nbytes,), pieces)


def _panels(matrix: Matrix, start: int, stop: int, weight_format: str) -> Bytes:
    bias = matrix.bias()
    part = None if bias is None else bias[start:stop]
    return pack_panels(matrix.rows(start, stop), part, weight_format=weight_format).reshape(-1)


def _table(table: Table, weight_format: str) -> PackedTensor:
    wide = table.is_exact or weight_format == "float32"

    def rows(start: int, stop: int) -> Bytes:
        values = table.rows(start, stop)
        return np.ascontiguousarray(values if wide else to_bfloat16(values)).reshape(-1).view(np.uint8)

    def pieces() -> Iterator[Piece]:
        step = max(1, _PIECE_BYTES // (4 * int(np.prod(table.shape[1:]))))
        for start in range(0, table.shape[0], step):
            yield partial(rows, start, min(start + step, table.shape[0]))

    return PackedTensor(table.name, "F32" if wide else "BF16", table.shape, pieces)
