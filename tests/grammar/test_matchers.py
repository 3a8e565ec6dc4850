"""Texts under a grammar, with the vocabularies of both kinds of tokenizer."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastdeploy.common.errors import GrammarFailed, RequestError
from fastdeploy.grammar.matchers import Grammars, Matcher
from fastdeploy.grammar.texts import (
    choice_grammar,
    json_schema_grammar,
    lark_grammar,
    regex_grammar,
    with_optional_space,
)
from fastdeploy.grammar.vocabulary import grammar_vocabulary
from fastdeploy.tokenizer.tokenizer import Tokenizer

from ..engine.test_tokenizer import TINY, sentencepiece_directory

KINDS = ["byte-level", "sentencepiece", "sentencepiece, space before the text"]
#: Columns of logits behind the tokenizer's ids.
PADDING = 37


class Writer:
    """Writes texts token by token, as a worker does."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.num_logits = tokenizer.vocab_size + PADDING
        self.grammars = Grammars(lambda: grammar_vocabulary(tokenizer, self.num_logits), threads=2)

    def grammar(self, text: str) -> str:
        """Return the grammar as the API sends it for an output that does not continue its prompt."""
        return with_optional_space(text) if self.tokenizer.strips_first_space else text

    def allowed(self, *matchers: Matcher) -> list[list[int]]:
        masks = self.grammars.masks(matchers, -(-self.num_logits // 64) * 2)
        bits = np.unpackbits(masks.view(np.uint8), axis=1, bitorder="little")
        return [np.flatnonzero(row).tolist() for row in bits]

    def write(self, grammar: str, token_ids: list[int]) -> bool:
        """Return True if the grammar allows these tokens one after another, and then the end."""
        matcher = self.grammars.matcher(self.grammar(grammar))
        for count, token_id in enumerate(token_ids):
            matcher.advance(token_ids[:count])
            if token_id not in self.allowed(matcher)[0]:
                return False
        matcher.advance(token_ids)
        return set(self.tokenizer.eos_token_ids) <= set(self.allowed(matcher)[0])

    def random_text(self, grammar: str, seed: int, most: int = 400) -> str:
        chance, matcher = random.Random(seed), self.grammars.matcher(self.grammar(grammar))
        written: list[int] = []
        for _ in range(most):
            matcher.advance(written)
            token_id = chance.choice(self.allowed(matcher)[0])
            if token_id in self.tokenizer.eos_token_ids:
                return self.tokenizer.decode(written)
            written.append(token_id)
        raise AssertionError(f"no end: {self.tokenizer.decode(written)!r}")


@pytest.fixture(scope="module", params=KINDS)
def writer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Writer:
    path: Path = TINY
    if request.param != KINDS[0]:
        path = tmp_path_factory.mktemp("tokenizer") / "model"
        sentencepiece_directory(path, add_dummy_prefix=request.param == KINDS[2])
    return Writer(Tokenizer.from_directory(path))


SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "hello world": {"type": "integer", "minimum": 0, "maximum": 99},
        "é中": {"enum": ["the quick", "naïve"]},
        "list": {"type": "array", "items": {"type": "boolean"}, "maxItems": 2},
    },
    "required": ["hello world", "é中", "list"],
    "additionalProperties": False,
}


def test_text_in_the_tokens_of_its_encoding_fits(writer: Writer) -> None:
    for grammar, text in (
        (json_schema_grammar(SCHEMA), '{"hello world": 12, "é中": "naïve", "list": []}'),
        (choice_grammar(["hello world, this is", "the quick"]), "the quick"),
        (choice_grammar(["naïve café 中文"]), "naïve café 中文"),
        (regex_grammar("[a-z]+ [0-9]{3}"), "hello 123"),
    ):
        assert writer.write(grammar, writer.tokenizer.encode(text)), text


def test_random_tokens_within_a_schema_are_json_of_the_schema(writer: Writer) -> None:
    for seed in range(5):
        value = json.loads(writer.random_text(json_schema_grammar(SCHEMA), seed))
        assert list(value) == list(SCHEMA["properties"])
        assert 0 <= value["hello world"] <= 99
        assert value["é中"] in ("the quick", "naïve")
        assert all(isinstance(each, bool) for each in value["list"])


def test_only_real_tokens_are_allowed(writer: Writer) -> None:
    anything = writer.grammars.matcher(regex_grammar(r"(.|\n)*"))
    [allowed] = writer.allowed(anything)
    assert len(allowed) > 200
    pieces = writer.tokenizer.pieces
    assert all(token_id < len(pieces) and pieces[token_id] for token_id in allowed)
    assert set(allowed) & writer.tokenizer.special_ids <= set(writer.tokenizer.eos_token_ids)


def test_special_token_is_no_text_but_has_a_name_in_lark(writer: Writer) -> None:
    special = writer.tokenizer.encode("<s>")
    assert not writer.write(choice_grammar(["<s> x"]), [*special, *writer.tokenizer.encode(" x")])
    inside = writer.tokenizer.encode_inside("x")
    assert inside is not None
    assert writer.write(lark_grammar('start: <s> "x"'), [*special, *inside])


@pytest.fixture
def tiny() -> Writer:
    return Writer(Tokenizer.from_directory(TINY))


def test_masks_together_equal_masks_alone_after_any_steps(tiny: Writer) -> None:
    tokens = tiny.tokenizer.encode('{"hello world": 12, "é中": "naïve", "list": []}')
    grammar = json_schema_grammar(SCHEMA)
    stepped = []
    for end in range(len(tokens) + 1):
        matcher = tiny.grammars.matcher(grammar)
        # One by one, and all at once as in a resumed text.
        for count in range(end + 1):
            matcher.advance(tokens[:count])
        stepped += [matcher, tiny.grammars.matcher(grammar)]
        stepped[-1].advance(tokens[:end])
    together = tiny.allowed(*stepped)
    assert together == [tiny.allowed(matcher)[0] for matcher in stepped]
    assert together[::2] == together[1::2]


def test_text_outside_of_its_grammar_is_an_error_and_not_an_end(tiny: Writer) -> None:
    matcher = tiny.grammars.matcher(choice_grammar(["the"]))
    with pytest.raises(GrammarFailed, match="the grammar of the output failed"):
        matcher.advance(tiny.tokenizer.encode("quick"))
    with pytest.raises(GrammarFailed):
        matcher.require_sound()


def test_failing_tokenizer_is_an_error_and_not_an_end(tiny: Writer, monkeypatch: pytest.MonkeyPatch) -> None:
    grammar = choice_grammar(["the quick"])
    matcher = tiny.grammars.matcher(grammar)

    def fail(self: Tokenizer, text: str) -> list[int]:
        raise RuntimeError(text)

    monkeypatch.setattr(Tokenizer, "encode_inside", fail)
    tiny.allowed(matcher)
    with pytest.raises(GrammarFailed):
        matcher.require_sound()


def test_invalid_grammar_is_an_error_of_its_requests_only(tiny: Writer) -> None:
    with pytest.raises(RequestError, match="unknown name"):
        tiny.grammars.matcher(lark_grammar("start: b"))
    assert tiny.allowed(tiny.grammars.matcher(choice_grammar(["q"])))[0]
