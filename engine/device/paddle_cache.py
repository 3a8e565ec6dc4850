"""Memory of the KV cache of one layer."""

from __future__ import annotations

import math
import mmap
from dataclasses import dataclass

import numpy as np
import paddle

from ..config import ModelConfig

#: Width of a panel: adjacent keys, or adjacent columns of values; see `custom_ops.paged_attention`.
_PANEL = 32


@dataclass(frozen=True, slots=True)
class KVCache:
    """Keys (rotated) and values, in the shapes of `custom_ops.paged_attention`."""

    key: paddle.Tensor
    value: paddle.Tensor

    @classmethod
    def allocate(cls, config: ModelConfig, num_blocks: int, block_size: int, *, wide: bool) -> KVCache:
        """Return a cache of zeros: float32 if `wide`, otherwise bfloat16."""
        heads, head_dim = config.num_key_value_heads, config.head_dim
        key = (num_blocks, heads, math.ceil(block_size / _PANEL), head_dim, _PANEL)
        value = (num_blocks, heads, math.ceil(head_dim / _PANEL), block_size, _PANEL)
        return cls(_zeros(key, wide), _zeros(value, wide))


def _zeros(shape: tuple[int, ...], wide: bool) -> paddle.Tensor:
    # New private pages are zero without being written, so blocks that are never used cost no memory. Memory
    # from malloc may be recycled and would have to be cleared.
    size = math.prod(shape) * (4 if wide else 2)
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    array = np.frombuffer(pages, dtype=np.float32 if wide else np.int16).reshape(shape)
    tensor = paddle.utils.dlpack.from_dlpack(array)
    return tensor if wide else tensor.view("bfloat16")
