"""Requests to a live replica, and its responses as JSON without a client library's own defaults."""

from __future__ import annotations

import json
import urllib.request
from typing import Any

from .conftest import ApiServer

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
_PROMPTS: dict[str, dict[str, Any]] = {
    CHAT: {"messages": [{"role": "user", "content": "the quick brown"}]},
    COMPLETIONS: {"prompt": "the quick brown"},
}


def chat(server: ApiServer, **fields: Any) -> dict[str, Any]:
    return _answer(server, CHAT, fields)


def complete(server: ApiServer, **fields: Any) -> dict[str, Any]:
    return _answer(server, COMPLETIONS, fields)


def refusal(server: ApiServer, path: str, **fields: Any) -> dict[str, Any]:
    """Return the error of a request that must be answered with 400."""
    status, answer = server.post(path, _PROMPTS[path] | fields)
    assert status == 400, answer
    error: dict[str, Any] = answer["error"]
    return error


def chunks(server: ApiServer, *, chat: bool, **fields: Any) -> list[dict[str, Any]]:
    """Return the events of a stream, except for [DONE]."""
    path = CHAT if chat else COMPLETIONS
    request = urllib.request.Request(
        server.url + path,
        json.dumps(_PROMPTS[path] | fields | {"stream": True}).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        events = answer.read().removesuffix(b"\n\n").split(b"\n\n")
    assert events.pop() == b"data: [DONE]"
    return [json.loads(event.removeprefix(b"data: ")) for event in events]


def _answer(server: ApiServer, path: str, fields: dict[str, Any]) -> dict[str, Any]:
    status, answer = server.post(path, _PROMPTS[path] | fields)
    assert status == 200, answer
    return answer
