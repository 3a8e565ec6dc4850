"""Rotation and attention over the paged cache, compared with attention over whole texts in float64."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import paddle
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fastdeploy import custom_ops
from fastdeploy.custom_ops import reference

from .draws import PagedCache, Span, Tolerance, draw, step, tensor

THETA = 10000.0
TOLERANCE: Tolerance = {"rtol": 2e-5, "atol": 2e-5}


@dataclass(frozen=True)
class Heads:
    queries: int
    keys: int
    head_dim: int

    @property
    def all(self) -> int:
        return self.queries + 2 * self.keys


@dataclass(frozen=True)
class Text:
    """A text: unrotated `qkv` of all positions, [context, heads, d]; the step computes the last `count`."""

    qkv: np.ndarray
    span: Span

    @property
    def earlier(self) -> Span:
        return Span(0, self.span.start, self.span.blocks)


def run(spans: list[Span], qkv: list[np.ndarray], cache: PagedCache) -> np.ndarray:
    plan = step(spans)
    rotary_cos_sin = custom_ops.rotary_embedding(plan, THETA, cache.head_dim)
    rows = np.concatenate([part.reshape(len(part), -1) for part in qkv])
    turned = tensor(rows)
    custom_ops.rope_and_cache(turned, plan, rotary_cos_sin, cache.keys, cache.values)
    return custom_ops.paged_attention(turned, plan, cache.keys, cache.values).numpy()


def expected(text: Text, heads: Heads, cache: PagedCache) -> np.ndarray:
    rotary_cos_sin = rotation_of(Span(0, text.span.end), cache.head_dim)
    turned = reference.rope(text.qkv[:, : heads.queries + heads.keys], rotary_cos_sin)
    query, key = np.split(turned, [heads.queries], axis=1)
    value = text.qkv[:, heads.queries + heads.keys :]
    # The operation rounds keys from float32, not from the reference's float64.
    key = cache.held(key.astype(np.float32).astype(np.float64))
    attended = reference.attention(query[text.span.start :], key, cache.held(value), text.span.start)
    return attended.reshape(text.span.count, -1)


def rotation_of(span: Span, head_dim: int) -> np.ndarray:
    """Return the operation's own rotation: its float32 angles differ from float64 at far positions."""
    return custom_ops.rotary_embedding(step([span]), THETA, head_dim).numpy().astype(np.float64)


