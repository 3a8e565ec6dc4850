"""A request's tokens, and its logits to the bit, do not depend on the engine's other work."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from fastdeploy import custom_ops
from fastdeploy.common.messages import AddRequest
from fastdeploy.common.request import SamplingParams
from tests.random_traffic import (
    WEIGHT_FORMATS,
    Alone,
    RandomModel,
    RecordedEngine,
    assert_as_if_alone,
    draw_requests,
)

seeds = st.integers(0, 2**32 - 1)


@pytest.fixture(autouse=True)
def one_thread_afterwards() -> Iterator[None]:
    yield
    custom_ops.set_threads(1)


@settings(max_examples=18)
@given(data=st.data())
@pytest.mark.parametrize("weight_format", WEIGHT_FORMATS)
def test_a_request_is_computed_as_if_it_were_alone(weight_format: str, data: st.DataObject) -> None:
    """They depend neither on batch, order and chunks, nor on prefix cache, blocks, threads, steps ahead."""
    model = RandomModel(data.draw(seeds, "model"), weight_format)
    random = np.random.default_rng(data.draw(seeds, "requests"))
    requests = draw_requests(random, model.config.vocab_size, data.draw(st.integers(1, 6), "requests"))
    block_size = data.draw(st.sampled_from([4, 8, 16, 32, 64]), "block size")
    alone = {request.request_id: Alone.compute(model, request, block_size) for request in requests}

    longest = max(len(request.prompt_token_ids) + request.params.max_tokens for request in requests)
    least = -(-longest // block_size)
    custom_ops.set_threads(data.draw(st.integers(1, 3), "threads"))
    engine = model.engine(
        num_blocks=least + data.draw(st.integers(0, 12), "spare blocks"),
        every_position=data.draw(st.booleans(), "every position"),
        block_size=block_size,
        max_num_seqs=data.draw(st.integers(1, 6), "seats"),
        max_num_batched_tokens=data.draw(st.one_of(st.integers(1, 40), st.just(700)), "tokens of a step"),
        enable_prefix_caching=data.draw(st.booleans(), "prefix caching"),
        ahead=data.draw(st.none() | st.integers(0, 99), "ahead"),
    )
    for request in data.draw(st.permutations(requests), "order"):
        engine.add(request)
        for _ in range(data.draw(st.integers(0, 3), "steps")):
            engine.step()
    engine.drain()
    assert engine.ended.keys() == alone.keys()
    assert_as_if_alone(engine, requests, alone)
    event("preempted", bool(engine.stats and engine.stats.preemptions_total))


def greedy(name: str, prompt: list[int], max_tokens: int) -> AddRequest:
    return AddRequest(name, prompt, SamplingParams(max_tokens=max_tokens, temperature=0.0), 0.0)


@pytest.fixture(scope="module", params=WEIGHT_FORMATS)
def model(request: pytest.FixtureRequest) -> RandomModel:
    return RandomModel(2, request.param)


def run(model: RandomModel, requests: list[AddRequest], **changes: object) -> RecordedEngine:
    options: dict[str, Any] = {"num_blocks": 60, "every_position": True, "block_size": 16, **changes}
    engine = model.engine(**options)
    for request in requests:
        engine.add(request)
    engine.drain()
    alone = {request.request_id: Alone.compute(model, request, 16) for request in requests}
    assert_as_if_alone(engine, requests, alone)
    return engine


def test_preempted_text_is_recomputed_to_the_bit(model: RandomModel) -> None:
    requests = [greedy(f"r{i}", [i + 3] * 20, max_tokens=60) for i in range(5)]
    engine = run(model, requests, num_blocks=14, enable_prefix_caching=False)
    assert engine.stats is not None
    assert engine.stats.preemptions_total > 0


def test_cached_prefix_of_another_text_gives_the_same_bits(model: RandomModel) -> None:
    prompt = list(range(3, 19)) * 6
    requests = [greedy("first", prompt, 4), greedy("again", prompt, 30), greedy("half", prompt[:50], 30)]
    engine = run(model, requests, max_num_seqs=1)
    assert engine.stats is not None
    assert engine.stats.prefix_cache_hit_tokens_total == 80 + 48


@pytest.mark.parametrize("chunk", [1, 7, 64, 512])
def test_chunks_of_a_prompt_longer_than_a_segment_do_not_show(model: RandomModel, chunk: int) -> None:
    prompt = np.random.default_rng(3).integers(3, 20, 530).tolist()
    run(model, [greedy("long", prompt, 6)], max_num_batched_tokens=chunk)


@pytest.mark.parametrize("threads", [2, 3])
def test_more_threads_compute_the_same(model: RandomModel, threads: int) -> None:
    requests = [greedy(f"r{i}", list(range(3, 5 + 13 * i)), max_tokens=9) for i in range(5)]
    custom_ops.set_threads(threads)
    run(model, requests, max_num_batched_tokens=50)
