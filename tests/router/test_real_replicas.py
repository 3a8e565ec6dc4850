"""The router with real replicas: an answer survives whatever kills its replica.

The other tests use replicas without a model; these show that real replicas behave the same.
"""

import concurrent.futures
import json
import os
import queue
import signal
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from fastdeploy.tokenizer.tokenizer import Tokenizer

from ..entrypoints.conftest import TINY, ApiServer
from .conftest import RouterProcess
from .fake_engine import wait_until

TINY_TOKENIZER = Tokenizer.from_directory(TINY)
NOTE = {"type": "string", "minLength": 300, "maxLength": 400}
PARAMETERS = {"properties": {"text": NOTE}, "required": ["text"]}
CALLS = {
    "tools": [{"type": "function", "function": {"name": "note", "parameters": PARAMETERS}}],
    "tool_choice": "required",
    # The ids of calls follow from it.
    "request_id": "calls",
}
LONG_JSON = {
    "type": "array",
    "items": {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]},
    "minItems": 90,
}
BODIES: list[tuple[str, dict[str, object]]] = [
    ("/v1/completions", {"prompt": "a b", "n": 3, "stream_options": {"include_usage": True}}),
    ("/v1/completions", {"prompt": "c", "logprobs": 2, "temperature": 1.5}),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}], "temperature": 1.2}),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "y"}], "guided_json": LONG_JSON}),
    # Within a tool call, and within reasoning.
    (
        "/v1/chat/completions",
        {**CALLS, "prompt_token_ids": [5, 6], "separate_reasoning": False, "temperature": 1.2},
    ),
    ("/v1/chat/completions", {"prompt_token_ids": TINY_TOKENIZER.encode("<think>"), "temperature": 1.2}),
]


@pytest.fixture(scope="module")
def router(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RouterProcess]:
    # The replica's signs of life come every five seconds.
    flags = ("--progress-timeout-secs", "8")
    router = RouterProcess(tmp_path_factory.mktemp("router"), *flags)
    yield router
    router.stop()


@pytest.fixture
def start_replica(
    router: RouterProcess, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[int], ApiServer]]:
    with ExitStack() as stack:

        def start(number: int) -> ApiServer:
            directory = tmp_path_factory.mktemp("replica")
            flags = ["--router", router.url, "--timeout-graceful-shutdown", "0"]
            flags += ["--reasoning-parser", "qwen3"]
            flags += ["--data-parallel-size", "8", "--local-data-parallel-id", str(number)]
            return stack.enter_context(ApiServer(directory, *flags))

        yield start


def stream(
    router: RouterProcess, path: str, body: dict[str, object], seed: int, begun: queue.SimpleQueue[str]
) -> dict[int, list[object]]:
    """Return the events by choice, and usage as -1; put the replica into `begun` at the first event."""
    fields = {"max_tokens": 450, "stream": True, "ignore_eos": True, "seed": seed, **body}
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(router.url + path, json.dumps(fields).encode(), headers)
    with urllib.request.urlopen(request, timeout=60) as answer:
        first = answer.readline()
        begun.put(answer.headers["X-FD-Replica"])
        lines = (first + answer.read()).splitlines()
    *whole, done = [line.removeprefix(b"data: ") for line in lines if line]
    assert done == b"[DONE]"
    events = [json.loads(event) for event in whole]
    assert len({(event["id"], event["created"]) for event in events}) == 1
    said: dict[int, list[object]] = {}
    for event in events:
        for choice in event["choices"]:
            said.setdefault(choice["index"], []).append(choice)
        if usage := event.get("usage"):
            # The cached share of the prompt depends on the replica.
            said.setdefault(-1, []).append({**usage, "prompt_tokens_details": None})
    return said


ENDS: dict[str, Callable[[ApiServer], object]] = {
    "its model's process is killed": lambda replica: replica.children()[1].kill(),
    "it is stopped and gives its streams no time": lambda replica: replica.process.terminate(),
    "its HTTP process is killed": lambda replica: replica.children()[0].kill(),
    "its model's process hangs": lambda replica: replica.children()[1].suspend(),
    "all of it is killed": lambda replica: os.killpg(replica.process.pid, signal.SIGKILL),
}


@pytest.mark.parametrize("count", [2, pytest.param(len(ENDS), marks=pytest.mark.slow)])
def test_streams_continue_however_a_replica_ends(
    router: RouterProcess, start_replica: Callable[[int], ApiServer], count: int
) -> None:
    replicas = {str(number): start_replica(number) for number in range(count + 1)}
    urls = {replica.url for replica in replicas.values()}
    wait_until(lambda: urls <= router.urls(), "all are there", deadline=90)
    before = resumes(router)
    for seed, (how, end) in enumerate([*ENDS.items()][:count]):
        undisturbed = [stream(router, *body, seed, queue.SimpleQueue()) for body in BODIES]
        assert "arguments" in json.dumps(undisturbed[-2])
        assert "reasoning_content" in json.dumps(undisturbed[-1])
        begun: queue.SimpleQueue[str] = queue.SimpleQueue()
        with concurrent.futures.ThreadPoolExecutor(2 * len(BODIES)) as pool:
            streams = [pool.submit(stream, router, *body, seed, begun) for body in 2 * BODIES]
            end(replicas[begun.get(timeout=60)])
            assert [stream.result() for stream in streams] == 2 * undisturbed, how
    # At least one was resumed: on a busy machine some streams may end before their replica does.
    assert resumes(router) > before


def test_unstreamed_answer_continues_when_its_replica_dies(
    router: RouterProcess, start_replica: Callable[[int], ApiServer]
) -> None:
    """The answer is long enough for a draft, which the replica sends once per second."""
    fields = {"prompt": "a", "n": 24, "max_tokens": 480, "ignore_eos": True, "seed": 5, "temperature": 1.2}
    replicas = [start_replica(0)]
    wait_until(lambda: replicas[0].url in router.urls(), "it is there", deadline=90)
    _, undisturbed = whole(router, fields)
    for number in range(1, 6):
        replicas.append(start_replica(number))
        wait_until(lambda: replicas[-1].url in router.urls(), "another one is there", deadline=90)
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            answer = pool.submit(whole, router, fields)
            wait_until(lambda: any(map(is_busy, replicas)), "one of them has it")
            [busy] = filter(is_busy, replicas)
            time.sleep(1.2)
            busy.children()[1].kill()
            replicas.remove(busy)
            resumed_by, choices = answer.result()
        assert choices == undisturbed
        if resumed_by is not None:
            return
    pytest.fail("the answer was restarted each time")


def whole(router: RouterProcess, fields: dict[str, object]) -> tuple[str | None, list[object]]:
    """Return the replica that resumed the answer, or None, and the choices."""
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(router.url + "/v1/completions", json.dumps(fields).encode(), headers)
    with urllib.request.urlopen(request, timeout=60) as answer:
        return answer.headers["X-FD-Resumed"], json.load(answer)["choices"]


def is_busy(replica: ApiServer) -> bool:
    return replica.metric("num_requests_running") > 0


def resumes(router: RouterProcess) -> float:
    return sum(float(line.rpartition(" ")[2]) for line in router.metric("fd_router_resumes_total"))
