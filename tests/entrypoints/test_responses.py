"""/v1/responses of a real replica, as OpenAI's client reads it."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import openai
import pytest
from openai.types.responses import Response

from fastdeploy.common.errors import RequestError
from fastdeploy.entrypoints.openai.bodies import ChatBody
from fastdeploy.entrypoints.openai.protocol import SamplingDefaults
from fastdeploy.entrypoints.openai.response_answers import ResponseEvent, ResponseObject
from fastdeploy.entrypoints.openai.response_bodies import ResponsesBody
from fastdeploy.entrypoints.openai.response_input import read_responses_request, without_oldest

from .conftest import MAX_MODEL_LEN, ApiServer

PATH = "/v1/responses"
TALK = "the quick brown"
GREEDY: dict[str, Any] = {"model": "tiny", "temperature": 0, "max_output_tokens": 6}
KINDS = ["created", "in_progress", "output_item.added", "content_part.added"]
END_KINDS = ["output_text.done", "content_part.done", "output_item.done", "incomplete"]


@pytest.fixture(scope="module")
def client(server: ApiServer) -> Any:
    """The client without its types, which know only OpenAI's models and declare most fields optional."""
    return server.client()


def test_a_response_has_the_text_of_a_chat(server: ApiServer, client: Any) -> None:
    response = client.responses.create(input=TALK, instructions="be brief", metadata={"a": "b"}, **GREEDY)
    messages: list[Any] = [{"role": "system", "content": "be brief"}, {"role": "user", "content": TALK}]
    chat = server.post("/v1/chat/completions", {"messages": messages, "temperature": 0, "max_tokens": 6})[1]
    assert response.output_text == chat["choices"][0]["message"]["content"]
    assert (response.status, response.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert response.usage.input_tokens == chat["usage"]["prompt_tokens"]
    assert (response.usage.output_tokens, response.usage.total_tokens) == (6, chat["usage"]["total_tokens"])
    assert (response.instructions, response.metadata) == ("be brief", {"a": "b"})
    assert response.id.startswith("resp_")
    assert response.output[0].id == f"msg_{response.id.removeprefix('resp_')}_0"


def test_a_stream_builds_the_whole_response(client: Any) -> None:
    options: dict[str, Any] = {"input": TALK, "extra_headers": {"X-Request-Id": "mine"}, **GREEDY}
    whole = client.responses.create(**options)
    events = list(client.responses.create(stream=True, **options))
    deltas = [event for event in events if event.type == "response.output_text.delta"]
    kinds = [event.type.removeprefix("response.") for event in events]
    assert kinds == [*KINDS, *["output_text.delta"] * len(deltas), *END_KINDS]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert "".join(event.delta for event in deltas) == whole.output_text
    assert without_times(events[-1].response) == without_times(whole)
    done = {event.type: event for event in events}
    assert done["response.output_text.done"].text == whole.output_text
    assert done["response.output_item.done"].item == whole.output[0]
    assert done["response.content_part.done"].part == whole.output[0].content[0]


def without_times(response: Response) -> dict[str, Any]:
    values: dict[str, Any] = response.to_dict()
    values["usage"]["input_tokens_details"]["cached_tokens"] = None
    return values | {"created_at": None}


def test_a_response_that_ends_by_itself_is_complete(client: Any) -> None:
    options = GREEDY | {"extra_body": {"stop": [" "]}, "input": TALK}
    assert client.responses.create(**options).status == "completed"
    with client.responses.stream(**options) as stream:
        text = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
        assert stream.get_final_response().output_text == text


def test_log_probabilities_stand_with_their_text(client: Any) -> None:
    options = {"input": TALK, "include": ["message.output_text.logprobs"], "top_logprobs": 2, **GREEDY}
    entries = client.responses.create(**options).output[0].content[0].logprobs
    assert len(entries) == 6
    assert all(len(entry.top_logprobs) == 2 for entry in entries)
    events = list(client.responses.create(stream=True, **options))
    deltas = [each for event in events if event.type.endswith("text.delta") for each in event.logprobs]
    assert [(each.token, each.logprob) for each in deltas] == [(each.token, each.logprob) for each in entries]
    by_id = client.responses.create(**options, extra_body={"return_tokens_as_token_ids": True})
    assert all(entry.token.startswith("token_id:") for entry in by_id.output[0].content[0].logprobs)
    assert not client.responses.create(input=TALK, **GREEDY).output[0].content[0].logprobs


def test_the_items_of_a_response_can_be_sent_again(client: Any) -> None:
    first = client.responses.create(input=TALK, **GREEDY)
    items = [{"role": "user", "content": TALK}, *first.output, {"role": "user", "content": "go on"}]
    second = client.responses.create(input=items, **GREEDY)
    plain = [
        {"role": "user", "content": [{"type": "input_text", "text": TALK}]},
        {"role": "assistant", "content": first.output_text},
        {"type": "message", "role": "user", "content": "go on"},
    ]
    assert second.output_text == client.responses.create(input=plain, **GREEDY).output_text
    assert second.usage.input_tokens > first.usage.input_tokens + first.usage.output_tokens


def test_truncation_leaves_out_the_oldest_items(client: Any) -> None:
    items = [{"role": "user", "content": f"{number} " * 70} for number in range(10)]
    with pytest.raises(openai.BadRequestError, match="input has"):
        client.responses.create(input=items, **GREEDY)
    shortened = client.responses.create(input=items, truncation="auto", **GREEDY)
    room = MAX_MODEL_LEN - 6
    fitting = shortened.usage.input_tokens
    [kept] = [at for at in range(1, 10) if num_tokens(client, items[at:]) == fitting]
    assert fitting <= room < num_tokens(client, items[kept - 1 :])


def num_tokens(client: Any, items: list[dict[str, str]]) -> int:
    try:
        return client.responses.create(input=items, **GREEDY).usage.input_tokens
    except openai.BadRequestError:
        return MAX_MODEL_LEN


@pytest.mark.parametrize("limit", range(6))
def test_what_is_left_of_a_conversation_begins_with_a_user(limit: int) -> None:
    roles = ["system", "user", "assistant", "user", "assistant", "user"]
    items = [{"role": role, "content": str(number)} for number, role in enumerate(roles)]
    request = read_responses_request({"input": items}, SamplingDefaults()).chat
    left = without_oldest(request, lambda shorter: len(shorter.messages) <= limit).messages
    count = next((each for each in (6, 4, 2) if each <= limit), 2)
    assert [message["content"] for message in left] == ["0", *map(str, range(7 - count, 6))]


def test_responses_are_as_declared(server: ApiServer, client: Any) -> None:
    body = {"input": TALK, "max_output_tokens": 3, "top_logprobs": 1, "reasoning": {"effort": "low"}}
    msgspec.convert(server.post(PATH, body)[1], ResponseObject)
    with client.responses.with_streaming_response.create(model="tiny", stream=True, **body) as raw:
        blocks = raw.read().decode().split("\n\n")
    assert blocks[-2:] == ["data: [DONE]", ""]
    for block in blocks[:-2]:
        kind, _, data = block.partition("\n")
        event = msgspec.convert(json.loads(data.removeprefix("data: ")), ResponseEvent)
        assert kind == f"event: {event.type}"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"store": True}, "store"),
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"background": True}, "background"),
        ({"prompt": {"id": "p"}}, "prompt"),
        ({"messages": [{}]}, "messages"),
        ({"max_tokens": 5}, "max_tokens"),
        ({"n": 2}, "n"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"min_tokens": 9, "max_output_tokens": 3}, "min_tokens"),
        ({"top_logprobs": -1}, "top_logprobs"),
        ({"prompt_logprobs": 1}, "prompt_logprobs"),
        ({"include": ["file_search_call.results"]}, "include[0]"),
        ({"text": {"verbosity": "low"}}, "text.verbosity"),
        ({"reasoning": {"summary": "detailed"}}, "reasoning.summary"),
        ({"truncation": "middle"}, "truncation"),
        ({"metadata": {str(number): "a" * 500 for number in range(2500)}}, "instructions"),
        ({"metadata": {"a": 1}}, "metadata.a"),
        ({"stream_options": {"include_obfuscation": True}}, "stream_options"),
        ({"input": None}, "input"),
        ({"input": []}, "input"),
        ({"input": [{"role": "tool", "content": "a"}]}, "input[0].role"),
        ({"input": [{"role": "user"}]}, "input[0].content"),
        ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "input[0].type"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content[0]"),
        ({"input": [{"type": "function_call_output", "output": "a"}]}, "input[0].call_id"),
        ({"input": [{"type": "reasoning", "encrypted_content": "a"}]}, "input[0].encrypted_content"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_a_wrong_field_is_named(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(RequestError) as error:
        read_responses_request({"input": "a", **fields}, SamplingDefaults())
    assert error.value.param == param
    assert str(error.value).startswith(param)


@pytest.mark.parametrize(
    "fields",
    [
        {
            "store": False,
            "background": False,
            "stream": True,
            "stream_options": {"include_obfuscation": False},
        },
        {"text": {"format": {"type": "text"}, "verbosity": "medium"}, "service_tier": "auto"},
        {"include": ["reasoning.encrypted_content"], "reasoning": {"effort": "low", "summary": "auto"}},
        {"max_tool_calls": 3, "safety_identifier": "a", "prompt_cache_key": "b", "no_such_field": 1},
    ],
)
def test_what_official_clients_send_anyway_is_accepted(fields: dict[str, Any]) -> None:
    read_responses_request({"input": "a", **fields}, SamplingDefaults())


def test_every_field_of_a_chat_acts_or_is_refused() -> None:
    known = {*ResponsesBody.__struct_fields__, *ResponsesBody.refused}
    assert {*ChatBody.__struct_fields__, *ChatBody.refused} - known == set()


def test_a_turn_of_reasoning_becomes_one_message() -> None:
    items = [
        {"role": "user", "content": "a"},
        {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "why"}]},
        {"role": "assistant", "content": [{"type": "output_text", "text": "b", "annotations": []}]},
        {"role": "user", "content": "c"},
        {"type": "reasoning", "summary": [{"type": "summary_text", "text": "short"}]},
    ]
    request = read_responses_request({"input": items}, SamplingDefaults()).chat
    assert request.messages == [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b", "reasoning_content": "why"},
        {"role": "user", "content": "c"},
        {"role": "assistant", "content": "", "reasoning_content": "short"},
    ]
