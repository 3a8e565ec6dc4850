"""Attention over a paged KV cache, and what a step has to know about the cache before its first layer."""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import paddle

from ..config import ModelConfig
from ..custom_ops import AttentionTile, Projection, linear, paged_attention, rope_and_cache
from ..request import ScheduledSequence

#: Queries of one prefill tile: its scores take nq * 128 * context floats.
TILE_QUERIES = 128


@dataclass(frozen=True, slots=True)
class KVCache:
    """Keys (rotated) and values of one layer: [num_blocks, nkv, block_size, d] each.

    Head before offset: the keys of one head in one block are neighbours in memory, so that gathering whole
    blocks by (sequence, head) gives the operand of a batched matrix product without transposing.
    """

    key: paddle.Tensor
    value: paddle.Tensor

    @classmethod
    def allocate(cls, config: ModelConfig, num_blocks: int, block_size: int) -> KVCache:
        shape = (num_blocks, config.num_key_value_heads, block_size, config.head_dim)
        return cls(_zeros(shape), _zeros(shape))


@dataclass(frozen=True, slots=True)
class AttentionStep:
    """Where the tokens of one step stand: made once a step, used by every layer.

    Tokens are in computing order: rows of one token first, similar contexts side by side, then chunks.
    """

    #: Indices into the rows of the batch, in computing order.
    row_order: tuple[int, ...]
    rotation: paddle.Tensor
    write_rows: paddle.Tensor
    tiles: tuple[AttentionTile, ...]

    @classmethod
    def plan(cls, rows: Sequence[ScheduledSequence], config: ModelConfig, block_size: int) -> AttentionStep:
        heads = config.num_key_value_heads
        tables = [
            np.asarray(row.sequence.block_ids[: math.ceil(row.end / block_size)], dtype=np.int64)
            for row in rows
        ]
        # Rows are padded to the longest of their tile: one tile per power of two at most doubles the work.
        decode: dict[int, list[int]] = {}
        for i, row in enumerate(rows):
            if row.num_tokens == 1:
                decode.setdefault(len(tables[i]).bit_length(), []).append(i)
        chunks = [i for i, row in enumerate(rows) if row.num_tokens > 1]
        row_order = tuple(i for _, members in sorted(decode.items()) for i in members) + tuple(chunks)

        tiles = []
        for _, members in sorted(decode.items()):
            width = max(len(tables[i]) for i in members)
            table = np.zeros((len(members), width), dtype=np.int64)
            for line, i in zip(table, members, strict=True):
                line[: len(tables[i])] = tables[i]
            last = np.array([rows[i].start for i in members]).repeat(config.num_attention_heads)
            tiles.append(_tile(table, _mask(last[:, None], width * block_size), heads))
        for i in chunks:
            for start in range(rows[i].start, rows[i].end, TILE_QUERIES):
                end = min(start + TILE_QUERIES, rows[i].end)
                table = tables[i][None, : math.ceil(end / block_size)]
                mask = _mask(np.arange(start, end), table.size * block_size)
                tiles.append(_tile(table, mask, heads))

        positions = [np.arange(rows[i].start, rows[i].end) for i in row_order]
        blocks = [tables[i][p // block_size] for i, p in zip(row_order, positions, strict=True)]
        position = np.concatenate(positions)
        of_head = (np.concatenate(blocks)[:, None] * heads + np.arange(heads)) * block_size
        write_rows = of_head + (position % block_size)[:, None]
        return cls(
            row_order=row_order,
            rotation=paddle.to_tensor(_rotation(position, config)),
            write_rows=paddle.to_tensor(write_rows.reshape(-1)),
            tiles=tuple(tiles),
        )


def attention(
    h: paddle.Tensor, qkv: Projection, output: Projection, step: AttentionStep, cache: KVCache
) -> paddle.Tensor:
    """h [T, H] -> [T, H]; the keys and values of these tokens are in `cache` afterwards."""
    heads = linear(h, qkv).reshape([h.shape[0], -1, cache.key.shape[-1]])
    query = rope_and_cache(heads, step.rotation, cache.key, cache.value, step.write_rows)
    return linear(paged_attention(query, cache.key, cache.value, step.tiles), output)


def _tile(table: np.ndarray, mask: np.ndarray, heads: int) -> AttentionTile:
    """table: block ids [sequences, blocks]."""
    read_rows = table[:, None, :] * heads + np.arange(heads)[None, :, None]
    return AttentionTile(
        num_sequences=table.shape[0],
        num_queries=mask.shape[-2],
        read_rows=paddle.to_tensor(read_rows.reshape(-1)),
        mask=paddle.to_tensor(mask),
    )


def _mask(positions: np.ndarray, num_keys: int) -> np.ndarray:
    return np.where(np.arange(num_keys) <= positions[..., None], np.float32(0), np.float32(-np.inf))


def _rotation(positions: np.ndarray, config: ModelConfig) -> np.ndarray:
    exponents = np.arange(0, config.head_dim, 2, dtype=np.float32) / np.float32(config.head_dim)
    frequencies = np.float32(1) / np.float32(config.rope_theta) ** exponents
    angles = positions.astype(np.float32)[:, None, None] * frequencies
    heads = config.num_attention_heads + config.num_key_value_heads
    rotation = np.empty((len(positions), heads, len(frequencies)), dtype=np.complex64)
    rotation.real, rotation.imag = np.cos(angles), np.sin(angles)
    return rotation


def _zeros(shape: tuple[int, ...]) -> paddle.Tensor:
    if paddle.device.get_device() != "cpu":
        return paddle.zeros(shape, dtype="float32")
    # Fresh private pages are zero without being written: a block that was never used costs no memory.
    # malloc'd memory may be recycled, and would then be cleared page by page.
    pages = mmap.mmap(-1, math.prod(shape) * 4, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return paddle.utils.dlpack.from_dlpack(np.frombuffer(pages, dtype=np.float32).reshape(shape))
