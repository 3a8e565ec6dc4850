"""The operations of the network, one public function each, computed by compiled CPU kernels.

`reference.py` implements each operation in plain NumPy. Activations are float32. A "packed" argument is a
uint8 tensor that holds a packed matrix or a stack of them, see `packed_matrix.py`. A "step" is the int32
tensor that describes the tokens to compute, see `include/step.h`.

The order of every sum depends on its row alone. The result of a row is therefore bit-identical whatever else
the step contains, for any number of threads, and however a text is split into steps.

T is the number of tokens in a step, H the hidden size, nq and nkv the number of query and key/value heads, d
the head size, V the vocabulary size, E the number of routed experts, k the experts per token.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .native import instruction_set, numeric_version, run, set_threads
from .sampling import BROKEN_ROW, SAMPLING_ROW, argmax, sample

if TYPE_CHECKING:
    import paddle

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
    "numeric_version",
    "paged_attention",
    "rms_norm",
    "rope_and_cache",
    "rotary_embedding",
    "sample",
    "set_threads",
]


# ---- blocks of a layer


def embedding(table: paddle.Tensor, step: paddle.Tensor) -> paddle.Tensor:
    """Return the rows of `table` [V, H] (float32 or bfloat16) for the tokens of a step: float32 [T, H]."""
    return run("embedding", table, step)[0]


def attention_block(
    hidden_states: paddle.Tensor,
    step: paddle.Tensor,
    norm: paddle.Tensor,
    qkv: paddle.Tensor,
    output: paddle.Tensor,
    rotary_cos_sin: paddle.Tensor,
    keys: paddle.Tensor,
    values: paddle.Tensor,
    epsilon: float,
) -> None:
    """Add output(attention(qkv(rms_norm(hidden_states)))) to `hidden_states` in place; write the KV cache.

    Args:
        hidden_states: [T, H].
        norm: [H].
        qkv, output: packed.
        rotary_cos_sin: from `rotary_embedding`.
        keys, values: the layer's cache, see `paged_attention`.
    """
    run("attention_block", hidden_states, step, norm, qkv, output, rotary_cos_sin, keys, values, epsilon)


def mlp_block(
    hidden_states: paddle.Tensor,
    norm: paddle.Tensor,
    gate_up: paddle.Tensor,
    down: paddle.Tensor,
    epsilon: float,
) -> None:
    """Add down(silu(gate(x)) * up(x)), x = rms_norm(hidden_states), to `hidden_states` in place.

    Args:
        hidden_states: [T, H].
        norm: [H].
        gate_up, down: packed.
    """
    run("mlp_block", hidden_states, norm, gate_up, down, epsilon)


def moe_block(
    hidden_states: paddle.Tensor,
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
    """Add the routed and shared experts of rms_norm(hidden_states) to `hidden_states` in place.

    Args:
        hidden_states: [T, H].
        norm: [H].
        router: packed float32 [E, H].
        bias: [E], see `moe_topk_select`.
        gate_up, down: packed stacks of E matrices.
        shared_gate_up, shared_down: packed, or both None.
        norm_min: see `moe_topk_select`.

    Returns:
        topk_ids int32 [T, k] and topk_weights [T, k].
    """
    experts = (router, bias, gate_up, down, shared_gate_up, shared_down)
    _, topk_ids, topk_weights = run("moe_block", hidden_states, norm, *experts, epsilon, k, norm_min)
    return topk_ids, topk_weights


def ep_moe_block(
    hidden_states: paddle.Tensor,
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
    """Compute `moe_block` as a collective of the ranks that share the experts; the results are bit-identical.

    Each token is computed on the ranks that hold its experts; the shared experts are computed during the
    exchange. A rank without tokens calls it with hidden_states [0, H].

    Args:
        group: handle of an `expert_group.NativeGroup`. Unless its status is GOING before and after the call,
            `hidden_states` is undefined.
        layer: index among the MoE layers.
    """
    experts = (router, bias, gate_up, down, shared_gate_up, shared_down)
    _, topk_ids, topk_weights = run(
        "ep_moe_block", hidden_states, norm, *experts, epsilon, k, norm_min, group, layer
    )
    return topk_ids, topk_weights


def logits(
    hidden_states: paddle.Tensor,
    step: paddle.Tensor,
    norm: paddle.Tensor,
    lm_head: paddle.Tensor,
    epsilon: float,
) -> paddle.Tensor:
    """Return lm_head(rms_norm(row)) for the rows of `hidden_states` [T, H] the step selects: [rows, V]."""
    return run("logits", hidden_states, step, norm, lm_head, epsilon)[0]


# ---- single operations


def rms_norm(
    x: paddle.Tensor, weight: paddle.Tensor, epsilon: float, residual: paddle.Tensor | None = None
) -> tuple[paddle.Tensor, paddle.Tensor]:
    """Normalise the rows of x + residual.

    Returns:
        The normalised rows [T, H], and x + residual [T, H], which is the next residual.
    """
    normed, total = run("rms_norm", x, weight, residual, epsilon)
    return normed, total


def linear(x: paddle.Tensor, weights: paddle.Tensor) -> paddle.Tensor:
    """Apply a packed matrix and its bias: [T, in] -> [T, out]."""
    return run("linear", x, weights)[0]


def rotary_embedding(step: paddle.Tensor, theta: float, head_dim: int) -> paddle.Tensor:
    """Return cos and sin of position * theta ** (-2j / d) as pairs: [T, d]. All layers share the result."""
    return run("rotation", step, theta, head_dim)[0]


def rope_and_cache(
    qkv: paddle.Tensor,
    step: paddle.Tensor,
    rotary_cos_sin: paddle.Tensor,
    keys: paddle.Tensor,
    values: paddle.Tensor,
) -> None:
    """Apply the rotary embedding to queries and keys in place, and write keys and values to the paged cache.

    Args:
        qkv: [T, (nq + 2 * nkv) * d], heads of q, then of k, then of v. Elements 2j and 2j + 1 of a head form
            a pair.
        rotary_cos_sin: from `rotary_embedding`.
        keys, values: see `paged_attention`.
    """
    run("rope_and_cache", qkv, step, rotary_cos_sin, keys, values)


def paged_attention(
    qkv: paddle.Tensor, step: paddle.Tensor, keys: paddle.Tensor, values: paddle.Tensor
) -> paddle.Tensor:
    """Compute causal attention of rotated queries over the paged cache, for decode rows and prefill chunks.

    Query head h reads the keys and values of kv head h // (nq / nkv).

    Args:
        qkv: as `rope_and_cache` leaves it.
        keys: float32 or bfloat16 [num_blocks, nkv, ceil(block_size / 32), d, 32]: the keys of a block,
            transposed in groups of 32.
        values: [num_blocks, nkv, ceil(d / 32), block_size, 32]. In bfloat16, the 32 elements of a row of keys
            or values have the order 0, 16, 1, 17, ...

    Returns:
        [T, nq * d].
    """
    return run("paged_attention", qkv, step, keys, values)[0]


def moe_topk_select(
    router_logits: paddle.Tensor, bias: paddle.Tensor, k: int, norm_min: float
) -> tuple[paddle.Tensor, paddle.Tensor]:
    """Select the k experts of each token.

    Args:
        router_logits: [T, E].
        bias: [E], added to the probabilities for the selection only.
        norm_min: lower bound of the sum by which the selected probabilities are divided.

    Returns:
        topk_ids int32 [T, k] in descending order of score, ties by ascending index; topk_weights [T, k].
    """
    topk_ids, topk_weights = run("moe_topk_select", router_logits, bias, k, norm_min)
    return topk_ids, topk_weights


def moe_permute(
    x: paddle.Tensor, topk_ids: paddle.Tensor, num_experts: int
) -> tuple[paddle.Tensor, paddle.Tensor, paddle.Tensor]:
    """Group the tokens x [T, H] by expert.

    Args:
        topk_ids: int32 [T, k].

    Returns:
        rows [T * k, H]; offsets int32 [E + 1], the first row of each expert; order int32 [T * k]: row i is
        token order[i] // k for its expert topk_ids[token, order[i] % k].
    """
    rows, offsets, order = run("moe_permute", x, topk_ids, num_experts)
    return rows, offsets, order


def moe_grouped_gemm(
    rows: paddle.Tensor, offsets: paddle.Tensor, gate_up: paddle.Tensor, down: paddle.Tensor
) -> paddle.Tensor:
    """Apply the gated MLP of each expert e to rows offsets[e] .. offsets[e + 1] - 1.

    Args:
        rows, offsets: as `moe_permute` returns them, [N, H] and int32 [E + 1].
        gate_up, down: packed stacks of E matrices.

    Returns:
        [N, H].
    """
    return run("moe_grouped_gemm", rows, offsets, gate_up, down)[0]


def moe_unpermute(rows: paddle.Tensor, order: paddle.Tensor, topk_weights: paddle.Tensor) -> paddle.Tensor:
    """Sum the rows [T * k, H] of each token, weighted by `topk_weights` [T, k], in top-k order: [T, H].

    Args:
        order: as `moe_permute` returns it.
    """
    return run("moe_unpermute", rows, order, topk_weights)[0]


def fused_moe(
    x: paddle.Tensor,
    topk_ids: paddle.Tensor,
    topk_weights: paddle.Tensor,
    gate_up: paddle.Tensor,
    down: paddle.Tensor,
) -> paddle.Tensor:
    """Compute the routed experts (permute, grouped GEMM, unpermute): x [T, H] -> [T, H]."""
    return run("fused_moe", x, topk_ids, topk_weights, gate_up, down)[0]


# ---- parts of a collective of an expert-parallel group; other operations may run between send and receive


def ep_dispatch_send(x: paddle.Tensor, topk_ids: paddle.Tensor, group: int, layer: int) -> paddle.Tensor:
    """Publish this rank's tokens and their targets.

    Args:
        x: float32 or bfloat16 [T, H], the same type on all ranks.
        topk_ids: int32 [T, k]; -1 drops an assignment.

    Returns:
        dispatch targets int32 [T, k]: expert * 64 + rank, or -1 for a dropped assignment.

    Raises:
        RuntimeError: the group was interrupted; its status says why. The other three operations raise it too.
    """
    return run("ep_dispatch_send", x, topk_ids, group, layer)[0]


def ep_dispatch_receive(
    like: paddle.Tensor, group: int, layer: int
) -> tuple[paddle.Tensor, paddle.Tensor, paddle.Tensor]:
    """Wait until all ranks have published their tokens, and return those for this rank's experts.

    Args:
        like: any tensor with the dtype and width of x.

    Returns:
        rows [N, H] grouped by expert, and within an expert ordered by rank, token and top-k position; offsets
        int32 [E + 1], the first row of each expert; source_token_index int32 [N, 3]: rank, token and top-k
        position of each row.
    """
    rows, offsets, source_token_index = run("ep_dispatch_receive", like, group, layer)
    return rows, offsets, source_token_index


def ep_combine_send(rows: paddle.Tensor, group: int) -> None:
    """Publish the results [N, H] of the received rows, in the same order.

    They are copied unless they already lie at `NativeGroup.result_rows`.
    """
    run("ep_combine_send", rows, group)


def ep_combine_receive(topk_weights: paddle.Tensor, like: paddle.Tensor, group: int) -> paddle.Tensor:
    """Wait for all results, and sum those of each token by `topk_weights` [T, k] in float32, in top-k order.

    Args:
        like: any tensor with the dtype and width of the rows that were sent.

    Returns:
        float32 [T, H].
    """
    return run("ep_combine_receive", topk_weights, like, group)[0]
