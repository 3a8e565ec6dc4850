"""Structured output through a live API server: a random model that writes what it is told to."""

from __future__ import annotations

import concurrent.futures
import json
import re
import threading
from typing import Any

import pytest

from .conftest import ApiServer

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "size": {"type": "integer", "minimum": 0, "maximum": 99},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 2},
    },
    "required": ["name", "size", "tags"],
    "additionalProperties": False,
}
JSON_SCHEMA = {"type": "json_schema", "json_schema": {"name": "thing", "schema": SCHEMA, "strict": True}}
COMPACT = {"structured_outputs": {"json": SCHEMA, "disable_any_whitespace": True}}


def _nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        schema = {"properties": {"a": schema}}
    return schema


def ask(server: ApiServer, **fields: Any) -> list[dict[str, Any]]:
    """Return the choices of an answer."""
    body = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 400, "seed": 5, **fields}
    status, answer = server.post("/v1/chat/completions", body)
    assert status == 200, answer
    choices: list[dict[str, Any]] = answer["choices"]
    return choices


def text(server: ApiServer, **fields: Any) -> str:
    [choice] = ask(server, **fields)
    assert choice["finish_reason"] == "stop"
    content: str = choice["message"]["content"]
    return content


def check_thing(text: str) -> None:
    thing = json.loads(text)
    assert list(thing) == ["name", "size", "tags"]
    assert len(thing["name"]) <= 8
    assert 0 <= thing["size"] <= 99
    assert set(thing["tags"]) <= {"a", "b"}


@pytest.mark.parametrize(
    "fields",
    [
        {"guided_json": SCHEMA, "guided_whitespace_pattern": "[ \n]?"},
        {"guided_json": json.dumps(SCHEMA), "guided_whitespace_pattern": " ?"},
        {"response_format": JSON_SCHEMA, "temperature": 1.5},
        {"json_schema": json.dumps(SCHEMA), "structured_outputs": {"disable_any_whitespace": True}},
        {**COMPACT, "repetition_penalty": 1.2, "top_p": 0.8},
    ],
)
def test_output_is_json_of_the_schema(server: ApiServer, fields: dict[str, Any]) -> None:
    check_thing(text(server, **fields))


@pytest.mark.parametrize(
    ("fields", "pattern"),
    [
        ({"guided_regex": "[0-9]{3}-[a-f]+x"}, "[0-9]{3}-[a-f]+x"),
        ({"regex": "ab?c"}, "ab?c"),
        ({"guided_choice": ["yes", "no", "é中"]}, "yes|no|é中"),
        ({"structured_outputs": {"choice": ["red"]}, "min_tokens": 50, "ignore_eos": True}, "red"),
        ({"guided_grammar": 'start: "<" num ">"\nnum: /[0-9]{2}/'}, "<[0-9]{2}>"),
        ({"ebnf": 'root ::= "<" [0-9]{2} ">"'}, "<[0-9]{2}>"),
        ({"structured_outputs": {"grammar": 'start: "a"+ "b"'}}, "a+b"),
        ({"guided_json_object": True, "guided_whitespace_pattern": "", "max_tokens": 490}, r"\{.*\}"),
    ],
)
def test_output_is_of_the_form_that_was_asked_for(
    server: ApiServer, fields: dict[str, Any], pattern: str
) -> None:
    [choice] = ask(server, **fields)
    if choice["finish_reason"] == "stop":
        assert re.fullmatch(pattern, choice["message"]["content"])
    else:
        # A random model seldom closes a string.
        assert "guided_json_object" in fields


def test_tags_are_written_in_free_text(server: ApiServer) -> None:
    tags = [{"begin": "<", "schema": {"enum": ["a", "b"]}, "end": ">"}]
    format_ = {"type": "structural_tag", "structures": tags, "triggers": ["<"]}
    status, tokens = server.post("/tokenize", {"prompt": "<", "add_special_tokens": False})
    assert status == 200
    # The bias lets the random model write the trigger soon.
    bias = {str(token): 20 for token in tokens["tokens"]}
    [choice] = ask(server, response_format=format_, logit_bias=bias, max_tokens=40)
    first, *_ = re.findall("<.*?>", choice["message"]["content"])
    assert first in ('<"a">', '<"b">')


