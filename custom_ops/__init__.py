"""The operations of the network: one public function each, computed by the compiled kernels on a CPU.

`reference.py` beside this file says in plain numpy what each one computes. Activations are float32. "packed"
is a uint8 tensor of one packed matrix (or a stack of them), see `packed_matrix.py`. A "step" is the int32
tensor that says which tokens of which sequences are computed, see `include/step.h`.

Every sum has an order of its own, fixed by its row alone: the result of a row does not depend, to the bit, on
what else is in the step, on the number of threads, or on how a text was cut into steps.

T is the number of tokens of a step, H the hidden size, nq / nkv the heads of queries / of keys and values, d
the size of a head, E the routed experts, k the experts that a token takes.
"""

from __future__ import annotations

import paddle

from .native import instruction_set, run, set_threads
from .sampling import BROKEN_ROW, SAMPLING_ROW, argmax, sample

__all__ = [
    "BROKEN_ROW",
    "SAMPLING_ROW",
    "argmax",
    "attention_block",
    "embedding",
    "ep_combine_receive",
    "ep_combine_send",
    "ep_dispatch_receive",
    "ep_dispatch_send",
    "ep_moe_block",
    "fused_moe",
    "instruction_set",
    "linear",
    "logits",
    "mlp_block",
    "moe_block",
    "moe_grouped_gemm",
    "moe_permute",
    "moe_topk_select",
    "moe_unpermute",
    "paged_attention",
    "rms_norm",
    "rope_and_cache",
    "rotation",
    "sample",
    "set_threads",
]


# ---- whole blocks of a layer, as the engine calls them


def embedding(table: paddle.Tensor, step: paddle.Tensor) -> paddle.Tensor:
    """Rows of table [V, H], float32 or bfloat16, for the tokens of the step: float32 [T, H]."""
    return run("embedding", table, step)[0]


def attention_block(
    stream: paddle.Tensor,
    step: paddle.Tensor,
    norm: paddle.Tensor,
    qkv: paddle.Tensor,
    output: paddle.Tensor,
    turns: paddle.Tensor,
    keys: paddle.Tensor,
    values: paddle.Tensor,
    epsilon: float,
) -> None:
    """stream += output(attention(qkv(rms_norm(stream)))), in place; keys and values go to the cache.

    Args:
        stream: [T, H].
        norm: [H].
        qkv, output: packed.
        turns: of `rotation`.
        keys, values: of the layer's cache, see `paged_attention`.
    """
    run("attention_block", stream, step, norm, qkv, output, turns, keys, values, epsilon)


def mlp_block(
    stream: paddle.Tensor, norm: paddle.Tensor, gate_up: paddle.Tensor, down: paddle.Tensor, epsilon: float
) -> None:
    """stream += down(silu(gate(x)) * up(x)) of x = rms_norm(stream), in place."""
    run("mlp_block", stream, norm, gate_up, down, epsilon)


def moe_block(
    stream: paddle.Tensor,
    norm: paddle.Tensor,
    router: paddle.Tensor,
    bias: paddle.Tensor,
    gate_up: paddle.Tensor,
    down: paddle.Tensor,
    shared_gate_up: paddle.Tensor | None,
    shared_down: paddle.Tensor | None,
    epsilon: float,
    k: int,
    norm_min: float,
) -> tuple[paddle.Tensor, paddle.Tensor]:
    """stream += the weighted sum of each token's experts + the shared experts, of rms_norm(stream), in place.

    Args:
        router: packed float32, [E, H].
        bias: [E], see `moe_topk_select`.
        gate_up, down: packed stacks of E matrices.
        shared_gate_up, shared_down: packed, or both None.

    Returns:
        picks int32 [T, k] and their weights [T, k].
    """
    experts = (router, bias, gate_up, down, shared_gate_up, shared_down)
    _, picks, weights = run("moe_block", stream, norm, *experts, epsilon, k, norm_min)
    return picks, weights


