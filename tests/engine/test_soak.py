"""`make soak`: random traffic over random models for FD_SOAK_MINUTES, every logit compared to the bit."""

from __future__ import annotations

import os
import random as entropy
import time
from collections import Counter
from collections.abc import Iterator

import numpy as np
import pytest

from fastdeploy import custom_ops
from fastdeploy.common.messages import AddRequest
from tests.random_traffic import (
    WEIGHT_FORMATS,
    Alone,
    RandomModel,
    RecordedEngine,
    assert_as_if_alone,
    draw_requests,
)


@pytest.fixture(autouse=True)
def one_thread_afterwards() -> Iterator[None]:
    yield
    custom_ops.set_threads(1)


@pytest.mark.slow
@pytest.mark.timeout(0)
def test_traffic_leaves_no_trace_in_any_logit(capsys: pytest.CaptureFixture[str]) -> None:
    minutes = float(os.environ.get("FD_SOAK_MINUTES", "3"))
    seed = int(os.environ.get("FD_SOAK_SEED", entropy.randrange(2**32)))
    done: Counter[str] = Counter()
    end = time.monotonic() + 60 * minutes
    while time.monotonic() < end:
        try:
            done.update(traffic(seed))
        except BaseException as error:
            error.add_note(f"FD_SOAK_SEED={seed} begins with this traffic")
            raise
        seed += 1
    with capsys.disabled():
        print(f"\nsoak of {minutes:g} minutes, to seed {seed}")
        for what, count in done.items():
            print(f"{count:>12,} {what}")
    assert done["logits compared"] > 0


def traffic(seed: int) -> Counter[str]:
    """Run random requests through one random model and abort some of them; return the counts."""
    random = np.random.default_rng(seed)
    model = RandomModel(int(random.integers(2**32)), str(random.choice(WEIGHT_FORMATS)))
    requests = draw_requests(random, model.config.vocab_size, int(random.integers(1, 25)))
    block_size = int(random.choice([4, 8, 16, 32, 64, 128]))
    alone = {request.request_id: Alone.compute(model, request, block_size) for request in requests}
    longest = max(len(request.prompt_token_ids) + request.params.max_tokens for request in requests)
    custom_ops.set_threads(int(random.integers(1, 4)))
    engine = model.engine(
        num_blocks=-(-longest // block_size) + int(random.choice([0, 2, 8, 30])),
        every_position=bool(random.random() < 0.3),
        block_size=block_size,
        max_num_seqs=int(random.integers(1, 17)),
        max_num_batched_tokens=int(random.choice([5, 24, 64, 256, 1024])),
        enable_prefix_caching=bool(random.integers(2)),
        ahead=seed if random.random() < 0.5 else None,
    )
    aborted = live(engine, requests, random)
    assert engine.ended.keys() | aborted == alone.keys()
    assert_as_if_alone(engine, requests, alone)
    assert engine.stats is not None
    return Counter(
        {
            "models": 1,
            "requests": len(requests),
            "of them aborted": len(aborted),
            "steps": engine.stats.steps_total,
            "of them submitted ahead": engine.ahead.num_ahead if engine.ahead else 0,
            "preemptions": engine.stats.preemptions_total,
            "prompt tokens from the prefix cache": engine.stats.prefix_cache_hit_tokens_total,
            "tokens drawn": sum(map(len, engine.texts.values())),
            "logits compared": sum(len(row) // 4 for row in engine.logits.values()),
        }
    )


def live(engine: RecordedEngine, requests: list[AddRequest], random: np.random.Generator) -> set[str]:
    """Serve all requests; return the names of aborted ones."""
    waiting, aborted = list(requests), set()
    # Pace of arrivals, from all at once to one after the other.
    pace = random.choice([1.0, 0.3, 0.05])
    while waiting or engine.has_work:
        if waiting and (random.random() < pace or not engine.has_work):
            engine.add(waiting.pop(int(random.integers(len(waiting)))))
            continue
        engine.step()
        if random.random() < 0.02:
            name = str(random.choice(list(engine.texts)))
            if name not in engine.ended:
                engine.abort(name)
                aborted.add(name)
    engine.drain()
    return aborted
