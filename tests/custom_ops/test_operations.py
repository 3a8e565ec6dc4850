"""Every operation against its numpy reference in float64, on random inputs."""

from __future__ import annotations

import numpy as np
import paddle
import pytest

from fastdeploy import custom_ops
from fastdeploy.config import ModelConfig
from fastdeploy.custom_ops import MLPWeights, Projection, reference
from fastdeploy.layers.attention import TILE_QUERIES, AttentionStep, KVCache
from fastdeploy.request import SamplingParams, ScheduledSequence, Sequence

TOLERANCE = {"rtol": 2e-5, "atol": 2e-5}


def tensor(array: np.ndarray) -> paddle.Tensor:
    return paddle.to_tensor(array.astype(np.float32))


def draw(random: np.random.Generator, *shape: int) -> np.ndarray:
    """Float64 values that float32 holds exactly, so that both sides start from the same numbers."""
    return random.standard_normal(shape).astype(np.float32).astype(np.float64)


@pytest.fixture
def random() -> np.random.Generator:
    return np.random.default_rng(7)


@pytest.mark.parametrize("tokens", [1, 5])
def test_rms_norm_with_and_without_residual(random: np.random.Generator, tokens: int) -> None:
    x, residual, weight = draw(random, tokens, 48), draw(random, tokens, 48), draw(random, 48)
    normed, stream = custom_ops.rms_norm(tensor(x), tensor(weight), 1e-5)
    np.testing.assert_allclose(normed.numpy(), reference.rms_norm(x, weight, 1e-5), **TOLERANCE)
    np.testing.assert_array_equal(stream.numpy(), x.astype(np.float32))
    normed, stream = custom_ops.rms_norm(tensor(x), tensor(weight), 1e-5, residual=tensor(residual))
    np.testing.assert_allclose(normed.numpy(), reference.rms_norm(x + residual, weight, 1e-5), **TOLERANCE)
    np.testing.assert_allclose(stream.numpy(), x + residual, **TOLERANCE)


@pytest.mark.parametrize("out_in", [True, False])
@pytest.mark.parametrize("widths", [(12,), (12, 4, 4)])
def test_linear_in_both_layouts_lays_its_parts_side_by_side(
    random: np.random.Generator, out_in: bool, widths: tuple[int, ...]
) -> None:
    x, bias = draw(random, 3, 20), draw(random, sum(widths))
    matrices = [draw(random, 20, width) for width in widths]
    weights = tuple(tensor(matrix.T if out_in else matrix) for matrix in matrices)
    expected = x @ np.concatenate(matrices, axis=1)
    plain = custom_ops.linear(tensor(x), Projection(weights, out_in))
    np.testing.assert_allclose(plain.numpy(), expected, **TOLERANCE)
    biased = custom_ops.linear(tensor(x), Projection(weights, out_in, tensor(bias)))
    np.testing.assert_allclose(biased.numpy(), expected + bias, **TOLERANCE)


def shape_of_heads(queries: int, keys: int, head_dim: int) -> ModelConfig:
    return ModelConfig(
        hidden_size=32,
        num_hidden_layers=1,
        vocab_size=8,
        num_attention_heads=queries,
        num_key_value_heads=keys,
        head_dim=head_dim,
        intermediate_size=8,
        rms_norm_eps=1e-5,
        rope_theta=10000.0,
        tie_word_embeddings=True,
        use_bias=False,
        max_position_embeddings=4096,
        eos_token_ids=(2,),
        bos_token_id=1,
    )


