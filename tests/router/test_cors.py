"""The headers with which browsers let web pages read the router's answers, and the pages they admit."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import requests

from fastdeploy.common.cors import CorsPolicy
from fastdeploy.common.errors import ConfigError

from .conftest import RouterProcess
from .fake_engine import FakeEngine, answers_status, wait_until
from .raw_client import RawClient

PAGE = "http://localhost:3000"
FOREIGN = "http://app.example"
ASKS = {
    "Access-Control-Request-Method": "POST",
    "Access-Control-Request-Headers": "authorization, content-type, x-stainless-os",
}


def cors_of(answer: requests.Response) -> dict[str, str]:
    """Return the CORS headers, each of which must occur once: a duplicate is as bad as none."""
    named = [name.lower() for name, _ in answer.raw.headers.items() if "access-control" in name.lower()]
    assert len(named) == len(set(named)), named
    values = {name.lower(): value for name, value in answer.headers.items()}
    return {name.removeprefix("access-control-"): values[name] for name in named}


def preflight(router: RouterProcess, origin: str, path: str = "/v1/chat/completions") -> requests.Response:
    return requests.options(router.url + path, headers={"Origin": origin, **ASKS}, timeout=20)


def complete(router: RouterProcess, origin: str, **arguments: Any) -> requests.Response:
    headers = {"Origin": origin, **arguments.pop("headers", {})}
    return router.complete(headers=headers, **arguments)


@pytest.mark.parametrize(
    "origin",
    [
        *("http://localhost", "https://localhost:5173", "http://127.0.0.1:8080", "http://127.8.0.1"),
        *("http://[::1]:3000", "http://app.localhost:1234"),
    ],
)
def test_pages_of_this_machine_are_allowed_by_default(
    shared_router: RouterProcess, replica: FakeEngine, origin: str
) -> None:
    answer = preflight(shared_router, origin)
    assert (answer.status_code, answer.content) == (204, b"")
    assert cors_of(answer) == {
        "allow-origin": origin,
        "allow-methods": "GET, POST, OPTIONS",
        "allow-headers": ASKS["Access-Control-Request-Headers"],
        "max-age": "600",
    }
    assert answer.headers["Vary"] == "Origin"
    answer = complete(shared_router, origin)
    assert (answer.status_code, cors_of(answer)["allow-origin"]) == (200, origin)
    assert answer.headers["Vary"] == "Origin"
    assert "X-Request-Id" in cors_of(answer)["expose-headers"]


@pytest.mark.parametrize(
    "origin",
    [
        *(
            FOREIGN,
            "null",
            "http://localhost.evil.example",
            "http://127.0.0.1.evil.example",
            "http://10.0.0.1",
        ),
        *("http://evil.example/http://localhost", "http://localhost:1:2", "LOCALHOST", "", "*", "loopback"),
    ],
)
def test_other_pages_are_not_shown_answers_by_default(
    shared_router: RouterProcess, replica: FakeEngine, origin: str
) -> None:
    answer = preflight(shared_router, origin)
    assert answer.status_code == 403
    assert answer.json()["error"]["code"] == "origin_not_allowed"
    assert "cors_origins" in answer.json()["error"]["message"]
    assert cors_of(answer) == {}
    # Answered because a program may send the header too, or a same-origin page behind a proxy.
    answer = complete(shared_router, origin)
    assert (answer.status_code, cors_of(answer)) == (200, {})
    assert not any(received.method == "OPTIONS" for received in replica.received)


def test_every_page_may_be_allowed_and_never_with_credentials(
    start_router: Callable[..., RouterProcess], new_engine: Callable[..., FakeEngine]
) -> None:
    router = start_router("--allow-origins", "*")
    router.add(new_engine())
    assert cors_of(preflight(router, FOREIGN))["allow-origin"] == "*"
    for origin in (FOREIGN, "null"):
        answer = complete(router, origin)
        assert cors_of(answer) == {"allow-origin": "*", "expose-headers": "X-Request-Id, Retry-After"}
        assert "Vary" not in answer.headers


def test_a_list_allows_only_its_origins(
    start_router: Callable[..., RouterProcess], new_engine: Callable[..., FakeEngine]
) -> None:
    router = start_router("--cors-origins", f"{FOREIGN}, https://chat.example:8443")
    router.add(new_engine())
    for origin in (FOREIGN, "https://chat.example:8443"):
        assert cors_of(complete(router, origin))["allow-origin"] == origin
    for origin in (PAGE, "https://app.example", f"{FOREIGN}:81"):
        assert cors_of(complete(router, origin)) == {}


def test_an_empty_list_allows_no_page(start_router: Callable[..., RouterProcess]) -> None:
    router = start_router("--cors-origins", "")
    assert preflight(router, PAGE).status_code == 403
    assert cors_of(complete(router, PAGE)) == {}


def test_a_stream_has_the_headers(shared_router: RouterProcess, replica: FakeEngine) -> None:
    answer = complete(shared_router, PAGE, body={"stream": True})
    assert answer.headers["Content-Type"] == "text/event-stream"
    assert cors_of(answer)["allow-origin"] == PAGE
    assert answer.text.endswith("data: [DONE]\n\n")


@pytest.mark.parametrize("status", ["404 Not Found", "400 Bad Request", "429 Too Many Requests"])
def test_a_replicas_error_has_the_headers(
    shared_router: RouterProcess, replica: FakeEngine, status: str
) -> None:
    replica.behaviour = answers_status(status)
    answer = complete(shared_router, PAGE)
    assert answer.status_code == int(status[:3])
    assert cors_of(answer)["allow-origin"] == PAGE


@pytest.mark.parametrize("status", ["200 OK", "503 Service Unavailable"])
def test_cors_headers_of_a_replica_are_dropped(
    shared_router: RouterProcess, replica: FakeEngine, status: str
) -> None:
    """FastDeploy itself answers every origin with * and credentials."""
    theirs = b"Access-Control-Allow-Origin: *\r\nAccess-Control-Allow-Credentials: true\r\n"
    replica.behaviour = answers_status(status, extra=theirs)
    assert cors_of(complete(shared_router, FOREIGN)) == {}
    answer = complete(shared_router, PAGE)
    assert cors_of(answer) == {"allow-origin": PAGE, "expose-headers": "X-Request-Id, Retry-After"}
    assert all(received.header("origin") is None for received in replica.received)


def test_the_routers_own_refusals_have_the_headers(
    start_router: Callable[..., RouterProcess], tmp_path: Path
) -> None:
    keys = tmp_path / "keys"
    keys.write_text("secret\n")
    router = start_router("--api-keys-file", str(keys), "--max-body-bytes", "1000")
    assert preflight(router, PAGE).status_code == 204, "browsers send no key with it"
    key = {"Authorization": "Bearer secret"}
    for status, arguments in (
        (401, {}),
        (503, {"headers": key}),
        (413, {"headers": key, "body": {"prompt": "x" * 2000}}),
    ):
        answer = complete(router, PAGE, **arguments)
        assert answer.status_code == status
        assert cors_of(answer)["allow-origin"] == PAGE, status


@pytest.mark.parametrize(
    "path", ["/version", "/load", "/health", "/ping", "/v1/embeddings", "/v1/abort_requests"]
)
def test_side_endpoints_are_for_pages(shared_router: RouterProcess, path: str) -> None:
    assert preflight(shared_router, PAGE, path).status_code == 204
    assert cors_of(shared_router.get(path, headers={"Origin": PAGE}))["allow-origin"] == PAGE
    assert cors_of(shared_router.get(path)) == {}


def test_the_rest_of_the_router_is_not_for_pages(shared_router: RouterProcess) -> None:
    for path in ("/registered", "/metrics", "/no/such/path"):
        assert cors_of(shared_router.get(path, headers={"Origin": PAGE})) == {}
    assert cors_of(preflight(shared_router, PAGE, "/register")) == {}


def test_without_an_origin_nothing_is_added(shared_router: RouterProcess, replica: FakeEngine) -> None:
    answer = shared_router.complete()
    assert cors_of(answer) == {}
    assert "Vary" not in answer.headers


def test_requests_behind_a_preflight_on_its_connection_are_answered(
    shared_router: RouterProcess, replica: FakeEngine
) -> None:
    lines = "".join(f"{name}: {value}\r\n" for name, value in ASKS.items())
    asked = f"OPTIONS /v1/completions HTTP/1.1\r\nHost: x\r\nOrigin: {PAGE}\r\n{lines}\r\n".encode()
    request = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{}"
    with RawClient(shared_router.port) as client:
        client.send(asked + request + asked + request)
        answers = [client.answer() for _ in range(4)]
    assert [answer.status for answer in answers] == [204, 200, 204, 200]
    assert json.loads(answers[1].body)["engine"] == replica.name


def test_invalid_header_names_are_not_repeated(shared_router: RouterProcess) -> None:
    headers = {"Origin": PAGE, **ASKS, "Access-Control-Request-Headers": "a: b; c"}
    answer = requests.options(f"{shared_router.url}/v1/models", headers=headers, timeout=20)
    assert answer.status_code == 204
    assert "allow-headers" not in cors_of(answer)


def test_the_list_can_change_while_the_router_runs(
    start_router: Callable[..., RouterProcess], tmp_path: Path
) -> None:
    flags = tmp_path / "flags.json"
    flags.write_text('["--cors-origins", ""]')
    router = start_router("--flags-file", str(flags))
    assert preflight(router, PAGE).status_code == 403
    flags.write_text('["--cors-origins", "*"]')
    router.process.send_signal(signal.SIGHUP)
    wait_until(lambda: preflight(router, PAGE).status_code == 204, "the new list is in use")


@pytest.mark.parametrize(
    "word", ["app.example", "http://app.example/", "HTTP://app.example", "http://*", "null"]
)
def test_invalid_origin_is_refused_at_the_start(word: str) -> None:
    with pytest.raises(ConfigError, match=r"--cors-origins: .* not an origin"):
        CorsPolicy.parse("--cors-origins", f"loopback,{word}")
