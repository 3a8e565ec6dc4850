"""The tokens that a sequence may draw, and what happens when none is left."""

from __future__ import annotations

from typing import Any

import numpy as np
import paddle
import pytest
from llguidance import LLTokenizer

from fastdeploy.common.messages import AddRequest
from fastdeploy.common.request import FinishReason, SamplingParams, Sequence
from fastdeploy.core.engine import EngineCore
from fastdeploy.core.sampler import Sampled, Sampler
from fastdeploy.grammar.matchers import Grammars
from fastdeploy.grammar.texts import choice_grammar, lark_grammar, regex_grammar

from .paged_oracle import EOS_ID, GRAMMARS, MODEL_CONFIG, VOCAB_SIZE, PagedOracle, engine_config
from .test_engine import Texts, collect

#: Ids of the vocabulary of `paged_oracle`.
A, B, C = 0, 1, 3
AB = 5
LETTERS = regex_grammar("[ab]*")


def sequence(outputs: list[int] | None = None, **params: Any) -> Sequence:
    values: dict[str, Any] = {
        "max_tokens": 100,
        "temperature": 0.0,
        "end_token_ids": (EOS_ID,),
        "stop_token_ids": (EOS_ID,),
    }
    sampling = SamplingParams(**(values | params))
    return Sequence("r", [9], sampling, output_token_ids=outputs or [])


def sample(*sequences: Sequence, best: int = EOS_ID) -> list[Sampled]:
    """Draw with logits whose best token is `best`, and then those with a lower id."""
    logits = np.linspace(1, 0, VOCAB_SIZE, dtype=np.float32)
    logits[best] = 5
    rows = paddle.to_tensor(np.tile(logits, (len(sequences), 1)))
    return Sampler(VOCAB_SIZE, GRAMMARS).sample(rows, list(sequences))


@pytest.mark.parametrize(
    ("outputs", "params", "drawn"),
    [
        # The grammar is not complete; complete; complete without a continuation.
        ([], {"grammar": choice_grammar(["ab"])}, A),
        ([A], {"grammar": LETTERS}, EOS_ID),
        ([AB], {"grammar": choice_grammar(["ab"])}, EOS_ID),
        # The end waits for min_tokens only if there is a continuation.
        ([A], {"grammar": LETTERS, "min_tokens": 5}, A),
        ([A, A, A, A, A], {"grammar": LETTERS, "min_tokens": 5}, EOS_ID),
        ([AB], {"grammar": choice_grammar(["ab"]), "min_tokens": 5}, EOS_ID),
        # The same with ignore_eos.
        ([A], {"grammar": LETTERS, "stop_token_ids": ()}, A),
        ([AB], {"grammar": choice_grammar(["ab"]), "stop_token_ids": ()}, EOS_ID),
        # Another stop token of the client, before min_tokens.
        ([], {"grammar": LETTERS, "stop_token_ids": (A, EOS_ID), "min_tokens": 1}, B),
        ([], {"grammar": choice_grammar(["ab"]), "stop_token_ids": (A, AB), "min_tokens": 1}, A),
        # Without a grammar.
        ([], {"allowed_token_ids": (40, C)}, C),
        ([], {"allowed_token_ids": (40, EOS_ID), "min_tokens": 1}, 40),
        ([], {"bad_words": ((EOS_ID,), (A,), (B, C))}, B),
        ([B], {"bad_words": ((EOS_ID,), (A,), (B, B))}, C),
        ([C, B], {"bad_words": ((EOS_ID,), (A, B, B), (C, B, A))}, B),
        ([], {"logit_bias": ((EOS_ID, -100.0), (C, 1.0))}, C),
        # All together.
        ([], {"grammar": LETTERS, "bad_words": ((EOS_ID,),), "allowed_token_ids": (EOS_ID, B, C)}, B),
        ([], {"grammar": LETTERS, "logit_bias": ((EOS_ID, -100.0), (B, 1.0))}, B),
    ],
)
def test_best_token_that_the_constraints_allow_is_drawn(
    outputs: list[int], params: dict[str, Any], drawn: int
) -> None:
    one = sequence(outputs, **params)
    assert sample(one) == [Sampled(drawn, None)]
    # In a batch with others, and in any order.
    others = [sequence(), sequence([A], grammar=LETTERS), sequence(temperature=1.0, frequency_penalty=1.0)]
    assert sample(*others, one)[-1] == sample(one, *others)[0] == Sampled(drawn, None)


