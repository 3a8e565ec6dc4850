"""A layer's fused blocks equal their operations one after the other, to the bit."""

from __future__ import annotations

import numpy as np
import paddle
import pytest

from fastdeploy import custom_ops
from fastdeploy.custom_ops import reference

from .draws import FORMATS, Packed, PackedMlp, PagedCache, Span, draw, step, tensor, tolerance

HIDDEN, EPSILON = 72, 1e-5


@pytest.fixture
def random() -> np.random.Generator:
    return np.random.default_rng(11)


def normed(hidden_states: np.ndarray, norm: paddle.Tensor) -> paddle.Tensor:
    return custom_ops.rms_norm(tensor(hidden_states), norm, EPSILON)[0]


@pytest.mark.parametrize("weight_format", FORMATS)
@pytest.mark.parametrize("tokens", [1, 40])
def test_attention_block(random: np.random.Generator, weight_format: str, tokens: int) -> None:
    queries, keys, head_dim, block_size = 6, 2, 24, 16
    qkv = Packed.draw(random, weight_format, (queries + 2 * keys) * head_dim, HIDDEN)
    output = Packed.draw(random, weight_format, HIDDEN, queries * head_dim)
    norm, before = tensor(draw(random, HIDDEN)), draw(random, tokens, HIDDEN).astype(np.float32)
    plan = step([Span(0, tokens, random.permutation(4))])
    rotary_cos_sin = custom_ops.rotary_embedding(plan, 10000.0, head_dim)
    wide = weight_format == "float32"
    caches = [PagedCache(4, block_size, keys, head_dim, wide) for _ in range(2)]

    hidden_states = tensor(before)
    tensors = (norm, qkv.blob, output.blob, rotary_cos_sin, caches[0].keys, caches[0].values)
    custom_ops.attention_block(hidden_states, plan, *tensors, EPSILON)

    rows = custom_ops.linear(normed(before, norm), qkv.blob)
    custom_ops.rope_and_cache(rows, plan, rotary_cos_sin, caches[1].keys, caches[1].values)
    attended = custom_ops.paged_attention(rows, plan, caches[1].keys, caches[1].values)
    expected = before + custom_ops.linear(attended, output.blob).numpy()
    np.testing.assert_array_equal(hidden_states.numpy(), expected)
    for part in ("keys", "values"):
        one, other = (getattr(cache, part).astype("float32").numpy() for cache in caches)
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("weight_format", FORMATS)
@pytest.mark.parametrize("tokens", [1, 40])
def test_mlp_block(random: np.random.Generator, weight_format: str, tokens: int) -> None:
    mlp = PackedMlp.draw(random, weight_format, HIDDEN, 50, bias=True)
    norm, before = tensor(draw(random, HIDDEN)), draw(random, tokens, HIDDEN).astype(np.float32)
    hidden_states = tensor(before)
    custom_ops.mlp_block(hidden_states, norm, mlp.gate_up, mlp.down, EPSILON)
    np.testing.assert_array_equal(hidden_states.numpy(), before + alone(mlp, normed(before, norm)))


def alone(mlp: PackedMlp, x: paddle.Tensor) -> np.ndarray:
    """Compute an MLP as one expert that takes every row, which is a single operation."""
    offsets = paddle.to_tensor(np.array([0, len(x)], np.int32))
    return custom_ops.moe_grouped_gemm(x, offsets, mlp.gate_up, mlp.down).numpy()


@pytest.mark.parametrize("weight_format", FORMATS)
@pytest.mark.parametrize("tokens", [1, 40])
@pytest.mark.parametrize("shared_width", [0, 30])
def test_moe_block(random: np.random.Generator, weight_format: str, tokens: int, shared_width: int) -> None:
    experts, k = 7, 3
    router = Packed.draw(random, "float32", experts, HIDDEN, bias=False)
    bias = tensor(0.1 * draw(random, experts))
    mlps = PackedMlp.draw(random, weight_format, HIDDEN, 20, experts)
    shared = PackedMlp.draw(random, weight_format, HIDDEN, shared_width, bias=True) if shared_width else None
    norm, before = tensor(draw(random, HIDDEN)), draw(random, tokens, HIDDEN).astype(np.float32)
    hidden_states = tensor(before)
    topk_ids, weights = custom_ops.moe_block(
        *(hidden_states, norm, router.blob, bias, mlps.gate_up, mlps.down),
        shared.gate_up if shared else None,
        shared.down if shared else None,
        *(EPSILON, k, 1e-12),
    )

    x = normed(before, norm)
    expected_ids, expected_weights = custom_ops.moe_topk_select(
        custom_ops.linear(x, router.blob), bias, k, 1e-12
    )
    np.testing.assert_array_equal(topk_ids.numpy(), expected_ids.numpy())
    np.testing.assert_array_equal(weights.numpy(), expected_weights.numpy())
    y = custom_ops.fused_moe(x, topk_ids, weights, mlps.gate_up, mlps.down).numpy()
    expected = before + (y + alone(shared, x) if shared else y)
    np.testing.assert_array_equal(hidden_states.numpy(), expected)


@pytest.mark.parametrize("weight_format", FORMATS)
def test_single_expert_over_all_rows_is_the_gated_mlp(
    random: np.random.Generator, weight_format: str
) -> None:
    """The baseline of the other tests here agrees with the reference."""
    mlp, x = PackedMlp.draw(random, weight_format, HIDDEN, 50, bias=True), draw(random, 40, HIDDEN)
    expected = reference.gated_mlp(x, mlp.plain[0])
    np.testing.assert_allclose(
        alone(mlp, tensor(x)), expected, **tolerance(weight_format, np.abs(expected).max())
    )
