"""Random arguments of the operations, each with its values as plain numbers.

Plain numbers are float64 values that the operation's own type holds exactly, so that the operation and its
reference start from the same inputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypedDict

import numpy as np
import paddle

from fastdeploy import custom_ops
from fastdeploy.custom_ops import packed_matrix, reference

FORMATS = packed_matrix.FORMATS


def tensor(array: np.ndarray) -> paddle.Tensor:
    return paddle.to_tensor(np.asarray(array, np.float32))


def integers(array: np.ndarray | list[int]) -> paddle.Tensor:
    return paddle.to_tensor(np.asarray(array, np.int32))


def draw(random: np.random.Generator, *shape: int) -> np.ndarray:
    return random.standard_normal(shape).astype(np.float32).astype(np.float64)


def bfloat16(values: np.ndarray) -> np.ndarray:
    """Round each value to the nearest bfloat16."""
    rounded = packed_matrix.from_bfloat16(packed_matrix.to_bfloat16(values.astype(np.float32)))
    return rounded.astype(np.float64)


def as_multiplied(values: np.ndarray, weight_format: str) -> np.ndarray:
    """Return activations as matrix products read them: AMX multiplies bfloat16 with bfloat16."""
    narrow = custom_ops.instruction_set() == "amx" and weight_format == "bfloat16"
    return bfloat16(values) if narrow else values


class Tolerance(TypedDict):
    rtol: float
    atol: float


def tolerance(weight_format: str, scale: float) -> Tolerance:
    """Return the tolerance of results around `scale` after two products in a row."""
    if custom_ops.instruction_set() == "amx" and weight_format == "bfloat16":
        return {"rtol": 0, "atol": 2e-2 * scale}
    return {"rtol": 3e-5, "atol": 3e-5 * scale}


@dataclass(frozen=True)
class Packed:
    blob: paddle.Tensor
    plain: reference.Matrix

    @classmethod
    def draw(
        cls, random: np.random.Generator, weight_format: str, outputs: int, inputs: int, *, bias: bool = True
    ) -> Packed:
        weights, biases = draw(random, outputs, inputs), bias * draw(random, outputs)
        blob = packed_matrix.pack(
            weights.astype(np.float32), biases.astype(np.float32), weight_format=weight_format
        )
        weights, biases = (part[0].astype(np.float64) for part in packed_matrix.unpack(blob))
        return cls(paddle.to_tensor(blob), reference.Matrix(weights, biases))


@dataclass(frozen=True)
class PackedMlp:
    """One gated MLP, or a stack of them."""

    gate_up: paddle.Tensor
    down: paddle.Tensor
    plain: tuple[reference.GatedMlp, ...]

    @classmethod
    def draw(
        cls,
        random: np.random.Generator,
        weight_format: str,
        hidden: int,
        width: int,
        count: int = 1,
        *,
        bias: bool = False,
    ) -> PackedMlp:
        def pack(outputs: int, inputs: int, parts: int) -> np.ndarray:
            drawn = [draw(random, count, outputs, inputs) / np.sqrt(inputs) for _ in range(parts)]
            biases = [bias * draw(random, count, outputs, 1) for _ in range(parts)]
            weights, column = (
                (packed_matrix.interleave_gate_up(*values) if parts == 2 else values[0]).astype(np.float32)
                for values in (drawn, biases)
            )
            return packed_matrix.pack(weights, column[..., 0], weight_format=weight_format)

        gate_up, down = pack(width, hidden, 2), pack(hidden, width, 1)
        gate: list[reference.Matrix] = []
        up: list[reference.Matrix] = []
        out: list[reference.Matrix] = []
        for weights, biases in zip(*packed_matrix.unpack(gate_up), strict=True):
            for into, rows, column in zip(
                (gate, up),
                packed_matrix.split_gate_up(weights, width),
                packed_matrix.split_gate_up(biases[:, None], width),
                strict=True,
            ):
                into.append(reference.Matrix(rows.astype(np.float64), column[:, 0].astype(np.float64)))
        for weights, biases in zip(*packed_matrix.unpack(down), strict=True):
            out.append(reference.Matrix(weights.astype(np.float64), biases.astype(np.float64)))
        plain = tuple(reference.GatedMlp(*parts) for parts in zip(gate, up, out, strict=True))
        return cls(paddle.to_tensor(gate_up), paddle.to_tensor(down), plain)


@dataclass(frozen=True)
class Span:
    """The positions start .. start + count - 1 of one sequence in a step."""

    start: int
    count: int
    blocks: Sequence[int] | np.ndarray = ()
    token_ids: Sequence[int] | None = None

    @property
    def end(self) -> int:
        return self.start + self.count

    @property
    def positions(self) -> np.ndarray:
        return np.arange(self.start, self.end)


def step(spans: Sequence[Span], logit_tokens: Sequence[int] = ()) -> paddle.Tensor:
    """Encode a step as the integers of include/step.h."""
    width = max(len(span.blocks) for span in spans)
    counts = [span.count for span in spans]
    # Entries of a table behind the sequence's blocks are undefined.
    tables = np.full((len(spans), width), -1)
    for row, span in zip(tables, spans, strict=True):
        row[: len(span.blocks)] = span.blocks
    parts = [
        [len(spans), sum(counts), width, len(logit_tokens)],
        [0, *np.cumsum(counts)],
        [span.start for span in spans],
        tables.reshape(-1),
        *(span.token_ids or [0] * span.count for span in spans),
        logit_tokens,
    ]
    return integers(np.concatenate([np.array(part, np.int32) for part in parts]))


@dataclass(frozen=True)
class PagedCache:
    """The cache of one layer, with every slot poisoned so that a read of an unwritten slot shows."""

    num_blocks: int
    block_size: int
    kv_heads: int
    head_dim: int
    wide: bool
    keys: paddle.Tensor = field(init=False)
    values: paddle.Tensor = field(init=False)

    def __post_init__(self) -> None:
        panels = (-(-self.block_size // 32), -(-self.head_dim // 32))
        shapes = {
            "keys": (self.num_blocks, self.kv_heads, panels[0], self.head_dim, 32),
            "values": (self.num_blocks, self.kv_heads, panels[1], self.block_size, 32),
        }
        for name, shape in shapes.items():
            poison = np.resize(np.array([np.nan, np.inf, -np.inf], np.float32), shape)
            cache = paddle.to_tensor(poison)
            object.__setattr__(self, name, cache if self.wide else cache.astype("bfloat16"))

    def held(self, values: np.ndarray) -> np.ndarray:
        """Return the values as the cache stores them."""
        return values if self.wide else bfloat16(values)
