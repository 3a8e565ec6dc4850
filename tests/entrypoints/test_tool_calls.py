"""Tool calls and reasoning in the answers of a replica whose worker writes a given text."""

from __future__ import annotations

import contextlib
import http.client
import json
from collections.abc import Iterator
from typing import Any

import openai
import pydantic
import pytest

from fastdeploy.common.resumption import Resumption, encode_resumption, marks_of
from fastdeploy.entrypoints.openai.served_model import ServedModel
from fastdeploy.tokenizer.tokenizer import Tokenizer

from .conftest import CHAT_TEMPLATE, TINY
from .scripted_replica import served_by

CHAT = "/v1/chat/completions"
CALLS = (
    '<tool_call>\n{"name": "weather", "arguments": {"city": "Rom, é好"}}\n</tool_call>\n'
    '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
)
TEXT = f"<think>\nHm.\n</think>\n\nLet me see.\n{CALLS}"
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
NOW = {"type": "function", "function": {"name": "now"}}
FIELDS: dict[str, Any] = {
    "messages": [{"role": "user", "content": "What is the weather?"}],
    "tools": [WEATHER, NOW],
    "seed": 1,
    "max_tokens": 300,
}


class Replica:
    def __init__(self, served: ServedModel, port: int) -> None:
        self.port = port
        self._token = served.identity.token

    def post(self, path: str, body: bytes, headers: dict[str, str]) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        connection.request("POST", path, body, {"Content-Type": "application/json", **headers})
        answer = connection.getresponse()
        return answer.status, answer.read()

    def chat(self, **fields: Any) -> dict[str, Any]:
        status, answer = self.post(CHAT, json.dumps(FIELDS | fields).encode(), {"X-Request-Id": "a"})
        assert status == 200, answer
        decoded: dict[str, Any] = json.loads(answer)
        return decoded

    def refusal(self, **fields: Any) -> dict[str, Any]:
        status, answer = self.post(CHAT, json.dumps(FIELDS | fields).encode(), {})
        assert status == 400, answer
        error: dict[str, Any] = json.loads(answer)["error"]
        return error

    def blocks(self, **fields: Any) -> list[bytes]:
        """Return the events of a stream with their marks."""
        headers = {"X-Request-Id": "a", "X-FD-Marks": "1"}
        status, answer = self.post(CHAT, json.dumps(FIELDS | {"stream": True} | fields).encode(), headers)
        assert status == 200, answer
        return answer.split(b"\n\n")[:-1]

    def resumed(self, blocks: list[bytes], **fields: Any) -> list[bytes]:
        """Return the events that follow `blocks`."""
        first = event(blocks[0])
        assert first is not None
        marks = [mark for block in blocks if (mark := block.partition(b"\n: fd ")[2])]
        body = json.dumps(FIELDS | {"stream": True} | fields).encode()
        resumption = Resumption(CHAT, body, first["id"], first["created"], marks_of(marks))
        headers = {"Content-Type": "application/msgpack", "X-FD-Token": self._token, "X-FD-Marks": "1"}
        status, answer = self.post("/internal/resume", encode_resumption(resumption), headers)
        assert status == 200, answer
        return answer.split(b"\n\n")[:-1]

    @property
    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"http://127.0.0.1:{self.port}/v1", api_key="none", max_retries=0)


@contextlib.contextmanager
def replica_that_writes(text: str, **settings: Any) -> Iterator[Replica]:
    ids = " ".join(map(str, Tokenizer.from_directory(TINY).encode(text)))
    with served_by(f"writes {ids}", **{"chat_template": CHAT_TEMPLATE} | settings) as (served, port):
        yield Replica(served, port)


@pytest.fixture(scope="module")
def replica() -> Iterator[Replica]:
    with replica_that_writes(TEXT, reasoning_parser="qwen3") as running:
        yield running


@pytest.fixture(scope="module")
def calling() -> Iterator[Replica]:
    """Return a replica that writes nothing but calls."""
    with replica_that_writes(CALLS) as running:
        yield running


def event(block: bytes) -> dict[str, Any] | None:
    data = block.partition(b"\n")[0].removeprefix(b"data: ")
    return None if data == b"[DONE]" else json.loads(data)


def events(blocks: list[bytes]) -> list[dict[str, Any]]:
    return [found for block in blocks if (found := event(block)) is not None]


def choices(blocks: list[bytes], index: int = 0) -> list[dict[str, Any]]:
    return [choice for each in events(blocks) for choice in each["choices"] if choice["index"] == index]


def message_of(choice: dict[str, Any]) -> dict[str, Any]:
    """Return the message of a whole answer without the keys that are null, except the content."""
    return {key: value for key, value in choice["message"].items() if value is not None or key == "content"}


