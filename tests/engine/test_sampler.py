"""A sequence's parameters reach the operation; the operation itself is tested in tests/custom_ops."""

from __future__ import annotations

import gc
import math
import weakref
from collections import Counter

import numpy as np
import paddle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdeploy.common.request import SamplingParams, Sequence
from fastdeploy.core.sampler import Sampled, Sampler
from fastdeploy.custom_ops import SAMPLING_ROW, reference


def sequence(prompt: list[int] | None = None, outputs: list[int] | None = None, **params: object) -> Sequence:
    sampling = SamplingParams(**({"max_tokens": 100, "temperature": 0.0} | params))  # type: ignore[arg-type]
    return Sequence("r", prompt or [0], sampling, output_token_ids=outputs or [])


def sample(logits: np.ndarray, sequences: list[Sequence]) -> list[Sampled]:
    return Sampler(logits.shape[1]).sample(paddle.to_tensor(logits.astype(np.float32)), sequences)


def draw(logits: list[float] | np.ndarray, one: Sequence) -> int:
    return sample(np.array([logits]), [one])[0].token_id


def reference_draws(logits: np.ndarray, one: Sequence) -> set[int]:
    """Return the reference's token, and those for a top_p that differs by a rounding error."""
    params, outputs = one.params, one.output_token_ids
    row = np.zeros(1, SAMPLING_ROW)[0]
    for name in ("temperature", "top_p", "min_p", "choice"):
        row[name] = getattr(params, name)
    for name in ("repetition_penalty", "presence_penalty", "frequency_penalty"):
        row[name] = getattr(params, name)
    row["top_k"] = min(params.top_k, len(logits))
    row["seed"] = params.seed % 2**64
    row["position"] = len(one.prompt_token_ids) + len(outputs)
    seen = [(token, Counter(outputs)[token]) for token in {*one.prompt_token_ids, *outputs}]
    masked = params.stop_token_ids if len(outputs) < params.min_tokens else ()
    draws = set()
    for nudge in (-1e-12, 0, 1e-12):
        row["top_p"] = params.top_p + nudge if 0 < params.top_p < 1 else params.top_p
        weights = reference.sampling_weights(logits.astype(np.float64), row, seen, masked)
        draws.add(reference.sample(weights, row))
    return draws


# Multiples of a quarter lead to many ties, and to sums exact enough for decisions at borders.
rows = st.lists(st.integers(-40, 40).map(lambda n: n / 4), min_size=8, max_size=40).map(np.array)


@settings(max_examples=300)
@given(data=st.data(), logits=rows)
def test_every_draw_along_a_text_is_the_references_draw(data: st.DataObject, logits: np.ndarray) -> None:
    token = st.integers(0, len(logits) - 1)
    one = sequence(
        data.draw(st.lists(token, min_size=1, max_size=5)),
        data.draw(st.lists(token, max_size=5)),
        temperature=data.draw(st.sampled_from([0.0, 0.5, 1.0, 2.0])),
        top_k=data.draw(st.sampled_from([0, 1, 3, 7, 1000, 2**40])),
        top_p=data.draw(st.sampled_from([0.0, 0.3, 0.77, 0.95, 1.0])),
        min_p=data.draw(st.sampled_from([0.0, 0.01, 0.3, 1.0])),
        repetition_penalty=data.draw(st.sampled_from([1.0, 1.25, 0.8])),
        presence_penalty=data.draw(st.sampled_from([0.0, 0.5, -1.0])),
        frequency_penalty=data.draw(st.sampled_from([0.0, 0.25, -0.5])),
        min_tokens=data.draw(st.sampled_from([0, 3])),
        stop_token_ids=data.draw(st.sampled_from([(), (0, 5)])),
        seed=data.draw(st.integers(-(2**63), 2**63 - 1)),
        choice=data.draw(st.integers(0, 3)),
    )
    sampler = Sampler(len(logits))
    for _ in range(3):
        drawn = sampler.sample(paddle.to_tensor(logits[None].astype(np.float32)), [one])[0].token_id
        assert drawn in reference_draws(logits, one)
        # The next tokens may differ from the drawn one: a step may be discarded and computed again.
        one.output_token_ids += data.draw(st.lists(token, max_size=2))


def test_a_draw_does_not_depend_on_the_rest_of_the_batch() -> None:
    logits = np.random.default_rng(0).normal(0, 2, (8, 500))
    batch = [
        sequence([1, 2, 3], [4, 4], temperature=0.8, top_p=0.9, seed=index, frequency_penalty=0.3, logprobs=3)
        for index in range(6)
    ]
    batch += [sequence([1]), sequence([2], [1], min_tokens=5, stop_token_ids=(2, 3), repetition_penalty=1.3)]
    together = sample(logits, batch)
    assert [sample(logits[i : i + 1], [batch[i]])[0] for i in range(8)] == together
    assert sample(logits[::-1], batch[::-1]) == together[::-1]


def test_another_choice_of_the_same_request_draws_another_text() -> None:
    flat = np.zeros(1000)
    texts = {
        tuple(draw(flat, sequence([1] * n, temperature=1.0, seed=3, choice=c)) for n in range(1, 6))
        for c in (0, 1, 2)
    }
    assert len(texts) == 3


def test_repetition_penalty_alone_also_counts_the_prompt() -> None:
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


def test_logprobs_are_computed_before_penalties_and_temperature() -> None:
    logits = np.array([[1.0, 3.0, 3.0, 0.5, -2.0]])
    one = sequence([1], [2], temperature=0.3, repetition_penalty=5.0, top_k=1, logprobs=3)
    drawn = sample(logits, [one])[0]
    exact = logits[0] - math.log(math.fsum(math.exp(x) for x in logits[0]))
    assert drawn.logprobs is not None
    assert drawn.token_id == 0
    assert drawn.logprobs.token_id == 0
    assert drawn.logprobs.logprob == pytest.approx(exact[0], abs=1e-12)
    assert [token for token, _ in drawn.logprobs.top] == [1, 2, 0]
    assert [value for _, value in drawn.logprobs.top] == pytest.approx(
        [exact[1], exact[2], exact[0]], abs=1e-12
    )


def test_each_row_gets_the_number_of_logprobs_it_requested() -> None:
    asked = [None, 0, 2, 5]
    drawn = sample(np.array([[1.0, 3.0, 2.0]] * 4), [sequence(logprobs=count) for count in asked])
    assert [None if one.logprobs is None else len(one.logprobs.top) for one in drawn] == [None, 0, 2, 3]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_broken_row_is_an_error_that_names_its_request(bad: float, temperature: float) -> None:
    good, broken = sequence(), sequence(temperature=temperature)
    broken.request_id = "broken"
    with pytest.raises(FloatingPointError, match="request broken are not finite"):
        sample(np.array([[0.0, 1.0, 2.0], [0.0, bad, 1.0]]), [good, broken])


def test_a_step_without_samples_draws_nothing() -> None:
    assert sample(np.empty((0, 10)), []) == []


def test_state_of_a_sequence_is_dropped_with_it() -> None:
    sampler = Sampler(10)
    one = sequence([1, 2], temperature=1.0, repetition_penalty=1.1)
    sampler.sample(paddle.zeros([1, 10]), [one])
    gone = weakref.ref(sampler._recipes[one])
    del one
    gc.collect()
    assert gone() is None
