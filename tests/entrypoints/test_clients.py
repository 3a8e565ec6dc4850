"""Fields that clients of OpenAI, vLLM and FastDeploy send beyond the plain request, to a real replica."""

import gzip
import http.client
import json
import urllib.error
import urllib.request
from email.message import Message
from typing import Any

import pytest
from openai.types import Completion, CompletionUsage
from openai.types.chat import ChatCompletionChunk

from .conftest import ApiServer

MESSAGES: list[Any] = [{"role": "user", "content": "the quick brown"}]
USAGE_IN_EACH_CHUNK: Any = {"include_usage": True, "continuous_usage_stats": True}


def refusal(server: ApiServer, body: bytes, headers: dict[str, str]) -> tuple[int, Message, dict[str, Any]]:
    request = urllib.request.Request(f"{server.url}/v1/completions", body, headers)
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(request, timeout=60)
    return caught.value.code, caught.value.headers, json.load(caught.value)["error"]


@pytest.mark.parametrize("coding", ["gzip", "br", "zstd", "identity, gzip"])
def test_a_compressed_body_is_415_and_names_the_header(server: ApiServer, coding: str) -> None:
    body = gzip.compress(b'{"prompt": "a", "max_tokens": 1}')
    headers = {"Content-Type": "application/json", "Content-Encoding": coding}
    status, answered, error = refusal(server, body, headers)
    assert (status, answered["Accept-Encoding"]) == (415, "identity")
    assert "Content-Encoding" in error["message"]
    assert coding in error["message"]


def test_a_body_that_says_it_is_not_compressed_is_read(server: ApiServer) -> None:
    headers = {"Content-Encoding": "Identity"}
    assert server.post("/v1/completions", {"prompt": "a", "max_tokens": 1}, headers)[0] == 200


def test_a_wrong_content_type_is_415_and_says_which_is_right(server: ApiServer) -> None:
    headers = {"Content-Type": "application/x-www-form-urlencoded"}
    status, answered, error = refusal(server, b"prompt=a", headers)
    assert (status, answered["Accept"]) == (415, "application/json")
    assert "application/json" in error["message"]


def usage_of(chunk: ChatCompletionChunk | Completion) -> CompletionUsage:
    assert chunk.usage is not None
    return chunk.usage


def test_each_chunk_of_a_chat_has_its_usage_so_far(server: ApiServer) -> None:
    *chunks, last = server.client().chat.completions.create(
        model="tiny",
        messages=MESSAGES,
        max_tokens=8,
        n=2,
        seed=1,
        stream=True,
        stream_options=USAGE_IN_EACH_CHUNK,
        extra_body={"ignore_eos": True},
    )
    for index in range(2):
        usages = [usage_of(chunk) for chunk in chunks if chunk.choices[0].index == index]
        counts = [usage.completion_tokens for usage in usages]
        assert counts[0] == 0, "the role comes before any token"
        assert counts[-1] == 8
        assert counts == sorted(counts)
        for usage in usages:
            assert usage.prompt_tokens == usage_of(last).prompt_tokens
            assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert (last.choices, usage_of(last).completion_tokens) == ([], 16)


def test_each_chunk_of_a_completion_has_its_usage_so_far(server: ApiServer) -> None:
    prompts = [[40], [41, 42, 43]]
    *chunks, last = server.client().completions.create(
        model="tiny",
        prompt=prompts,
        max_tokens=5,
        echo=True,
        stream=True,
        stream_options=USAGE_IN_EACH_CHUNK,
        extra_body={"ignore_eos": True},
    )
    for index, prompt in enumerate(prompts):
        usages = [usage_of(chunk) for chunk in chunks if chunk.choices[0].index == index]
        assert {usage.prompt_tokens for usage in usages} == {len(prompt)}
        assert (usages[0].completion_tokens, usages[-1].completion_tokens) == (0, 5)
    assert usage_of(last).total_tokens == 4 + 10


def test_an_answer_of_openais_client_comes_back_as_history(server: ApiServer) -> None:
    client = server.client()
    said = client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=3)
    history = [*MESSAGES, said.choices[0].message.model_dump(), *MESSAGES]
    assert client.chat.completions.create(model="tiny", messages=history, max_tokens=3).choices
    # OpenAI's own models return these fields.
    nulls: dict[str, object] = {
        "refusal": None,
        "annotations": [],
        "audio": None,
        "function_call": None,
        "tool_calls": None,
    }
    history[1] = {"role": "assistant", "content": "x", **nulls}
    answer = client.chat.completions.create(
        model="tiny",
        messages=history,
        max_tokens=3,
        extra_body={"response_format": {"type": "text", "json_schema": None}},
    )
    assert answer.choices


PAGE = "http://localhost:3000"


def asked(server: ApiServer, method: str, path: str, **headers: str) -> tuple[int, Message]:
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    request = urllib.request.Request(server.url + path, headers=names, method=method)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, answer.headers
    except urllib.error.HTTPError as error:
        return error.code, error.headers


@pytest.mark.parametrize("path", ["/v1/models", "/v1/nothing"])
def test_a_page_of_this_machine_is_shown_answers(server: ApiServer, path: str) -> None:
    _, headers = asked(server, "GET", path, Origin=PAGE)
    assert headers.get_all("Access-Control-Allow-Origin") == [PAGE]
    assert headers["Vary"] == "Origin"
    assert "Access-Control-Allow-Credentials" not in headers
    _, headers = asked(server, "GET", path, Origin="http://app.example")
    assert "Access-Control-Allow-Origin" not in headers


def test_preflight_of_a_page_is_answered(server: ApiServer) -> None:
    wanted = {"Access_Control_Request_Method": "POST", "Access_Control_Request_Headers": "authorization"}
    status, headers = asked(server, "OPTIONS", "/v1/completions", Origin=PAGE, **wanted)
    assert (status, headers["Access-Control-Allow-Headers"]) == (204, "authorization")
    assert headers.get_all("Access-Control-Allow-Origin") == [PAGE]
    assert asked(server, "OPTIONS", "/v1/completions", Origin="http://app.example", **wanted)[0] == 403


def test_a_page_may_read_a_stream(server: ApiServer) -> None:
    body = json.dumps({"prompt": "a", "max_tokens": 2, "stream": True}).encode()
    headers = {"Content-Type": "application/json", "Origin": PAGE}
    request = urllib.request.Request(f"{server.url}/v1/completions", body, headers)
    with urllib.request.urlopen(request, timeout=60) as answer:
        assert answer.headers["Access-Control-Allow-Origin"] == PAGE
        assert answer.read().endswith(b"data: [DONE]\n\n")


@pytest.mark.parametrize("path", ["/v1/nothing//here", "/nothing%0A%20", "/v1/a/./b"])
def test_unknown_path_is_quoted_as_it_was_sent(server: ApiServer, path: str) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    connection.putrequest("GET", f"{path}?x=1")
    connection.endheaders()
    answer = connection.getresponse()
    assert answer.status == 404
    assert json.load(answer)["error"]["message"] == f"GET {path}: Not Found"
    connection.close()
