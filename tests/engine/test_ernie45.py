"""The network against logits, greedy texts and router picks recorded from transformers in float32."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fastdeploy.common.request import Batch, ScheduledSequence, Sequence
from tests.cpu_library import PATHS
from tests.network import Network, recorded_routes

FIXTURES = Path(__file__).parent.parent / "fixtures"
PROMPTS = range(8)
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def reference() -> dict[str, np.ndarray]:
    return dict(np.load(FIXTURES / "tiny_reference.npz"))


@pytest.fixture(params=PATHS)
def network(request: pytest.FixtureRequest) -> Network:
    return Network(FIXTURES / "tiny", kernels=request.param)


#: The library shows no picks.
through_paddle = pytest.mark.parametrize("network", ["paddle"], indirect=True)


def assert_close(found: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE)


@through_paddle
@pytest.mark.parametrize("prompt", PROMPTS)
def test_logits_picks_and_greedy_text_are_the_reference(
    network: Network, reference: dict[str, np.ndarray], prompt: int
) -> None:
    sequence = network.sequence(reference[f"prompt_{prompt}"].tolist())
    with recorded_routes() as routes:
        logits = network.prefill(sequence)
    topk_ids, weights = routes.by_layer(layers=2)
    assert_close(logits, reference[f"logits_{prompt}"])
    np.testing.assert_array_equal(topk_ids, reference[f"router_{prompt}"])
    np.testing.assert_allclose(weights, reference[f"router_w_{prompt}"], atol=1e-5)
    assert_close(network.decode(sequence, logits[-1], 64), reference[f"greedy_logits_{prompt}"])
    assert sequence.output_token_ids == reference[f"greedy_{prompt}"].tolist()


@through_paddle
@pytest.mark.parametrize("chunk", [1, 7, 16, 50, 129, 199])
def test_chunks_of_prefill_do_not_show(
    network: Network, reference: dict[str, np.ndarray], chunk: int
) -> None:
    sequence = network.sequence(reference["prompt_7"].tolist())
    with recorded_routes() as routes:
        logits = network.prefill(sequence, chunk=chunk)
    assert_close(logits, reference["logits_7"])
    np.testing.assert_array_equal(routes.by_layer(layers=2)[0], reference["router_7"])


def test_prefix_of_another_sequence_gives_the_same_logits(
    network: Network, reference: dict[str, np.ndarray]
) -> None:
    prompt = reference["prompt_7"].tolist()
    first = network.sequence([*prompt[:128], 5, 6, 7])
    network.prefill(first)
    second = network.sequence(prompt, shared_blocks=first.block_ids[: 128 // network.block_size])
    logits = network.prefill(second, start=128)
    assert_close(logits, reference["logits_7"][128:])
    network.decode(second, logits[-1], 64)
    assert second.output_token_ids == reference["greedy_7"].tolist()


def test_logits_are_right_for_decode_rows_and_chunks_in_one_step(
    network: Network, reference: dict[str, np.ndarray]
) -> None:
    """A new sequence joins every third step with chunks of 23, while the earlier ones decode."""
    sequences = [network.sequence(reference[f"prompt_{i}"].tolist()) for i in PROMPTS]
    waiting = list(sequences)
    running: list[Sequence] = []
    step = 0
    while waiting or running:
        if waiting and step % 3 == 0:
            running.append(waiting.pop())
        rows = tuple(next_row(sequence) for sequence in running)
        logits = iter(network.runner.execute(Batch(rows)))
        for row in rows:
            row.sequence.num_computed = row.end
            if row.samples:
                produced = len(row.sequence.output_token_ids)
                drawn = next(logits)
                assert_close(drawn, reference[f"greedy_logits_{sequences.index(row.sequence)}"][produced])
                row.sequence.output_token_ids.append(int(drawn.argmax()))
        assert next(logits, None) is None
        running = [sequence for sequence in running if len(sequence.output_token_ids) < 64]
        step += 1
    for i in PROMPTS:
        assert sequences[i].output_token_ids == reference[f"greedy_{i}"].tolist()


def next_row(sequence: Sequence) -> ScheduledSequence:
    count = min(23, sequence.num_tokens - sequence.num_computed)
    samples = sequence.num_computed + count == sequence.num_tokens
    return ScheduledSequence(sequence, sequence.num_computed, count, samples)


def test_logits_come_in_batch_order_and_of_sampling_rows_only(
    network: Network, reference: dict[str, np.ndarray]
) -> None:
    """A chunk precedes a decode row: they are computed in the opposite order and returned in this one."""
    long, short = (network.sequence(reference[f"prompt_{i}"].tolist()) for i in (4, 0))
    chunk = ScheduledSequence(long, 0, 33, samples=True)
    single = ScheduledSequence(short, 0, 1, samples=True)
    logits = network.runner.execute(Batch((chunk, single)))
    assert_close(logits, np.stack([reference["logits_4"][-1], reference["logits_0"][-1]]))
    silent = ScheduledSequence(long, 0, 20, samples=False)
    assert network.runner.execute(Batch((silent, single))).shape == (1, 512)
    assert network.runner.execute(Batch((silent,))).shape == (0, 512)
