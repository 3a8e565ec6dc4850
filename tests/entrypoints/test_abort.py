"""POST /v1/abort_requests of a replica: choices end with the text that they have."""

from __future__ import annotations

import concurrent.futures
import json
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import msgspec
import pytest

from fastdeploy.entrypoints.openai import answers

from .conftest import ApiServer, wait_until

PATH = "/v1/abort_requests"
LONG = {"ignore_eos": True, "max_tokens": 400}
BODIES: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "the", **LONG},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "the"}], **LONG},
    "/v1/responses": {"input": "the", "ignore_eos": True, "max_output_tokens": 400},
}


@contextmanager
def begun(server: ApiServer, path: str, request_id: str, **fields: Any) -> Iterator[Iterator[bytes]]:
    """Start a stream; yield its lines from the second on."""
    body = json.dumps(BODIES[path] | {"stream": True, **fields}).encode()
    headers = {"Content-Type": "application/json", "X-Request-Id": request_id}
    request = urllib.request.Request(server.url + path, body, headers)
    with urllib.request.urlopen(request, timeout=60) as answer:
        answer.readline()
        yield answer


def abort(server: ApiServer, **body: Any) -> answers.AbortResult:
    status, answer = server.post(PATH, body)
    assert status == 200, answer
    return msgspec.convert(answer, answers.Abortion).result


def last_event(lines: Iterator[bytes]) -> dict[str, Any]:
    *_, event, done = [line for line in lines if line.startswith(b"data: ")]
    assert done == b"data: [DONE]\n"
    return json.loads(event.removeprefix(b"data: "))


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize("with_prefix", [False, True])
def test_a_stream_is_ended_by_its_id(server: ApiServer, path: str, with_prefix: bool) -> None:
    prefix = {"/v1/completions": "cmpl-", "/v1/chat/completions": "chatcmpl-", "/v1/responses": "resp_"}[path]
    with begun(server, path, "one") as lines, begun(server, path, "other"):
        result = abort(server, req_ids=[f"{prefix}one" if with_prefix else "one", "three"])
        assert [each.request_id for each in result.aborted] == [f"{prefix}one"]
        assert 0 < result.aborted[0].output_token_count < 400
        assert result.not_found == ["three"]
        event = last_event(lines)
    if path == "/v1/responses":
        assert (event["type"], event["response"]["status"]) == ("response.failed", "cancelled")
        assert event["response"]["output"][0]["content"][0]["text"]
    else:
        assert event["choices"][0]["finish_reason"] == "abort"


def test_all_choices_of_a_whole_response_end_with_their_text(server: ApiServer) -> None:
    body = BODIES["/v1/completions"] | {"n": 3}
    # Tokens of earlier requests must not count.
    wait_until(lambda: server.metric("num_requests_running") == 0, "the server is idle")
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        before = server.metric("generation_tokens_total")
        waiting = pool.submit(server.post, "/v1/completions", body)
        wait_until(lambda: server.metric("generation_tokens_total") > before + 30, "its choices have tokens")
        assert len(abort(server, abort_all=True).aborted) == 1
        status, answer = waiting.result()
    assert status == 200
    assert [choice["finish_reason"] for choice in answer["choices"]] == ["abort"] * 3
    assert all(choice["text"] for choice in answer["choices"])
    assert 0 < answer["usage"]["completion_tokens"] < 1200
    wait_until(lambda: server.metric("num_requests_running") == 0, "the engine has none either")
    assert abort(server, abort_all=True) == answers.AbortResult(aborted=[], not_found=[])


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "req_ids"),
        ({"req_ids": []}, "req_ids"),
        ({"req_ids": [5]}, "req_ids[0]"),
        ({"abort_all": 1}, "abort_all"),
    ],
)
def test_a_request_must_say_what_to_end(server: ApiServer, body: dict[str, Any], param: str) -> None:
    status, answer = server.post(PATH, body)
    assert (status, answer["error"]["param"]) == (400, param)