def ep_moe_block(
    stream: paddle.Tensor,
    norm: paddle.Tensor,
    router: paddle.Tensor,
    bias: paddle.Tensor,
    gate_up: paddle.Tensor,
    down: paddle.Tensor,
    shared_gate_up: paddle.Tensor | None,
    shared_down: paddle.Tensor | None,
    epsilon: float,
    k: int,
    norm_min: float,
    group: int,
    layer: int,
) -> tuple[paddle.Tensor, paddle.Tensor]:
    """`moe_block` with the experts of a group of ranks: a collective, and equal to it to the bit.

    Tokens go to where their experts are computed, and this rank computes those that are for its own experts;
    shared experts are computed meanwhile. A rank that has no tokens calls it with a stream [0, H].

    Args:
        group: of `expert_group.NativeGroup`. When its status is not GOING afterwards, or was not before, the
        stream is
            not to be used.
        layer: counts those that have experts.
    """
    experts = (router, bias, gate_up, down, shared_gate_up, shared_down)
    _, picks, weights = run("ep_moe_block", stream, norm, *experts, epsilon, k, norm_min, group, layer)
    return picks, weights


def logits(
    stream: paddle.Tensor, step: paddle.Tensor, norm: paddle.Tensor, lm_head: paddle.Tensor, epsilon: float
) -> paddle.Tensor:
    """lm_head(rms_norm(row)) of those rows of the stream [T, H] that the step wants: [rows, V]."""
    return run("logits", stream, step, norm, lm_head, epsilon)[0]


# ---- single operations


def rms_norm(
    x: paddle.Tensor, weight: paddle.Tensor, epsilon: float, residual: paddle.Tensor | None = None
) -> tuple[paddle.Tensor, paddle.Tensor]:
    """Adds `residual` to x [T, H], if there is one, and normalises the sum.

    Returns:
        The normalised rows [T, H], and the sum they were made from: the next residual.
    """
    normed, total = run("rms_norm", x, weight, residual, epsilon)
    return normed, total


def linear(x: paddle.Tensor, weights: paddle.Tensor) -> paddle.Tensor:
    """x [T, in] -> [T, out] with a packed matrix and its bias."""
    return run("linear", x, weights)[0]


def rotation(step: paddle.Tensor, theta: float, head_dim: int) -> paddle.Tensor:
    """cos and sin of position * theta ** (-2j / d): [T, d], pairs side by side. The same for all layers."""
    return run("rotation", step, theta, head_dim)[0]


def rope_and_cache(
    qkv: paddle.Tensor,
    step: paddle.Tensor,
    turns: paddle.Tensor,
    keys: paddle.Tensor,
    values: paddle.Tensor,
) -> None:
    """Rotates queries and keys by their positions and writes keys and values into the paged cache, in place.

    Args:
        qkv: [T, (nq + 2 * nkv) * d], heads of q, then of k, then of v. Elements 2j and 2j + 1 of a head are
            one pair.
        turns: of `rotation`.
        keys, values: see `paged_attention`.
    """
    run("rope_and_cache", qkv, step, turns, keys, values)


def paged_attention(
    qkv: paddle.Tensor, step: paddle.Tensor, keys: paddle.Tensor, values: paddle.Tensor
) -> paddle.Tensor:
    """Softmax attention of rotated queries over the paged cache; decode rows and prefill chunks in one call.

    Query head h reads the keys and values of head h // (nq / nkv).

    Args:
        qkv: as `rope_and_cache` leaves it.
        keys: float32 or bfloat16 [num_blocks, nkv, ceil(block_size / 32), d, 32]: a block's keys transposed,
            32 at a time.
        values: [num_blocks, nkv, ceil(d / 32), block_size, 32]. In bfloat16 the 32 of a row stand in
            the order 0, 16, 1, 17, ...: so have the keys of a row.

    Returns:
        [T, nq * d].
    """
    return run("paged_attention", qkv, step, keys, values)[0]


