"""/v1/abort_requests of the router: all replicas are asked, and their results joined."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import requests

from .conftest import RouterProcess
from .fake_engine import FakeEngine, answers_status

KEY = {"Authorization": "Bearer secret"}
IDS = {"req_ids": ["a", "b", "c"]}


def result(aborted: list[str], not_found: list[str]) -> dict[str, Any]:
    return {
        "aborted": [{"request_id": each, "output_token_count": 5} for each in aborted],
        "not_found": not_found,
    }


def aborts(aborted: list[str], not_found: list[str]) -> Callable[..., bool]:
    answer = {"request_id": "x", "status": "success", "result": result(aborted, not_found)}
    return answers_status("200 OK", json.dumps(answer).encode())


def abort(
    router: RouterProcess, body: dict[str, Any] = IDS, headers: dict[str, str] | None = None
) -> tuple[int, dict[str, Any]]:
    answer = requests.post(f"{router.url}/v1/abort_requests", json=body, headers=headers, timeout=20)
    return answer.status_code, answer.json()


def test_all_replicas_are_asked(router: RouterProcess, new_engine: Callable[..., FakeEngine]) -> None:
    first, second = new_engine(), new_engine()
    router.add(first, second)
    first.behaviour, second.behaviour = aborts(["a"], ["b", "c"]), aborts(["b"], ["a", "c"])
    status, answer = abort(router, headers={"X-Request-Id": "mine"})
    assert (status, answer["request_id"], answer["status"], answer["error_message"]) == (
        *(200, "mine", "success"),
        None,
    )
    both = [each["request_id"] for each in answer["result"]["aborted"]]
    assert (sorted(both), answer["result"]["not_found"]) == (["a", "b"], ["c"])
    for engine in (first, second):
        assert json.loads(engine.received[-1].body) == IDS


def test_a_replica_that_does_not_answer_is_named(
    router: RouterProcess, new_engine: Callable[..., FakeEngine]
) -> None:
    first, second = new_engine(), new_engine()
    router.add(first, second)
    first.behaviour, second.behaviour = aborts(["a"], ["b", "c"]), answers_status("404 Not Found")
    status, answer = abort(router)
    assert (status, answer["status"], answer["result"]) == (502, "error", result(["a"], ["b", "c"]))
    assert answer["error_message"] == f"replica {second.url.removeprefix('http://')}: answered 404"


def test_a_long_list_is_passed_on(router: RouterProcess, new_engine: Callable[..., FakeEngine]) -> None:
    engine = new_engine()
    router.add(engine)
    engine.behaviour = aborts([], [])
    many = {"req_ids": [f"chatcmpl-{number:032}" for number in range(4096)]}
    assert abort(router, many)[0] == 200
    assert json.loads(engine.received[-1].body) == many


def test_a_refusal_of_a_replica_is_passed_on(
    router: RouterProcess, new_engine: Callable[..., FakeEngine]
) -> None:
    engine = new_engine()
    router.add(engine)
    engine.behaviour = answers_status("400 Bad Request", b'{"error":{"message":"no","param":"req_ids"}}')
    assert abort(router, {}) == (400, {"error": {"message": "no", "param": "req_ids"}})


def test_it_needs_a_key_where_keys_are_set(
    start_router: Callable[..., RouterProcess], new_engine: Callable[..., FakeEngine], tmp_path: Path
) -> None:
    keys = tmp_path / "keys"
    keys.write_text("secret\n")
    router = start_router("--api-keys-file", str(keys))
    assert abort(router)[0] == 401
    assert abort(router, headers=KEY)[1]["error"]["code"] == "no_replica"
    engine = new_engine()
    router.add(engine)
    engine.behaviour = aborts(["a", "b", "c"], [])
    assert abort(router, headers=KEY)[0] == 200
    assert engine.received[-1].header("authorization") == "Bearer secret"