def test_choices_are_the_same_alone_together_and_beside_others(server: ApiServer) -> None:
    fields = {**COMPACT, "temperature": 1.3, "n": 4, "logprobs": True, "top_logprobs": 2}
    alone = ask(server, **fields)
    assert len({choice["message"]["content"] for choice in alone}) > 1
    for choice in alone:
        check_thing(choice["message"]["content"])
    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        others = [pool.submit(ask, server, max_tokens=60, guided_regex="[a-z]+") for _ in range(3)]
        again = [pool.submit(ask, server, **fields) for _ in range(3)]
        assert [answer.result() for answer in again] == [alone] * 3
        assert len([other.result() for other in others]) == 3


def test_stream_joins_to_the_whole_answer(server: ApiServer) -> None:
    create: Any = server.client().chat.completions.create
    fields: dict[str, Any] = {"model": "default", "messages": [{"role": "user", "content": "x"}]}
    fields |= {"max_tokens": 400, "seed": 6, "extra_body": COMPACT}
    whole = create(**fields)
    stream = create(stream=True, **fields)
    joined = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
    assert joined == whole.choices[0].message.content
    check_thing(joined)


def test_completions_are_structured_too(server: ApiServer) -> None:
    body = {"prompt": ["a", "b"], "guided_choice": ["one", "two"], "seed": 1, "max_tokens": 20}
    status, answer = server.post("/v1/completions", body)
    assert status == 200
    assert {choice["text"] for choice in answer["choices"]} <= {"one", "two"}


