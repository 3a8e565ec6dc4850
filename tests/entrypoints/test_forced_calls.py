"""Calls that a grammar forces a real model to make."""

from __future__ import annotations

import json
from typing import Any

import pytest

from fastdeploy.tokenizer.tokenizer import Tokenizer

from .conftest import TINY, ApiServer
from .test_tool_calls import joined, message_of

CITY = {
    "type": "object",
    "properties": {
        "city": {"enum": ["Rome", "Paris"]},
        "days": {"type": "integer", "minimum": 1, "maximum": 9},
    },
    "required": ["city", "days"],
    "additionalProperties": False,
}
TOOLS = [
    {"type": "function", "function": {"name": "weather", "parameters": CITY}},
    {"type": "function", "function": {"name": "now", "parameters": {"type": "object", "maxProperties": 0}}},
]
NAMED = {"type": "function", "function": {"name": "weather"}}
#: Left to itself, this model fills its context with white space.
NO_SPACE = {str(each): -100 for each in Tokenizer.from_directory(TINY).encode(" \n\r\t")}
FIELDS = {
    # The context is too short for tools in a prompt of bytes.
    "prompt_token_ids": [5, 6],
    "tools": TOOLS,
    "max_tokens": 300,
    "temperature": 1.3,
    "logit_bias": NO_SPACE,
}


def chat(server: ApiServer, **fields: Any) -> list[dict[str, Any]]:
    status, answer = server.post("/v1/chat/completions", {**FIELDS, **fields})
    assert status == 200, answer
    choices: list[dict[str, Any]] = answer["choices"]
    return choices


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("choice", ["required", NAMED])
def test_a_call_fits_its_tool(server: ApiServer, choice: Any, seed: int) -> None:
    for answer in chat(server, tool_choice=choice, seed=seed, n=3, parallel_tool_calls=False):
        assert answer["finish_reason"] == "tool_calls"
        assert answer["message"]["content"] is None
        [call] = answer["message"]["tool_calls"]
        arguments = json.loads(call["function"]["arguments"])
        if call["function"]["name"] == "now" and choice != NAMED:
            assert arguments == {}
        else:
            assert call["function"]["name"] == "weather"
            assert arguments["city"] in ("Rome", "Paris")
            assert arguments["days"] in range(1, 10)


def test_a_stream_of_forced_calls_is_the_whole_answer(server: ApiServer) -> None:
    fields: dict[str, Any] = {"tool_choice": "required", "seed": 7, "n": 2, "extra": "ignored"}
    whole = chat(server, **fields)
    chunks = server.client().chat.completions.create(
        model="tiny",
        messages=[],
        stream=True,
        extra_body={**FIELDS, **fields},
    )
    deltas: dict[int, list[dict[str, Any]]] = {0: [], 1: []}
    reasons: dict[int, list[str]] = {0: [], 1: []}
    for chunk in chunks:
        for choice in chunk.choices:
            deltas[choice.index].append(choice.delta.model_dump(exclude_unset=True))
            reasons[choice.index] += [choice.finish_reason] if choice.finish_reason else []
    for index, answer in enumerate(whole):
        message, expected = joined(deltas[index]), message_of(answer)
        for call in (*message["tool_calls"], *expected["tool_calls"]):
            # Two requests have two ids.
            del call["id"]
        assert message == expected
        assert reasons[index] == [answer["finish_reason"]]


def test_a_schema_without_grammar_is_refused_with_its_place(server: ApiServer) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "string", "format": "no-such"}}}
    tools = [{"type": "function", "function": {"name": "f", "parameters": schema}}]
    status, answer = server.post(
        "/v1/chat/completions", {**FIELDS, "tools": tools, "tool_choice": "required"}
    )
    assert status == 400
    assert answer["error"]["param"] == "tools[0].function.parameters.properties.a"
