from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdeploy.philox import uniform
from fastdeploy.request import SamplingParams, Sequence
from fastdeploy.sampler import sample


def sequence(prompt: list[int] | None = None, outputs: list[int] | None = None, **params: object) -> Sequence:
    sampling = SamplingParams(**({"max_tokens": 100, "temperature": 0.0} | params))  # type: ignore[arg-type]
    return Sequence("r", prompt or [0], sampling, output_token_ids=outputs or [])


def draw(logits: list[float] | np.ndarray, one: Sequence) -> int:
    return sample(np.array([logits], dtype=np.float32), [one])[0].token_id


# ---- an obviously correct reference: lists, full sorts, one candidate at a time


def reference_distribution(logits: np.ndarray, one: Sequence) -> list[float]:
    """Probability of each token id, after everything."""
    p = one.params
    scores = [float(x) for x in logits]
    for token in set(one.prompt_token_ids + one.output_token_ids):
        scores[token] = (
            scores[token] / p.repetition_penalty
            if scores[token] > 0
            else scores[token] * p.repetition_penalty
        )
    for token in range(len(scores)):
        count = one.output_token_ids.count(token)
        scores[token] -= p.frequency_penalty * count + p.presence_penalty * (count > 0)
    if len(one.output_token_ids) < p.min_tokens:
        for token in p.stop_token_ids:
            scores[token] = -math.inf
    best = max(scores)
    if p.temperature == 0:
        winner = scores.index(best)
        return [float(token == winner) for token in range(len(scores))]
    weights = [math.exp((score - best) / p.temperature) for score in scores]
    weights = [w if w >= p.min_p else 0.0 for w in weights]
    if 0 < p.top_k < len(scores):
        kth = sorted(scores, reverse=True)[p.top_k - 1]
        weights = [w if score >= kth else 0.0 for w, score in zip(weights, scores, strict=True)]
    kept, mass, goal = set(), 0.0, p.top_p * math.fsum(weights)
    for token in sorted(range(len(weights)), key=lambda token: (-weights[token], token)):
        kept.add(token)
        mass += weights[token]
        if mass >= goal and p.top_p < 1:
            break
    weights = [w if token in kept else 0.0 for token, w in enumerate(weights)]
    total = math.fsum(weights)
    return [w / total for w in weights]


def reference_draw(distribution: list[float], number: float) -> int:
    mass = 0.0
    for token, probability in enumerate(distribution):
        mass += probability
        if number < mass:
            return token
    raise AssertionError("the distribution does not reach 1")


# Multiples of a quarter: many ties, and sums that are exact enough to compare decisions at borders.
rows = st.lists(st.integers(-40, 40).map(lambda n: n / 4), min_size=8, max_size=40).map(np.array)


@settings(max_examples=400, deadline=None)
@given(data=st.data(), logits=rows)
def test_every_draw_is_the_references_draw(data: st.DataObject, logits: np.ndarray) -> None:
    token = st.integers(0, len(logits) - 1)
    one = sequence(
        data.draw(st.lists(token, min_size=1, max_size=5)),
        data.draw(st.lists(token, max_size=5)),
        temperature=data.draw(st.sampled_from([0.0, 0.5, 1.0, 2.0])),
        top_k=data.draw(st.sampled_from([0, 1, 3, 7, 1000])),
        top_p=data.draw(st.sampled_from([0.0, 0.3, 0.77, 0.95, 1.0])),
        min_p=data.draw(st.sampled_from([0.0, 0.01, 0.3, 1.0])),
        repetition_penalty=data.draw(st.sampled_from([1.0, 1.25, 0.8])),
        presence_penalty=data.draw(st.sampled_from([0.0, 0.5, -1.0])),
        frequency_penalty=data.draw(st.sampled_from([0.0, 0.25, -0.5])),
        min_tokens=data.draw(st.sampled_from([0, 3])),
        stop_token_ids=(0, 5),
        seed=data.draw(st.integers(0, 2**63)),
        choice=data.draw(st.integers(0, 3)),
    )
    expected = reference_distribution(logits, one)
    number = uniform(one.params.seed, one.params.choice, one.num_tokens)
    assert draw(logits, one) == reference_draw(expected, number)


def test_greedy_takes_the_lowest_id_among_equals() -> None:
    assert draw([1, 3, 3, 2], sequence()) == 1


def test_a_draw_does_not_depend_on_the_rest_of_the_batch() -> None:
    logits = np.random.default_rng(0).normal(0, 2, (6, 500)).astype(np.float32)
    batch = [
        sequence([1, 2, 3], [4, 4], temperature=0.8, top_p=0.9, seed=index, frequency_penalty=0.3, logprobs=3)
        for index in range(6)
    ]
    together = sample(logits, batch)
    assert [sample(logits[i : i + 1], [batch[i]])[0] for i in range(6)] == together
    assert sample(logits[::-1], batch[::-1]) == together[::-1]


