from __future__ import annotations

import logging

import msgspec
import numpy as np
import paddle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdeploy.common.messages import AddRequest, StepOutputs, TokenOutput
from fastdeploy.common.request import Batch, FinishReason, SamplingParams, Sequence
from fastdeploy.core.engine import EngineBroken, EngineCore
from fastdeploy.grammar.texts import choice_grammar, lark_grammar, regex_grammar
from tests.running_ahead import RunningAhead

from .paged_oracle import (
    EOS_ID,
    GRAMMARS,
    MODEL_CONFIG,
    VOCAB_SIZE,
    PagedOracle,
    engine_config,
    generate_alone,
    request,
)


def build(
    num_blocks: int = 32, *, ahead: int | None = None, **changes: object
) -> tuple[EngineCore, PagedOracle]:
    """Build an engine; with `ahead`, the seed of a `RunningAhead`, on a runner that runs ahead."""
    config = engine_config(**changes)
    runner = PagedOracle(num_blocks, config.block_size)
    used = runner if ahead is None else RunningAhead(runner, ahead)
    return EngineCore(config, MODEL_CONFIG, used, num_blocks, GRAMMARS), runner


def drain(engine: EngineCore) -> list[StepOutputs]:
    steps = []
    while engine.has_work:
        steps.append(engine.step())
        assert len(steps) < 10_000, "the engine does not come to an end"
    steps.append(engine.on_idle())
    return steps


class Texts:
    """The outputs that a client would get."""

    def __init__(self) -> None:
        self.token_ids: dict[str, list[int]] = {}
        self.reasons: dict[str, FinishReason] = {}
        self.messages: dict[str, str | None] = {}

    def take(self, step: StepOutputs) -> None:
        for output in step.outputs:
            assert output.request_id not in self.reasons, "nothing follows the end of a text"
            self.token_ids.setdefault(output.request_id, []).extend(output.token_ids)
            if output.finish_reason is not None:
                self.reasons[output.request_id] = output.finish_reason
                self.messages[output.request_id] = output.message


def collect(engine: EngineCore) -> Texts:
    texts = Texts()
    for step in drain(engine):
        texts.take(step)
    return texts


prompts = st.one_of(
    st.lists(st.integers(0, VOCAB_SIZE - 1), min_size=1, max_size=30),
    # Common beginnings, so that the prefix cache has something to find.
    st.integers(1, 30).map(lambda length: list(range(length))),
    st.integers(1, 30).map(lambda length: [*range(9), *[5] * length]),
)

