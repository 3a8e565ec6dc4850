"""An answer that breaks off anywhere and is resumed at another replica equals the uninterrupted one.

There are two real replicas. The first answers each request in full and sends marks: the tokens behind each
event, or the drafts of a whole answer. For each mark, the second is asked to resume the answer from there.
"""

from __future__ import annotations

import concurrent.futures
import http.client
import itertools
import json
import socket
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdeploy.common.cli import MAX_BODY_BYTES
from fastdeploy.common.resumption import Delivered, Resumption, encode_resumption, marks_of

from ..fake_router import FakeRouter
from .conftest import ApiServer, wait_until

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
DONE = b"data: [DONE]"
TALK = {"messages": [{"role": "user", "content": "Tell me: é好?"}]}


@dataclass(frozen=True)
class Replica:
    server: ApiServer
    token: str

    def post(self, path: str, body: bytes, headers: dict[str, str]) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.server.port, timeout=60)
        connection.request("POST", path, body, headers)
        answer = connection.getresponse()
        return answer.status, answer.read()

    def resume(self, resumption: Resumption, **headers: str) -> tuple[int, bytes]:
        return self.post(
            "/internal/resume",
            encode_resumption(resumption),
            {
                "Content-Type": "application/msgpack",
                "X-FD-Token": self.token,
                "X-FD-Marks": "1",
                "X-FD-Seed": "11",
                **headers,
            },
        )


@dataclass(frozen=True)
class Stream:
    """The events that a replica has sent, or the first of them."""

    blocks: tuple[bytes, ...]

    @classmethod
    def of(cls, answer: bytes) -> Stream:
        assert answer.endswith(DONE + b"\n\n"), answer
        return cls(tuple(answer.removesuffix(b"\n\n").split(b"\n\n")))

    def before(self, cut: int) -> Stream:
        return Stream(self.blocks[:cut])

    @cached_property
    def events(self) -> list[bytes]:
        """The events as a client gets them, without marks."""
        return [block.partition(b"\n")[0] for block in self.blocks]

    @property
    def marks(self) -> list[bytes]:
        return [mark for block in self.blocks if (mark := block.partition(b"\n: fd ")[2])]

    def of_choices(self) -> dict[int | None, list[bytes]]:
        """Return the events by choice, None for those of no choice; the order between choices may vary."""
        events = defaultdict(list)
        for event in self.events:
            choices = [] if event == DONE else data_of(event)["choices"]
            events[choices[0]["index"] if choices else None].append(_without_cache(event))
        return events

    def resumption(self, path: str, body: bytes) -> Resumption:
        head = data_of(self.events[0])
        return Resumption(path, body, head["id"], head["created"], marks_of(self.marks))


def data_of(event: bytes) -> dict[str, Any]:
    return json.loads(event.removeprefix(b"data: "))


def _without_cache(event: bytes) -> bytes:
    """Return the event without cached tokens, whose number depends on the replica."""
    if event == DONE or not (usage := (data := data_of(event)).get("usage")):
        return event
    cached = usage.get("prompt_tokens_details", {}).pop("cached_tokens", 0)
    assert 0 <= cached <= usage["prompt_tokens"]
    return json.dumps(data).encode()


@pytest.fixture(scope="module")
def replicas(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Replica, Replica]]:
    router = FakeRouter()
    # With small blocks, tokens of both replicas share blocks; with few, long texts are preempted.
    flags = ("--router", router.address, "--block-size", "16", "--num-gpu-blocks-override", "16")
    with (
        ApiServer(tmp_path_factory.mktemp("first"), *flags) as first,
        ApiServer(tmp_path_factory.mktemp("second"), *flags) as second,
    ):
        wait_until(lambda: len({post["port"] for post in router.bodies("/register")}) == 2, "registered")
        tokens = {post["port"]: post["token"] for post in router.bodies("/register")}
        yield Replica(first, tokens[str(first.port)]), Replica(second, tokens[str(second.port)])
        # A request is logged after its response.
        wait_until(lambda: b"POST /internal/resume" in logs_of(first, second), "the resumption is logged")
        assert not [token for token in tokens.values() if token.encode() in logs_of(first, second)]
    router.close()


