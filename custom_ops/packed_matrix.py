"""The packed matrix format of the kernels: a self-describing blob, 64-byte aligned.

A blob is a header followed by `count` matrices of one shape (the experts of a layer; otherwise one matrix). A
matrix is divided into panels of 32 outputs, c0 to c31 below, padded with zeros. A panel holds its data in the
order in which a kernel reads it: biases, scales, then the weights, with the 32 outputs of an input adjacent.

    header (64 bytes, little endian)
       0  magic "FDMATRIX"     8  u32 layout version   12  u32 format, an index into FORMATS
      16  u32 outputs         20  u32 inputs           24  u32 count          28  u32 0
      32  u64 bytes per panel 40  u64 bytes per matrix: expert e begins at 64 + e times this
    panel
      32 float32 biases, zero if there are none
      float32   per input: 32 float32
      bfloat16  per two inputs: 32 u32; word i holds the weights of c_i, the first input in the low half and
                the second in the high half, as AMX requires; inputs are zero-padded to a multiple of 32
      wint8     32 float32 scales; per input: 32 int8. A weight is q * scale.
      wint4     per group of 32 inputs: 32 u32, each with the scale s (low half) and the minimum m (high half)
                of an output as bfloat16; then, per four inputs, 16 u32: byte k of word i holds the q of c_i
                for the k-th of the four inputs (low half) and that of c_(16+i) (high half).
                A weight is fma(q, s, m).
      zero padding to a multiple of 64

The engine uses `pack_panels`; `pack` and `unpack` are for references and tests.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]

LAYOUT_VERSION = 2
FORMATS = ("float32", "bfloat16", "wint8", "wint4")
PANEL = 32
GROUP = 32  # inputs that share a scale and a minimum, in wint4
HEADER_BYTES = 64

_MAGIC = b"FDMATRIX"
_HEADER = struct.Struct("<8s6I2Q16x")
_BIAS_BYTES = 4 * PANEL
_GROUP_BYTES = 640
_PAGE = 4096
#: Bytes of float32 weights processed at a time: they and their result fit into a core's private cache.
_BLOCK_BYTES = 256 << 10


@dataclass(frozen=True, slots=True)
class PackedShape:
    """The header of a blob."""

    weight_format: str
    outputs: int
    inputs: int
    count: int = 1

    @property
    def panels(self) -> int:
        return -(-self.outputs // PANEL)

    @property
    def panel_bytes(self) -> int:
        weights = {
            "float32": self.inputs * 4 * PANEL,
            "bfloat16": _rounded_up(self.inputs, 32) * 2 * PANEL,
            "wint8": 4 * PANEL + self.inputs * PANEL,
            "wint4": -(-self.inputs // GROUP) * _GROUP_BYTES,
        }
        return _rounded_up(_BIAS_BYTES + weights[self.weight_format], 64)

    @property
    def matrix_bytes(self) -> int:
        size = self.panels * self.panel_bytes
        paged = _rounded_up(size, _PAGE)
        # Page-aligned experts, if the padding is small: unused experts then share no page with used ones.
        return paged if self.count > 1 and paged < 1.03 * size else size

    @property
    def nbytes(self) -> int:
        return HEADER_BYTES + self.count * self.matrix_bytes

    def header(self) -> bytes:
        return _HEADER.pack(
            _MAGIC,
            LAYOUT_VERSION,
            FORMATS.index(self.weight_format),
            self.outputs,
            self.inputs,
            self.count,
            0,
            self.panel_bytes,
            self.matrix_bytes,
        )

    @classmethod
    def of(cls, blob: Bytes) -> PackedShape:
        """Read the header of a blob.

        Raises:
            ValueError: it is not a packed matrix of this layout version.
        """
        if blob.nbytes < HEADER_BYTES:
            raise ValueError(f"not a packed matrix: only {blob.nbytes} bytes")
        magic, version, index, outputs, inputs, count, _, panel, matrix = _HEADER.unpack(
            blob[:HEADER_BYTES].tobytes()
        )
        if magic != _MAGIC or version != LAYOUT_VERSION or index >= len(FORMATS):
            raise ValueError(f"not a packed matrix of layout {LAYOUT_VERSION}: {blob[:16].tobytes()!r}")
        shape = cls(FORMATS[index], outputs, inputs, count)
        if (panel, matrix, blob.nbytes) != (shape.panel_bytes, shape.matrix_bytes, shape.nbytes):
            raise ValueError(f"{shape}: sizes {panel}, {matrix}, {blob.nbytes} do not match")
        return shape


def pack(weights: Floats, bias: Floats | None = None, *, weight_format: str) -> Bytes:
    """Pack `weights` [outputs, inputs] or [count, outputs, inputs]; `bias` has no last axis."""
    stacked = weights[None] if weights.ndim == 2 else weights
    biases = [None] * len(stacked) if bias is None else bias.reshape(stacked.shape[:2])
    count, outputs, inputs = stacked.shape
    shape = PackedShape(weight_format, outputs, inputs, count)
    blob = _aligned_zeros(shape.nbytes)
    blob[:HEADER_BYTES] = np.frombuffer(shape.header(), np.uint8)
    for matrix, values, row in zip(_matrices(blob, shape), stacked, biases, strict=True):
        matrix[:] = pack_panels(values, row, weight_format=weight_format)
    return blob


def pack_panels(weights: Floats, bias: Floats | None = None, *, weight_format: str) -> Bytes:
    """Return the panels [panels, bytes per panel] of a matrix, or of rows of it that fill whole panels.

    Args:
        weights: [outputs, inputs], finite.
        bias: [outputs].
    """
    outputs, inputs = weights.shape
    shape = PackedShape(weight_format, outputs, inputs)
    panels = np.zeros((shape.panels, shape.panel_bytes), np.uint8)
    if bias is not None:
        biases = np.zeros(shape.panels * PANEL, np.float32)
        biases[:outputs] = bias
        panels[:, :_BIAS_BYTES].view(np.float32)[:] = biases.reshape(-1, PANEL)
    fill = {"float32": _fill_float32, "bfloat16": _fill_bfloat16, "wint8": _fill_wint8, "wint4": _fill_wint4}
    step = max(1, _BLOCK_BYTES // (4 * PANEL * max(1, inputs)))
    for start in range(0, shape.panels, step):
        block = panels[start : start + step, _BIAS_BYTES:]
        rows = np.ascontiguousarray(weights[start * PANEL : (start + len(block)) * PANEL], np.float32)
        if len(rows) < len(block) * PANEL:
            rows = np.concatenate([rows, np.zeros((len(block) * PANEL - len(rows), inputs), np.float32)])
        fill[weight_format](block, rows.reshape(len(block), PANEL, inputs))
    return panels


def unpack(blob: Bytes) -> tuple[Floats, Floats]:
    """Return the exact values that kernels use: weights [count, outputs, inputs], biases [count, outputs]."""
    shape = PackedShape.of(blob)
    read = {"float32": _read_float32, "bfloat16": _read_bfloat16, "wint8": _read_wint8, "wint4": _read_wint4}
    weights, biases = [], []
    for panels in _matrices(blob, shape):
        values = read[shape.weight_format](panels[:, _BIAS_BYTES:], shape.inputs)
        weights.append(values.reshape(-1, shape.inputs)[: shape.outputs])
        biases.append(panels[:, :_BIAS_BYTES].view(np.float32).reshape(-1)[: shape.outputs])
    return np.stack(weights), np.stack(biases)


def gate_up_order(width: int) -> NDArray[np.int64]:
    """Return for each row of the interleaved matrix its row in [gate; up] (2 * width rows), or -1 for zeros.

    Panel p holds gate[16p:16p+16] and up[16p:16p+16], so one pass yields both factors of an activation.
    """
    half = PANEL // 2
    rows = np.arange(_rounded_up(width, half))
    rows[width:] = -1
    gate = rows.reshape(-1, half)
    return np.concatenate([gate, np.where(gate < 0, -1, gate + width)], axis=1).reshape(-1)


def interleave_gate_up(gate: Floats, up: Floats) -> Floats:
    """Interleave gate and up [.., width, inputs] for packing. Biases are passed as [.., width, 1]."""
    width, inputs = gate.shape[-2:]
    zero = np.zeros((*gate.shape[:-2], 1, inputs), np.float32)
    return np.concatenate([gate, up, zero], axis=-2)[..., gate_up_order(width), :]


def split_gate_up(interleaved: Floats, width: int) -> tuple[Floats, Floats]:
    """Return gate and up [.., width, inputs] of a matrix from `interleave_gate_up`."""
    row_of = np.empty(2 * width, np.int64)
    order = gate_up_order(width)
    row_of[order[order >= 0]] = np.flatnonzero(order >= 0)
    return interleaved[..., row_of[:width], :], interleaved[..., row_of[width:], :]


def to_bfloat16(values: Floats) -> NDArray[np.uint16]:
    """Return the bfloat16 bits of finite values, rounded to nearest even."""
    return (_rounded_bits(np.ascontiguousarray(values)) >> 16).astype(np.uint16)


def from_bfloat16(bits: NDArray[np.uint16]) -> Floats:
    # bfloat16 is the upper half of a float32.
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _fill_float32(block: Bytes, rows: Floats) -> None:
    panels, _, inputs = rows.shape
    block.view(np.float32).reshape(panels, inputs, PANEL)[:] = rows.transpose(0, 2, 1)


def _fill_bfloat16(block: Bytes, rows: Floats) -> None:
    panels, _, inputs = rows.shape
    halves = _columns(block.view(np.uint16), -(-inputs // 2), 2 * PANEL).reshape(panels, -1, PANEL, 2)
    bits = (_rounded_bits(rows) >> 16).astype(np.uint16).transpose(0, 2, 1)
    halves[:, :, :, 0] = bits[:, 0::2]
    halves[:, : inputs // 2, :, 1] = bits[:, 1::2]


def _fill_wint8(block: Bytes, rows: Floats) -> None:
    inputs = rows.shape[2]
    largest = np.maximum(rows.max(axis=2, initial=0), -rows.min(axis=2, initial=0))
    scales = _or_zero(largest / np.float32(127))
    block[:, : 4 * PANEL].view(np.float32)[:] = scales
    quotients = rows / np.where(scales == 0, np.float32(np.inf), scales)[:, :, None]
    integers = np.rint(quotients, out=quotients).astype(np.int8)
    _columns(block[:, 4 * PANEL :].view(np.int8), inputs, PANEL)[:] = integers.transpose(0, 2, 1)


def _fill_wint4(block: Bytes, rows: Floats) -> None:
    panels, _, inputs = rows.shape
    groups = -(-inputs // GROUP)
    padded = groups * GROUP - inputs
    if padded:
        # Copies of the last input do not widen the range of a group.
        rows = np.pad(rows, ((0, 0), (0, 0), (0, padded)), mode="edge")
    levels, scales, minima = _grid(rows.reshape(panels, PANEL, groups, GROUP))
    integers = levels.astype(np.uint8).reshape(panels, PANEL, groups * GROUP)
    integers[:, :, inputs:] = 0
    pairs = integers[:, PANEL // 2 :] << 4
    pairs |= integers[:, : PANEL // 2]
    words = _columns(block.view(np.uint32), groups, _GROUP_BYTES // 4)
    parameters = (scales.view(np.uint32) >> 16) | minima.view(np.uint32)
    words[:, :, :PANEL] = parameters.transpose(0, 2, 1)
    quads = pairs.view(np.uint32).reshape(panels, PANEL // 2, groups, 8)
    words[:, :, PANEL:].reshape(panels, groups, 8, PANEL // 2)[:] = quads.transpose(0, 2, 3, 1)


def _grid(groups: Floats) -> tuple[Floats, Floats, Floats]:
    """Return q, s and m for groups [.., GROUP].

    A grid from the smallest to the largest weight is exact for weights that lie on a grid. Otherwise a
    slightly smaller grid, fitted by least squares, is usually better: for normally distributed weights it
    reduces the squared error by a tenth. The better of the two is chosen for each group.
    """
    low = groups.min(axis=-1)
    span = groups.max(axis=-1) - low
    whole = _levels(groups, span / np.float32(15), low)
    clipped, _, _ = _levels(groups, span * np.float32(0.96 / 15), low + np.float32(0.02) * span)
    offsets = groups - low[..., None]
    level, offset = clipped.mean(axis=-1), offsets.mean(axis=-1)
    variance = np.einsum("...g,...g", clipped, clipped) / np.float32(GROUP) - level * level
    covariance = np.einsum("...g,...g", clipped, offsets) / np.float32(GROUP) - level * offset
    slope = covariance / np.where(variance > 0, variance, np.float32(np.inf))
    fitted = _levels(groups, slope, low + (offset - slope * level))
    better = _squared_error(groups, *fitted) < _squared_error(groups, *whole)
    levels, scales, minima = (
        np.where(better.reshape(better.shape + (1,) * (new.ndim - better.ndim)), new, old)
        for new, old in zip(fitted, whole, strict=True)
    )
    return levels, scales, minima


def _levels(groups: Floats, scales: Floats, minima: Floats) -> tuple[Floats, Floats, Floats]:
    """Return the nearest q of a grid, and the grid rounded to bfloat16."""
    scales = (_rounded_bits(_or_zero(scales)) & 0xFFFF0000).view(np.float32)
    minima = (_rounded_bits(minima) & 0xFFFF0000).view(np.float32)
    levels = groups - minima[..., None]
    levels /= np.where(scales == 0, np.float32(np.inf), scales)[..., None]
    np.rint(levels, out=levels)
    return np.clip(levels, 0, 15, out=levels), scales, minima


def _squared_error(groups: Floats, levels: Floats, scales: Floats, minima: Floats) -> Floats:
    errors = _wint4_values(levels, scales, minima)
    errors -= groups
    return np.einsum("...g,...g", errors, errors)


def _wint4_values(levels: Floats, scales: Floats, minima: Floats) -> Floats:
    """Return fma(q, s, m): q * s is exact (4 bits times 8 bits), so the result is rounded once."""
    values = levels * scales[..., None]
    values += minima[..., None]
    return values


def _read_float32(block: Bytes, inputs: int) -> Floats:
    return _columns(block.view(np.float32), inputs, PANEL).transpose(0, 2, 1)


def _read_bfloat16(block: Bytes, inputs: int) -> Floats:
    pairs = -(-inputs // 2)
    halves = _columns(block.view(np.uint16), pairs, 2 * PANEL).reshape(len(block), pairs, PANEL, 2)
    bits = halves.transpose(0, 2, 1, 3).reshape(len(block), PANEL, 2 * pairs)
    return from_bfloat16(bits[:, :, :inputs])


def _read_wint8(block: Bytes, inputs: int) -> Floats:
    scales = block[:, : 4 * PANEL].view(np.float32)
    integers = _columns(block[:, 4 * PANEL :].view(np.int8), inputs, PANEL).transpose(0, 2, 1)
    return integers * scales[:, :, None]


def _read_wint4(block: Bytes, inputs: int) -> Floats:
    groups = -(-inputs // GROUP)
    words = _columns(block.view(np.uint32), groups, _GROUP_BYTES // 4)
    parameters = words[:, :, :PANEL].transpose(0, 2, 1)
    quads = words[:, :, PANEL:].reshape(len(block), groups, 8, PANEL // 2).transpose(0, 3, 1, 2)
    pairs = np.ascontiguousarray(quads).view(np.uint8).reshape(len(block), PANEL // 2, groups, GROUP)
    levels = np.concatenate([pairs & 15, pairs >> 4], axis=1).astype(np.float32)
    values = _wint4_values(
        levels, (parameters << 16).view(np.float32), (parameters & 0xFFFF0000).view(np.float32)
    )
    return values.reshape(len(block), PANEL, groups * GROUP)[:, :, :inputs]


def _columns(block: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """Return a view [panels, rows, columns] of [panels, at least rows * columns]."""
    return block[:, : rows * columns].reshape(len(block), rows, columns)


def _rounded_bits(values: Floats) -> NDArray[np.uint32]:
    """Return float32 bits whose upper half is the bfloat16 nearest to a finite value, ties to even."""
    bits = values.view(np.uint32)
    rounded: NDArray[np.uint32] = bits >> np.uint32(16)
    rounded &= 1
    rounded += 0x7FFF
    rounded += bits
    return rounded


def _or_zero(scales: Floats) -> Floats:
    """Replace denormal scales, by which no weight can be divided, by 0; their weights become 0, too."""
    return np.where(scales < np.finfo(np.float32).tiny, np.float32(0), scales)


def _matrices(blob: Bytes, shape: PackedShape) -> Bytes:
    """Return a view [count, panels, bytes per panel]."""
    stacked = blob[HEADER_BYTES:].reshape(shape.count, shape.matrix_bytes)
    panels = stacked[:, : shape.panels * shape.panel_bytes]
    return panels.reshape(shape.count, shape.panels, shape.panel_bytes)


def _aligned_zeros(size: int) -> Bytes:
    memory = np.zeros(size + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + size]


def _rounded_up(size: int, step: int) -> int:
    return -(-size // step) * step
