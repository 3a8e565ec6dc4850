"""Log probabilities of a prompt's tokens: correct, and independent of how the prompt was computed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import structs

from fastdeploy import custom_ops
from fastdeploy.common.messages import AddRequest, Logprobs, TokenOutput
from fastdeploy.common.request import Batch, FinishReason, SamplingParams
from fastdeploy.config import EngineConfig, ModelConfig
from fastdeploy.core.engine import EngineCore
from fastdeploy.core.scheduler import MAX_SCORED
from fastdeploy.custom_ops import reference
from fastdeploy.device.paddle_cpu import ModelRunner

from ..checkpoints import config_json, draw_tensors, write_checkpoint
from ..cpu_library import PATHS
from ..network import Network
from ..random_traffic import MAX_MODEL_LEN, RandomModel
from ..reference_network import ReferenceNetwork

VOCABULARY = 60


class Answers:
    """The outputs of an engine by request."""

    def __init__(self, engine: EngineCore) -> None:
        self._engine = engine
        self.tokens: dict[str, list[int]] = {}
        self.prompts: dict[str, list[Logprobs]] = {}
        self.drawn: dict[str, list[Logprobs]] = {}
        self.reasons: dict[str, FinishReason] = {}

    def drain(self) -> Answers:
        while self._engine.has_work:
            for output in self._engine.step().outputs:
                self._take(output)
        self._engine.on_idle()
        return self

    def _take(self, output: TokenOutput) -> None:
        name = output.request_id
        assert output.finish_reason is not FinishReason.ERROR, output.message
        if output.prompt_logprobs is not None:
            assert name not in self.prompts, "they come once"
            assert name not in self.tokens, "they come first"
            self.prompts[name] = list(output.prompt_logprobs)
        self.tokens.setdefault(name, []).extend(output.token_ids)
        self.drawn.setdefault(name, []).extend(output.logprobs or [])
        if output.finish_reason is not None:
            self.reasons[name] = output.finish_reason


def ask(name: str, prompt: list[int], **params: object) -> AddRequest:
    values = {"max_tokens": 1, "temperature": 0.0, "prompt_logprobs": 2, "logprobs": 2} | params
    return AddRequest(name, prompt, SamplingParams(**values), arrival_time=0.0)  # type: ignore[arg-type]


def engine_of(model: RandomModel, num_blocks: int = 64, **changes: object) -> EngineCore:
    config = config_of(**changes)
    return EngineCore(config, model.config, model.runner(config, num_blocks), num_blocks)


def paddle_engine_of(model: RandomModel, **changes: object) -> tuple[EngineCore, ModelRunner]:
    config = config_of(**changes)
    runner = ModelRunner(model.network, model.config, config, 64)
    return EngineCore(config, model.config, runner, 64), runner


def config_of(**changes: object) -> EngineConfig:
    values: dict[str, object] = {"max_model_len": MAX_MODEL_LEN, "block_size": 16, "dtype": "float32"}
    return EngineConfig(model=Path("none"), **(values | changes))  # type: ignore[arg-type]


def alone(model: RandomModel, request: AddRequest) -> Answers:
    engine, _ = paddle_engine_of(model, max_num_batched_tokens=MAX_MODEL_LEN, enable_prefix_caching=False)
    engine.add(request)
    return Answers(engine).drain()


@pytest.fixture(scope="module", params=PATHS)
def model(request: pytest.FixtureRequest) -> RandomModel:
    return RandomModel(5, "float32", request.param)


def prompt_of(model: RandomModel, length: int, seed: int = 1) -> list[int]:
    return np.random.default_rng(seed).integers(0, model.config.vocab_size, length).tolist()


def test_logprobs_equal_those_of_an_independent_network(tmp_path: Path) -> None:
    config = config_json(vocab_size=VOCABULARY, num_hidden_layers=2)
    tensors = draw_tensors(config, 3)
    write_checkpoint(tmp_path, config, tensors)
    network = Network(tmp_path)
    engine = EngineCore(
        EngineConfig(model=tmp_path, dtype="float32", block_size=16),
        ModelConfig.from_directory(tmp_path),
        network.runner,
        num_blocks=160,
    )
    prompt = np.random.default_rng(2).integers(0, VOCABULARY, 40).tolist()
    engine.add(ask("a", prompt, max_tokens=0, prompt_logprobs=5))
    answers = Answers(engine).drain()
    assert (answers.tokens["a"], answers.reasons["a"]) == ([], FinishReason.LENGTH)
    exact = [reference.log_softmax(row) for row in ReferenceNetwork(config, tensors).logits(prompt)]
    entries = answers.prompts["a"]
    assert [entry.token_id for entry in entries] == prompt[1:]
    for position, entry in enumerate(entries):
        row = exact[position]
        assert entry.logprob == pytest.approx(row[entry.token_id], abs=2e-4)
        best = np.sort(row)[::-1][:5]
        assert [value for _, value in entry.top] == pytest.approx(best.tolist(), abs=2e-4)
        for token_id, value in entry.top:
            assert value == pytest.approx(row[token_id], abs=2e-4)
        # Rounding may swap tokens that are about as likely.
        more, less = row[entry.token_id] + 5e-4, row[entry.token_id] - 5e-4
        assert (row > more).sum() < entry.rank <= (row > less).sum()


def test_generated_text_has_the_same_logprobs_as_a_prompt(model: RandomModel) -> None:
    """They are equal to the bit: prefill and decode compute the same."""
    drawn = alone(model, ask("a", prompt_of(model, 20), max_tokens=50, temperature=1.0))
    text = prompt_of(model, 20) + drawn.tokens["a"]
    read = alone(model, ask("b", text, max_tokens=0))
    assert [structs.replace(entry, rank=0) for entry in read.prompts["b"][19:]] == drawn.drawn["a"]
    assert read.prompts["b"][:19] == drawn.prompts["a"]


@settings(max_examples=25)
@given(data=st.data())
@pytest.mark.parametrize("kernels", PATHS)
def test_neither_chunks_nor_neighbours_nor_preemption_change_them(kernels: str, data: st.DataObject) -> None:
    model = RandomModel(5, "float32", kernels)
    lengths = data.draw(st.lists(st.integers(1, 300), min_size=1, max_size=5), "lengths")
    wanted = data.draw(st.lists(st.sampled_from([None, 0, 3]), min_size=5, max_size=5), "wanted")
    requests = [
        ask(f"r{index}", prompt_of(model, length), prompt_logprobs=wanted[index], max_tokens=1 + 7 * index)
        for index, length in enumerate(lengths)
    ]
    custom_ops.set_threads(data.draw(st.integers(1, 2), "threads"))
    engine = engine_of(
        model,
        # With few blocks, later requests are preempted and recomputed from their cached prefix.
        num_blocks=data.draw(st.sampled_from([24, 40, 100]), "blocks"),
        max_num_batched_tokens=data.draw(st.sampled_from([7, 64, 512]), "batched tokens"),
        max_num_seqs=4,
    )
    for request in requests:
        engine.add(request)
    answers = Answers(engine).drain()
    for request in requests:
        expected, name = alone(model, request), request.request_id
        assert answers.prompts.get(name) == expected.prompts.get(name)
        assert (name in answers.prompts) == (request.params.prompt_logprobs is not None)
        assert answers.tokens[name] == expected.tokens[name]
        assert answers.drawn[name] == expected.drawn[name]


def test_scored_prompt_does_not_use_the_prefix_cache(model: RandomModel) -> None:
    engine = engine_of(model)
    prompt = prompt_of(model, 100)
    answers = Answers(engine)
    for name in ("first", "second"):
        engine.add(ask(name, prompt))
        answers.drain()
    assert len(answers.prompts["second"]) == 99
    assert answers.prompts["second"] == answers.prompts["first"]
    # Its blocks nevertheless serve other requests.
    engine.add(ask("third", prompt, prompt_logprobs=None))
    outputs = engine.step().outputs
    assert outputs[0].num_cached == 96


def test_a_preempted_prompt_is_scored_once(model: RandomModel) -> None:
    engine = engine_of(model, num_blocks=20, max_num_batched_tokens=64)
    # The old request grows until the young one, whose prompt is not yet complete, is preempted.
    engine.add(ask("old", prompt_of(model, 60), max_tokens=200, prompt_logprobs=None, logprobs=None))
    engine.add(ask("young", prompt_of(model, 200, seed=2)))
    answers = Answers(engine).drain()
    assert (
        answers.prompts["young"] == alone(model, ask("young", prompt_of(model, 200, seed=2))).prompts["young"]
    )


def test_a_step_keeps_few_rows_of_logits() -> None:
    """A row is as long as the vocabulary, and a prompt has thousands of tokens."""
    model = RandomModel(5, "float32")
    engine, runner = paddle_engine_of(model, max_num_batched_tokens=MAX_MODEL_LEN)
    rows: list[int] = []
    execute = runner.execute

    def counted(batch: Batch, **options: bool) -> object:
        logits = execute(batch, **options)
        rows.append(logits.shape[0])
        return logits

    runner.execute = counted  # type: ignore[method-assign]
    for index in range(3):
        engine.add(ask(f"r{index}", prompt_of(model, 400, seed=index)))
    answers = Answers(engine).drain()
    assert all(len(answers.prompts[f"r{index}"]) == 399 for index in range(3))
    assert max(rows) <= MAX_SCORED + 3
    assert sum(rows) == 3 * 400


def test_prompt_of_one_token_has_no_logprobs(model: RandomModel) -> None:
    assert alone(model, ask("a", [7])).prompts["a"] == []


def test_a_prompt_without_an_answer_may_fill_the_whole_context(model: RandomModel) -> None:
    engine = engine_of(model, num_blocks=MAX_MODEL_LEN // 16)
    engine.add(ask("a", prompt_of(model, MAX_MODEL_LEN), max_tokens=0))
    answers = Answers(engine).drain()
    assert len(answers.prompts["a"]) == MAX_MODEL_LEN - 1
    assert answers.tokens["a"] == []


def test_broken_logits_fail_the_request() -> None:
    model = RandomModel(5, "float32")
    engine, runner = paddle_engine_of(model)
    execute = runner.execute

    def broken(batch: Batch, **options: bool) -> object:
        return execute(batch, **options) * float("nan")

    runner.execute = broken  # type: ignore[method-assign]
    engine.add(ask("a", prompt_of(model, 300)))
    [output] = engine.step().outputs
    assert (output.finish_reason, output.prompt_logprobs) == (FinishReason.ERROR, None)