sampling = st.builds(
    SamplingParams,
    max_tokens=st.integers(1, 20),
    min_tokens=st.integers(0, 4),
    temperature=st.sampled_from([0.0, 0.0, 0.9]),
    top_p=st.sampled_from([1.0, 0.8]),
    repetition_penalty=st.sampled_from([1.0, 1.3]),
    frequency_penalty=st.sampled_from([0.0, 0.5]),
    seed=st.integers(0, 99),
    choice=st.integers(0, 2),
    stop_token_ids=st.just((3, 7, 11)),
)
#: With texts that end early, late or by a lack of tokens.
constrained = st.builds(
    msgspec.structs.replace,
    sampling,
    grammar=st.sampled_from(
        [
            regex_grammar("[a-d]*1"),
            regex_grammar("(ab|cd)*"),
            choice_grammar(["abc"]),
            lark_grammar('start: few "1" rest\nfew[max_tokens=3]: /[a-d]*/\nrest[lazy]: /[a-f]*ef/'),
        ]
    ),
    end_token_ids=st.just((EOS_ID,)),
    stop_token_ids=st.sampled_from([(EOS_ID,), (), (EOS_ID, 7)]),
    logit_bias=st.sampled_from([(), ((EOS_ID, 5.0), (4, -2.5))]),
    bad_words=st.sampled_from([(), ((1, 3), (5,)), ((0,),)]),
    allowed_token_ids=st.sampled_from([(), tuple(range(40))]),
)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_every_text_equals_that_of_the_request_alone(data: st.DataObject) -> None:
    """The text depends neither on batch, chunks, prefix hits, preemptions and aborts of others, nor on steps
    ahead, nor on how much of it another engine has generated."""
    num_blocks = data.draw(st.integers(3, 24))
    engine, runner = build(
        num_blocks=num_blocks,
        max_num_seqs=data.draw(st.integers(1, 6)),
        max_num_batched_tokens=data.draw(st.integers(1, 24)),
        block_size=data.draw(st.sampled_from([1, 4, 8])),
        enable_prefix_caching=data.draw(st.booleans()),
        ahead=data.draw(st.none() | st.integers(0, 99)),
    )
    limit = min(64, len(runner.cache))
    sent: dict[str, AddRequest] = {}
    alone: dict[str, tuple[list[int], FinishReason]] = {}
    aborted: set[str] = set()
    texts = Texts()
    for _ in range(data.draw(st.integers(1, 25))):
        action = data.draw(st.sampled_from(["add", "add", "step", "step", "abort"]))
        if action == "add":
            prompt, params = data.draw(prompts), data.draw(st.one_of(sampling, constrained))
            if len(prompt) < limit:
                name = f"r{len(sent)}"
                alone[name] = generate_alone(prompt, params, limit)
                written, _ = alone[name]
                known = data.draw(st.just(0) | st.integers(0, max(0, len(written) - 1)))
                sent[name] = AddRequest(name, prompt, params, 0.0, written[:known])
                engine.add(sent[name])
        elif action == "step":
            texts.take(engine.step())
        elif sent:
            name = data.draw(st.sampled_from(sorted(sent)))
            engine.abort([name])
            aborted.add(name)
    steps = drain(engine)
    for step in steps:
        texts.take(step)
    for name, one in sent.items():
        expected, reason = alone[name]
        if name in texts.reasons:
            written = one.output_token_ids + texts.token_ids[name]
            assert (written, texts.reasons[name]) == (expected, reason)
        else:
            assert name in aborted
            written = one.output_token_ids + texts.token_ids.get(name, [])
            assert written == expected[: len(written)]
    last = steps[-1].stats
    assert (last.num_running, last.num_waiting, last.batch_tokens) == (0, 0, 0)
    assert last.num_free_blocks == num_blocks


def test_cached_token_count_excludes_output_sent_with_the_prompt() -> None:
    engine, _ = build(block_size=4)
    engine.add(request("first", [1] * 6, max_tokens=12))
    text = collect(engine).token_ids["first"]
    engine.add(AddRequest("second", [1] * 6, SamplingParams(max_tokens=12, temperature=0.0), 0.0, text[:9]))
    outputs = [output for step in drain(engine) for output in step.outputs]
    assert [token for output in outputs for token in output.token_ids] == text[9:]
    assert outputs[0].num_cached == 6


@pytest.mark.parametrize("known", [[VOCAB_SIZE], [5] * 100], ids=["unknown token", "too long"])
def test_an_output_that_does_not_fit_is_refused(known: list[int]) -> None:
    engine, _ = build()
    engine.add(AddRequest("a", [1, 2], SamplingParams(max_tokens=200), 0.0, known))
    assert collect(engine).reasons == {"a": FinishReason.ERROR}


def test_preemption_happens_under_pressure_and_changes_no_text() -> None:
    engine, _ = build(num_blocks=10, max_num_seqs=4)
    asked = {f"r{i}": request(f"r{i}", [i + 1] * 7, max_tokens=25) for i in range(4)}
    for one in asked.values():
        engine.add(one)
    steps = drain(engine)
    texts = Texts()
    for step in steps:
        texts.take(step)
    assert steps[-1].stats.preemptions_total > 0
    for name, one in asked.items():
        assert texts.token_ids[name] == generate_alone(one.prompt_token_ids, one.params, 40)[0]


def test_a_prefix_hit_is_reported_and_saves_the_computation() -> None:
    engine, runner = build(max_num_batched_tokens=32)
    prompt = list(range(20))
    engine.add(request("first", prompt, max_tokens=1))
    drain(engine)
    engine.add(request("again", prompt, max_tokens=1))
    outputs = drain(engine)[0].outputs
    assert outputs[0].num_cached == 16
    assert runner.batches[-1].num_tokens == 4