def joined(deltas: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the message that a client makes of deltas."""
    message: dict[str, Any] = {"role": "assistant", "content": None}
    calls: list[dict[str, Any]] = []
    for delta in deltas:
        for key in ("content", "reasoning_content"):
            if delta.get(key):
                message[key] = (message.get(key) or "") + delta[key]
        for entry in delta.get("tool_calls") or ():
            if entry["index"] == len(calls):
                calls.append(json.loads(json.dumps({key: entry[key] for key in ("id", "type", "function")})))
            else:
                assert entry["index"] == len(calls) - 1
                assert entry.keys() == {"index", "function"}
                assert entry["function"].keys() == {"arguments"}
                calls[-1]["function"]["arguments"] += entry["function"]["arguments"]
    return message | ({"tool_calls": calls} if calls else {})


def test_a_whole_answer_has_calls_reasoning_and_content(replica: Replica) -> None:
    answer = replica.chat()
    [choice] = answer["choices"]
    message = choice["message"]
    assert choice["finish_reason"] == "tool_calls"
    assert (message["content"], message["reasoning_content"]) == ("Let me see.", "Hm.")
    assert [(call["type"], call["function"]) for call in message["tool_calls"]] == [
        ("function", {"name": "weather", "arguments": '{"city": "Rom, é好"}'}),
        ("function", {"name": "now", "arguments": "{}"}),
    ]
    # The tokens of this checkpoint are bytes.
    thought = len("<think>\nHm.\n</think>")
    assert answer["usage"]["completion_tokens_details"] == {"reasoning_tokens": thought}


def test_an_answer_of_calls_only_has_no_content(calling: Replica) -> None:
    message = message_of(calling.chat()["choices"][0])
    assert message["content"] is None
    assert "reasoning_content" not in message
    assert joined([choice["delta"] for choice in choices(calling.blocks())]) == message


def test_ids_of_calls_follow_from_the_answer(calling: Replica) -> None:
    def ids(**fields: Any) -> list[str]:
        return [
            call["id"]
            for choice in calling.chat(**fields)["choices"]
            for call in choice["message"]["tool_calls"]
        ]

    assert ids() == ids()
    assert len({*ids(n=2), *ids(request_id="b")}) == 6
    assert all(len(each) == 29 and each.startswith("call_") for each in ids())


def test_a_stream_has_the_order_of_openai(replica: Replica) -> None:
    blocks = replica.blocks()
    deltas = [choice["delta"] for choice in choices(blocks)]
    whole = message_of(replica.chat()["choices"][0])
    assert joined(deltas) == whole
    entries = [entry for delta in deltas for entry in delta.get("tool_calls", ())]
    assert [entry["index"] for entry in entries] == sorted(entry["index"] for entry in entries)
    for index, call in enumerate(whole["tool_calls"]):
        first, *others = [entry for entry in entries if entry["index"] == index]
        function = {"name": call["function"]["name"], "arguments": ""}
        assert first == {"index": index, "id": call["id"], "type": "function", "function": function}
        assert len(others) > 1
    reasons = [choice["finish_reason"] for choice in choices(blocks)]
    assert reasons == [None] * (len(reasons) - 1) + ["tool_calls"]


def test_each_of_several_choices_has_its_calls(replica: Replica) -> None:
    fields = {"n": 2, "return_token_ids": True, "stream_options": {"continuous_usage_stats": True}}
    whole = replica.chat(n=2, return_token_ids=True)
    blocks = replica.blocks(**fields)
    for index, choice in enumerate(whole["choices"]):
        chunks = choices(blocks, index)
        message = joined([chunk["delta"] for chunk in chunks])
        assert message.items() <= choice["message"].items()
        assert [chunk["finish_reason"] for chunk in chunks if chunk["finish_reason"]] == ["tool_calls"]
        ids = [i for chunk in chunks for i in chunk["delta"]["completion_token_ids"] or ()]
        assert ids == choice["message"]["completion_token_ids"]
    usages = [each["usage"] for each in events(blocks)]
    assert usages[-1] == whole["usage"]
    assert all(usage["completion_tokens"] >= 0 for usage in usages)


@pytest.mark.parametrize(
    ("fields", "step"), [({}, 2), ({"n": 2, "stream_options": {"include_usage": True}}, 17)]
)
def test_an_interrupted_stream_continues_with_the_same_bytes(
    replica: Replica, fields: dict[str, Any], step: int
) -> None:
    whole = replica.blocks(**fields)
    marked = sum(b"\n: fd " in block for block in whole)
    for cut in range(1, marked + 1, step):
        before = whole[:cut]
        again = before + replica.resumed(before, **fields)
        assert [choices(again, index) for index in range(2)] == [choices(whole, index) for index in range(2)]
        assert again[-1] == whole[-1]
        assert events(again)[-1].get("usage") == events(whole)[-1].get("usage")


def test_reasoning_can_be_left_out_or_left_in(replica: Replica) -> None:
    hidden = replica.chat(include_reasoning=False)
    assert hidden["choices"][0]["message"]["reasoning_content"] is None
    assert hidden["usage"]["completion_tokens_details"]["reasoning_tokens"] > 0
    shown = replica.chat(separate_reasoning=False)
    assert shown["choices"][0]["message"]["content"] == "<think>\nHm.\n</think>\n\nLet me see."
    assert shown["usage"]["completion_tokens_details"]["reasoning_tokens"] == 0
    pieces = [
        choice["delta"]["reasoning_content"]
        for choice in choices(replica.blocks(stream_reasoning=False))
        if "reasoning_content" in choice["delta"]
    ]
    assert pieces == ["Hm."]


def test_without_tools_there_are_no_calls(calling: Replica) -> None:
    without: list[dict[str, Any]] = [{"tool_choice": "none"}, {"tools": []}, {"tools": None}]
    for fields in without:
        [choice] = calling.chat(**fields)["choices"]
        assert choice["message"]["content"] == CALLS
        assert choice["finish_reason"] == "stop"


@pytest.mark.parametrize("text", ["<tool_call>{no JSON}</tool_call>", '<tool_call>{"name": "f"'])
def test_what_is_no_call_is_content(text: str) -> None:
    with replica_that_writes(text) as running:
        [choice] = running.chat()["choices"]
        assert message_of(choice) == {"role": "assistant", "content": text}
        assert choice["finish_reason"] == "stop"
        assert joined([each["delta"] for each in choices(running.blocks())]) == message_of(choice)


class weather(pydantic.BaseModel):
    city: str


class now(pydantic.BaseModel):
    pass


def test_the_client_of_openai_reads_calls(calling: Replica) -> None:
    tools = [openai.pydantic_function_tool(weather), openai.pydantic_function_tool(now)]
    wanted: dict[str, Any] = {"model": "tiny", "messages": FIELDS["messages"], "tools": tools}
    answer = calling.client.chat.completions.parse(**wanted)
    calls = answer.choices[0].message.tool_calls
    assert calls is not None
    assert [call.function.parsed_arguments for call in calls] == [weather(city="Rom, é好"), now()]
    with calling.client.chat.completions.stream(**wanted) as stream:
        done = [each for each in stream if each.type == "tool_calls.function.arguments.done"]
        final = stream.get_final_completion()
    assert [(each.index, each.name) for each in done] == [(0, "weather"), (1, "now")]
    again = final.choices[0].message.tool_calls
    assert again is not None
    assert [call.function.parsed_arguments for call in again] == [weather(city="Rom, é好"), now()]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [{"type": "custom"}]}, "tools[0].type"),
        ({"tools": [NOW, NOW]}, "tools[1].function.name"),
        ({"tools": [NOW] * 300}, "tools"),
        ({"tools": [{"type": "function", "function": {"name": "x" * 300}}]}, "tools[0].function.name"),
        ({"tools": [{"type": "function", "function": {"name": "\n"}}]}, "tools[0].function.name"),
        (
            {"tools": [{"type": "function", "function": {"name": "a", "parameters": [1]}}]},
            "tools[0].function.parameters",
        ),
        (
            {"tools": [{"type": "function", "function": {"name": "a", "description": "x" * (1 << 20)}}]},
            "tools",
        ),
        ({"tool_choice": "sometimes"}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "other"}}}, "tool_choice.function.name"),
        ({"tools": [], "tool_choice": "required"}, "tool_choice"),
        ({"parallel_tool_calls": "no"}, "parallel_tool_calls"),
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"reasoning_max_tokens": 5}, "reasoning_max_tokens"),
        (
            {"messages": [{"role": "user", "content": "a", "tool_calls": [{"function": {"name": "f"}}]}]},
            "messages[0].tool_calls",
        ),
    ],
)
def test_wrong_tools_are_refused_with_their_place(
    calling: Replica, fields: dict[str, Any], param: str
) -> None:
    error = calling.refusal(**fields)
    assert error["param"] == param
    assert error["code"] is not None
    assert param in error["message"]


def test_a_template_with_tools_needs_a_parser_for_the_calls_of_its_model() -> None:
    template = "{% if tools %}{{ tools | tojson }}{% endif %}{{ messages[0].content }}"
    with replica_that_writes(CALLS, chat_template=template) as running:
        error = running.refusal()
        assert error["param"] == "tools"
        assert "--tool-call-parser" in error["message"]
        for choice in ("required", {"type": "function", "function": {"name": "now"}}):
            assert running.chat(tool_choice=choice)["choices"][0]["message"]["tool_calls"]
    with replica_that_writes(CALLS, chat_template=template, tool_call_parser="qwen25") as running:
        assert len(running.chat()["choices"][0]["message"]["tool_calls"]) == 2
