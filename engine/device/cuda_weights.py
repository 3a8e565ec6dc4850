"""Uploads the weights of a checkpoint to a device, which converts them to its own layout."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..common.errors import CheckpointError
from ..common.foreign_text import printable
from ..config import ModelConfig
from ..custom_ops.packed_matrix import to_bfloat16
from ..models.ernie45 import LayerWeights, MLPWeights, MoEWeights, Weights
from ..weights.checkpoint_matrices import Matrix, MatrixStack, Table
from .cuda_library import BFLOAT16, BIAS, FLOAT16, FLOAT32, ROUTER, CudaLibrary, RetileArgs
from .device import Progress
from .kernel_sizes import KernelSizes, aligned
from .uploads import Part, bias_of, is_interleaved, outputs_of, parts_of

_SOURCE_TYPES = {"F32": (FLOAT32, 4), "F16": (FLOAT16, 2), "BF16": (BFLOAT16, 2)}
_TABLE_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class CudaMatrix:
    """Matrices of one shape, one after the other: the experts of a layer, or a single matrix."""

    address: int
    outputs: int
    inputs: int
    #: float32 [outputs], or 0 if there is none or the matrix holds it.
    bias: int = 0


def weight_bytes(tensors: Sequence[MatrixStack | Table], sizes: KernelSizes) -> int:
    """Return the bytes of all tensors on the device."""
    return sum(_bytes_of(tensor, sizes) for tensor in tensors)


def upload(
    library: CudaLibrary,
    device: int,
    address: int,
    tensors: Sequence[MatrixStack | Table],
    sizes: KernelSizes,
    progress: Progress,
) -> dict[str, CudaMatrix | int]:
    """Upload `tensors` to `address` and return what each became: a matrix, or the address of plain values.

    Raises:
        CheckpointError: a tensor holds values that are not finite.
    """
    library.call("fd_upload_begin", device)
    uploader = _Uploader(library, device, sizes)
    placed: dict[str, CudaMatrix | int] = {}
    total, done = weight_bytes(tensors, sizes), 0
    for tensor in tensors:
        progress(done / total, f"uploading weights, {done / 1e9:.1f} of {total / 1e9:.1f} GB")
        placed[tensor.name] = uploader.place(tensor, address + done)
        done += _bytes_of(tensor, sizes)
    bad = ctypes.c_int32()
    library.call("fd_upload_finish", device, ctypes.byref(bad))
    if bad.value:
        part = uploader.uploaded[bad.value - 1]
        raise CheckpointError(
            f"{part.tensor.file}: tensor {printable(part.tensor.name)} holds values that are not finite "
            "numbers"
        )
    progress(1.0, "weights uploaded")
    return placed


def weights_of(config: ModelConfig, placed: dict[str, CudaMatrix | int]) -> Weights:
    """Return the weights of the network."""

    def mlp(name: str) -> MLPWeights:
        return MLPWeights(placed[f"{name}gate_up"], placed[f"{name}down"])

    def moe(name: str) -> MoEWeights:
        shared = mlp(f"{name}shared.") if config.moe_num_shared_experts else None
        return MoEWeights(
            placed[f"{name}router"], placed[f"{name}correction_bias"], mlp(f"{name}experts."), shared
        )

    def layer(index: int) -> LayerWeights:
        name = f"layers.{index}."
        return LayerWeights(
            input_norm=placed[f"{name}input_norm"],
            qkv=placed[f"{name}qkv"],
            attention_output=placed[f"{name}attention_output"],
            post_attention_norm=placed[f"{name}post_attention_norm"],
            mlp=moe(f"{name}mlp.") if config.is_moe_layer(index) else mlp(f"{name}mlp."),
        )

    layers = tuple(layer(index) for index in range(config.num_hidden_layers))
    return Weights(placed["embedding"], layers, placed["final_norm"], placed["lm_head"])


def _bytes_of(tensor: MatrixStack | Table, sizes: KernelSizes) -> int:
    if isinstance(tensor, Table):
        return aligned(math.prod(tensor.shape) * (4 if tensor.is_exact else sizes.table_element))
    matrix, count = tensor.matrices[0], len(tensor.matrices)
    outputs = outputs_of(matrix)
    if tensor.is_exact:
        return aligned(count * sizes.router(outputs, matrix.inputs))
    bias = outputs * 4 if matrix.biases and not sizes.biases_in_matrices else 0
    return aligned(count * sizes.matrix(outputs, matrix.inputs)) + aligned(bias)


class _Uploader:
    def __init__(self, library: CudaLibrary, device: int, sizes: KernelSizes) -> None:
        self._library = library
        self._device = device
        self._sizes = sizes
        #: Tag i + 1 marks part i.
        self.uploaded: list[Part] = []

    def place(self, tensor: MatrixStack | Table, address: int) -> CudaMatrix | int:
        if isinstance(tensor, Table):
            self._table(tensor, address)
            return address
        if tensor.is_exact:
            for index, matrix in enumerate(tensor.matrices):
                place = address + index * self._sizes.router(matrix.outputs, matrix.inputs)
                self._rows(matrix.rows(0, matrix.outputs), ROUTER, matrix.outputs, matrix.inputs, place)
            return address
        return self._stack(tensor, address)

    def _table(self, table: Table, address: int) -> None:
        row = math.prod(table.shape[1:])
        step = max(1, _TABLE_BYTES // (4 * row))
        for start in range(0, table.shape[0], step):
            values = np.ascontiguousarray(table.rows(start, min(start + step, table.shape[0])), np.float32)
            stored = values if table.is_exact or self._sizes.table_element == 4 else to_bfloat16(values)
            self._bytes(address + start * row * stored.itemsize, stored)

    def _stack(self, stack: MatrixStack, address: int) -> CudaMatrix:
        first, interleaved = stack.matrices[0], is_interleaved(stack)
        outputs = outputs_of(first)
        size = self._sizes.matrix(outputs, first.inputs)
        for index, matrix in enumerate(stack.matrices):
            place = address + index * size
            self._matrix(matrix, outputs, place, interleaved=interleaved)
            # It has the order of the CPU's layout, and its padding.
            if self._sizes.biases_in_matrices and (values := matrix.bias()) is not None:
                self._rows(values, BIAS, outputs, matrix.inputs, place)
        bias = None if self._sizes.biases_in_matrices else bias_of(first, interleaved=interleaved)
        if bias is None:
            return CudaMatrix(address, outputs, first.inputs)
        behind = address + aligned(len(stack.matrices) * size)
        self._bytes(behind, np.ascontiguousarray(bias, np.float32))
        return CudaMatrix(address, outputs, first.inputs, behind)

    def _matrix(self, matrix: Matrix, outputs: int, address: int, *, interleaved: bool) -> None:
        for part in parts_of(matrix, interleaved=interleaved):
            self.uploaded.append(part)
            source_type, item_size = _SOURCE_TYPES[part.tensor.dtype]
            arguments = RetileArgs(
                source=part.tensor.data.ctypes.data + part.offset * item_size,
                source_type=source_type,
                turn=part.turn,
                row_stride=part.row_stride,
                column_stride=part.column_stride,
                rows=part.rows,
                inputs=matrix.inputs,
                outputs=outputs,
                first_row=part.first_row,
                matrix=address,
            )
            self._library.call("fd_upload", self._device, ctypes.byref(arguments), len(self.uploaded))

    def _rows(self, rows: np.ndarray, kind: int, outputs: int, inputs: int, address: int) -> None:
        """Upload finite float32 rows of a router, or biases."""
        values = np.ascontiguousarray(rows, np.float32)
        arguments = RetileArgs(
            source=values.ctypes.data,
            source_type=FLOAT32,
            turn=kind,
            row_stride=values.size // len(values),
            column_stride=1,
            rows=len(values),
            inputs=inputs,
            outputs=outputs,
            matrix=address,
        )
        self._library.call("fd_upload", self._device, ctypes.byref(arguments), 0)

    def _bytes(self, address: int, values: np.ndarray) -> None:
        self._library.call("fd_upload_bytes", self._device, address, values.ctypes.data, values.nbytes)