def test_frequencies_follow_the_softmax() -> None:
    logits = np.array([0.0, 1.0, 2.0, -1.0])
    expected = reference_distribution(logits, sequence(temperature=0.7))
    count = 8000
    drawn = [draw(logits, sequence(temperature=0.7, seed=seed)) for seed in range(count)]
    observed = np.bincount(drawn, minlength=4)
    chi_square = ((observed - count * np.array(expected)) ** 2 / (count * np.array(expected))).sum()
    # 0.999 quantile of 3 degrees of freedom; the seeds are fixed.
    assert chi_square < 16.3


def test_another_choice_of_the_same_request_draws_another_text() -> None:
    flat = np.zeros(1000)
    texts = {
        tuple(draw(flat, sequence([1] * n, temperature=1.0, seed=3, choice=c)) for n in range(1, 6))
        for c in (0, 1, 2)
    }
    assert len(texts) == 3


def test_a_nucleus_wider_than_the_first_guess_is_found_exactly() -> None:
    logits = np.random.default_rng(1).normal(0, 0.1, 5000).astype(np.float32)
    for seed in range(20):
        one = sequence(temperature=1.0, top_p=0.8, seed=seed)
        expected = reference_distribution(logits, one)
        assert draw(logits, one) == reference_draw(expected, uniform(seed, 0, one.num_tokens))


def test_equals_of_the_kth_token_stay_in() -> None:
    drawn = {draw([2, 2, 2, 0], sequence(temperature=1.0, top_k=2, seed=seed)) for seed in range(60)}
    assert drawn == {0, 1, 2}


def test_a_nucleus_and_the_top_logprobs_take_the_lowest_ids_among_equals() -> None:
    flat = np.zeros(100)
    assert max(draw(flat, sequence(temperature=1.0, top_p=0.25, seed=seed)) for seed in range(300)) == 24
    logprobs = sample(flat[None].astype(np.float32), [sequence(logprobs=40)])[0].logprobs
    assert logprobs is not None
    assert [token for token, _ in logprobs.top] == list(range(40))


def test_top_p_zero_and_tiny_temperatures_are_greedy() -> None:
    logits = [0.0, 5.0, 4.9, -3.0]
    assert {draw(logits, sequence(temperature=1.0, top_p=0.0, seed=s)) for s in range(20)} == {1}
    assert {draw(logits, sequence(temperature=1e-300, seed=s)) for s in range(20)} == {1}


def test_repetition_counts_prompt_and_output_but_presence_and_frequency_only_output() -> None:
    logits = [1.0, 2.0, 1.9]
    assert draw(logits, sequence([1], repetition_penalty=1.5)) == 2
    assert draw(logits, sequence([1], presence_penalty=2.0, frequency_penalty=2.0)) == 1
    assert draw(logits, sequence([0], [1], presence_penalty=0.5)) == 2
    assert draw([1.0, 2.0, 1.6], sequence([0], [1, 1], frequency_penalty=0.25)) == 2
    # A negative score is multiplied: penalising it must not make it larger.
    assert draw([-1.0, -1.1], sequence([0], repetition_penalty=1.2)) == 1


def test_stop_tokens_cannot_be_drawn_before_min_tokens() -> None:
    logits = [0.0, 9.0, 1.0]
    # An id outside of the vocabulary can never be drawn anyway.
    params = {"stop_token_ids": (1, 99), "min_tokens": 2}
    assert draw(logits, sequence([0], [0], **params)) == 2
    assert draw(logits, sequence([0], [0, 0], **params)) == 1


def test_logprobs_are_of_the_distribution_before_penalties_and_temperature() -> None:
    logits = np.array([[1.0, 3.0, 3.0, 0.5, -2.0]], dtype=np.float32)
    one = sequence([1], [2], temperature=0.3, repetition_penalty=5.0, top_k=1, logprobs=3)
    drawn = sample(logits, [one])[0]
    exact = logits[0] - math.log(math.fsum(math.exp(x) for x in logits[0]))
    assert drawn.logprobs is not None
    assert drawn.token_id == 0
    assert drawn.logprobs.token_id == 0
    assert drawn.logprobs.logprob == pytest.approx(exact[0], abs=1e-6)
    assert [token for token, _ in drawn.logprobs.top] == [1, 2, 0]
    assert [value for _, value in drawn.logprobs.top] == pytest.approx(
        [exact[1], exact[2], exact[0]], abs=1e-6
    )


def test_logprobs_zero_tells_of_the_drawn_token_only_and_none_of_nothing() -> None:
    logits = np.array([[1.0, 3.0]], dtype=np.float32)
    only = sample(logits, [sequence(logprobs=0)])[0].logprobs
    assert only is not None
    assert only.top == []
    assert sample(logits, [sequence()])[0].logprobs is None


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_broken_row_is_an_error_and_not_a_token(bad: float, temperature: float) -> None:
    with pytest.raises(FloatingPointError, match="request r are not finite"):
        draw([0.0, bad, 1.0], sequence(temperature=temperature))


def test_a_step_without_samples_draws_nothing() -> None:
    assert sample(np.empty((0, 10), dtype=np.float32), []) == []