@pytest.mark.parametrize(("queries", "keys"), [(4, 4), (6, 2), (5, 1)])
def test_attention_over_scattered_blocks_equals_attention_over_whole_sequences(
    random: np.random.Generator, queries: int, keys: int
) -> None:
    """Rows of one step: two decodes of unlike context, a first chunk, a later chunk of more than one tile."""
    block_size, head_dim = 8, 16
    config = shape_of_heads(queries, keys, head_dim)
    spans = [(300, 1), (0, 21), (19, 1), (40, TILE_QUERIES + 30)]
    cache = KVCache.allocate(config, num_blocks=100, block_size=block_size)
    free = random.permutation(100).tolist()
    params = SamplingParams(max_tokens=1)
    rows, plain = [], []
    for start, count in spans:
        end = start + count
        blocks = [free.pop() for _ in range(-(-end // block_size))]
        sequence = Sequence("s", [0] * end, params, block_ids=blocks)
        rows.append(ScheduledSequence(sequence, start, count, samples=True))
        plain.append(draw(random, end, queries + 2 * keys, head_dim))

    def run(step_rows: list[ScheduledSequence], heads: list[np.ndarray]) -> list[np.ndarray]:
        step = AttentionStep.plan(step_rows, config, block_size)
        qkv = tensor(np.concatenate([heads[i] for i in step.row_order]))
        query = custom_ops.rope_and_cache(qkv, step.rotation, cache.key, cache.value, step.write_rows)
        out = custom_ops.paged_attention(query, cache.key, cache.value, step.tiles).numpy()
        cuts = np.cumsum([step_rows[i].num_tokens for i in step.row_order])[:-1]
        return [part for _, part in sorted(zip(step.row_order, np.split(out, cuts), strict=True))]

    for row, heads in zip(rows, plain, strict=True):
        if row.start:
            run([ScheduledSequence(row.sequence, 0, row.start, samples=False)], [heads[: row.start]])
    outputs = run(rows, [heads[row.start :] for row, heads in zip(rows, plain, strict=True)])

    for row, heads, output in zip(rows, plain, outputs, strict=True):
        turned = reference.rope(heads[:, : queries + keys], range(row.end), config.rope_theta)
        expected = reference.attention(
            turned[row.start :, :queries], turned[:, queries:], heads[:, queries + keys :], row.start
        )
        np.testing.assert_allclose(output, expected.reshape(row.num_tokens, -1), rtol=1e-4, atol=1e-4)


def test_topk_select_adds_the_bias_to_the_choice_only(random: np.random.Generator) -> None:
    logits, bias = draw(random, 40, 9), 0.2 * draw(random, 9)
    picks, weights = custom_ops.moe_topk_select(tensor(logits), tensor(bias), 3, 1e-12)
    expected_picks, expected_weights = reference.moe_topk_select(logits, bias, 3, 1e-12)
    np.testing.assert_array_equal(picks.numpy(), expected_picks)
    np.testing.assert_allclose(weights.numpy(), expected_weights, **TOLERANCE)
    assert (expected_picks != reference.moe_topk_select(logits, 0 * bias, 3, 1e-12)[0]).any()


@pytest.mark.parametrize("tokens", [1, 30])
def test_topk_select_takes_the_lower_index_of_equals(tokens: int) -> None:
    logits = np.zeros((tokens, 64))
    logits[:, 50] = 1
    picks, weights = custom_ops.moe_topk_select(tensor(logits), tensor(np.zeros(64)), 8, 1e-12)
    assert picks.numpy().tolist() == [[50, 0, 1, 2, 3, 4, 5, 6]] * tokens
    np.testing.assert_allclose(weights.numpy().sum(axis=1), 1, rtol=1e-6)


def test_topk_select_divides_by_no_less_than_the_floor() -> None:
    _, weights = custom_ops.moe_topk_select(tensor(np.zeros((1, 10))), tensor(np.zeros(10)), 2, norm_min=0.5)
    np.testing.assert_allclose(weights.numpy(), [[0.2, 0.2]], rtol=1e-6)


@pytest.mark.parametrize("tokens", [1, 2, 23])
@pytest.mark.parametrize("out_in", [True, False])
def test_fused_moe_sums_what_the_picked_experts_say(
    random: np.random.Generator, tokens: int, out_in: bool
) -> None:
    """With 23 tokens of 5 experts every expert is used; with 1 or 2 most are not."""
    x = draw(random, tokens, 16)
    experts = [(draw(random, 16, 12), draw(random, 16, 12), draw(random, 12, 16)) for _ in range(5)]
    picks, weights = reference.moe_topk_select(draw(random, tokens, 5), np.zeros(5), 2, 1e-12)

    def projection(*matrices: np.ndarray) -> Projection:
        joined = np.concatenate(matrices, axis=1)
        return Projection((tensor(joined.T if out_in else joined),), out_in)

    y = custom_ops.fused_moe(
        tensor(x),
        paddle.to_tensor(picks),
        tensor(weights),
        [MLPWeights(projection(gate, up), projection(down)) for gate, up, down in experts],
    )
    np.testing.assert_allclose(
        y.numpy(), reference.fused_moe(x, picks, weights, experts), rtol=1e-4, atol=1e-4
    )