def test_bad_words_biases_and_allowed_ids_act(server: ApiServer) -> None:
    [free] = ask(server, max_tokens=60)
    [without] = ask(server, max_tokens=60, bad_words=["1", "9"])
    assert re.search("[19]", free["message"]["content"])
    _, tokens = server.post("/tokenize", {"prompt": "1", "add_special_tokens": False})
    assert not re.search(r"\b[19]\b", without["message"]["content"])
    [token] = tokens["tokens"]
    for fields in (
        {"logit_bias": {str(token): 100}, "temperature": 0},
        {"allowed_token_ids": [token]},
        {"bad_words_token_ids": [each for each in range(500) if each != token], "allowed_token_ids": [token]},
    ):
        [biased] = ask(server, max_tokens=5, **fields)
        assert biased["message"]["content"] == "11111"


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"guided_json": {"type": "thing"}}, "guided_json", "guided_json: Invalid type: thing"),
        ({"guided_json": "{"}, "guided_json", "guided_json is not valid JSON"),
        ({"guided_json": False}, "guided_json", "guided_json is false"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {"items": {"type": 1}}}}},
            "response_format.json_schema.schema.items",
            "response_format.json_schema.schema.items: type must be a string",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
            "response_format.json_schema.schema",
            "response_format.json_schema.schema is missing",
        ),
        ({"response_format": {"type": "yaml"}}, "response_format.type", "response_format.type is"),
        (
            {"response_format": {"type": "structural_tag", "triggers": ["<"]}},
            "response_format.structures",
            "response_format.structures is missing",
        ),
        (
            {"structural_tag": {"structures": [{"begin": "a", "schema": {}, "end": ""}], "triggers": ["b"]}},
            "structural_tag.structures[0].begin",
            "structural_tag.structures[0].begin must start with one of the triggers",
        ),
        ({"guided_regex": "a(b"}, "guided_regex", "guided_regex: character 2: unclosed group"),
        ({"guided_regex": "a" * 300_000}, "guided_regex", "guided_regex has 300000 characters"),
        ({"guided_choice": []}, "guided_choice", "guided_choice is empty"),
        ({"guided_choice": ["a"] * 9000}, "guided_choice", "guided_choice has 9000 items"),
        ({"guided_grammar": "start: b"}, "guided_grammar", "guided_grammar: line 1, column 8: unknown name"),
        ({"guided_grammar": "start: <|no|>"}, "guided_grammar", "guided_grammar: line 1, column 8: unknown"),
        ({"structured_outputs": {"grammar": "root ::= b"}}, "structured_outputs.grammar", "structured_out"),
        ({"guided_whitespace_pattern": " "}, "guided_whitespace_pattern", "guided_whitespace_pattern needs"),
        (
            {"guided_json": {}, "guided_whitespace_pattern": "("},
            "guided_whitespace_pattern",
            "guided_whitespace_pattern: character 1: unclosed group",
        ),
        (
            {"guided_choice": ["a"], "response_format": {"type": "json_object"}},
            "guided_choice",
            "response_format and guided_choice exclude each other",
        ),
        ({"guided_json": json.dumps(_nested(300))}, "guided_json", "guided_json"),
        ({"logit_bias": {"x": 1}}, "logit_bias", "logit_bias has a key that is not a token id"),
        ({"logit_bias": {"9999": 1}}, "logit_bias", "logit_bias has token id 9999"),
        ({"logit_bias": {"5": 101}}, "logit_bias.5", "logit_bias.5 is 101"),
        ({"allowed_token_ids": [9999]}, "allowed_token_ids", "allowed_token_ids has token id 9999"),
        ({"bad_words_token_ids": [[5, 9999]]}, "bad_words_token_ids", "bad_words_token_ids has token id"),
        ({"bad_words": [" "]}, "bad_words", "bad_words has a word of spaces only"),
        ({"guided_choice": ["a"], "bad_words": ["a"]}, None, "no token may follow"),
    ],
)
def test_wrong_constraint_is_a_400_that_names_it(
    server: ApiServer, fields: dict[str, Any], param: str | None, message: str
) -> None:
    body = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 5, **fields}
    status, answer = server.post("/v1/chat/completions", body)
    assert (status, answer["error"]["param"]) == (400, param)
    assert answer["error"]["message"].startswith(message)
    assert len(answer["error"]["message"]) < 500


def test_fields_that_constrain_nothing_are_accepted(server: ApiServer) -> None:
    free = ask(server, max_tokens=5)
    accepted: tuple[dict[str, Any], ...] = (
        {"response_format": {"type": "text"}, "guided_json": None, "logit_bias": {}, "bad_words": []},
        {"response_format": {}, "structured_outputs": {}, "guided_json_object": False},
    )
    for fields in accepted:
        assert ask(server, max_tokens=5, **fields) == free


def test_hostile_grammars_do_not_delay_others(server: ApiServer) -> None:
    """Steps go on while grammars are compiled, and each hostile request ends."""
    wide: dict[str, Any] = {
        "properties": {f"p{i}": {"properties": {f"q{j}": {} for j in range(40)}} for i in range(40)}
    }
    hostile = [
        {"guided_json": wide},
        {"guided_regex": "(a|b)*a(a|b){3000}"},
        {"guided_regex": "((a{1,300}){1,300}){1,300}"},
        {"guided_grammar": 'start: start start | "a" | ""'},
        {"guided_choice": [f"word {i}" for i in range(3000)]},
    ]
    stop = threading.Event()

    def chat() -> int:
        count = 0
        while not stop.is_set():
            ask(server, max_tokens=10)
            count += 1
        return count

    def attack(fields: dict[str, Any]) -> int:
        body = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 20, **fields}
        return server.post("/v1/chat/completions", body)[0]

    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        others = pool.submit(chat)
        statuses = list(pool.map(attack, hostile))
        stop.set()
        assert others.result() > 0
    assert set(statuses) <= {200, 400}