def test_tokens_leave_with_the_step_that_drew_them() -> None:
    engine, _ = build()
    engine.add(request("one", [1, 2, 3], max_tokens=2, logprobs=1))
    first, second = engine.step().outputs[0], engine.step().outputs[0]
    assert (len(first.token_ids), first.finish_reason) == (1, None)
    assert (len(second.token_ids), second.finish_reason) == (1, FinishReason.LENGTH)
    assert first.logprobs is not None
    assert first.logprobs[0].token_id == first.token_ids[0]


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        ([], "the prompt has no tokens"),
        ([1] * 64, "the prompt has 64 tokens"),
        ([1, VOCAB_SIZE], f"token ids outside of 0..{VOCAB_SIZE - 1}"),
        ([-1, 1], f"token ids outside of 0..{VOCAB_SIZE - 1}"),
    ],
)
def test_a_request_that_cannot_be_served_is_answered_with_an_error(prompt: list[int], said: str) -> None:
    engine, runner = build()
    engine.add(request("bad", prompt))
    assert engine.has_work
    texts = collect(engine)
    assert texts.reasons == {"bad": FinishReason.ERROR}
    assert said in (texts.messages["bad"] or "")
    assert runner.batches == []


def test_a_request_id_in_use_ends_both_because_it_names_neither() -> None:
    engine, _ = build()
    engine.add(request("same", [1, 2]))
    engine.step()
    engine.add(request("same", [3, 4]))
    outputs = [output for step in drain(engine) for output in step.outputs]
    assert outputs == [
        TokenOutput(
            "same", [], FinishReason.ERROR, message="request id 'same' is in use already; ids must be unique"
        )
    ]


class Faulty(PagedOracle):
    """Fails each step whose batch includes a request of the given name."""

    def __init__(self, num_blocks: int, block_size: int, poison: str) -> None:
        super().__init__(num_blocks, block_size)
        self._poison = poison

    def execute(self, batch: Batch) -> paddle.Tensor:
        if any(row.sequence.request_id.startswith(self._poison) for row in batch.rows):
            raise MemoryError("no room for the batch")
        return super().execute(batch)


def faulty() -> EngineCore:
    return EngineCore(engine_config(max_num_seqs=2), MODEL_CONFIG, Faulty(32, 4, "poison"), 32)


def test_failed_step_ends_only_its_own_requests_with_an_error(
    caplog: pytest.LogCaptureFixture,
) -> None:
    engine = faulty()
    good = request("good", [1, 2, 3])
    for one in (request("poison", [1]), request("beside", [2]), good):
        engine.add(one)
    with caplog.at_level(logging.ERROR):
        texts = collect(engine)
    assert texts.reasons == {
        "poison": FinishReason.ERROR,
        "beside": FinishReason.ERROR,
        "good": FinishReason.LENGTH,
    }
    assert texts.messages["poison"] == "the engine failed while computing this request"
    assert texts.token_ids["good"] == generate_alone(good.prompt_token_ids, good.params, 64)[0]
    assert [record.getMessage() for record in caplog.records] == [
        "step failed, 2 tokens, requests poison beside"
    ]
    assert caplog.records[0].exc_info is not None


def test_failures_that_do_not_end_break_the_engine() -> None:
    engine = faulty()
    for index in range(6):
        engine.add(request(f"poison{index}", [1]))
    with pytest.raises(EngineBroken, match="3 consecutive steps have failed, the last with MemoryError"):
        drain(engine)


def test_logits_that_are_not_finite_fail_the_step() -> None:
    class Broken(PagedOracle):
        def execute(self, batch: Batch) -> paddle.Tensor:
            return paddle.full_like(super().execute(batch), np.nan)

    engine = EngineCore(engine_config(), MODEL_CONFIG, Broken(32, 4), 32)
    engine.add(request("one", [1]))
    assert collect(engine).reasons == {"one": FinishReason.ERROR}


def test_a_request_that_cannot_be_queued_ends_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, _ = build()
    add = engine._scheduler.add

    def broken(sequence: Sequence) -> None:
        if sequence.request_id == "broken":
            raise RuntimeError("injected")
        add(sequence)

    monkeypatch.setattr(engine._scheduler, "add", broken)
    for name in ("a", "broken", "b"):
        engine.add(request(name, [1, 2]))
    texts = collect(engine)
    assert texts.reasons["broken"] is FinishReason.ERROR
    assert [len(texts.token_ids[name]) for name in "ab"] == [8, 8]
