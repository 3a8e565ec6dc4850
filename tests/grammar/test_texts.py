"""Grammars made from the notations of clients: the texts they accept, and the mistakes they report."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper

from fastdeploy.common.errors import RequestError
from fastdeploy.grammar.texts import (
    Tag,
    choice_grammar,
    ebnf_grammar,
    json_object_grammar,
    json_rule,
    json_schema_grammar,
    lark_grammar,
    regex_grammar,
    structural_tag_grammar,
    with_optional_space,
)
from fastdeploy.grammar.validation import LIMITS, MAX_CHARACTERS, require_valid, require_valid_schema


class _Bytes:
    """A vocabulary of single bytes."""

    eos_token_id, bos_token_id, special_token_ids = 256, None, (256,)
    tokens = (*(bytes([byte]) for byte in range(256)), b"</s>")

    def __call__(self, text: bytes) -> list[int]:
        return list(text)


VOCABULARY = LLTokenizer(TokenizerWrapper(_Bytes()), eos_token=[256])


def accepts(grammar: str, text: str) -> bool:
    matcher = LLMatcher(VOCABULARY, grammar, limits=LIMITS)
    assert not matcher.is_error(), matcher.get_error()
    data = list(text.encode())
    return matcher.try_consume_tokens(data) == len(data) and matcher.is_accepting()


@settings(max_examples=40)
@given(st.lists(st.text(max_size=8), min_size=1, max_size=6), st.text(max_size=8))
def test_choices_are_exactly_these_words(words: list[str], other: str) -> None:
    grammar = choice_grammar(words)
    assert all(accepts(grammar, word) for word in words)
    assert accepts(grammar, other) == (other in words)


NESTED = {
    "type": "object",
    "properties": {"a": {"oneOf": [{"type": "integer"}, {"enum": ["x", None]}]}},
    "required": ["a"],
}


@pytest.mark.parametrize(
    ("grammar", "good", "bad"),
    [
        (json_schema_grammar(True), ["1", "null", '{"a":[]}'], ["", "{", "a"]),
        (json_object_grammar(), ["{}", '{"a": {"b": 1.5e3}}'], ["[]", "1"]),
        (json_schema_grammar(NESTED), ['{"a":1}', '{\n "a" : null, "b": 2}'], ['{"a":1.5}', "{}"]),
        (json_schema_grammar(NESTED, compact=True), ['{"a":1}'], ['{"a": 1}']),
        (json_schema_grammar(NESTED, whitespace=" ?"), ['{"a": 1}'], ['{"a":  1}', '{\n"a":1}']),
        (regex_grammar("^[a/]+$"), ["a/a"], ["", "^a$"]),
        (lark_grammar('start: "a" b\nb: /[0-9]{2}/'), ["a12"], ["a1", "b12"]),
        (lark_grammar(f'start: "f(" json ")"\njson: {json_rule(NESTED)}'), ['f({"a": 1})'], ['f({"b":1})']),
        (ebnf_grammar('root ::= "a" b\nb ::= [0-9]{2}'), ["a12"], ["a1"]),
        (ebnf_grammar('start: "a"'), ["a"], ["b"]),
        (with_optional_space(choice_grammar(["yes", " no"])), ["yes", " yes", " no"], ["  yes", "no"]),
        (with_optional_space(regex_grammar(" *a")), ["a", "   a"], ["", " "]),
    ],
)
def test_grammar_accepts_what_its_notation_says(grammar: str, good: list[str], bad: list[str]) -> None:
    assert [text for text in good if not accepts(grammar, text)] == []
    assert [text for text in bad if accepts(grammar, text)] == []


def test_tags_follow_their_triggers_in_free_text() -> None:
    tags = [Tag("<f=a>", NESTED, "</f>"), Tag("<f=b>", {"type": "integer"}, "</f>"), Tag("[", True, "]")]
    grammar = structural_tag_grammar(tags, ["<f=", "["])
    for text in ("hello", 'x <f=a>{"a":1}</f> y', "<f=b>1</f><f=b>2</f>[{}]", "a <f b"):
        assert accepts(grammar, text), text
    for text in ("<f=a>1</f>", "<f=c>", "[1", 'x <f=a>{"a":1}'):
        assert not accepts(grammar, text), text


def test_whitespace_in_json_has_an_end() -> None:
    assert accepts(json_object_grammar(), "{" + " " * 64 + "}")
    assert not accepts(json_object_grammar(), "{" + " " * 65 + "}")


def refusal(check: Callable[..., None], *arguments: Any, **options: Any) -> RequestError:
    with pytest.raises(RequestError) as caught:
        check(*arguments, **options)
    assert "\n" not in str(caught.value)
    return caught.value


@pytest.mark.parametrize(
    ("grammar", "has_place", "message"),
    [
        (regex_grammar("ab(c"), False, "f: character 3: unclosed group"),
        (regex_grammar("(?=a)b"), False, "f: character 1: look-around, including look-ahead"),
        (lark_grammar('start: b\nb: "a" c'), True, 'f: line 2, column 4: unknown name: "c"'),
        (lark_grammar("start: /(c/"), True, "f: line 1, column 8: invalid regex"),
        (lark_grammar("start: " + "(" * 5000), True, "f: line 1, column "),
    ],
)
def test_mistake_in_a_grammar_is_told_with_its_place(grammar: str, has_place: bool, message: str) -> None:
    error = refusal(require_valid, grammar, "f", has_place=has_place)
    assert str(error).startswith(message)
    assert (error.param, error.code) == ("f", "invalid_value")


DEFINITIONS = {"$defs": {"d": {"type": "integer"}}}


@pytest.mark.parametrize(
    ("schema", "place", "message"),
    [
        ({"type": "thing"}, "f", "Invalid type: thing"),
        (
            {"properties": {"a": {"$ref": "#/$defs/d"}, "b": {"items": {"anyOf": [{}, {"type": 5}]}}}}
            | DEFINITIONS,
            "f.properties.b.items.anyOf[1]",
            "type must be a string",
        ),
        ({"properties": {"a": {"format": "nope", "type": "string"}}}, "f.properties.a", "Unknown format"),
        ({"properties": {"a": {"$ref": "http://x/y"}}}, "f.properties.a", "Resource 'http://x/y'"),
        ({"properties": {"a": {"not": {}}}}, "f.properties.a", "Unimplemented keys"),
        ({"type": "string", "pattern": "(a"}, "f", "character 1: unclosed group"),
    ],
)
def test_mistake_in_a_schema_is_told_with_its_part(schema: dict[str, Any], place: str, message: str) -> None:
    error = refusal(require_valid_schema, schema, "f", json_schema_grammar)
    assert error.param == place
    assert str(error).startswith(f"{place}: {message}")


def hostile_schemas() -> dict[str, dict[str, Any]]:
    deep: dict[str, Any] = {"type": "string"}
    for _ in range(500):
        deep = {"type": "array", "items": deep}
    wide: dict[str, Any] = {
        "properties": {f"p{i}": {"properties": {f"q{j}": {} for j in range(60)}} for i in range(60)}
    }
    states = {"type": "string", "pattern": "^(a|b)*a(a|b){5000}(a|b)*a(a|b){5000}$"}
    return {"deep": deep, "wide": wide, "states": states}


@pytest.mark.parametrize("name", ["deep", "wide", "states"])
def test_hostile_schema_is_refused_or_makes_masks(name: str) -> None:
    """Limits count work, so the time is limited too."""
    schema = hostile_schemas()[name]
    with suppress(RequestError):
        require_valid_schema(schema, "f", json_schema_grammar)
    matcher = LLMatcher(VOCABULARY, json_schema_grammar(schema), limits=LIMITS)
    for byte in b'"' + b"ab" * 200:
        matcher.compute_bitmask()
        if not matcher.consume_token(byte):
            break


@pytest.mark.parametrize(
    "grammar",
    [
        lark_grammar("start: " + "|".join(f'"{i}"' for i in range(60_000))),
        regex_grammar("a" * (MAX_CHARACTERS + 1)),
        json_schema_grammar({"enum": [f"{i}" for i in range(40_000)]}),
    ],
)
def test_text_that_is_too_long_is_refused(grammar: str) -> None:
    assert "at most" in str(refusal(require_valid, grammar, "f"))


def test_gbnf_that_cannot_be_converted_is_an_error() -> None:
    many = "root ::= a0\n" + "\n".join(f"a{i} ::= a{i + 1}" for i in range(3000))
    for text in ("", "root ::= (", "root ::= b", "root ::= " + "(" * 5000, many):
        with pytest.raises(ValueError, match=r"."):
            ebnf_grammar(text)


def test_schema_keeps_the_order_of_its_properties() -> None:
    schema = {"properties": {"b": {"type": "null"}, "a": {"type": "null"}}, "required": ["a", "b"]}
    grammar = json_schema_grammar(schema | {"type": "object", "additionalProperties": False}, compact=True)
    assert accepts(grammar, json.dumps({"b": None, "a": None}, separators=(",", ":")))
    assert not accepts(grammar, json.dumps({"a": None, "b": None}, separators=(",", ":")))
