"""What the operations compute, in plain numpy: slow, obvious, in the precision of the arguments.

Functions have the names of the operations. Where an operation works on packed or paged data, its reference
works on the plain data behind them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.floating]


def rms_norm(x: Array, weight: Array, epsilon: float) -> Array:
    return x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + epsilon) * weight


def swiglu_mlp(x: Array, gate: Array, up: Array, down: Array) -> Array:
    """Matrices are [in, out]."""
    g = x @ gate
    return (g / (1 + np.exp(-g)) * (x @ up)) @ down


def rope(x: Array, positions: Sequence[int], theta: float) -> Array:
    """Rotates the pairs (2j, 2j + 1) of each head by position * theta ** (-2j / d); x is [T, heads, d]."""
    y = np.empty_like(x)
    head_dim = x.shape[-1]
    for t, position in enumerate(positions):
        for j in range(0, head_dim, 2):
            angle = position * theta ** (-j / head_dim)
            cos, sin = np.cos(angle), np.sin(angle)
            y[t, :, j] = x[t, :, j] * cos - x[t, :, j + 1] * sin
            y[t, :, j + 1] = x[t, :, j + 1] * cos + x[t, :, j] * sin
    return y


def attention(query: Array, key: Array, value: Array, start: int) -> Array:
    """One sequence: queries [t, nq, d] from position `start`, keys and values [context, nkv, d] from 0."""
    group = query.shape[1] // key.shape[1]
    out = np.empty_like(query)
    for t in range(query.shape[0]):
        visible = start + t + 1
        for head in range(query.shape[1]):
            scores = key[:visible, head // group] @ query[t, head] / np.sqrt(query.shape[2])
            weights = np.exp(scores - scores.max())
            out[t, head] = weights / weights.sum() @ value[:visible, head // group]
    return out


def moe_topk_select(logits: Array, bias: Array, k: int, norm_min: float) -> tuple[NDArray[np.int64], Array]:
    picks = np.empty((len(logits), k), dtype=np.int64)
    weights = np.empty((len(logits), k), dtype=logits.dtype)
    for t, row in enumerate(logits):
        probabilities = np.exp(row - row.max())
        probabilities /= probabilities.sum()
        picks[t] = sorted(range(len(row)), key=lambda e: (-(probabilities + bias)[e], e))[:k]
        weights[t] = probabilities[picks[t]] / max(probabilities[picks[t]].sum(), norm_min)
    return picks, weights


def fused_moe(
    x: Array, picks: NDArray[np.int64], weights: Array, experts: Sequence[tuple[Array, Array, Array]]
) -> Array:
    """experts: gate, up and down of each, [in, out]."""
    y = np.zeros_like(x)
    for t, token in enumerate(x):
        for expert, weight in zip(picks[t], weights[t], strict=True):
            y[t] += weight * swiglu_mlp(token, *experts[expert])
    return y
