"""Embedding, normalisation and packed matrices, compared with float64."""

from __future__ import annotations

import numpy as np
import paddle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdeploy import custom_ops
from fastdeploy.custom_ops import packed_matrix, reference

from .draws import FORMATS, Packed, Span, as_multiplied, bfloat16, draw, step, tensor

seeds = st.integers(0, 2**32 - 1)


@settings(max_examples=150)
@given(
    seed=seeds,
    weight_format=st.sampled_from(FORMATS),
    rows=st.integers(1, 40),
    outputs=st.one_of(st.integers(1, 70), st.integers(1, 300)),
    inputs=st.one_of(st.integers(1, 70), st.integers(1, 300)),
    bias=st.booleans(),
)
def test_linear_is_off_by_no_more_than_its_roundings(
    seed: int, weight_format: str, rows: int, outputs: int, inputs: int, bias: bool
) -> None:
    random = np.random.default_rng(seed)
    matrix = Packed.draw(random, weight_format, outputs, inputs, bias=bias)
    x = draw(random, rows, inputs)
    y = custom_ops.linear(tensor(x), matrix.blob).numpy()
    x, plain = as_multiplied(x, weight_format), matrix.plain
    # One rounding for each input, and a few for scale and bias.
    most = reference.linear(np.abs(x), reference.Matrix(*map(np.abs, plain)))
    assert (np.abs(y - reference.linear(x, plain)) <= (inputs + 4) * 2.0**-24 * most).all()


@pytest.mark.parametrize("weight_format", FORMATS)
def test_linear_of_no_rows_is_nothing(weight_format: str) -> None:
    matrix = Packed.draw(np.random.default_rng(1), weight_format, 33, 17)
    assert custom_ops.linear(paddle.empty([0, 17]), matrix.blob).shape == [0, 33]


@pytest.mark.parametrize("weight_format", FORMATS)
def test_infinities_of_one_row_stay_in_that_row(weight_format: str) -> None:
    random = np.random.default_rng(2)
    matrix = Packed.draw(random, weight_format, 50, 41)
    x = draw(random, 14, 41)
    alone = custom_ops.linear(tensor(x), matrix.blob).numpy()
    x[5] = np.inf
    beside = custom_ops.linear(tensor(x), matrix.blob).numpy()
    others = np.arange(14) != 5
    np.testing.assert_array_equal(beside[others], alone[others])


@settings(max_examples=60)
@given(seed=seeds, rows=st.integers(1, 20), width=st.integers(1, 200), residual=st.booleans())
def test_rms_norm_with_and_without_residual(seed: int, rows: int, width: int, residual: bool) -> None:
    random = np.random.default_rng(seed)
    x, weight, other = draw(random, rows, width), draw(random, width), draw(random, rows, width)
    normed, next_residual = custom_ops.rms_norm(
        tensor(x), tensor(weight), 1e-5, residual=tensor(other) if residual else None
    )
    total = (x + other if residual else x).astype(np.float32)
    np.testing.assert_array_equal(next_residual.numpy(), total)
    expected = reference.rms_norm(total.astype(np.float64), weight, 1e-5)
    np.testing.assert_allclose(normed.numpy(), expected, rtol=2e-6, atol=1e-9)


@pytest.mark.parametrize("wide", [True, False])
def test_embedding_takes_the_rows_of_the_tokens(wide: bool) -> None:
    random = np.random.default_rng(3)
    table = draw(random, 11, 19) if wide else bfloat16(draw(random, 11, 19))
    packed = tensor(table) if wide else tensor(table).astype("bfloat16")
    plan = step([Span(0, 3, token_ids=[10, 0, 4]), Span(7, 1, token_ids=[10])])
    np.testing.assert_array_equal(custom_ops.embedding(packed, plan).numpy(), table[[10, 0, 4, 10]])


@pytest.mark.parametrize("weight_format", FORMATS)
def test_logits_are_of_the_rows_that_the_step_wants(weight_format: str) -> None:
    random = np.random.default_rng(4)
    hidden_states, norm = draw(random, 9, 48), draw(random, 48)
    head = Packed.draw(random, weight_format, 70, 48)
    plan = step([Span(0, 9)], logit_tokens=[8, 2, 2])
    found = custom_ops.logits(tensor(hidden_states), plan, tensor(norm), head.blob, 1e-5).numpy()
    normed, _ = custom_ops.rms_norm(tensor(hidden_states[[8, 2, 2]]), tensor(norm), 1e-5)
    np.testing.assert_array_equal(found, custom_ops.linear(normed, head.blob).numpy())


def test_bfloat16_of_the_cache_and_of_the_weights_round_alike() -> None:
    """`packed_matrix` rounds like Paddle's conversion, which tests compare the cache with."""
    values = draw(np.random.default_rng(5), 1000)
    by_paddle = tensor(values).astype("bfloat16").astype("float32").numpy()
    by_us = packed_matrix.from_bfloat16(packed_matrix.to_bfloat16(values.astype(np.float32)))
    np.testing.assert_array_equal(by_paddle, by_us)