def logs_of(*servers: ApiServer) -> bytes:
    return b"".join(file.read_bytes() for server in servers for file in server.output.parent.iterdir())


def stream(replica: Replica, path: str, body: bytes, **headers: str) -> Stream:
    wanted = {"Content-Type": "application/json", "X-FD-Marks": "1", "X-FD-Seed": "11", **headers}
    status, answer = replica.post(path, body, wanted)
    assert status == 200, answer
    return Stream.of(answer)


def check_cuts(
    replicas: tuple[Replica, Replica], path: str, request: dict[str, Any], **headers: str
) -> Stream:
    """Cut the stream of this request behind each event of a choice, and resume it there."""
    first, second = replicas
    body = json.dumps({"stream": True, "stream_options": {"include_usage": True}, **request}).encode()
    whole = stream(first, path, body, **headers)

    def check(cut: int) -> None:
        before = whole.before(cut)
        status, answer = second.resume(before.resumption(path, body), **headers)
        assert status == 200, answer
        after = Stream.of(answer)
        joined = Stream(before.blocks + after.blocks)
        assert joined.of_choices() == whole.of_choices(), f"cut behind event {cut}"
        assert marks_of(joined.marks) == marks_of(whole.marks), f"cut behind event {cut}"

    # The last two are the usage, which a client gets once, and [DONE].
    cuts = range(1, len(whole.blocks) - 1)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        list(pool.map(check, cuts))
    return whole


def text_of(whole: Stream) -> str:
    return "".join(
        data_of(event)["choices"][0].get("text", "")
        for event in whole.events
        if event != DONE and data_of(event)["choices"]
    )


@pytest.mark.parametrize(
    "request_",
    [
        {"max_tokens": 12},
        {"max_tokens": 12, "logprobs": True, "top_logprobs": 2, "return_token_ids": True},
        {"max_tokens": 8, "n": 3, "temperature": 1.5, "top_k": 50, "seed": -5},
        {"max_tokens": 9, "stream_options": None},
        {"max_tokens": 9, "request_id": "mine"},
        {"max_tokens": 6, "n": 2, "prompt_logprobs": 1, "return_token_ids": True},
        {"max_tokens": 20, "max_streaming_response_tokens": 3, "logprobs": True, "stop": ["e", "th"], "n": 2},
        {"max_tokens": 40, "n": 2, "guided_json": {"items": {"type": "integer"}, "minItems": 3}},
        {"max_tokens": 12, "bad_words": ["1"], "logit_bias": {"50": 3}, "guided_regex": "[a-z0-9]*"},
        {"max_tokens": 9, "n": 2, "stop": ["e", "th"], "stream_options": {"continuous_usage_stats": True}},
    ],
    ids=lambda request: " ".join(request),
)
def test_chats(replicas: tuple[Replica, Replica], request_: dict[str, Any]) -> None:
    check_cuts(replicas, CHAT, TALK | request_)


@pytest.mark.parametrize(
    "request_",
    [
        {"max_tokens": 10, "temperature": 0},
        {"max_tokens": 10, "echo": True, "n": 2},
        {"max_tokens": 10, "return_token_ids": True, "echo": True},
        {"max_tokens": 9, "echo": True, "stream_options": {"continuous_usage_stats": True}},
        {"max_tokens": 14, "logprobs": 1},
        {"max_tokens": 8, "logprobs": 1, "echo": True, "n": 2},
        {"max_tokens": 0, "logprobs": 1, "echo": True, "n": 2},
        {"max_tokens": 8, "logprobs": 1, "echo": True, "stop": ["e", "th"], "stop_token_ids": [5, 6, 7]},
        {"max_tokens": 14, "logprobs": 1, "return_token_ids": True, "stop_token_ids": list(range(0, 512, 9))},
        {"max_tokens": 8, "prompt_logprobs": 0, "n": 2},
        {"max_tokens": 12, "max_streaming_response_tokens": 5, "echo": True, "logprobs": 1},
        {"max_tokens": 8, "prompt_logprobs": 3, "echo": True, "logprobs": 1},
        {"prompt": ["one", "two", "three"], "n": 2, "max_tokens": 5},
        {"prompt": [[40, 41, 42], [43]], "max_tokens": 5, "echo": True},
        {"max_tokens": 14, "repetition_penalty": 1.8, "presence_penalty": 1.5, "frequency_penalty": 1.0},
        # The likeliest tokens end the text, but must not be drawn at first.
        {"max_tokens": 20, "min_tokens": 9, "stop_token_ids": list(range(0, 512, 3))},
        {"max_tokens": 10, "min_tokens": 6, "stop": ["e", "a", "t"], "include_stop_str_in_output": True},
        {"max_tokens": 6, "n": 2, "ignore_eos": True, "top_p": 0.9, "min_p": 0.01},
    ],
    ids=lambda request: " ".join(request),
)
def test_completions(replicas: tuple[Replica, Replica], request_: dict[str, Any]) -> None:
    check_cuts(replicas, COMPLETIONS, {"prompt": "Once upon a time"} | request_)