@pytest.mark.parametrize(
    "params",
    [
        {"grammar": choice_grammar(["ab"]), "allowed_token_ids": (B,)},
        {"grammar": choice_grammar(["b"]), "bad_words": ((B,),)},
        {"allowed_token_ids": (EOS_ID,), "min_tokens": 1},
        {"allowed_token_ids": (VOCAB_SIZE + 5,)},
        {"bad_words": tuple((token_id,) for token_id in range(VOCAB_SIZE))},
    ],
)
def test_choice_without_a_possible_token_is_an_error_of_its_own(params: dict[str, Any]) -> None:
    stuck, other = sample(sequence(**params), sequence())
    assert stuck.error is not None
    assert other == Sampled(EOS_ID, None)


def test_output_outside_of_the_grammar_is_an_error() -> None:
    [one] = sample(sequence([C], grammar=LETTERS))
    assert one.error is not None
    assert "the grammar of the output failed" in one.error


def test_logprobs_are_those_before_masks_and_biases() -> None:
    [free] = sample(sequence([], logprobs=3))
    params: dict[str, Any] = {
        "logprobs": 3,
        "grammar": LETTERS,
        "logit_bias": ((A, 2.0),),
        "bad_words": ((EOS_ID,),),
    }
    [bound] = sample(sequence([], **params))
    assert free.logprobs is not None
    assert bound.logprobs is not None
    assert (free.token_id, bound.token_id) == (EOS_ID, A)
    assert bound.logprobs.top == free.logprobs.top


def engine(**changes: Any) -> EngineCore:
    config = engine_config(**changes)
    return EngineCore(config, MODEL_CONFIG, PagedOracle(32, config.block_size), 32, GRAMMARS)


def test_stuck_and_invalid_requests_end_while_others_go_on() -> None:
    core = engine()
    wanted: dict[str, dict[str, Any]] = {
        "stuck": {"grammar": choice_grammar(["ab"]), "allowed_token_ids": (B,)},
        "invalid": {"grammar": lark_grammar("start: b")},
        "fine": {"grammar": choice_grammar(["abcd"])},
        "free": {"end_token_ids": ()},
    }
    for name, params in wanted.items():
        core.add(AddRequest(name, [1, 2], sequence(max_tokens=12, **params).params, 0.0))
    texts = collect(core)
    assert texts.reasons["stuck"] == texts.reasons["invalid"] == FinishReason.ERROR
    assert "unknown name" in (texts.messages["invalid"] or "")
    assert texts.reasons["fine"] == FinishReason.STOP
    assert texts.token_ids["fine"][-1] == EOS_ID
    assert texts.reasons["free"] in (FinishReason.STOP, FinishReason.LENGTH)


def test_vocabulary_that_cannot_be_used_ends_requests_with_a_grammar_only() -> None:
    def read() -> LLTokenizer:
        raise ValueError("no tokens")

    config = engine_config()
    core = EngineCore(config, MODEL_CONFIG, PagedOracle(32, config.block_size), 32, Grammars(read))
    core.add(AddRequest("bound", [1, 2], sequence(grammar=choice_grammar(["ab"])).params, 0.0))
    core.add(AddRequest("free", [1, 2], sequence(max_tokens=3).params, 0.0))
    texts = collect(core)
    assert texts.reasons["bound"] == FinishReason.ERROR
    assert "vocabulary cannot be used" in (texts.messages["bound"] or "")
    assert texts.reasons["free"] != FinishReason.ERROR


def test_request_can_be_aborted_while_its_grammar_is_compiled() -> None:
    core = engine()
    core.add(AddRequest("r", [1], sequence(grammar=choice_grammar(["abab"])).params, 0.0))
    core.abort(["r"])
    assert not core.has_work
    core.add(AddRequest("r", [1], sequence(grammar=choice_grammar(["abab"])).params, 0.0))
    assert collect(core).reasons == {"r": FinishReason.STOP}


def test_two_requests_with_one_id_both_end_while_a_grammar_is_compiled() -> None:
    core, params = engine(), sequence(grammar=choice_grammar(["abab"])).params
    texts = Texts()
    core.add(AddRequest("r", [1], params, 0.0))
    core.add(AddRequest("r", [1], params, 0.0))
    while core.has_work:
        texts.take(core.step())
    assert texts.reasons == {"r": FinishReason.ERROR}
