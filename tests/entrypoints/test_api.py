"""OpenAI's own client, and some worse ones, against a real replica of the tiny checkpoint."""

import http.client
import json
import socket
import threading
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from .conftest import MAX_MODEL_LEN, ApiServer, wait_until

MESSAGES: list[Any] = [{"role": "user", "content": "the quick brown"}]
GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 12, "extra_body": {"ignore_eos": True}}


@pytest.fixture(scope="module", autouse=True)
def unfinished(server: ApiServer) -> Iterator[socket.socket]:
    """A request with an incomplete body. Its timeout of 30 s passes while the other tests run."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=120) as client:
        client.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n"
            b"Content-Type: application/json\r\nContent-Length: 50\r\n\r\n{"
        )
        yield client


def test_chat(server: ApiServer) -> None:
    answer = server.client().chat.completions.create(model="tiny", messages=MESSAGES, **GREEDY)
    assert answer.id.startswith("chatcmpl-")
    assert answer.object == "chat.completion"
    assert answer.model == "tiny"
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].message.content
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 12
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 12
    assert answer.usage.prompt_tokens_details.cached_tokens >= 0


def test_a_streamed_chat_says_the_same_in_pieces(server: ApiServer) -> None:
    client = server.client()
    whole = client.chat.completions.create(model="tiny", messages=MESSAGES, **GREEDY)
    chunks = list(
        client.chat.completions.create(
            model="tiny", messages=MESSAGES, stream=True, stream_options={"include_usage": True}, **GREEDY
        )
    )
    assert (chunks[0].choices[0].delta.role, chunks[0].choices[0].delta.content) == ("assistant", "")
    *deltas, last, usage = chunks[1:]
    assert all(chunk.choices[0].finish_reason is None for chunk in deltas)
    assert last.choices[0].finish_reason == "length"
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert usage.choices == []
    assert usage.usage.completion_tokens == 12
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1])
    assert text == whole.choices[0].message.content
    assert {chunk.id for chunk in chunks} == {chunks[0].id}


def test_the_end_of_a_stream_on_the_wire(server: ApiServer) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    body = {"prompt": "the", "max_tokens": 3, "stream": True}
    connection.request(
        "POST",
        "/v1/completions",
        json.dumps(body),
        {"Content-Type": "application/json", "X-Request-Id": "abc"},
    )
    answer = connection.getresponse()
    assert answer.status == 200
    assert answer.headers["Content-Type"].startswith("text/event-stream")
    assert answer.headers["X-Request-Id"] == "abc"
    *events, rest = answer.read().split(b"\n\n")
    assert rest == b""
    assert events[-1] == b"data: [DONE]"
    assert json.loads(events[0].removeprefix(b"data: "))["id"] == "cmpl-abc"
    connection.close()


def test_completions_of_every_kind_of_prompt(server: ApiServer) -> None:
    client = server.client()
    one = client.completions.create(model="tiny", prompt="the quick", **GREEDY)
    assert one.object == "text_completion"
    assert one.usage.completion_tokens == 12
    ids = (
        client.completions.create(
            model="tiny",
            prompt="the quick",
            **GREEDY | {"extra_body": {"return_token_ids": True, "ignore_eos": True}},
        )
        .choices[0]
        .prompt_token_ids
    )
    several = client.completions.create(model="tiny", prompt=[ids, ids], n=2, **GREEDY)
    assert [choice.index for choice in several.choices] == [0, 1, 2, 3]
    assert {choice.text for choice in several.choices} == {one.choices[0].text}
    assert several.usage.prompt_tokens == 2 * len(ids)
    echoed = client.completions.create(model="tiny", prompt="the quick", echo=True, **GREEDY)
    assert echoed.choices[0].text == "the quick" + one.choices[0].text


def test_streamed_completion_with_echo_and_choices_equals_the_whole_one(server: ApiServer) -> None:
    client = server.client()
    options: dict[str, Any] = {"model": "tiny", "prompt": ["one", "two"], "n": 2, "seed": 5, "echo": True}
    whole = client.completions.create(**options, max_tokens=8)
    texts = [""] * 4
    for chunk in client.completions.create(**options, max_tokens=8, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == [choice.text for choice in whole.choices]


def test_a_seed_repeats_the_text_and_its_choices_differ(server: ApiServer) -> None:
    def texts(seed: int | None, headers: dict[str, str] | None = None) -> list[str]:
        answer = server.client().chat.completions.create(
            model="tiny",
            messages=MESSAGES,
            n=3,
            max_tokens=16,
            temperature=1.5,
            seed=seed,
            extra_headers=headers,
        )
        return [choice.message.content or "" for choice in answer.choices]

    first = texts(7)
    assert texts(7) == first
    assert len(set(first)) == 3
    assert texts(8) != first
    assert texts(None, {"X-FD-Seed": "7"}) == first
    assert texts(7, {"X-FD-Seed": "8"}) == first


def test_logprobs_of_a_chat(server: ApiServer) -> None:
    answer = server.client().chat.completions.create(
        model="tiny", messages=MESSAGES, logprobs=True, top_logprobs=3, **GREEDY
    )
    content = answer.choices[0].logprobs.content
    assert len(content) == 12
    for entry in content:
        assert entry.logprob <= 0
        assert len(entry.top_logprobs) == 3
        assert entry.top_logprobs[0].token == entry.token
    joined = b"".join(bytes(entry.bytes) for entry in content)
    assert joined.decode(errors="replace") == answer.choices[0].message.content


def test_logprobs_of_a_completion_are_the_same_in_pieces(server: ApiServer) -> None:
    client = server.client()
    whole = client.completions.create(model="tiny", prompt="the", logprobs=2, **GREEDY).choices[0].logprobs
    assert len(whole.tokens) == len(whole.token_logprobs) == len(whole.top_logprobs) == 12
    parts = [
        chunk.choices[0].logprobs
        for chunk in client.completions.create(model="tiny", prompt="the", logprobs=2, stream=True, **GREEDY)
    ]
    assert [token for part in parts for token in part.tokens] == whole.tokens
    assert [offset for part in parts for offset in part.text_offset] == whole.text_offset


def test_a_stop_string_ends_the_text_before_it(server: ApiServer) -> None:
    client = server.client()
    text = client.completions.create(model="tiny", prompt="the", **GREEDY).choices[0].text
    stop = text[5:8]
    expected = text[: text.index(stop)]
    answer = client.completions.create(model="tiny", prompt="the", stop=stop, **GREEDY)
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == (expected, "stop")
    kept = client.completions.create(
        model="tiny", prompt="the", stop=[stop], temperature=0, max_tokens=12,
        extra_body={"include_stop_str_in_output": True, "ignore_eos": True},
    )  # fmt: skip
    assert kept.choices[0].text == expected + stop
    wait_until(lambda: server.metric("num_requests_running") == 0, "the stopped text is not computed further")


def test_token_limits_are_what_is_left_of_the_context(server: ApiServer) -> None:
    answer = server.client().completions.create(
        model="tiny", prompt=[5] * (MAX_MODEL_LEN - 4), extra_body={"ignore_eos": True}
    )
    assert answer.usage
    assert answer.usage.completion_tokens == 4
    with pytest.raises(openai.BadRequestError) as caught:
        server.client().completions.create(model="tiny", prompt=[5] * MAX_MODEL_LEN)
    assert caught.value.code == "context_length_exceeded"
    assert str(MAX_MODEL_LEN) in caught.value.message


def test_models(server: ApiServer) -> None:
    client = server.client()
    card = client.models.list().data[0]
    assert (card.id, card.owned_by) == ("tiny", "FastDeploy")
    assert card.model_extra
    assert card.model_extra["max_model_len"] == MAX_MODEL_LEN
    assert client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


@pytest.mark.parametrize("name", [None, "default", "tiny"])
def test_the_model_field_is_optional(server: ApiServer, name: str | None) -> None:
    assert server.post("/v1/completions", {"prompt": "a", "max_tokens": 1, "model": name})[0] == 200


@pytest.mark.parametrize(
    ("path", "body", "headers", "status", "param"),
    [
        ("/v1/chat/completions", {"messages": MESSAGES, "model": "gpt-9"}, {}, 404, "model"),
        ("/v1/chat/completions", {"messages": MESSAGES, "temperature": -1}, {}, 400, "temperature"),
        ("/v1/chat/completions", b"not json", {}, 400, None),
        ("/v1/chat/completions", b'{"messages": "\xff"}', {}, 400, None),
        ("/v1/chat/completions", b"[" * 50_000, {}, 400, None),
        ("/v1/chat/completions", b"{}", {"Content-Type": "text/plain"}, 415, None),
        ("/v1/completions", b"{}", {"Content-Encoding": "gzip"}, 415, None),
        ("/v1/chat/completions", {"messages": MESSAGES, "chat_template": "{{ x."}, {}, 400, "chat_template"),
        ("/v1/completions", {"prompt": ""}, {}, 400, "prompt"),
        ("/v1/completions", {"prompt": [100_000]}, {}, 400, "prompt"),
        ("/v1/completions", {"prompt": "a"}, {"X-FD-Seed": "-1"}, 400, "X-FD-Seed"),
        ("/v1/completions", {"prompt": "a", "request_id": "a b"}, {}, 400, "request_id"),
        ("/v1/completions", b'"' + b"x" * (11 << 20) + b'"', {}, 413, None),
        ("/v1/nothing", {}, {}, 404, None),
        ("/v1/no%0Athing", {}, {}, 404, None),
        ("/v1/models", {}, {}, 405, None),
    ],
)
def test_errors_have_openais_shape(
    server: ApiServer, path: str, body: object, headers: dict[str, str], status: int, param: str | None
) -> None:
    got, answer = server.post(path, body, headers)
    assert got == status
    assert set(answer["error"]) == {"message", "type", "param", "code"}
    assert answer["error"]["param"] == param
    assert "\n" not in answer["error"]["message"]


@pytest.mark.parametrize(
    "text",
    [
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: -5\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 50\r\n\r\n{}",
        b"GARBAGE\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: x\r\nA: " + b"a" * 70_000 + b"\r\n\r\n",
    ],
)
def test_broken_http_gets_a_4xx_or_no_answer(server: ApiServer, text: bytes) -> None:
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as client:
        client.sendall(text)
        client.shutdown(socket.SHUT_WR)
        answer = client.recv(4096)
    assert answer == b"" or answer.split()[1].startswith(b"4")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
FIELDS = [
    "messages",
    "prompt",
    "temperature",
    "top_p",
    "top_k",
    "n",
    "stop",
    "seed",
    "logprobs",
    "top_logprobs",
    "stream",
    "stream_options",
    "echo",
    "stop_token_ids",
    "min_tokens",
    "chat_template_kwargs",
    "model",
]


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(fields=st.dictionaries(st.sampled_from(FIELDS), json_values, max_size=4), chat=st.booleans())
def test_no_body_is_answered_with_a_server_error(
    server: ApiServer, fields: dict[str, object], chat: bool
) -> None:
    base = {"messages": MESSAGES} if chat else {"prompt": "a"}
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    body = json.dumps({**base, **fields, "max_tokens": 2})
    path = "/v1/chat/completions" if chat else "/v1/completions"
    connection.request("POST", path, body, {"Content-Type": "application/json"})
    answer = connection.getresponse()
    text = answer.read()
    connection.close()
    assert answer.status in (200, 400, 404), text


@pytest.mark.parametrize("stream", [True, False])
def test_disconnect_frees_the_place_in_the_batch(server: ApiServer, stream: bool) -> None:
    """This holds before the first token too, and for answers that are sent only at the end."""
    body = json.dumps(
        {"prompt": "a", "n": 6, "stream": stream, "max_tokens": 500, "ignore_eos": True}
    ).encode()
    before = server.metric("generation_tokens_total")
    client = socket.create_connection(("127.0.0.1", server.port))
    client.sendall(
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        b"Content-Length: %d\r\n\r\n%s" % (len(body), body)
    )
    wait_until(lambda: server.metric("num_requests_running") > 0, "the request runs")
    client.close()
    wait_until(lambda: server.metric("num_requests_running") == 0, "the request is cancelled")
    wait_until(lambda: server.metric("generation_tokens_total") > before, "its tokens are counted")
    assert server.metric("generation_tokens_total") - before < 6 * 500


def test_parallel_requests_are_batched_and_counted(server: ApiServer) -> None:
    before = {name: server.metric(name) for name in ("requests_number_total", "request_success_total")}
    answers: list[tuple[int, dict[str, Any]]] = []

    def ask(index: int) -> None:
        answers.append(
            server.post("/v1/completions", {"prompt": f"number {index}", "max_tokens": 8, "seed": 1})
        )

    threads = [threading.Thread(target=ask, args=(index,)) for index in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [status for status, _ in answers] == [200] * 16
    for name, value in before.items():
        assert server.metric(name) == value + 16
    wait_until(lambda: server.metric("num_requests_running") == 0, "all done")
    assert server.metric("free_gpu_block_num") == server.metric("max_gpu_block_num") == 32
    assert server.metric("time_to_first_token_seconds_count") > 0


def test_tokens_are_counted_as_they_are_written(server: ApiServer) -> None:
    """An answer may take minutes; its load must be visible before its end."""
    names = (
        "generation_tokens_total",
        "time_to_first_token_seconds_count",
        "time_per_output_token_seconds_count",
    )
    before = [server.metric(name) for name in names]
    stream = server.client().completions.create(
        model="tiny", prompt="a", n=8, max_tokens=400, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    now = [server.metric(name) for name in names]
    assert before[0] < now[0] < before[0] + 8 * 400
    assert now[1] == before[1] + 1
    for _ in stream:
        pass
    expected = [before[0] + 8 * 400, before[1] + 1, before[2] + 8 * 399]
    assert [server.metric(name) for name in names] == expected


def test_a_repeated_prompt_is_found_in_the_prefix_cache(server: ApiServer) -> None:
    prompt = [7] * 200
    server.client().completions.create(model="tiny", prompt=prompt, max_tokens=1)
    again = server.client().completions.create(model="tiny", prompt=prompt, max_tokens=1)
    assert again.usage
    assert again.usage.prompt_tokens_details
    assert (again.usage.prompt_tokens_details.cached_tokens or 0) >= 128
    assert server.metric("prefix_cache_token_num_total") >= 128
    assert server.metric("prefix_cache_query_token_num_total") >= 400


def test_every_request_leaves_one_line(server: ApiServer) -> None:
    server.post(
        "/v1/completions", {"prompt": "a", "max_tokens": 2, "ignore_eos": True, "request_id": "find-me"}
    )
    lines = wait_until(lambda: [x for x in server.log().splitlines() if "request=find-me " in x], "its line")
    assert len(lines) == 1
    for part in ("POST /v1/completions", "status=200", "output=2", "ttft=", "duration=", "finish=length"):
        assert part in lines[0]


def test_a_path_cannot_forge_a_line_of_the_log(server: ApiServer) -> None:
    server.get("/v1/x%0Aforged%20line")
    wait_until(lambda: "/v1/x%0Aforged%20line" in server.log(), "its line")
    assert not any(line.startswith("forged") for line in server.log().splitlines())


def test_health_and_ping(server: ApiServer) -> None:
    status, health = server.health()
    worker = health.pop("worker")
    assert (status, health) == (200, {"status": "ready", "model": "tiny"})
    assert worker["pid"] in [process.pid for process in server.children()]
    assert (worker["requests"], worker["silent"]) == (0, 0)
    assert server.get("/ping")[0] == 200
    assert server.get("/metrics")[0] == 404, "it has a port of its own"


def test_incomplete_request_body_is_answered_408(
    unfinished: socket.socket,
) -> None:
    assert unfinished.recv(1 << 16).startswith(b"HTTP/1.1 408 ")
