"""The operations of the network: one public function each, composed here of Paddle's built-ins.

They run on whatever device their tensors are on. `reference.py` beside this file says in plain numpy what
each one computes. All floating-point tensors are float32. T is the number of tokens of a step, H the hidden
size, nq / nkv the heads of queries / of keys and values, d the size of a head, E the routed experts, k the
experts that a token takes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import paddle
import paddle.incubate.nn.functional as fused
import paddle.nn.functional as F


@dataclass(frozen=True, slots=True)
class Projection:
    """A linear map whose matrix stays as the checkpoint stores it, so that it can be memory-mapped.

    Several `weights` (q, k and v; gate and up) act on the same input and their outputs are laid side by side.
    """

    weights: tuple[paddle.Tensor, ...]
    #: True: matrices are [out, in] (Hugging Face). False: [in, out] (Paddle).
    out_in: bool
    #: [out], of all parts together.
    bias: paddle.Tensor | None = None


@dataclass(frozen=True, slots=True)
class MLPWeights:
    """down(silu(gate(x)) * up(x)); the output of `gate_up` is the gate half, then the up half."""

    gate_up: Projection
    down: Projection


@dataclass(frozen=True, slots=True)
class AttentionTile:
    """Queries that one matrix product handles: one token each of many sequences, or many tokens of one.

    The block tables of a tile are padded to the longest. S is the keys per sequence, padding included.
    """

    num_sequences: int
    num_queries: int
    #: int64 [num_sequences * nkv * S / block_size]: per sequence and head, rows of the cache seen as
    #: [num_blocks * nkv, block_size * d].
    read_rows: paddle.Tensor
    #: 0 where a query may look, -inf elsewhere: [num_queries, S] of one sequence, [num_sequences * nq, 1, S]
    #: of many. There the heads are written out, because a broadcast in the middle is 15 times slower.
    mask: paddle.Tensor


def rms_norm(
    x: paddle.Tensor, weight: paddle.Tensor, epsilon: float, residual: paddle.Tensor | None = None
) -> tuple[paddle.Tensor, paddle.Tensor]:
    """Adds `residual` to x [T, H], if there is one, and normalises the sum.

    Returns:
        The normalised rows [T, H], and the sum they were made from: the next residual.
    """
    if residual is None:
        return fused.fused_rms_norm(x, weight, None, epsilon, begin_norm_axis=1)[0], x
    normed, total = fused.fused_rms_norm(x, weight, None, epsilon, begin_norm_axis=1, residual=residual)
    return normed, total


def linear(x: paddle.Tensor, projection: Projection) -> paddle.Tensor:
    """x [T, in] -> [T, out]."""
    parts = [paddle.matmul(x, weight, transpose_y=projection.out_in) for weight in projection.weights]
    y = parts[0] if len(parts) == 1 else paddle.concat(parts, axis=-1)
    return y if projection.bias is None else y + projection.bias


def swiglu_mlp(x: paddle.Tensor, weights: MLPWeights) -> paddle.Tensor:
    """x [T, H] -> [T, H] through a gated MLP."""
    return linear(F.swiglu(linear(x, weights.gate_up)), weights.down)


def rope_and_cache(
    qkv: paddle.Tensor,
    rotation: paddle.Tensor,
    key_cache: paddle.Tensor,
    value_cache: paddle.Tensor,
    write_rows: paddle.Tensor,
) -> paddle.Tensor:
    """Rotates queries and keys by their positions and writes keys and values into the paged cache, in place.

    Args:
        qkv: [T, nq + 2 * nkv, d], heads of q, then of k, then of v.
        rotation: complex64 [T, nq + nkv, d / 2], cos + i sin of position times frequency j, the same for all
            heads. Elements 2j and 2j + 1 of a head are the real and imaginary part of what it multiplies
            (interleaved pairs).
        key_cache, value_cache: [num_blocks, nkv, block_size, d].
        write_rows: int64 [T * nkv], for each token and head its row of the cache seen as
            [num_blocks * nkv * block_size, d]: (block * nkv + head) * block_size + offset.

    Returns:
        The rotated queries [T, nq, d].
    """
    num_kv_heads, head_dim = key_cache.shape[1], key_cache.shape[3]
    num_heads = qkv.shape[1] - 2 * num_kv_heads
    turning, value = paddle.split(qkv, [num_heads + num_kv_heads, num_kv_heads], axis=1)
    pairs = turning.reshape([turning.shape[0], turning.shape[1], head_dim // 2, 2])
    turned = paddle.as_real(paddle.as_complex(pairs) * rotation).reshape(turning.shape)
    query, key = paddle.split(turned, [num_heads, num_kv_heads], axis=1)
    for cache, update in ((key_cache, key), (value_cache, value)):
        paddle.scatter_(cache.reshape([-1, head_dim]), write_rows, update.reshape([-1, head_dim]))
    return query


def paged_attention(
    query: paddle.Tensor,
    key_cache: paddle.Tensor,
    value_cache: paddle.Tensor,
    tiles: Sequence[AttentionTile],
) -> paddle.Tensor:
    """Softmax attention of rotated queries over the paged cache; decode rows and prefill chunks in one call.

    Query head h reads the keys and values of head h // (nq / nkv).

    Args:
        query: [T, nq, d]; tile after tile, in a tile sequence after sequence.
        key_cache, value_cache: [num_blocks, nkv, block_size, d]; the step's own tokens are written already.

    Returns:
        [T, nq * d].
    """
    num_blocks, num_kv_heads, block_size, head_dim = key_cache.shape
    num_heads = query.shape[1]
    group = num_heads // num_kv_heads
    keys = key_cache.reshape([num_blocks * num_kv_heads, block_size * head_dim])
    values = value_cache.reshape(keys.shape)
    query = query * head_dim**-0.5
    sizes = [tile.num_sequences * tile.num_queries for tile in tiles]
    outputs = []
    for tile, q in zip(tiles, paddle.split(query, sizes) if len(tiles) > 1 else [query], strict=True):
        b, t = tile.num_sequences, tile.num_queries
        k = paddle.gather(keys, tile.read_rows).reshape([b, num_kv_heads, -1, head_dim])
        v = paddle.gather(values, tile.read_rows).reshape(k.shape)
        # Heads that share keys become rows of one matrix product: no key is repeated in memory.
        if t > 1:
            q = q.reshape([t, num_kv_heads, group, head_dim]).transpose([1, 2, 0, 3])
        scores = paddle.matmul(q.reshape([b, num_kv_heads, group * t, head_dim]), k, transpose_y=True)
        weights = F.softmax_(scores.reshape([b * num_heads, t, -1]).add_(tile.mask))
        out = paddle.matmul(weights.reshape(scores.shape), v)
        if t > 1:
            out = out.reshape([num_kv_heads, group, t, head_dim]).transpose([2, 0, 1, 3])
        outputs.append(out.reshape([b * t, num_heads * head_dim]))
    return outputs[0] if len(outputs) == 1 else paddle.concat(outputs)


def moe_topk_select(
    logits: paddle.Tensor, bias: paddle.Tensor, k: int, norm_min: float
) -> tuple[paddle.Tensor, paddle.Tensor]:
    """Picks the k experts of each token.

    Args:
        logits: [T, E] of the router.
        bias: [E], added to the probabilities for the choice only.
        norm_min: floor of the sum that the picked probabilities are divided by.

    Returns:
        picks int64 [T, k], best first, the lower index first among equals; their weights [T, k].
    """
    probabilities = F.softmax(logits, axis=-1)
    # A stable sort, because topk leaves open which of two equals it takes.
    picks = paddle.argsort(probabilities + bias, axis=-1, descending=True, stable=True)[:, :k]
    weights = paddle.index_sample(probabilities, picks)
    return picks, weights / paddle.clip(weights.sum(axis=-1, keepdim=True), min=norm_min)


def fused_moe(
    x: paddle.Tensor, picks: paddle.Tensor, weights: paddle.Tensor, experts: Sequence[MLPWeights]
) -> paddle.Tensor:
    """The routed experts: sends each token through its experts and sums by weight, in the order of its picks.

    Args:
        x: [T, H].
        picks, weights: [T, k], of `moe_topk_select`.

    Returns:
        [T, H].
    """
    num_tokens, k = picks.shape
    assigned = picks.numpy().reshape(-1)
    if num_tokens == 1:
        out = paddle.concat([swiglu_mlp(x, experts[e]) for e in assigned.tolist()])
    else:
        # Permute: the rows of one expert become neighbours; row order[i] of (token, pick) goes to place i.
        order = np.argsort(assigned, kind="stable")
        counts = np.bincount(assigned)
        active = np.flatnonzero(counts)
        rows = paddle.gather(x, paddle.to_tensor(order // k))
        parts = paddle.split(rows, counts[active].tolist())
        out = paddle.concat(
            [swiglu_mlp(part, experts[e]) for e, part in zip(active.tolist(), parts, strict=True)]
        )
        out = paddle.gather(out, paddle.to_tensor(np.argsort(order)))
    out = out.reshape([num_tokens, k, -1])
    return paddle.matmul(weights.unsqueeze(1), out).squeeze(1)
