"""/v1/responses and /v1/abort_requests through the router, with real replicas."""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import os
import queue
import re
import signal
from collections.abc import Callable
from typing import Any

import openai
import pytest
import requests

from ..entrypoints.conftest import ApiServer
from .conftest import RouterProcess
from .fake_engine import wait_until
from .test_real_replicas import resumes
from .test_real_replicas import router as router
from .test_real_replicas import start_replica as start_replica

LONG: dict[str, Any] = {"input": "Tell me", "max_output_tokens": 450, "extra_body": {"ignore_eos": True}}
#: A function whose calls are long.
NOTE = {
    "type": "function",
    "name": "note",
    "parameters": {
        "properties": {"text": {"type": "string", "minLength": 300, "maxLength": 400}},
        "required": ["text"],
    },
}
_CACHED = re.compile(rb'"cached_tokens":\d+')


@pytest.fixture
def client(router: RouterProcess) -> Any:
    return openai.OpenAI(base_url=f"{router.url}/v1", api_key="none", max_retries=0, timeout=60)


@pytest.fixture
def replicas(router: RouterProcess, start_replica: Callable[[int], ApiServer]) -> list[ApiServer]:
    started = [start_replica(number) for number in range(2)]
    wait_until(lambda: {replica.url for replica in started} <= router.urls(), "both are there", deadline=90)
    return started


def test_the_bytes_of_a_stream_do_not_depend_on_the_death_of_its_replica(
    router: RouterProcess, client: Any, replicas: list[ApiServer]
) -> None:
    whole = client.responses.create(model="tiny", **LONG)
    assert len(whole.output_text) > 100
    assert whole.usage.output_tokens == 450

    begun: queue.SimpleQueue[str] = queue.SimpleQueue()
    bodies: list[dict[str, Any]] = [
        {"seed": seed, "temperature": 1.3, **extra} for seed in (1, 2) for extra in ({}, {"top_logprobs": 1})
    ]
    bodies.append({"tools": [NOTE], "tool_choice": "required", "truncate_prompt_tokens": 30, "seed": 3})
    undisturbed = [stream(router, number, body, begun) for number, body in enumerate(bodies)]
    assert b"function_call_arguments.delta" in undisturbed[-1]
    while not begun.empty():
        begun.get()
    before = resumes(router)
    with concurrent.futures.ThreadPoolExecutor(5) as pool:
        waiting = [pool.submit(stream, router, number, body, begun) for number, body in enumerate(bodies)]
        os.killpg(replicas[int(begun.get(timeout=60))].process.pid, signal.SIGKILL)
        assert [each.result() for each in waiting] == undisturbed
    assert resumes(router) > before


def stream(
    router: RouterProcess, number: int, fields: dict[str, Any], begun: queue.SimpleQueue[str]
) -> bytes:
    """Return the bytes of a stream without what depends on the time and the cache."""
    body = {"input": "Tell me: é好?", "max_output_tokens": 450, "stream": True, "ignore_eos": True, **fields}
    headers = {"X-Request-Id": f"stream-{number}"}
    with requests.post(
        f"{router.url}/v1/responses", json=body, headers=headers, stream=True, timeout=60
    ) as answer:
        assert answer.status_code == 200
        pieces = answer.iter_content(None)
        first = next(pieces)
        begun.put(answer.headers["X-FD-Replica"])
        data = first + b"".join(pieces)
    assert data.endswith(b"data: [DONE]\n\n")
    return re.sub(rb'"created_at":\d+', b"", _CACHED.sub(b"", data))


def test_aborted_requests_are_not_resumed_elsewhere(
    router: RouterProcess, client: Any, replicas: list[ApiServer]
) -> None:
    before = resumes(router)
    names = [f"abort-{number}" for number in range(4)]

    def ended(name: str) -> tuple[str, str, str]:
        options = {"extra_headers": {"X-Request-Id": name}, **LONG}
        *_, last = client.responses.create(model="tiny", stream=True, **options)
        return last.type, last.response.status, last.response.id

    with contextlib.ExitStack() as stack:
        for replica in replicas:
            # Without their engines the requests cannot end by themselves.
            engine = replica.children()[1]
            engine.suspend()
            stack.callback(engine.resume)
        pool = stack.enter_context(concurrent.futures.ThreadPoolExecutor(4))
        streams = {name: pool.submit(ended, name) for name in names}
        wait_until(lambda: sum(map(num_open, replicas)) == 4, "all are at a replica")

        answer = abort(router, {"req_ids": ["abort-0", "resp_abort-1", "no-such-id"]})
        assert {each["request_id"] for each in answer["aborted"]} == {"resp_abort-0", "resp_abort-1"}
        assert answer["not_found"] == ["no-such-id"]
        for name in names[:2]:
            assert streams[name].result(30) == ("response.failed", "cancelled", f"resp_{name}")
        assert sum(map(num_open, replicas)) == 2

        answer = abort(router, {"abort_all": True})
        assert {each["request_id"] for each in answer["aborted"]} == {"resp_abort-2", "resp_abort-3"}
        for name in names[2:]:
            assert streams[name].result(30) == ("response.failed", "cancelled", f"resp_{name}")
    router.wait_idle()
    assert resumes(router) == before


def num_open(replica: ApiServer) -> int:
    return int(json.loads(replica.get("/load")[1])["server_load"])


def test_what_the_router_passes_on_beside_generation(
    router: RouterProcess, start_replica: Callable[[int], ApiServer]
) -> None:
    replica = start_replica(0)
    wait_until(lambda: replica.url in router.urls(), "it is there", deadline=90)
    assert router.get("/config-info").json()["served_model_name"] == "tiny"
    tokens = requests.post(f"{router.url}/tokenize", json={"prompt": "a b"}, timeout=20).json()["tokens"]
    text = requests.post(f"{router.url}/detokenize", json={"tokens": tokens}, timeout=20).json()["prompt"]
    assert text.endswith("a b")
    assert "/v1/responses" in router.get("/openapi.json").json()["paths"]
    refused = requests.post(f"{router.url}/v1/abort_requests", json={}, timeout=20)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "req_ids")


def abort(router: RouterProcess, body: dict[str, Any]) -> dict[str, Any]:
    answer = requests.post(f"{router.url}/v1/abort_requests", json=body, timeout=20)
    assert answer.status_code == 200, answer.text
    assert answer.json()["status"] == "success"
    result: dict[str, Any] = answer.json()["result"]
    return result
