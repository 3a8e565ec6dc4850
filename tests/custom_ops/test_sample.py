"""Sampling compared with its numpy reference in float64, and inputs that must not affect a token."""

from __future__ import annotations

import hashlib
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import paddle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdeploy import custom_ops
from fastdeploy.custom_ops import reference


@dataclass
class Row:
    logits: np.ndarray
    seen: list[tuple[int, int]] = field(default_factory=list)
    masked: list[int] = field(default_factory=list)
    biased: list[tuple[int, float]] = field(default_factory=list)
    #: None: all tokens.
    allowed: list[int] | None = None
    fields: dict[str, float] = field(default_factory=dict)

    @property
    def params(self) -> np.ndarray:
        params = np.zeros(1, custom_ops.SAMPLING_ROW)
        params["top_p"] = params["repetition_penalty"] = 1
        params["logprobs"] = -1
        for name, value in self.fields.items():
            params[name] = value
        return params


def sample(rows: list[Row]) -> tuple[list[int], np.ndarray, np.ndarray]:
    params = np.concatenate([row.params for row in rows])
    tokens: list[tuple[int, int]] = []
    for row, into in zip(rows, params, strict=True):
        into["first_token"], into["num_seen"], into["num_masked"] = (
            len(tokens),
            len(row.seen),
            len(row.masked),
        )
        tokens += row.seen + [(token, 0) for token in row.masked]
        tokens += [(token, int(np.float32(bias).view(np.int32))) for token, bias in row.biased]
        mask = mask_entries(row.allowed)
        into["num_biased"], into["num_mask_entries"] = len(row.biased), len(mask)
        tokens += mask
    logits = paddle.to_tensor(np.stack([row.logits for row in rows]).astype(np.float32))
    width = 1 + max(0, params["logprobs"].max())
    drawn, top, logprobs = custom_ops.sample(
        logits, params, np.array([*tokens, (0, 0)], np.int32), int(width)
    )
    return drawn.tolist(), top.numpy(), logprobs.numpy()


