"""The constraints of a request in the tokens of a model."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fastdeploy.common.errors import RequestError
from fastdeploy.entrypoints.openai.protocol import ChatRequest, CompletionRequest, SamplingDefaults
from fastdeploy.entrypoints.openai.token_constraints import token_constraints
from fastdeploy.grammar.texts import choice_grammar, with_optional_space
from fastdeploy.tokenizer.tokenizer import Tokenizer

from ..engine.test_tokenizer import TINY, sentencepiece_directory


def served(tokenizer: Tokenizer, backend: str = "auto") -> Any:
    return SimpleNamespace(
        tokenizer=tokenizer,
        config=SimpleNamespace(guided_decoding_backend=backend),
        require_known=lambda token_ids, field: None,
    )


def chat(**fields: Any) -> ChatRequest:
    return ChatRequest.parse({"messages": [{"role": "user", "content": "x"}], **fields}, SamplingDefaults())


@pytest.fixture(scope="module")
def spaced(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A tokenizer that puts a space before each text."""
    path: Path = tmp_path_factory.mktemp("tokenizer") / "model"
    return Tokenizer.from_directory(sentencepiece_directory(path, add_dummy_prefix=True))


def test_output_may_begin_with_the_space_that_the_detokenizer_strips(spaced: Tokenizer) -> None:
    word = {"guided_choice": ["the"]}
    completion = CompletionRequest.parse({"prompt": "x", **word}, SamplingDefaults())
    plain = Tokenizer.from_directory(TINY)
    grammar = choice_grammar(["the"])
    assert token_constraints(served(spaced), chat(**word))["grammar"] == with_optional_space(grammar)
    assert token_constraints(served(spaced), completion)["grammar"] == grammar
    assert token_constraints(served(plain), chat(**word))["grammar"] == grammar


def test_bad_word_is_forbidden_with_and_without_a_space_before_it(spaced: Tokenizer) -> None:
    words = token_constraints(served(spaced), chat(bad_words=["quick"]))["bad_words"]
    assert [b"".join(map(spaced.token_bytes, word)) for word in words] == [b"quick", b" quick"]


def test_structured_output_can_be_switched_off(spaced: Tokenizer) -> None:
    off = served(spaced, "off")
    with pytest.raises(RequestError, match="--guided-decoding-backend off") as caught:
        token_constraints(off, chat(guided_regex="a"))
    assert (caught.value.param, caught.value.code) == ("guided_regex", "unsupported_parameter")
    assert token_constraints(off, chat(logit_bias={"5": 1}))["logit_bias"] == ((5, 1.0),)


def test_unconstrained_request_has_no_constraints(spaced: Tokenizer) -> None:
    assert token_constraints(served(spaced), chat()) == {}