def test_choices_of_which_some_have_ended(replicas: tuple[Replica, Replica]) -> None:
    request = {"max_tokens": 20, "n": 4, "stop": ["e", "a", "o", " "]}
    marks = check_cuts(replicas, CHAT, TALK | request).marks
    ends = [index for index, mark in enumerate(marks) if mark.endswith(b".")]
    # The first choice ends long before the last.
    assert ends[0] < len(marks) / 2


def test_any_name_of_the_model_is_accepted_and_answered_with_the_real_one(
    replicas: tuple[Replica, Replica],
) -> None:
    server = replicas[0].server
    status, answer = server.post(COMPLETIONS, {"prompt": "a", "max_tokens": 1, "model": "null"})
    assert (status, answer["model"]) == (200, "tiny")
    assert server.client().models.retrieve("null").id == "tiny"


def fits(request: dict[str, Any]) -> bool:
    min_tokens, max_tokens = request.get("min_tokens", 0), request["max_tokens"]
    return bool(min_tokens <= max_tokens)


texts = st.text(alphabet="ab é好", min_size=1, max_size=12)
requests = st.fixed_dictionaries(
    {"prompt": texts | st.lists(texts, min_size=1, max_size=2), "max_tokens": st.integers(1, 12)},
    optional={
        "n": st.integers(1, 3),
        "temperature": st.sampled_from([0, 0.7, 2.0]),
        "stop": st.lists(st.sampled_from(["e", " a", "ing", "\ufffd", "th", "\ufffd\ufffd!"]), max_size=3),
        "stop_token_ids": st.lists(st.integers(0, 511), max_size=100),
        "min_tokens": st.integers(1, 9),
        "include_stop_str_in_output": st.booleans(),
        "logprobs": st.integers(0, 3),
        "max_streaming_response_tokens": st.integers(1, 4),
        "return_token_ids": st.booleans(),
        "ignore_eos": st.booleans(),
        "repetition_penalty": st.sampled_from([0.7, 1.5]),
        "presence_penalty": st.sampled_from([-1.0, 1.5]),
        "top_k": st.integers(0, 60),
    },
).filter(fits)


@settings(max_examples=80)
@given(request_=requests, seed=st.integers(0, 2**63 - 1))
def test_any_completion(replicas: tuple[Replica, Replica], request_: dict[str, Any], seed: int) -> None:
    check_cuts(replicas, COMPLETIONS, request_, **{"X-FD-Seed": str(seed)})


@pytest.mark.parametrize("extra", [{}, {"logprobs": 2, "return_token_ids": True}], ids=["plain", "logprobs"])
def test_cut_within_a_possible_stop_string(replicas: tuple[Replica, Replica], extra: dict[str, Any]) -> None:
    """The second replica sends the text that was held back, whether it became a stop string or not."""
    request = {"prompt": "x", "max_tokens": 16, "ignore_eos": True} | extra
    text = text_of(check_cuts(replicas, COMPLETIONS, request))
    almost, whole = text[2:7] + "☃", text[9:14]
    held = check_cuts(replicas, COMPLETIONS, request | {"stop": [almost]})
    assert text_of(held) == text
    # Some tokens were held back until later ones.
    assert any(len(mark.split()) > 2 for mark in held.marks)
    # The last characters could always begin a stop string, so that some tokens are always held back.
    always = [text[at : at + 5] + "☃" for at in range(min(16, len(text)))]
    assert text_of(check_cuts(replicas, COMPLETIONS, request | {"stop": always})) == text
    for include in (False, True):
        options = {"stop": [almost, whole], "include_stop_str_in_output": include}
        stopped = check_cuts(replicas, COMPLETIONS, request | options)
        assert text_of(stopped) == text[: text.index(whole) + include * len(whole)]


