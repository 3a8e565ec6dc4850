"""Steps that are submitted before the results of the step before are known."""

from __future__ import annotations

import numpy as np
import paddle
import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from fastdeploy.common.messages import AddRequest, TokenOutput
from fastdeploy.common.request import Batch, FinishReason
from fastdeploy.core.engine import EngineBroken, EngineCore
from fastdeploy.grammar.texts import regex_grammar
from tests.random_traffic import RandomModel, RecordedEngine, draw_requests
from tests.running_ahead import RunningAhead

from .paged_oracle import GRAMMARS, MODEL_CONFIG, PagedOracle, engine_config, generate_alone, request

seeds = st.integers(0, 2**32 - 1)


@settings(max_examples=60)
@given(data=st.data())
def test_steps_ahead_change_no_text(data: st.DataObject) -> None:
    model = RandomModel(data.draw(seeds, "model"), "float32")
    random = np.random.default_rng(data.draw(seeds, "requests"))
    requests = draw_requests(random, model.config.vocab_size, data.draw(st.integers(1, 7), "requests"))
    # A stop string, or a client that leaves: the API aborts the request when its text is that long.
    ends = {each.request_id: int(random.choice([3, 9, 20, 999])) for each in requests}
    longest = max(len(each.prompt_token_ids) + each.params.max_tokens for each in requests)
    seats, pace = data.draw(st.integers(1, 6), "seats"), data.draw(st.integers(1, 3), "pace")
    spare = data.draw(st.integers(0, 12), "spare blocks")
    engines = [
        model.engine(
            num_blocks=-(-longest // 8) + spare,
            every_position=False,
            block_size=8,
            max_num_seqs=seats,
            max_num_batched_tokens=300,
            ahead=ahead,
        )
        for ahead in (None, data.draw(st.integers(0, 99), "ahead"))
    ]
    for engine in engines:
        serve(engine, requests, ends, pace)
    one_by_one, ahead = engines
    assert ahead.texts == one_by_one.texts
    assert ahead.ended == one_by_one.ended
    assert ahead.ahead is not None
    event("ran ahead", ahead.ahead.num_ahead > 0)


def serve(engine: RecordedEngine, requests: list[AddRequest], ends: dict[str, int], pace: int) -> None:
    waiting = list(requests)
    while waiting or engine.has_work:
        for one in waiting[:pace]:
            engine.add(one)
        del waiting[:pace]
        engine.step()
        for name, text in engine.texts.items():
            assert len(text) <= ends[name], "an aborted request gets no further tokens"
            if len(text) == ends[name]:
                engine.abort(name)
    engine.drain()


def build(num_blocks: int = 32, **changes: object) -> tuple[EngineCore, PagedOracle, RunningAhead]:
    config = engine_config(**changes)
    oracle = PagedOracle(num_blocks, config.block_size)
    runner = RunningAhead(oracle, 0)
    return EngineCore(config, MODEL_CONFIG, runner, num_blocks, GRAMMARS), oracle, runner


def outputs_of(engine: EngineCore) -> list[TokenOutput]:
    outputs = []
    while engine.has_work:
        outputs += engine.step().outputs
    engine.on_idle()
    return outputs


def test_every_step_but_the_first_is_submitted_ahead() -> None:
    engine, oracle, runner = build()
    for name in "ab":
        engine.add(request(name, [1, 2], max_tokens=9))
    assert [output.finish_reason for output in outputs_of(engine)][-2:] == [FinishReason.LENGTH] * 2
    # Its end is known beforehand, so no step is computed in vain.
    assert (len(oracle.batches), runner.num_ahead) == (9, 8)


def test_a_step_after_the_end_of_a_text_is_thrown_away() -> None:
    engine, oracle, _ = build()
    text, _ = generate_alone([1, 2], request("a", [1, 2]).params, 64)
    engine.add(request("a", [1, 2], max_tokens=60, stop_token_ids=(text[3],)))
    outputs = outputs_of(engine)
    assert [token for output in outputs for token in output.token_ids] == text[: text.index(text[3]) + 1]
    assert outputs[-1].finish_reason is FinishReason.STOP
    assert len(oracle.batches) == len(outputs) + 1


def test_a_request_takes_the_blocks_of_an_aborted_one_while_its_step_is_computed() -> None:
    engine, _, runner = build(num_blocks=4, max_num_seqs=1)
    for rounds in range(30):
        engine.add(request("a", [rounds + 1] * 3, max_tokens=13))
        for _ in range(rounds % 9):
            engine.step()
        engine.abort(["a"])
        # It needs all blocks.
        engine.add(request("b", [50 - rounds] * 3, max_tokens=13))
        text = [token for output in outputs_of(engine) for token in output.token_ids]
        assert text == generate_alone([50 - rounds] * 3, request("b", [], max_tokens=13).params, 16)[0]
    assert runner.num_ahead > 0


@pytest.mark.parametrize(
    "changes",
    [
        {"frequency_penalty": 0.5},
        {"repetition_penalty": 1.1},
        {"bad_words": ((1, 2),)},
        {"grammar": regex_grammar("[a-d]*")},
        {"min_tokens": 9, "stop_token_ids": (3,)},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_a_draw_that_depends_on_the_text_waits_for_it(changes: dict[str, object]) -> None:
    engine, _, runner = build()
    engine.add(request("a", [1, 2], **changes))
    outputs_of(engine)
    assert runner.num_ahead == 0


@pytest.mark.parametrize(
    "changes",
    [
        {"temperature": 0.9, "top_p": 0.9, "seed": 5},
        {"logprobs": 2},
        {"logit_bias": ((4, 1.5),)},
        {"allowed_token_ids": (4, 5, 6, 7)},
        {"min_tokens": 3, "stop_token_ids": (3,)},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_a_draw_that_does_not_depend_on_the_text_is_made_ahead(changes: dict[str, object]) -> None:
    one = request("a", [1, 2], **changes)
    answers = []
    for engine, runner in ((build()[0], None), build()[::2]):
        if runner is None:
            engine._runner.runs_ahead = False
        engine.add(one)
        answers.append([(each.token_ids, each.logprobs, each.finish_reason) for each in outputs_of(engine)])
    assert answers[0] == answers[1]
    assert runner is not None
    assert runner.num_ahead > 2


def test_a_waiting_request_is_admitted_as_soon_as_there_is_room() -> None:
    engine, _, _ = build(max_num_seqs=2)
    engine.add(request("a", [1, 2], max_tokens=20))
    for _ in range(4):
        engine.step()
    engine.add(request("b", [3, 4], max_tokens=3))
    # One step is in progress already.
    assert [len(engine.step().outputs) for _ in range(2)] == [1, 2]


def test_a_failed_step_takes_the_step_after_it_along() -> None:
    class Faulty(PagedOracle):
        def execute(self, batch: Batch) -> paddle.Tensor:
            logits = super().execute(batch)
            bad = any(row.sequence.request_id == "bad" and row.start == 4 for row in batch.rows)
            return paddle.full_like(logits, np.nan) if bad else logits

    for seed in range(4):
        config = engine_config(max_num_seqs=2)
        engine = EngineCore(config, MODEL_CONFIG, RunningAhead(Faulty(32, 4), seed), 32)
        good = request("good", [5, 6])
        for one in (request("bad", [1, 2]), request("beside", [2, 3]), good):
            engine.add(one)
        outputs = outputs_of(engine)
        failed = [each for each in outputs if each.finish_reason is FinishReason.ERROR]
        assert [each.request_id for each in failed] == ["bad", "beside"]
        text = [token for each in outputs if each.request_id == "good" for token in each.token_ids]
        assert text == generate_alone(good.prompt_token_ids, good.params, 64)[0]


def test_failures_of_steps_ahead_break_the_engine() -> None:
    class Broken(PagedOracle):
        def execute(self, batch: Batch) -> paddle.Tensor:
            logits = super().execute(batch)
            return paddle.full_like(logits, np.nan) if len(self.batches) > 1 else logits

    engine = EngineCore(engine_config(max_num_seqs=1), MODEL_CONFIG, RunningAhead(Broken(32, 4), 1), 32)
    for name in "abcd":
        engine.add(request(name, [1, 2]))
    with pytest.raises(EngineBroken, match="consecutive steps have failed"):
        outputs_of(engine)
