"""A stream of /v1/responses that breaks off behind any event continues with the same bytes."""

from __future__ import annotations

import concurrent.futures
import json
import re
from typing import Any

import pytest

from fastdeploy.common.resumption import Resumption, marks_of

from .test_resume import Replica, Stream, stream
from .test_resume import replicas as replicas

PATH = "/v1/responses"
KEEP_ALIVE = b":"
_CACHED = re.compile(rb'"cached_tokens":\d+')


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"temperature": 1.5, "top_logprobs": 1},
        {"stop": ["e", "th"], "temperature": 1.4, "instructions": "é好"},
        {"max_output_tokens": 1},
    ],
    ids=lambda fields: " ".join(fields),
)
def test_a_stream_continues_behind_any_event(
    replicas: tuple[Replica, Replica], fields: dict[str, Any]
) -> None:
    first, second = replicas
    body = json.dumps({"input": "Tell me: é好?", "max_output_tokens": 9, "stream": True, **fields}).encode()
    whole = stream(first, PATH, body)
    response = data_of(whole.blocks[0])["response"]
    assert len(whole.marks) == len(whole.blocks) - 1, "each event but [DONE] has a mark"

    def check(cut: int) -> None:
        before = whole.before(cut)
        delivered = marks_of(before.marks)
        resumption = Resumption(PATH, body, response["id"], response["created_at"], delivered, cut)
        status, answer = second.resume(resumption)
        assert status == 200, answer
        after = Stream.of(answer)
        assert sent(after) == sent(whole)[cut:], f"cut behind event {cut}"
        assert marks_of([*before.marks, *after.marks]) == marks_of(whole.marks), f"cut behind event {cut}"

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        list(pool.map(check, range(1, len(whole.blocks))))


def test_a_router_that_does_not_count_events_cannot_resume(replicas: tuple[Replica, Replica]) -> None:
    first, second = replicas
    body = json.dumps({"input": "a", "max_output_tokens": 9, "stream": True}).encode()
    whole = stream(first, PATH, body)
    response = data_of(whole.blocks[0])["response"]
    delivered = marks_of(whole.before(7).marks)
    status, answer = second.resume(Resumption(PATH, body, response["id"], response["created_at"], delivered))
    assert status == 409
    assert b"0 were sent" in answer


def test_a_whole_response_continues(replicas: tuple[Replica, Replica]) -> None:
    first, second = replicas
    body = json.dumps({"input": "Tell me", "max_output_tokens": 9}).encode()
    headers = {"Content-Type": "application/json", "X-FD-Seed": "11"}
    undisturbed = json.loads(first.post(PATH, body, headers)[1])
    streamed = stream(first, PATH, json.dumps(json.loads(body) | {"stream": True}).encode())
    delivered = marks_of(streamed.marks[:8])
    assert delivered[0].tokens
    resumption = Resumption(PATH, body, undisturbed["id"], undisturbed["created_at"], delivered)
    answer = json.loads(second.resume(resumption)[1])
    assert answer["output"] == undisturbed["output"]
    assert answer["usage"]["output_tokens"] == 9


def data_of(block: bytes) -> dict[str, Any]:
    return json.loads(block.partition(b"\ndata: ")[2].partition(b"\n")[0])


def sent(part: Stream) -> list[bytes]:
    """Return the events as a client gets them, without the cached tokens, which depend on the replica."""
    events = [block.partition(b"\n: fd ")[0] for block in part.blocks]
    return [_CACHED.sub(b"", event) for event in events if event != KEEP_ALIVE]