def test_a_cut_within_a_character(replicas: tuple[Replica, Replica]) -> None:
    """Tokens of this model are often parts of a character; a mark has them before their text is sent."""
    seeds = [str(seed) for seed in range(8)]
    streams = [
        check_cuts(
            replicas, COMPLETIONS, {"prompt": "好é", "max_tokens": 10, "ignore_eos": True}, **{"X-FD-Seed": s}
        )
        for s in seeds
    ]
    assert any(len(mark.split()) > 2 for one in streams for mark in one.marks)


def test_texts_that_are_preempted_and_cached(replicas: tuple[Replica, Replica]) -> None:
    """Eight choices need more blocks than there are, so that some are preempted repeatedly."""
    _, second = replicas
    path, body = COMPLETIONS, {"prompt": "a b c d " * 10, "max_tokens": 40, "n": 8, "ignore_eos": True}
    data = json.dumps(body | {"stream": True, "stream_options": {}}).encode()
    whole = stream(replicas[0], path, data)
    before = second.server.metric("request_preempted_total")
    for part in (0.1, 0.4, 0.7, 0.9):
        cut = int(part * len(whole.blocks))
        status, answer = second.resume(whole.before(cut).resumption(path, data))
        assert status == 200
        joined = Stream(whole.before(cut).blocks + Stream.of(answer).blocks)
        assert joined.of_choices() == whole.of_choices()
    assert second.server.metric("request_preempted_total") > before


def test_stream_is_resumed_repeatedly(replicas: tuple[Replica, Replica]) -> None:
    body = json.dumps({"prompt": "x", "max_tokens": 12, "n": 2, "stream": True, "logprobs": 0}).encode()
    whole = stream(replicas[0], COMPLETIONS, body)
    got = whole.before(2)
    for replica in itertools.islice(itertools.cycle(reversed(replicas)), 40):
        status, answer = replica.resume(got.resumption(COMPLETIONS, body))
        assert status == 200
        more = Stream.of(answer)
        got = Stream(got.blocks + more.blocks[:2])
        if DONE in got.blocks:
            break
    assert got.of_choices() == whole.of_choices()


# ---- whole answers


def drafted(
    replica: Replica,
    path: str,
    request: dict[str, Any] | bytes,
    at_least: int = 1,
    tokens: int = 1,
    headers: dict[str, str] | None = None,
) -> tuple[list[Resumption], dict[str, Any]]:
    """Return the drafts that the replica has sent before its whole answer, and the answer.

    The number of drafts depends on timing. The request is repeated until there are `at_least` drafts and the
    last has at least `tokens` tokens.
    """
    body = request if isinstance(request, bytes) else json.dumps(request).encode()

    def told() -> tuple[list[Resumption], dict[str, Any]] | None:
        drafts, answer = _drafted(replica, path, body, headers or {})
        last = sum(len(choice.tokens) for choice in drafts[-1].choices.values()) if drafts else 0
        return (drafts, answer) if len(drafts) >= at_least and last >= tokens else None

    drafts, answer = wait_until(told, "it says enough of its answer before it is whole")
    return drafts, answer


def _drafted(
    replica: Replica, path: str, body: bytes, headers: dict[str, str]
) -> tuple[list[Resumption], dict[str, Any]]:
    *interim, last, answer = raw_answer(replica, path, body, headers).split(b"\r\n\r\n")
    assert last.startswith(b"HTTP/1.1 200 "), last
    marks: list[bytes] = []
    drafts = []
    for each in interim:
        status, *fields = each.split(b"\r\n")
        assert status == b"HTTP/1.1 102 Processing"
        if fields:
            created, identity = fields[0].removeprefix(b"X-FD-Draft: ").split(b" ")
            marks += [line.removeprefix(b"X-FD-Mark: ") for line in fields[1:]]
            drafts.append(Resumption(path, body, identity.decode(), int(created), marks_of(marks)))
    return drafts, json.loads(answer)


