"""OpenAI's client reads forced JSON, tool calls and responses into the caller's types, through the router."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, Literal

import openai
import pytest
from pydantic import BaseModel, Field

from .conftest import System

MESSAGES: list[Any] = [{"role": "user", "content": "the quick brown"}]
#: A random model writes much white space where it may.
COMPACT = {"guided_whitespace_pattern": " ?"}
SAMPLED: dict[str, Any] = {"model": "tiny", "messages": MESSAGES, "max_tokens": 400, "seed": 4}


class Verdict(BaseModel):
    colour: Literal["red", "green"]
    sure: bool
    number: int = Field(ge=0, le=99)
    tags: list[Literal["x", "é好"]] = Field(max_length=3)


class Weather(BaseModel):
    """Return the weather."""

    city: Literal["Rome", "Köln"]
    days: int = Field(ge=1, le=9)


class Now(BaseModel):
    """Return the time."""

    zone: Literal["UTC", "CET"]


TOOLS = [openai.pydantic_function_tool(Weather), openai.pydantic_function_tool(Now)]


@pytest.fixture(scope="module")
def client(system: System) -> Iterator[openai.OpenAI]:
    with system.openai() as client:
        yield client


def test_a_random_model_fills_in_the_callers_type(client: openai.OpenAI) -> None:
    answer = client.chat.completions.parse(**SAMPLED, n=3, response_format=Verdict, extra_body=COMPACT)
    found = [choice.message.parsed for choice in answer.choices]
    assert all(isinstance(verdict, Verdict) for verdict in found)
    with client.chat.completions.stream(
        **SAMPLED, n=3, response_format=Verdict, extra_body=COMPACT
    ) as stream:
        for _ in stream:
            pass
        final = stream.get_final_completion()
    assert [choice.message.parsed for choice in final.choices] == found


@pytest.mark.parametrize("parallel", [True, False])
def test_forced_calls_have_the_callers_arguments(client: openai.OpenAI, parallel: bool) -> None:
    options: dict[str, Any] = {**SAMPLED, "tools": TOOLS, "tool_choice": "required"}
    options["parallel_tool_calls"] = parallel
    choice = client.chat.completions.parse(**options).choices[0]
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content is None
    calls = choice.message.tool_calls or []
    assert calls
    assert parallel or len(calls) == 1
    for call in calls:
        assert isinstance(call.function.parsed_arguments, Weather | Now)
        assert type(call.function.parsed_arguments).__name__ == call.function.name
    with client.chat.completions.stream(**options) as stream:
        for _ in stream:
            pass
        streamed = stream.get_final_completion().choices[0].message.tool_calls or []
    assert [call.function.arguments for call in streamed] == [call.function.arguments for call in calls]
    assert len({call.id for call in [*calls, *streamed]}) == 2 * len(calls)


def test_the_named_function_is_called_and_its_result_taken(client: openai.OpenAI) -> None:
    choice: Any = {"type": "function", "function": {"name": "Now"}}
    answer = client.chat.completions.create(**SAMPLED, tools=TOOLS, tool_choice=choice).choices[0]
    [call] = answer.message.tool_calls or []
    assert call.type == "function"
    assert Now.model_validate_json(call.function.arguments)
    result = {"role": "tool", "tool_call_id": call.id, "content": "12:00"}
    history = [*MESSAGES, answer.message.model_dump(), result]
    more = client.chat.completions.create(**{**SAMPLED, "messages": history, "tools": TOOLS, "max_tokens": 9})
    assert more.choices[0].finish_reason in ("length", "stop")


RESPONSE: dict[str, Any] = {
    "model": "tiny",
    "input": "the quick brown",
    "max_output_tokens": 400,
    "extra_body": {"seed": 4, **COMPACT},
}


def test_a_response_whole_and_streamed(client: openai.OpenAI) -> None:
    options = {**RESPONSE, "max_output_tokens": 12, "extra_body": {"seed": 4}}
    whole = client.responses.create(**options)
    assert (whole.object, whole.status) == ("response", "incomplete")
    assert whole.usage is not None
    assert whole.usage.output_tokens == 12
    events = list(client.responses.create(**options, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert events[0].type == "response.created"
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert text == whole.output_text
    assert events[-1].type == "response.incomplete"


def test_a_response_fills_in_the_callers_type(client: openai.OpenAI) -> None:
    whole = client.responses.parse(**RESPONSE, text_format=Verdict)
    assert isinstance(whole.output_parsed, Verdict)
    with client.responses.stream(**RESPONSE, text_format=Verdict) as stream:
        for _ in stream:
            pass
        assert stream.get_final_response().output_parsed == whole.output_parsed


def test_a_response_calls_a_tool_and_takes_its_result(client: openai.OpenAI) -> None:
    schema = {**Now.model_json_schema(), "additionalProperties": False}
    tool: Any = {"type": "function", "name": "now", "parameters": schema, "strict": True}
    options = {
        **RESPONSE,
        "extra_body": {"seed": 4},
        "tools": [tool],
        "tool_choice": "required",
        "parallel_tool_calls": False,
    }
    first = client.responses.create(**options)
    [call] = first.output
    assert call.type == "function_call"
    assert Now(**json.loads(call.arguments))
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "12:00"}
    history = [{"role": "user", "content": "a"}, call.model_dump(exclude_none=True), result]
    second = client.responses.create(
        model="tiny", input=history, tools=[tool], tool_choice="none", max_output_tokens=9
    )
    assert second.output