def mask_entries(allowed: list[int] | None) -> list[tuple[int, int]]:
    """Return the bits of the allowed tokens, no longer than the highest one needs."""
    if allowed is None:
        return []
    words = np.zeros(2 * (max(allowed) // 64 + 1), np.uint32)
    for token in allowed:
        words[token // 32] |= np.uint32(1 << token % 32)
    return [(int(low), int(high)) for low, high in words.view(np.int32).reshape(-1, 2)]


def draw(logits: np.ndarray | list[float], **fields: float) -> int:
    return sample([Row(np.array(logits), fields=fields)])[0][0]


def reference_draws(row: Row) -> set[int]:
    """Return the reference's tokens for this top_p and for those within the rounding of the sums."""
    params = row.params[0].copy()
    draws = set()
    for top_p in (row.params[0]["top_p"] + nudge for nudge in (-1e-12, 0, 1e-12)):
        params["top_p"] = top_p if 0 < row.params[0]["top_p"] < 1 else row.params[0]["top_p"]
        logits = row.logits.astype(np.float64)
        weights = reference.sampling_weights(logits, params, row.seen, row.masked, row.biased, row.allowed)
        draws.add(reference.sample(weights, params))
    return draws


@st.composite
def any_rows(draw: st.DrawFn) -> list[Row]:
    """Draw a batch over a vocabulary of any size, with many ties, flat or peaked."""
    size = draw(st.sampled_from([1, 7, 63, 64, 65, 200, 1000, 4100]))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    rows = []
    for _ in range(draw(st.integers(1, 4))):
        logits = random.normal(0, draw(st.sampled_from([0.0, 0.3, 2.0, 8.0])), size)
        if draw(st.booleans()):
            logits = np.round(logits * 4) / 4
        token = st.integers(0, size - 1)
        some = st.lists(token, max_size=12, unique=True)
        masked = draw(st.lists(token, max_size=3)) if size > 3 else []
        # A mask that leaves no token is not drawn from.
        possible = token.filter(set(range(size)).difference(masked).__contains__)
        rows.append(
            Row(
                logits.astype(np.float32),
                seen=[(one, draw(st.integers(0, 3))) for one in draw(some)],
                masked=masked,
                biased=[(one, draw(st.sampled_from([-100.0, -0.1, 2.5]))) for one in draw(some)],
                allowed=draw(st.none() | st.sets(possible, min_size=1, max_size=40).map(list)),
                fields={
                    "temperature": draw(st.sampled_from([0.0, 0.3, 1.0, 2.0, 1e5])),
                    "top_k": draw(st.sampled_from([0, 0, 1, 3, 50, 3000])),
                    "top_p": draw(st.sampled_from([0.0, 0.3, 0.77, 0.95, 0.999, 1.0])),
                    "min_p": draw(st.sampled_from([0.0, 0.0, 0.01, 0.3, 1.0])),
                    "repetition_penalty": draw(st.sampled_from([1.0, 1.25, 0.8])),
                    "presence_penalty": draw(st.sampled_from([0.0, 0.5, -1.0])),
                    "frequency_penalty": draw(st.sampled_from([0.0, 0.25, -0.5])),
                    "seed": draw(st.integers(0, 2**64 - 1)),
                    "choice": draw(st.integers(0, 3)),
                    "position": draw(st.integers(0, 2**20)),
                    "logprobs": draw(st.sampled_from([-1, 0, 1, 5, 70])),
                },
            )
        )
    return rows


@settings(max_examples=300)
@given(any_rows())
def test_every_draw_is_the_references_draw(rows: list[Row]) -> None:
    drawn, top, logprobs = sample(rows)
    for index, row in enumerate(rows):
        assert drawn[index] in reference_draws(row)
        if (wanted := row.fields["logprobs"]) >= 0:
            # Highest logit first, and the lower id first among ties.
            best = np.argsort(-row.logits, kind="stable")[: int(wanted)].tolist()
            told = top[index, : 1 + len(best)]
            assert told.tolist() == [drawn[index], *best]
            exact = reference.log_softmax(row.logits.astype(np.float64))
            np.testing.assert_allclose(logprobs[index, : len(told)], exact[told], rtol=0, atol=1e-12)


@settings(max_examples=100)
@given(any_rows())
def test_row_has_the_same_bits_alone_and_in_a_batch(rows: list[Row]) -> None:
    drawn, top, logprobs = sample(rows)
    for index, row in enumerate(rows):
        alone, alone_top, alone_logprobs = sample([row])
        end = min(int(row.fields["logprobs"]), len(row.logits)) + 1
        assert alone == [drawn[index]]
        assert alone_top[0, :end].tolist() == top[index, :end].tolist()
        assert alone_logprobs[0, :end].tobytes() == logprobs[index, :end].tobytes()


def digest() -> str:
    """Return a hash of the tokens and log probabilities of a fixed batch."""
    random = np.random.default_rng(5)
    rows = [
        Row(
            random.normal(0, spread, 5001).astype(np.float32),
            seen=[(3, 1), (9, 0)],
            biased=[(5, 1.5), (700, -2.25)] if seed % 2 else [],
            allowed=[token for token in range(5001) if token % 7] if seed % 3 == 0 else None,
            fields={"temperature": 0.8, "seed": seed, "logprobs": 30, "repetition_penalty": 1.1} | cut,
        )
        for seed in range(8)
        for spread in (0.3, 3.0)
        for cut in ({}, {"top_p": 0.9}, {"min_p": 0.02}, {"top_k": 40, "top_p": 0.5})
    ]
    drawn, top, logprobs = sample(rows)
    return hashlib.sha256(np.array(drawn).tobytes() + top.tobytes() + logprobs.tobytes()).hexdigest()


@pytest.fixture
def restored_threads() -> Iterator[None]:
    yield
    custom_ops.set_threads(1)


@pytest.mark.usefixtures("restored_threads")
def test_the_number_of_threads_changes_no_bit() -> None:
    custom_ops.set_threads(1)
    alone = digest()
    custom_ops.set_threads(3)
    assert digest() == alone


@pytest.mark.parametrize("isa", ["generic", "avx2"])
def test_every_instruction_set_gives_the_same_bits(isa: str) -> None:
    result = subprocess.run(
        [sys.executable, "-c", "from tests.custom_ops.test_sample import digest; print(digest())"],
        env=os.environ | {"FD_ISA": isa},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    assert result.stdout.split()[-1] == digest()


def test_the_random_number_is_philox_of_seed_choice_and_position() -> None:
    """With 65536 equal logits the token is the first 16 bits of the random number."""
    flat = np.zeros(2**16)
    for seed, choice, position in [(0, 0, 0), (1, 0, 0), (2**64 - 1, 3, 7), (2**40 + 5, 2**32 - 1, 10**6)]:
        expected = int(reference.uniform(seed, choice, position) * 2**16)
        assert draw(flat, temperature=1, seed=seed, choice=choice, position=position) == expected


def test_frequencies_follow_the_softmax() -> None:
    logits = np.array([0.0, 1.0, 2.0, -1.0])
    expected = np.exp(logits / 0.7) / np.exp(logits / 0.7).sum()
    count = 20_000
    drawn = sample([Row(logits, fields={"temperature": 0.7, "seed": seed}) for seed in range(count)])[0]
    observed = np.bincount(drawn, minlength=4)
    # 0.999 quantile of chi-square with 3 degrees of freedom; the seeds are fixed.
    assert ((observed - count * expected) ** 2 / (count * expected)).sum() < 16.3


@pytest.mark.parametrize("size", [5, 64, 5000])
def test_argmax_takes_the_lowest_id_among_equals(size: int) -> None:
    logits = np.random.default_rng(size).integers(-5, 3, (20, size)).astype(np.float32)
    expected = logits.argmax(axis=1).tolist()
    assert custom_ops.argmax(paddle.to_tensor(logits)).tolist() == expected
    assert sample([Row(row) for row in logits])[0] == expected


def test_tokens_tied_with_the_kth_are_kept() -> None:
    drawn = {draw([2, 2, 2, 0], temperature=1, top_k=2, seed=seed) for seed in range(60)}
    assert drawn == {0, 1, 2}


def test_a_nucleus_takes_the_lowest_ids_among_equals() -> None:
    drawn = {draw(np.zeros(100), temperature=1, top_p=0.25, seed=seed) for seed in range(300)}
    assert drawn == set(range(25))


def test_top_p_zero_and_tiny_temperatures_are_greedy() -> None:
    logits = [0.0, 5.0, 4.9, -3.0]
    for fields in ({"top_p": 0.0}, {"temperature": 1e-300}, {"temperature": 5e-324}):
        assert {draw(logits, **({"temperature": 1, "seed": seed} | fields)) for seed in range(20)} == {1}


def test_infinite_temperatures_are_uniform() -> None:
    drawn = {draw([9.0, -9.0, 0.0], temperature=1e308, min_p=0.5, seed=seed) for seed in range(50)}
    assert drawn == {0, 1, 2}


def test_ids_outside_of_the_vocabulary_are_passed_over() -> None:
    row = Row(
        np.array([1.0, 3.0]), seen=[(2, 1), (-1, 1)], masked=[1, 99, -7], fields={"presence_penalty": 1}
    )
    assert sample([row])[0] == [0]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("place", [0, 70, 99])
def test_broken_row_is_reported_and_others_are_unaffected(bad: float, place: int) -> None:
    logits = np.zeros((3, 100), dtype=np.float32)
    logits[1, place] = bad
    expected = [0, custom_ops.BROKEN_ROW, 0]
    assert custom_ops.argmax(paddle.to_tensor(logits)).tolist() == expected
    assert sample([Row(row) for row in logits])[0] == expected
    drawn = sample([Row(row, fields={"temperature": 1, "top_p": 0.5, "top_k": 9}) for row in logits])[0]
    assert [token == custom_ops.BROKEN_ROW for token in drawn] == [False, True, False]


def test_row_without_possible_tokens_is_broken() -> None:
    assert sample([Row(np.zeros(3), masked=[0, 1, 2])])[0] == [custom_ops.BROKEN_ROW]


def test_wrong_sizes_are_refused_before_memory_is_read() -> None:
    logits = paddle.zeros([2, 8])
    one = Row(np.zeros(8)).params
    tokens = np.zeros((1, 2), np.int32)
    with pytest.raises(ValueError, match="one SamplingRow for each row of logits"):
        custom_ops.sample(logits, one, tokens, 1)
    beyond = np.concatenate([one, one])
    beyond["num_seen"] = 2
    with pytest.raises(ValueError, match="reach beyond the end"):
        custom_ops.sample(logits, beyond, tokens, 1)
    telling = np.concatenate([one, one])
    telling["logprobs"] = 1
    with pytest.raises(ValueError, match="more log probabilities than the width"):
        custom_ops.sample(logits, telling, tokens, 1)


@given(any_rows(), st.data())
def test_a_given_token_takes_the_place_of_a_draw(rows: list[Row], data: st.DataObject) -> None:
    """The log probability is the same, to the bit, as when that token is drawn."""
    for row in rows:
        row.fields["logprobs"] = max(row.fields["logprobs"], 0)
    drawn, top, logprobs = sample(rows)
    for row, token in zip(rows, drawn, strict=True):
        # Penalties, masks and temperature have no effect.
        row.fields |= {"given": 1 + token, "temperature": data.draw(st.sampled_from([0.0, 0.7]))}
        row.masked = [token]
    ranks, top_again, logprobs_again = sample(rows)
    for index, row in enumerate(rows):
        order = sorted(range(len(row.logits)), key=lambda token: (-row.logits[token], token))
        assert order[ranks[index] - 1] == drawn[index]
        end = 1 + min(int(row.fields["logprobs"]), len(row.logits))
        assert top_again[index, :end].tolist() == top[index, :end].tolist()
        assert logprobs_again[index, :end].tobytes() == logprobs[index, :end].tobytes()


def test_given_token_of_a_broken_row_is_reported_as_broken() -> None:
    row = Row(np.full(70, np.nan), fields={"given": 3, "logprobs": 0})
    assert sample([row])[0] == [custom_ops.BROKEN_ROW]