def raw_answer(replica: Replica, path: str, body: bytes, headers: dict[str, str]) -> bytes:
    """Return the answer with its interim heads."""
    given = {"X-FD-Marks": "1", "X-FD-Progress": "0.001", "X-FD-Seed": "11", **headers}
    lines = [f"POST {path} HTTP/1.1", "Host: x", "Connection: close", f"Content-Length: {len(body)}"]
    head = "\r\n".join([*lines, *(f"{name}: {value}" for name, value in given.items()), "", ""])
    with socket.create_connection(("127.0.0.1", replica.server.port), timeout=60) as connection:
        connection.sendall(head.encode() + body)
        return b"".join(iter(lambda: connection.recv(65536), b""))


@pytest.mark.parametrize(
    ("path", "request_"),
    [
        (CHAT, TALK | {"max_tokens": 60, "n": 2, "ignore_eos": True}),
        (CHAT, TALK | {"max_tokens": 120, "n": 4, "stop": ["e", "th"], "return_token_ids": True}),
        (COMPLETIONS, {"prompt": [[40, 41], [43]], "n": 2, "max_tokens": 40, "echo": True}),
        (
            COMPLETIONS,
            {"prompt": "x", "max_tokens": 60, "min_tokens": 50, "presence_penalty": 1.5, "seed": 3},
        ),
    ],
    ids=["chat", "stop strings", "prompts", "penalties"],
)
def test_unstreamed_answer_is_resumed_from_each_draft(
    replicas: tuple[Replica, Replica], path: str, request_: dict[str, Any]
) -> None:
    first, second = replicas
    drafts, whole = drafted(first, path, request_, at_least=4, tokens=21)
    whole["usage"].pop("prompt_tokens_details")
    for draft in (drafts[0], drafts[len(drafts) // 2], drafts[-1]):
        status, answer = second.resume(draft)
        assert status == 200, answer
        resumed = json.loads(answer)
        resumed["usage"].pop("prompt_tokens_details")
        assert resumed == whole


def test_resuming_replica_sends_drafts_of_added_tokens(replicas: tuple[Replica, Replica]) -> None:
    request = {"prompt": "x", "max_tokens": 60, "ignore_eos": True, "return_token_ids": True}
    drafts, whole = drafted(replicas[0], COMPLETIONS, request)
    begun = drafts[len(drafts) // 2]
    headers = {"Content-Type": "application/msgpack", "X-FD-Token": replicas[1].token}
    more, resumed = drafted(replicas[1], "/internal/resume", encode_resumption(begun), headers=headers)
    assert resumed["choices"] == whole["choices"]
    tokens = begun.choices[0].tokens + more[-1].choices[0].tokens
    assert tokens == whole["choices"][0]["completion_token_ids"][: len(tokens)]
    assert {(each.id, each.created) for each in more} == {(begun.id, begun.created)}


@pytest.mark.parametrize(
    ("request_", "headers"),
    [({"logprobs": 1}, {}), ({"prompt_logprobs": 0}, {}), ({}, {"X-FD-Marks": "0"}), ({"stream": True}, {})],
    ids=[
        "log probabilities would be lost",
        "those of the prompt too",
        "nobody has asked",
        "a stream has its own marks",
    ],
)
def test_answers_that_cannot_be_resumed_have_no_drafts(
    replicas: tuple[Replica, Replica], request_: dict[str, Any], headers: dict[str, str]
) -> None:
    request = {"prompt": "x", "max_tokens": 30, "ignore_eos": True, **request_}
    body = json.dumps(request).encode()
    answer = raw_answer(replicas[0], COMPLETIONS, body, headers)
    assert b"HTTP/1.1 102 " in answer or "stream" in request
    assert b"X-FD-Draft" not in answer


# ---- answers without marks, and refused resumptions


def test_marks_are_sent_only_on_request(replicas: tuple[Replica, Replica]) -> None:
    body = json.dumps({"prompt": "x", "max_tokens": 3, "stream": True, "temperature": 0}).encode()
    marked = stream(replicas[0], COMPLETIONS, body)
    plain = stream(replicas[0], COMPLETIONS, body, **{"X-FD-Marks": "0"})
    assert marked.marks
    assert plain.marks == []
    assert [data_of(event)["choices"] for event in plain.events[:-1]] == [
        data_of(event)["choices"] for event in marked.events[:-1]
    ]
    status, answer = replicas[0].post(
        COMPLETIONS, body.replace(b"true", b"false"), {"Content-Type": "application/json", "X-FD-Marks": "1"}
    )
    assert status == 200
    assert b": fd" not in answer
    # Without a seed, no other replica could draw these tokens again.
    status, answer = replicas[0].post(
        COMPLETIONS, body, {"Content-Type": "application/json", "X-FD-Marks": "1"}
    )
    assert status == 200
    assert Stream.of(answer).marks == []


def test_the_largest_request_is_resumed(replicas: tuple[Replica, Replica]) -> None:
    first, second = replicas
    fields = json.dumps({"prompt": "a", "max_tokens": 4, "stream": True, "user": ""}).encode()
    body = fields.removesuffix(b'"}') + b"x" * (MAX_BODY_BYTES - len(fields)) + b'"}'
    whole = stream(first, COMPLETIONS, body)
    status, answer = second.resume(whole.before(2).resumption(COMPLETIONS, body))
    assert status == 200, answer


BODY = b'{"prompt": "x", "max_tokens": 5, "stream": true}'
GOOD = Resumption(COMPLETIONS, BODY, "cmpl-1", 1700000000, {0: Delivered([40])})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"path": "/v1/embeddings"}, "/v1/embeddings"),
        ({"body": b'{"prompt": "x", "logprobs": 1}'}, "log probabilities"),
        ({"body": b'{"prompt": "x"}', "choices": {0: Delivered([40], finished=True)}}, "has finished"),
        ({"choices": {1: Delivered([40])}}, "no choice 1"),
        ({"choices": {0: Delivered([512])}}, "token 512"),
        ({"choices": {0: Delivered([40] * 5)}}, "already has 5 of at most 5 tokens"),
        ({"body": BODY.replace(b"5", b'5, "stop": "E"')}, "stop string"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_resumed_is_409(
    replicas: tuple[Replica, Replica], changes: dict[str, Any], words: str
) -> None:
    status, answer = replicas[1].resume(msgspec.structs.replace(GOOD, **changes))
    assert status == 409, answer
    message = json.loads(answer)["error"]["message"]
    assert words in message
    assert "\n" not in message


def test_without_a_seed_is_409(replicas: tuple[Replica, Replica]) -> None:
    headers = {"Content-Type": "application/msgpack", "X-FD-Token": replicas[1].token}
    assert replicas[1].post("/internal/resume", encode_resumption(GOOD), headers)[0] == 409


@pytest.mark.parametrize("token", ["", "wrong", "the other's", "é"])
def test_a_wrong_token_is_401(replicas: tuple[Replica, Replica], token: str) -> None:
    token = replicas[0].token if token == "the other's" else token
    status, answer = replicas[1].resume(GOOD, **{"X-FD-Token": token})
    assert status == 401
    assert json.loads(answer)["error"]["type"] == "authentication_error"


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xc1",
        b"{}",
        encode_resumption(GOOD)[:-2],
        encode_resumption(msgspec.structs.replace(GOOD, choices={-1: Delivered([])})),
        encode_resumption(msgspec.structs.replace(GOOD, choices={0: Delivered([-1])})),
        encode_resumption(msgspec.structs.replace(GOOD, created=10**18)),
        encode_resumption(msgspec.structs.replace(GOOD, body=b"{")),
    ],
    ids=["empty", "no MessagePack", "JSON", "cut", "choice -1", "token -1", "a late date", "no JSON within"],
)
def test_garbage_is_400(replicas: tuple[Replica, Replica], data: bytes) -> None:
    headers = {"X-FD-Token": replicas[1].token, "X-FD-Seed": "11"}
    status, answer = replicas[1].post("/internal/resume", data, headers)
    assert status == 400
    assert "\n" not in json.loads(answer)["error"]["message"]