def moe_topk_select(
    router_logits: paddle.Tensor, bias: paddle.Tensor, k: int, norm_min: float
) -> tuple[paddle.Tensor, paddle.Tensor]:
    """Picks the k experts of each token.

    Args:
        router_logits: [T, E].
        bias: [E], added to the probabilities for the choice only.
        norm_min: floor of the sum that the picked probabilities are divided by.

    Returns:
        picks int32 [T, k], best first, the lower index first among equals; their weights [T, k].
    """
    picks, weights = run("moe_topk_select", router_logits, bias, k, norm_min)
    return picks, weights


def moe_permute(
    x: paddle.Tensor, picks: paddle.Tensor, num_experts: int
) -> tuple[paddle.Tensor, paddle.Tensor, paddle.Tensor]:
    """Makes the tokens of one expert neighbours.

    Returns:
        rows [T * k, H]; offsets int32 [E + 1], where each expert's rows begin; order int32 [T * k]: row i is
        token order[i] // k for its pick order[i] % k.
    """
    rows, offsets, order = run("moe_permute", x, picks, num_experts)
    return rows, offsets, order


def moe_grouped_gemm(
    rows: paddle.Tensor, offsets: paddle.Tensor, gate_up: paddle.Tensor, down: paddle.Tensor
) -> paddle.Tensor:
    """Rows offsets[e] .. offsets[e + 1] - 1 through the gated MLP of expert e, all experts at once."""
    return run("moe_grouped_gemm", rows, offsets, gate_up, down)[0]


def moe_unpermute(rows: paddle.Tensor, order: paddle.Tensor, weights: paddle.Tensor) -> paddle.Tensor:
    """Each token's rows summed by `weights` [T, k], in the order of its picks: [T, H]."""
    return run("moe_unpermute", rows, order, weights)[0]


def fused_moe(
    x: paddle.Tensor,
    picks: paddle.Tensor,
    weights: paddle.Tensor,
    gate_up: paddle.Tensor,
    down: paddle.Tensor,
) -> paddle.Tensor:
    """The routed experts: permute, grouped GEMM and unpermute in one call; x [T, H] -> [T, H]."""
    return run("fused_moe", x, picks, weights, gate_up, down)[0]


# ---- a collective of an expert-parallel group in its parts: between each send and its receive others may be
# computed


def ep_dispatch_send(x: paddle.Tensor, picks: paddle.Tensor, group: int, layer: int) -> paddle.Tensor:
    """Publishes this rank's tokens and where each of them goes.

    Args:
        x: float32 or bfloat16 [T, H], the same type on all ranks.
        picks: int32 [T, k]; -1 drops a pick.

    Returns:
        int32 [T, k]: expert * 64 + seat of each pick, -1 for those that are dropped.

    Raises:
        RuntimeError: the group has been interrupted (its status says why). So do the other three.
    """
    return run("ep_dispatch_send", x, picks, group, layer)[0]


def ep_dispatch_receive(
    like: paddle.Tensor, group: int, layer: int
) -> tuple[paddle.Tensor, paddle.Tensor, paddle.Tensor]:
    """Waits until all ranks have published theirs, and takes what is for this rank's experts.

    Args:
        like: any tensor of the type and width of x.

    Returns:
        rows [N, H] by expert, and within an expert by seat, token and pick; offsets int32 [E + 1], where each
        expert's rows begin; origins int32 [N, 3]: seat, token and pick of each row.
    """
    rows, offsets, origins = run("ep_dispatch_receive", like, group, layer)
    return rows, offsets, origins


def ep_combine_send(rows: paddle.Tensor, group: int) -> None:
    """Publishes the results [N, H] of the rows that were received, in their order.

    They are copied unless they lie where `NativeGroup.result_rows` says already.
    """
    run("ep_combine_send", rows, group)


def ep_combine_receive(weights: paddle.Tensor, like: paddle.Tensor, group: int) -> paddle.Tensor:
    """Waits for all results, and sums those of each token by `weights` [T, k] in float32, in the order of
    its picks.

    Args:
        like: any tensor of the type and width of the rows that were sent.

    Returns:
        float32 [T, H].
    """
    return run("ep_combine_receive", weights, like, group)[0]
