"""Endpoints beside generation, and the description of the API, against a real replica."""

from __future__ import annotations

import json
import re
import urllib.request
from typing import Any

import msgspec
import pytest

from fastdeploy import __version__
from fastdeploy.entrypoints.openai import answers
from fastdeploy.entrypoints.openai.api_description import docs_page, openapi
from fastdeploy.entrypoints.openai.bodies import ChatBody, CompletionBody
from fastdeploy.entrypoints.openai.unsupported import CHAT_FIELDS

from .conftest import CHAT_TEMPLATE, MAX_MODEL_LEN, ApiServer

MESSAGES = [{"role": "user", "content": "the quick brown"}]


def test_tokens_of_a_text_and_back(server: ApiServer) -> None:
    status, tokens = server.post("/tokenize", {"prompt": "the quick", "return_token_strs": True})
    answer = msgspec.convert(tokens, answers.Tokens)
    assert (status, answer.count, answer.max_model_len) == (200, len(answer.tokens), MAX_MODEL_LEN)
    assert answer.token_strs is not None
    assert "".join(answer.token_strs).endswith("the quick")
    plain = {"prompt": "the quick", "add_special_tokens": False}
    bare = server.post("/v1/tokenize", plain)[1]["tokens"]
    assert answer.tokens[-len(bare) :] == bare
    assert server.post("/detokenize", {"tokens": bare}) == (200, {"prompt": "the quick"})
    assert server.post("/detokenize", {"tokens": []}) == (200, {"prompt": ""})


def test_tokens_of_messages_are_those_of_a_chat(server: ApiServer) -> None:
    tokens = server.post("/tokenize", {"messages": MESSAGES})[1]["tokens"]
    body = {"messages": MESSAGES, "max_tokens": 1, "return_token_ids": True}
    chat = server.post("/v1/chat/completions", body)[1]
    assert chat["choices"][0]["message"]["prompt_token_ids"] == tokens
    assert CHAT_TEMPLATE.endswith("assistant:")
    template = "{% if add_generation_prompt %}a{% else %}b{% endif %}"
    for wanted, text in ((None, "a"), (True, "a"), (False, "b")):
        fields = {"messages": MESSAGES, "chat_template": template, "add_generation_prompt": wanted}
        got = server.post("/tokenize", fields)[1]["tokens"]
        assert server.post("/detokenize", {"tokens": got})[1] == {"prompt": text}


@pytest.mark.parametrize(
    ("path", "body", "status", "param"),
    [
        ("/tokenize", {}, 400, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": MESSAGES}, 400, "prompt"),
        ("/tokenize", {"prompt": 5}, 400, "prompt"),
        ("/tokenize", {"messages": [{"role": "user"}]}, 400, "messages[0].content"),
        ("/tokenize", {"prompt": "a", "model": "gpt-9"}, 404, "model"),
        ("/tokenize", {"messages": MESSAGES, "tools": [{}]}, 400, "tools[0].function"),
        ("/detokenize", {}, 400, "tokens"),
        ("/detokenize", {"tokens": [1, -1]}, 400, "tokens[1]"),
        ("/detokenize", {"tokens": [10**6]}, 400, "tokens"),
    ],
)
def test_a_wrong_body_is_refused_with_its_field(
    server: ApiServer, path: str, body: dict[str, Any], status: int, param: str
) -> None:
    got, answer = server.post(path, body)
    error = msgspec.convert(answer, answers.Error).error
    assert (got, error.param) == (status, param)
    assert error.code


def test_version_load_ping_and_configuration(server: ApiServer) -> None:
    assert json.loads(server.get("/version")[1]) == {"version": __version__}
    assert json.loads(server.get("/load")[1]) == {"server_load": 0, "max_concurrency": 512}
    assert server.get("/ping")[0] == 200
    configuration = json.loads(server.get("/config-info")[1])
    assert configuration["served_model_name"] == "tiny"
    assert configuration["engine"]["max_model_len"] == MAX_MODEL_LEN
    assert json.loads(server.get("/config-info", server.metrics_port)[1]) == configuration
    assert "key" not in json.dumps(configuration)


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("/v1/embeddings", "models here generate text"),
        ("/rerank", "models here generate text"),
        ("/v1/sleep", "a replica keeps its weights"),
        ("/rearrange_experts", "experts are balanced automatically"),
        ("/generate", "use /v1/chat/completions"),
        ("/v1/responses/resp_1/cancel", "this server stores no responses"),
        ("/v1/responses/input_tokens", "use /tokenize"),
        ("/abort_request", "use /v1/abort_requests"),
        ("/v1/pause", "fdctl drain"),
    ],
)
def test_an_endpoint_that_is_not_served_says_why(server: ApiServer, path: str, reason: str) -> None:
    status, answer = server.post(path, {})
    error = msgspec.convert(answer, answers.Error).error
    assert (status, error.code) == (404, "unknown_url")
    assert error.message.startswith(f"POST {path} is not served: {reason}")


def test_the_description_has_every_field(server: ApiServer) -> None:
    status, text = server.get("/openapi.json")
    description = json.loads(text)
    assert (status, description["openapi"]) == (200, "3.1.0")
    schemas = description["components"]["schemas"]
    for reference in re.findall(r'"\$ref":"#/components/schemas/(\w+)"', openapi().decode()):
        assert reference in schemas
    for body in (ChatBody, CompletionBody):
        assert set(schemas[body.__name__]["properties"]) >= {*body.__struct_fields__, *body.refused, "user"}
    assert schemas["DetokenizeBody"]["required"] == ["tokens"]
    refused = schemas["ChatBody"]["properties"]["kv_transfer_params"]
    assert refused == {
        "enum": [None, {}],
        "description": f"Not supported: {CHAT_FIELDS['kv_transfer_params'].why}.",
    }


def test_the_page_describes_the_api_without_other_files(server: ApiServer) -> None:
    with urllib.request.urlopen(f"{server.url}/docs", timeout=30) as answer:
        page = answer.read().decode()
        assert answer.headers["Content-Type"].startswith("text/html")
        assert "default-src 'none'" in answer.headers["Content-Security-Policy"]
    assert page == docs_page().decode()
    assert "kv_transfer_params" in page
    assert not re.search(r"<script|<link|<img|src=|https?://", page)


@pytest.mark.parametrize("ids", [False, True])
def test_responses_are_as_declared(server: ApiServer, ids: bool) -> None:
    options = {"max_tokens": 4, "n": 2, "return_token_ids": ids, "stream_options": None}
    chat = {"messages": MESSAGES, "logprobs": True, "top_logprobs": 2, **options}
    completion = {"prompt": "the", "logprobs": 1, "echo": ids, **options}
    msgspec.convert(server.post("/v1/chat/completions", chat)[1], answers.ChatCompletion)
    msgspec.convert(server.post("/v1/completions", completion)[1], answers.Completion)
    msgspec.convert(json.loads(server.get("/v1/models")[1]), answers.ModelList)
    streamed = {"stream": True, "stream_options": {"continuous_usage_stats": ids}}
    for event in events(server, "/v1/chat/completions", chat | streamed):
        msgspec.convert(event, answers.ChatCompletionChunk)
    for event in events(server, "/v1/completions", completion | streamed):
        msgspec.convert(event, answers.Completion)


def events(server: ApiServer, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    request = urllib.request.Request(
        server.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        lines = answer.read().decode().split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]
