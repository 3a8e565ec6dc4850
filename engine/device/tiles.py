"""Sizes of the layouts of custom_ops/cuda/layout.h. Pure."""

from __future__ import annotations

_BLOCK = 64
_BLOCK_BYTES = 8192
_PANEL = 128
#: Alignment of what is laid out one after the other in an arena.
_ALIGNMENT = 256


def matrix_bytes(outputs: int, inputs: int) -> int:
    """Return the bytes of a bfloat16 matrix in panels of 128 outputs."""
    return -(-outputs // _PANEL) * 2 * -(-inputs // _BLOCK) * _BLOCK_BYTES


def activation_bytes(rows: int, width: int) -> int:
    return -(-rows // _BLOCK) * -(-width // _BLOCK) * _BLOCK_BYTES


def cache_block_bytes(kv_heads: int, head_dim: int) -> int:
    """Return the bytes of the keys, or values, of one layer and block of 64 tokens."""
    return kv_heads * (head_dim // _BLOCK) * _BLOCK_BYTES


def aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT
