"""Calls of functions, reasoning and structured output in /v1/responses."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import msgspec
import pydantic
import pytest

from fastdeploy.common.errors import RequestError
from fastdeploy.common.resumption import Resumption, encode_resumption, marks_of
from fastdeploy.entrypoints.openai.protocol import SamplingDefaults
from fastdeploy.entrypoints.openai.response_answers import ResponseEvent, ResponseObject
from fastdeploy.entrypoints.openai.response_input import read_responses_request
from fastdeploy.entrypoints.openai.response_output import ResponseOutput
from fastdeploy.parsers.parts import CallArguments, CallBegin, CallEnd, Content, Part, Reasoning

from .conftest import ApiServer
from .test_forced_calls import NO_SPACE
from .test_tool_calls import TEXT, Replica, replica_that_writes

PATH = "/v1/responses"
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}}
TOOLS = [
    {"type": "function", "name": "weather", "parameters": PARAMETERS, "strict": False},
    {"type": "function", "name": "now"},
]
FIELDS: dict[str, Any] = {
    "input": "What is the weather?",
    "tools": TOOLS,
    "seed": 1,
    "max_output_tokens": 300,
}


@pytest.fixture(scope="module")
def replica() -> Iterator[Replica]:
    with replica_that_writes(TEXT, reasoning_parser="qwen3") as running:
        yield running


def respond(replica: Replica, **fields: Any) -> dict[str, Any]:
    status, answer = replica.post(PATH, json.dumps(FIELDS | fields).encode(), {"X-Request-Id": "a"})
    assert status == 200, answer
    msgspec.json.decode(answer, type=ResponseObject)
    decoded: dict[str, Any] = json.loads(answer)
    return decoded


def blocks(replica: Replica, **fields: Any) -> list[bytes]:
    headers = {"X-Request-Id": "a", "X-FD-Marks": "1"}
    body = json.dumps(FIELDS | {"stream": True} | fields).encode()
    status, answer = replica.post(PATH, body, headers)
    assert status == 200, answer
    return answer.split(b"\n\n")[:-1]


def data_of(block: bytes) -> dict[str, Any]:
    data = block.partition(b"\ndata: ")[2].partition(b"\n")[0]
    msgspec.json.decode(data, type=ResponseEvent)
    decoded: dict[str, Any] = json.loads(data)
    return decoded


def test_reasoning_text_and_calls_are_items(replica: Replica) -> None:
    response = respond(replica)
    reasoning, message, *calls = response["output"]
    assert (reasoning["type"], reasoning["content"][0]["text"].strip()) == ("reasoning", "Hm.")
    assert (message["type"], message["content"][0]["text"].strip()) == ("message", "Let me see.")
    assert [(call["type"], call["name"], json.loads(call["arguments"])) for call in calls] == [
        ("function_call", "weather", {"city": "Rom, é好"}),
        ("function_call", "now", {}),
    ]
    assert len({item["id"] for item in response["output"]}) == 4
    assert len({call["call_id"] for call in calls}) == 2
    assert {item["status"] for item in response["output"]} == {response["status"]} == {"completed"}
    assert response["usage"]["output_tokens_details"]["reasoning_tokens"] > 0
    assert (response["tools"][0], response["tool_choice"]) == (TOOLS[0], "auto")


def test_official_client_assembles_the_stream(replica: Replica) -> None:
    fields = {key: value for key, value in FIELDS.items() if key != "seed"}
    client: Any = replica.client
    kinds = []
    with client.responses.stream(model="tiny", **fields) as stream:
        for event in stream:
            if event.type.startswith("response.function_call_arguments") and event.type not in kinds:
                kinds.append(event.type)
        final = stream.get_final_response()
    assert kinds == ["response.function_call_arguments.delta", "response.function_call_arguments.done"]
    assert [item.type for item in final.output] == ["reasoning", "message", "function_call", "function_call"]
    whole = respond(replica)
    assert final.output[2].arguments == whole["output"][2]["arguments"]


def test_a_stream_with_calls_continues_behind_any_event(replica: Replica) -> None:
    """Within the reasoning, a text and a call, and between two events for the same tokens."""
    whole = blocks(replica)
    assert len(whole) > 40
    first = data_of(whole[0])["response"]
    body = json.dumps(FIELDS | {"stream": True}).encode()
    headers = {"Content-Type": "application/msgpack", "X-FD-Token": replica._token, "X-FD-Marks": "1"}
    for cut in range(1, len(whole)):
        marks = [mark for block in whole[:cut] if (mark := block.partition(b"\n: fd ")[2])]
        resumption = Resumption(PATH, body, first["id"], first["created_at"], marks_of(marks), cut)
        status, answer = replica.post("/internal/resume", encode_resumption(resumption), headers)
        assert status == 200, answer
        assert answer.split(b"\n\n")[:-1] == whole[cut:], f"cut behind event {cut}"


def test_the_items_of_a_stream_are_those_of_the_response(replica: Replica) -> None:
    events = [data_of(block) for block in blocks(replica)[:-1]]
    whole = respond(replica)
    done = [event["item"] for event in events if event["type"] == "response.output_item.done"]
    assert done == whole["output"] == events[-1]["response"]["output"]
    for event in events:
        if event["type"].endswith(("_text.done", "arguments.done")):
            pieces = [
                other["delta"]
                for other in events
                if other["type"] == event["type"].replace(".done", ".delta")
                and other["item_id"] == event["item_id"]
            ]
            assert "".join(pieces) == event.get("text", event.get("arguments"))


PARTS: list[Part] = [
    Reasoning("Hm."),
    Content("Let "),
    Content("me."),
    CallBegin(0, "now"),
    CallArguments(0, "{}"),
    CallEnd(0),
]


@pytest.mark.parametrize("count", range(len(PARTS) + 1))
def test_what_a_limit_cuts_off_is_incomplete(count: int) -> None:
    output = ResponseOutput("a", lambda number: f"call-{number}")
    for part in PARTS[:count]:
        output.add([part], [])
    output.finish("incomplete")
    kinds = {0: ["message"], 1: ["reasoning"], 2: ["reasoning", "message"], 3: ["reasoning", "message"]}
    assert [item["type"] for item in output.items] == kinds.get(
        count, ["reasoning", "message", "function_call"]
    )
    *before, last = [item["status"] for item in output.items]
    assert set(before) <= {"completed"}
    assert last == ("completed" if count == len(PARTS) else "incomplete")


def test_log_probabilities_stand_with_the_text_only() -> None:
    output = ResponseOutput("a", str)
    # The text of the tokens 0 and 4 comes with that of the next.
    steps: list[list[Part]] = [[], PARTS[:1], PARTS[1:2], PARTS[2:3], [], [Content("x")], PARTS[3:4], []]
    for number, parts in enumerate(steps):
        output.add(parts, [{"token": number}])
    output.finish("completed")
    logprobs = output.items[1]["content"][0]["logprobs"]
    assert [each["token"] for each in logprobs] == [2, 3, 4, 5]


def test_earlier_calls_and_results_are_shown_to_the_model() -> None:
    turns = [
        {"role": "user", "content": "a"},
        {
            "type": "reasoning",
            "id": "rs",
            "summary": [],
            "content": [{"type": "reasoning_text", "text": "why"}],
        },
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "b"}]},
        {"type": "function_call", "call_id": "c1", "name": "now", "arguments": "{}"},
        {"type": "function_call", "call_id": "c2", "name": "weather", "arguments": '{"city": "Rom"}'},
        {"type": "function_call_output", "call_id": "c1", "output": "noon"},
        {"type": "function_call_output", "call_id": "c2", "output": [{"type": "input_text", "text": "fine"}]},
    ]
    call = read_responses_request({"input": turns, "tools": TOOLS}, SamplingDefaults())
    _, assistant, first, second = call.chat.messages
    assert (assistant["role"], assistant["content"], assistant["reasoning_content"]) == (
        "assistant",
        "b",
        "why",
    )
    assert [each["function"]["name"] for each in assistant["tool_calls"]] == ["now", "weather"]
    assert assistant["tool_calls"][1]["function"]["arguments"] == {"city": "Rom"}
    assert [(each["role"], each["tool_call_id"], each["content"]) for each in (first, second)] == [
        ("tool", "c1", "noon"),
        ("tool", "c2", "fine"),
    ]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tools": [{"type": "function"}]}, "tools[0].name"),
        ({"tools": [{"type": "function", "name": "a"}] * 2}, "tools[1].name"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "name": "b"}}, "tool_choice.name"),
        ({"tools": TOOLS, "tool_choice": {"type": "file_search"}}, "tool_choice.type"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"text": {"format": {"type": "json_schema", "name": "a"}}}, "text.format.schema"),
        ({"text": {"format": {"type": "grammar"}}}, "text.format.type"),
        ({"text": {"format": {"type": "json_schema", "schema": {"type": "rock"}}}}, "text.format.schema"),
    ],
    ids=str,
)
def test_wrong_tools_and_formats_are_named(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(RequestError) as error:
        read_responses_request({"input": "a", **fields}, SamplingDefaults())
    assert error.value.param == param
    assert param in str(error.value)


class Answer(pydantic.BaseModel):
    is_true: bool
    note: str = pydantic.Field(max_length=5)


def test_official_client_parses_a_model(server: ApiServer) -> None:
    client: Any = server.client()
    response = client.responses.parse(
        model="tiny",
        input="a",
        text_format=Answer,
        extra_body={"logit_bias": NO_SPACE, "seed": 3},
    )
    assert isinstance(response.output_parsed, Answer)
    assert response.text.format.type == "json_schema"


def test_a_required_call_follows_its_schema(server: ApiServer) -> None:
    schema = {"type": "object", "properties": {"up": {"type": "boolean"}}, "required": ["up"]}
    tool = {"type": "function", "name": "move", "parameters": schema | {"additionalProperties": False}}
    client: Any = server.client()
    response = client.responses.create(
        model="tiny",
        input="a",
        tools=[tool],
        tool_choice={"type": "function", "name": "move"},
        # The context is too short for tools in a prompt of bytes.
        extra_body={"truncate_prompt_tokens": 20, "logit_bias": NO_SPACE, "seed": 3},
    )
    [call] = response.output
    assert (call.type, call.name, response.status) == ("function_call", "move", "completed")
    assert isinstance(json.loads(call.arguments)["up"], bool)
