"""Reference implementations of the operations in plain NumPy, in the precision of their arguments.

Functions have the names of the operations. Where an operation takes packed or paged data, its reference takes
plain arrays.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.floating]


class Matrix(NamedTuple):
    #: [outputs, inputs]
    weights: Array
    #: [outputs]
    bias: Array


class GatedMlp(NamedTuple):
    gate: Matrix
    up: Matrix
    down: Matrix


def rms_norm(x: Array, weight: Array, epsilon: float) -> Array:
    return x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + epsilon) * weight


def linear(x: Array, matrix: Matrix) -> Array:
    return x @ matrix.weights.T + matrix.bias


def silu(x: Array) -> Array:
    return x / (1 + np.exp(-x))


def gated_mlp(x: Array, mlp: GatedMlp) -> Array:
    return linear(silu(linear(x, mlp.gate)) * linear(x, mlp.up), mlp.down)


def rotary_embedding(positions: NDArray[np.integer], theta: float, head_dim: int) -> Array:
    angles = positions[:, None] * theta ** (-np.arange(0, head_dim, 2) / head_dim)
    return np.stack([np.cos(angles), np.sin(angles)], axis=2).reshape(len(positions), head_dim)


def rope(x: Array, rotary_cos_sin: Array) -> Array:
    """Rotate the pairs (2j, 2j + 1) of each head of x [T, heads, d]."""
    a, b = x[:, :, 0::2], x[:, :, 1::2]
    cos, sin = rotary_cos_sin[:, None, 0::2], rotary_cos_sin[:, None, 1::2]
    return np.stack([a * cos - b * sin, b * cos + a * sin], axis=3).reshape(x.shape)


def attention(query: Array, key: Array, value: Array, start: int) -> Array:
    """Causal attention of one sequence.

    Args:
        query: [t, nq, d], from position `start` on.
        key, value: [context, nkv, d], from position 0 on.
    """
    group = query.shape[1] // key.shape[1]
    hidden = np.arange(len(key)) > start + np.arange(len(query))[:, None]
    out = np.empty_like(query)
    for head in range(query.shape[1]):
        scores = query[:, head] @ key[:, head // group].T / np.sqrt(query.shape[2])
        out[:, head] = softmax(np.where(hidden, -np.inf, scores)) @ value[:, head // group]
    return out


def softmax(x: Array) -> Array:
    weights = np.exp(x - x.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


def moe_topk_select(logits: Array, bias: Array, k: int, norm_min: float) -> tuple[NDArray[np.int64], Array]:
    probabilities = softmax(logits)
    # A stable sort puts the lower index first among equals.
    topk_ids = np.argsort(-(probabilities + bias), axis=1, kind="stable")[:, :k]
    weights = np.take_along_axis(probabilities, topk_ids, axis=1)
    return topk_ids, weights / np.maximum(weights.sum(axis=1, keepdims=True), norm_min)


def fused_moe(x: Array, topk_ids: NDArray[np.integer], weights: Array, experts: Sequence[GatedMlp]) -> Array:
    y = np.zeros_like(x)
    for t, token in enumerate(x):
        for expert, weight in zip(topk_ids[t], weights[t], strict=True):
            y[t] += weight * gated_mlp(token, experts[expert])
    return y


class Received(NamedTuple):
    """The tokens that one rank of an expert-parallel group receives."""

    #: [N, H], grouped by expert; within an expert ordered by rank, token and top-k position.
    rows: Array
    #: [E + 1], the first row of each expert.
    offsets: NDArray[np.integer]
    #: [N, 3]: rank, token and top-k position of each row.
    source_token_index: NDArray[np.integer]


def ep_dispatch(
    x: Sequence[Array], dispatch_targets: Sequence[NDArray[np.integer]], num_experts: int
) -> list[Received]:
    """Return what each rank receives.

    Args:
        x: [T, H] of each rank.
        dispatch_targets: [T, k] of each rank: expert * 64 + rank, or -1.
    """
    sent = sorted(
        (int(target) % 64, int(target) // 64, rank, token, j)
        for rank, targets in enumerate(dispatch_targets)
        for (token, j), target in np.ndenumerate(targets)
        if target >= 0
    )
    received = []
    for rank, own in enumerate(x):
        mine = [(expert, origin) for receiver, expert, *origin in sent if receiver == rank]
        rows = np.empty((len(mine), own.shape[1]), own.dtype)
        for row, (_, (source, token, _)) in enumerate(mine):
            rows[row] = x[source][token]
        offsets = np.searchsorted([expert for expert, _ in mine], np.arange(num_experts + 1))
        source_token_index = np.array([origin for _, origin in mine], np.int64).reshape(-1, 3)
        received.append(Received(rows, offsets, source_token_index))
    return received


def ep_combine(
    received: Sequence[Received], results: Sequence[Array], weights: Sequence[Array]
) -> list[Array]:
    """Return the sums [T, H] of each rank, bit-exact in float32: fused multiply-adds in top-k order.

    Args:
        received: what each rank received.
        results: [N, H] of each rank, for the rows it received.
        weights: [T, k] of each rank.
    """
    sums = []
    for rank, own in enumerate(weights):
        rows = np.zeros((*own.shape, results[0].shape[1]), np.float32)
        taken = np.zeros(own.shape, bool)
        for part, result in zip(received, results, strict=True):
            mine = part.source_token_index[:, 0] == rank
            tokens, positions = part.source_token_index[mine, 1], part.source_token_index[mine, 2]
            rows[tokens, positions], taken[tokens, positions] = result[mine], True
        total = np.zeros((len(own), rows.shape[2]), np.float32)
        for j in range(own.shape[1]):
            added = fma(own[:, j, None], rows[:, j], total)
            total = np.where(taken[:, j, None], added, total)
        sums.append(total)
    return sums


def fma(a: Array, b: Array, c: Array) -> Array:
    """Return a * b + c of float32 values, rounded once."""
    # Exact: the product of two 24-bit mantissas has at most 48 bits.
    product = a.astype(np.float64) * b.astype(np.float64)
    total = product + c
    # The exact rounding error of the sum (Knuth's TwoSum).
    part = total - product
    lost = (product - (total - part)) + (c - part)
    # Rounding to odd in double makes the second rounding, to float32, correct (Boldo and Melquiond,
    # "Emulation of FMA and correctly rounded sums", 2008).
    is_even = (total.view(np.int64) & 1) == 0
    odd = np.where((lost != 0) & is_even, np.nextafter(total, np.copysign(np.inf, lost)), total)
    return odd.astype(np.float32)


def philox4x32(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """Ten rounds of Philox over four 32-bit words (Salmon et al., SC 2011)."""
    word = 0xFFFFFFFF
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        product0, product1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1 = (product1 >> 32) ^ c1 ^ k0, product1 & word
        c2, c3 = (product0 >> 32) ^ c3 ^ k1, product0 & word
        k0, k1 = (k0 + 0x9E3779B9) & word, (k1 + 0xBB67AE85) & word
    return c0, c1, c2, c3


def uniform(seed: int, choice: int, position: int) -> float:
    """Return the random number in [0, 1) for the token at `position` of a text."""
    first, second, _, _ = philox4x32((position, choice, 0, 0), (seed & 0xFFFFFFFF, seed >> 32))
    return ((first >> 5) * 2**26 + (second >> 6)) / 2**53


def sampling_weights(
    logits: Array,
    row: np.void,
    seen: Sequence[tuple[int, int]],
    masked: Sequence[int],
    biased: Sequence[tuple[int, float]] = (),
    allowed: Collection[int] | None = None,
) -> Array:
    """Return the unnormalised probabilities of the tokens of one row.

    Args:
        row: a SAMPLING_ROW.
        seen: (token, count in the output) for all tokens of the text.
        masked: tokens that must not be drawn.
        biased: (token, what is added to its logit).
        allowed: tokens that may be drawn; None: all.
    """
    scores = logits.astype(np.float64)
    for token, bias in biased:
        scores[token] = np.float32(scores[token]) + np.float32(bias)
    for token, count in seen:
        penalty = row["repetition_penalty"]
        scores[token] = scores[token] / penalty if scores[token] > 0 else scores[token] * penalty
        if count:
            scores[token] -= count * row["frequency_penalty"] + row["presence_penalty"]
    scores = scores.astype(np.float32).astype(np.float64)
    scores[list(masked)] = -np.inf
    if allowed is not None:
        scores[[token for token in range(len(scores)) if token not in allowed]] = -np.inf
    if row["temperature"] == 0:
        return (np.arange(len(scores)) == scores.argmax()).astype(np.float64)
    with np.errstate(over="ignore", under="ignore"):
        weights = np.exp((scores - scores.max()) / row["temperature"])
    keep = weights >= row["min_p"]
    if 0 < row["top_k"] < len(scores):
        keep &= scores >= np.sort(scores)[-row["top_k"]]
    weights[~keep] = 0
    if row["top_p"] < 1:
        # Largest first, ties by lower id.
        order = np.argsort(-weights, kind="stable")
        reached = np.cumsum(weights[order]) >= row["top_p"] * weights.sum()
        weights[order[reached.argmax() + 1 :]] = 0
    return weights


def sample(weights: Array, row: np.void) -> int:
    """Draw the token of one row by inverse CDF over ascending ids.

    Args:
        weights: unnormalised probabilities, see `sampling_weights`.
        row: a SAMPLING_ROW.
    """
    mass = np.cumsum(weights)
    point = uniform(int(row["seed"]), int(row["choice"]), int(row["position"])) * mass[-1]
    return int(np.searchsorted(mass, point, side="right"))


def log_softmax(logits: Array) -> Array:
    shifted = logits - logits.max()
    return shifted - np.log(np.exp(shifted).sum())
