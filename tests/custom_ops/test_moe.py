"""Routing and experts, compared with float64."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdeploy import custom_ops
from fastdeploy.custom_ops import reference

from .draws import FORMATS, PackedMlp, Tolerance, draw, integers, tensor, tolerance

TOLERANCE: Tolerance = {"rtol": 2e-5, "atol": 2e-5}
seeds = st.integers(0, 2**32 - 1)


@settings(max_examples=80)
@given(
    seed=seeds,
    tokens=st.integers(1, 30),
    experts=st.integers(1, 70),
    k=st.integers(1, 64),
    spread=st.sampled_from([1.0, 30.0]),
)
def test_topk_select_adds_the_bias_to_the_choice_only(
    seed: int, tokens: int, experts: int, k: int, spread: float
) -> None:
    random, k = np.random.default_rng(seed), min(k, experts)
    logits, bias = spread * draw(random, tokens, experts), 0.2 * draw(random, experts)
    topk_ids, weights = (
        out.numpy() for out in custom_ops.moe_topk_select(tensor(logits), tensor(bias), k, 1e-12)
    )
    expected_ids, expected_weights = reference.moe_topk_select(logits, bias, k, 1e-12)
    # Float32 may swap experts whose scores are closer than its rounding.
    scores = reference.softmax(logits) + bias
    found, expected = (np.take_along_axis(scores, chosen, axis=1) for chosen in (topk_ids, expected_ids))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)
    same = (topk_ids == expected_ids).all(axis=1)
    np.testing.assert_allclose(weights[same], expected_weights[same], rtol=3e-5, atol=1e-7)


def test_topk_select_takes_the_lower_index_of_equals() -> None:
    logits = np.zeros((3, 64))
    logits[:, 50] = 1
    topk_ids, weights = custom_ops.moe_topk_select(tensor(logits), tensor(np.zeros(64)), 8, 1e-12)
    assert topk_ids.numpy().tolist() == [[50, 0, 1, 2, 3, 4, 5, 6]] * 3
    np.testing.assert_allclose(weights.numpy().sum(axis=1), 1, rtol=1e-6)


def test_topk_select_divides_by_no_less_than_the_floor() -> None:
    _, weights = custom_ops.moe_topk_select(tensor(np.zeros((1, 10))), tensor(np.zeros(10)), 2, norm_min=0.5)
    np.testing.assert_allclose(weights.numpy(), [[0.2, 0.2]], rtol=1e-6)


#: Distributions of tokens over experts.
SPREADS = ("any", "one expert", "half without tokens")


def draw_topk_ids(random: np.random.Generator, tokens: int, experts: int, k: int, spread: str) -> np.ndarray:
    if spread == "one expert":
        return np.full((tokens, k), random.integers(experts))
    some = random.permutation(experts)[: experts if spread == "any" else max(k, experts // 2)]
    return np.stack([random.permutation(some)[:k] for _ in range(tokens)])


@settings(max_examples=60)
@given(
    seed=seeds,
    tokens=st.integers(1, 40),
    experts=st.integers(1, 12),
    k=st.integers(1, 5),
    spread=st.sampled_from(SPREADS),
)
def test_permute_groups_rows_by_expert_and_unpermute_sums_them(
    seed: int, tokens: int, experts: int, k: int, spread: str
) -> None:
    random, k = np.random.default_rng(seed), min(k, experts)
    x, weights = draw(random, tokens, 21), draw(random, tokens, k)
    topk_ids = draw_topk_ids(random, tokens, experts, k, spread)
    rows, offsets, order = custom_ops.moe_permute(tensor(x), integers(topk_ids), experts)
    expected = np.argsort(topk_ids.reshape(-1), kind="stable")
    np.testing.assert_array_equal(order.numpy(), expected)
    np.testing.assert_array_equal(rows.numpy(), x[expected // k])
    counts = np.bincount(topk_ids.reshape(-1), minlength=experts)
    np.testing.assert_array_equal(offsets.numpy(), [0, *np.cumsum(counts)])
    y = custom_ops.moe_unpermute(rows, order, tensor(weights)).numpy()
    np.testing.assert_allclose(y, x * weights.sum(axis=1, keepdims=True), **TOLERANCE)


@settings(max_examples=80)
@given(
    seed=seeds,
    weight_format=st.sampled_from(FORMATS),
    tokens=st.integers(1, 40),
    hidden=st.integers(1, 100),
    width=st.integers(1, 70),
    experts=st.integers(1, 8),
    k=st.integers(1, 4),
    spread=st.sampled_from(SPREADS),
)
def test_fused_moe_sums_the_outputs_of_the_picked_experts(
    seed: int,
    weight_format: str,
    tokens: int,
    hidden: int,
    width: int,
    experts: int,
    k: int,
    spread: str,
) -> None:
    """The fused operation also gives the same bits as its parts one by one."""
    random, k = np.random.default_rng(seed), min(k, experts)
    mlps = PackedMlp.draw(random, weight_format, hidden, width, experts)
    x, weights = draw(random, tokens, hidden), np.abs(draw(random, tokens, k))
    topk_ids = draw_topk_ids(random, tokens, experts, k, spread)
    given_ids = integers(topk_ids)
    y = custom_ops.fused_moe(tensor(x), given_ids, tensor(weights), mlps.gate_up, mlps.down).numpy()
    expected = reference.fused_moe(x, topk_ids, weights, mlps.plain)
    # The error is bounded by sums of magnitudes: where terms cancel, their roundings do not.
    without_signs = [reference.GatedMlp(*(without_sign(part) for part in mlp)) for mlp in mlps.plain]
    scale = reference.fused_moe(np.abs(x), topk_ids, weights, without_signs).max()
    np.testing.assert_allclose(y, expected, **tolerance(weight_format, scale))
    rows, offsets, order = custom_ops.moe_permute(tensor(x), given_ids, experts)
    rows = custom_ops.moe_grouped_gemm(rows, offsets, mlps.gate_up, mlps.down)
    parts = custom_ops.moe_unpermute(rows, order, tensor(weights)).numpy()
    np.testing.assert_array_equal(parts, y)


def without_sign(matrix: reference.Matrix) -> reference.Matrix:
    return reference.Matrix(np.abs(matrix.weights), np.abs(matrix.bias))


@pytest.mark.parametrize("weight_format", FORMATS)
def test_grouped_gemm_is_each_experts_mlp_of_its_own_rows(weight_format: str) -> None:
    random = np.random.default_rng(1)
    mlps = PackedMlp.draw(random, weight_format, 40, 24, 4, bias=True)
    offsets = [0, 0, 15, 16, 30]
    rows = draw(random, 30, 40)
    found = custom_ops.moe_grouped_gemm(tensor(rows), integers(offsets), mlps.gate_up, mlps.down).numpy()
    for mlp, begin, end in zip(mlps.plain, offsets, offsets[1:], strict=False):
        expected = reference.gated_mlp(rows[begin:end], mlp)
        np.testing.assert_allclose(found[begin:end], expected, **tolerance(weight_format, 3))