def draw_texts(
    random: np.random.Generator, heads: Heads, shares: list[tuple[int, int]], block_size: int, shared: int
) -> tuple[list[Text], int]:
    """Draw texts in scattered blocks, the first `shared` in common. Returns them and the number of blocks."""
    sizes = [-(-(start + count) // block_size) for start, count in shares]
    num_blocks = sum(sizes) + shared + 3
    free = random.permutation(num_blocks).tolist()
    prefix = [free.pop() for _ in range(shared)]
    beginning = draw(random, shared * block_size, heads.all, heads.head_dim)
    texts = []
    for (start, count), size in zip(shares, sizes, strict=True):
        # The prefix is shared only as far as it lies before the computed positions.
        blocks = prefix[: start // block_size]
        blocks = blocks + [free.pop() for _ in range(size - len(blocks))]
        qkv = draw(random, start + count, heads.all, heads.head_dim)
        common = min(shared, start // block_size) * block_size
        qkv[:common] = beginning[:common]
        texts.append(Text(qkv, Span(start, count, blocks)))
    return texts, num_blocks


def check(
    heads: Heads, shares: list[tuple[int, int]], block_size: int, *, shared: int, wide: bool, seed: int
) -> None:
    random = np.random.default_rng(seed)
    texts, num_blocks = draw_texts(random, heads, shares, block_size, shared)
    cache = PagedCache(num_blocks, block_size, heads.keys, heads.head_dim, wide)
    for text in texts:
        if text.span.start:
            run([text.earlier], [text.qkv[: text.span.start]], cache)
    out = run([text.span for text in texts], [text.qkv[text.span.start :] for text in texts], cache)
    found = np.split(out, np.cumsum([text.span.count for text in texts])[:-1])
    for text, rows in zip(texts, found, strict=True):
        # A key or value halfway between two bfloat16 numbers may be rounded either way.
        tolerance: Tolerance = TOLERANCE if wide else {"rtol": 2.0**-8, "atol": 2.0**-8}
        np.testing.assert_allclose(rows, expected(text, heads, cache), **tolerance)


shares_of_a_step = st.lists(
    st.one_of(
        st.tuples(st.integers(0, 90), st.just(1)),
        st.tuples(st.sampled_from([0, 0, 5, 64]), st.integers(1, 60)),
        st.tuples(st.integers(450, 1100), st.integers(1, 4)),
    ),
    min_size=1,
    max_size=5,
)


@settings(max_examples=60)
@given(
    heads=st.builds(
        lambda keys, group, half: Heads(keys * group, keys, 2 * half),
        st.integers(1, 3),
        st.integers(1, 20),
        st.one_of(st.sampled_from([8, 16, 32, 64]), st.integers(8, 64)),
    ),
    shares=shares_of_a_step,
    block_size=st.sampled_from([8, 16, 32, 64, 128]),
    shared=st.integers(0, 4),
    wide=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
# Decodes on both sides of the border between two segments, and chunks across the border.
@example(
    heads=Heads(5, 1, 64),
    shares=[(510, 1), (511, 1), (512, 1), (1023, 1)],
    block_size=64,
    shared=2,
    wide=True,
    seed=0,
)
@example(heads=Heads(20, 1, 128), shares=[(500, 30), (0, 1)], block_size=128, shared=0, wide=False, seed=0)
@example(heads=Heads(6, 2, 16), shares=[(0, 600), (40, 1)], block_size=8, shared=3, wide=True, seed=0)
def test_attention_over_scattered_blocks_is_attention_over_whole_texts(
    heads: Heads, shares: list[tuple[int, int]], block_size: int, shared: int, wide: bool, seed: int
) -> None:
    """Decodes and chunks share a step, in a cache whose unwritten slots hold NaN or infinities."""
    check(heads, shares, block_size, shared=shared, wide=wide, seed=seed)


@pytest.mark.parametrize("wide", [True, False])
def test_stale_content_of_a_block_is_not_read(wide: bool) -> None:
    """A block is reused by a second text while the first text's numbers still fill it."""
    random = np.random.default_rng(1)
    heads, cache = Heads(4, 2, 32), PagedCache(3, 16, 2, 32, wide)
    former, qkv = (1e30 * draw(random, 32, 8, 32), draw(random, 21, 8, 32))
    run([Span(0, 32, [2, 1])], [former], cache)
    text = Text(qkv, Span(0, 21, [1, 2]))
    np.testing.assert_allclose(
        run([text.span], [qkv], cache), expected(text, heads, cache), rtol=1e-3, atol=1e-3
    )


def test_a_step_writes_its_own_slots_and_no_other() -> None:
    random = np.random.default_rng(2)
    cache = PagedCache(4, 16, 2, 24, wide=True)
    before = [cache.keys.numpy().copy(), cache.values.numpy().copy()]
    run([Span(14, 4, [3, 0])], [draw(random, 4, 6, 24)], cache)
    keys, values = (
        old.view(np.uint32) != new.numpy().view(np.uint32)
        for old, new in zip(before, (cache.keys, cache.values), strict=True)
    )
    # [blocks, heads, panels, d, 32]: positions 14 and 15 in block 3, 16 and 17 in block 0.
    written = np.zeros((4, 2, 1, 24, 32), bool)
    written[3, ..., 14:16] = written[0, ..., 0:2] = True
    np.testing.assert_array_equal(keys, written)
    # [blocks, heads, panels, block size, 32]
    written = np.zeros((4, 2, 1, 16, 32), bool)
    written[3, :, :, 14:16, :24] = written[0, :, :, 0:2, :24] = True
    np.testing.assert_array_equal(values, written)


@pytest.mark.parametrize("theta", [10000.0, 500000.0])
@pytest.mark.parametrize("head_dim", [2, 16, 24, 128])
def test_rotation_is_of_the_positions_of_each_sequence(theta: float, head_dim: int) -> None:
    spans = [Span(0, 5), Span(8190, 3), Span(77, 1)]
    rotary_cos_sin = custom_ops.rotary_embedding(step(spans), theta, head_dim).numpy()
    positions = np.concatenate([span.positions for span in spans])
    # Angles are float32: a position times a frequency, both rounded.
    error = np.abs(rotary_cos_sin - reference.rotary_embedding(positions, theta, head_dim))
    assert (error <= 1e-7 + 3e-7 * positions[:, None]).all()


def test_rope_turns_pairs_and_leaves_values_alone() -> None:
    random = np.random.default_rng(3)
    cache = PagedCache(1, 8, 1, 16, wide=True)
    span = Span(2, 4, [0])
    qkv = draw(random, 4, 4, 16)
    turned = tensor(qkv.reshape(4, -1))
    rotary_cos_sin = custom_ops.rotary_embedding(step([span]), THETA, 16)
    custom_ops.rope_and_cache(turned, step([span]), rotary_cos_sin, cache.keys, cache.values)
    heads = turned.numpy().reshape(4, 4, 16)
    plain = reference.rope(qkv, rotation_of(span, 16))
    np.testing.assert_allclose(heads[:, :2], plain[:, :2], **TOLERANCE)
    np.testing.assert_array_equal(heads[:, 3], qkv[:, 3])
    assert isinstance(turned, paddle.Tensor)
    np.testing.assert_allclose(cache.keys.numpy()[0, 0, 0, :, 2:6].T, plain[:, 2], **TOLERANCE)
    np.testing.assert_array_equal(cache.values.numpy()[0, 0, 0, 2:6, :16], qkv[:, 3])
