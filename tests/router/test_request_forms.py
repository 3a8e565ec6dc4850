"""A real replica's HTTP server accepts the form of every request that the router forwards."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from fastdeploy import __version__

from ..entrypoints.conftest import ApiServer
from .conftest import RouterProcess
from .fake_engine import FakeEngine, answers_status, closes, sends, wait_until
from .raw_client import RawAnswer, RawClient

#: Statuses with which a server rejects the form of a request; the API gives none to these requests.
REFUSALS_OF_FORM = {301, 302, 307, 308, 411, 414, 417, 431, 500, 501, 505}
#: Headers that load balancers, meshes and browsers add, and that WSGI servers interpret.
PROXY_HEADERS = [
    "X-Forwarded-Proto: https",
    "X-Forwarded-Protocol: https",
    "X-Forwarded-Protocol: ssl",
    "X-Forwarded-Ssl: on",
    "X-Forwarded-For: 10.0.0.1, 10.0.0.2",
    "X-Forwarded-Host: example.org",
    "X-Forwarded-Prefix: /api",
    "X-Script-Name: /api",
    "Script-Name: /api",
    "Path-Info: /api",
    "Forwarded: for=1.2.3.4;proto=https",
    "Front-End-Https: on",
    "X-Http-Method-Override: DELETE",
    "X-Original-Url: /admin",
    "Range: bytes=0-1",
    "If-None-Match: *",
    "If-Modified-Since: Thu, 01 Jan 1970 00:00:00 GMT",
    "Accept-Encoding: gzip, br, zstd",
    "Content-Encoding: identity",
    "Cookie: a=b; a=c",
    "Proxy: http://127.0.0.1:1",
    "Sec-Fetch-Site: cross-site",
    "Origin: null",
]


@pytest.fixture(scope="module")
def router(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RouterProcess]:
    router = RouterProcess(tmp_path_factory.mktemp("router"))
    with ApiServer(tmp_path_factory.mktemp("replica"), "--router", router.url) as replica:
        wait_until(lambda: replica.url in router.urls(), "the replica is there", deadline=90)
        yield router
        replica.stop()
    router.stop()


def ask(router: RouterProcess, raw: bytes) -> RawAnswer:
    with RawClient(router.port) as client:
        client.send_what_is_taken(raw)
        return client.answer(to_head=raw.startswith(b"HEAD"))


def request(method: str, target: str, *headers: str, body: str = "") -> bytes:
    lines = [f"{method} {target} HTTP/1.1", "Host: x", *headers]
    if body:
        lines += ["Content-Type: application/json", f"Content-Length: {len(body)}"]
    return "\r\n".join([*lines, "", body]).encode("latin-1")


def assert_its_form_is_accepted(answer: RawAnswer) -> None:
    """Assert that a replica's answer does not reject the form; other answers are the router's own."""
    assert "location" not in answer.headers
    if "x-fd-replica" in answer.headers:
        assert answer.status not in REFUSALS_OF_FORM, answer
        assert b"bad_http" not in answer.body
        assert b"127.0.0.1" not in answer.body


@pytest.mark.parametrize("header", PROXY_HEADERS)
def test_headers_of_proxies_change_nothing(router: RouterProcess, header: str) -> None:
    assert ask(router, request("GET", "/v1/models", header)).status == 200


def test_contradictory_scheme_headers_are_not_judged(router: RouterProcess) -> None:
    headers = ["X-Forwarded-Proto: https", "X-Forwarded-Protocol: https", "X-Forwarded-Ssl: off"]
    assert ask(router, request("GET", "/v1/models", *headers)).status == 200


@pytest.mark.parametrize(
    ("method", "target", "headers"),
    [
        ("GET", "/v1/models", ["Cookie: " + "a" * 9000]),
        ("GET", "/v1/models", ["Authorization: Bearer " + "a" * 60000]),
        ("GET", "/v1/models", [f"x-{number}: {'a' * 490}" for number in range(125)]),
        ("GET", "/v1/models?" + "q" * (8000 - len("/v1/models?")), []),
        ("OPTIONS", "/v1/models?" + "q" * (8000 - len("/v1/models?")), []),
    ],
    ids=["cookie", "token", "many headers", "long target", "long target of the longest method"],
)
def test_largest_request_of_the_router_is_accepted(
    router: RouterProcess, method: str, target: str, headers: list[str]
) -> None:
    answer = ask(router, request(method, target, *headers))
    assert (answer.status, "x-fd-replica" in answer.headers) == (200, True), answer


@pytest.mark.parametrize(
    ("raw", "status"),
    [
        (request("GET", "/v1/models?" + "q" * 8000), 414),
        (request("GET", "/v1/models", *[f"x-{number}: a" for number in range(129)]), 431),
        (request("GET", "/v1/models", "Cookie: " + "a" * (65 << 10)), 431),
        (request("GET", "/v1/models", "Content-Type: a/b", "Content-Type: a/c"), 400),
    ],
)
def test_larger_requests_are_refused_by_the_router_itself(
    router: RouterProcess, raw: bytes, status: int
) -> None:
    answer = ask(router, raw)
    assert (answer.status, "x-fd-replica" in answer.headers) == (status, False)


@pytest.mark.parametrize(
    "target",
    [
        *("//v1/models", "/v1//models", "///v1///models", "/%761/models", "/v1%2Fmodels", "/v1/%6dodels"),
        *("/v1/models?x=//", "http://example.org//v1//models"),
    ],
)
def test_every_spelling_of_a_path_has_one_answer(router: RouterProcess, target: str) -> None:
    answer = ask(router, request("GET", target))
    assert (answer.status, "x-fd-replica" in answer.headers) == (200, True)
    assert json.loads(answer.body)["object"] == "list"


@pytest.mark.parametrize("target", ["//v1//completions", "/v1/%63ompletions", "/v1/chat//completions"])
def test_every_spelling_of_a_path_generates(router: RouterProcess, target: str) -> None:
    fields = {"prompt": "a", "messages": [{"role": "user", "content": "a"}], "max_tokens": 1}
    if "chat" not in target:
        del fields["messages"]
    else:
        del fields["prompt"]
    answer = ask(router, request("POST", target, body=json.dumps(fields)))
    assert (answer.status, "location" in answer.headers) == (200, False), answer


def test_the_api_beside_v1_is_passed_on(router: RouterProcess) -> None:
    answer = ask(router, request("POST", "/tokenize", body='{"prompt": "the quick"}'))
    assert (answer.status, "x-fd-replica" in answer.headers) == (200, True)
    tokens = json.loads(answer.body)["tokens"]
    answer = ask(router, request("POST", "/detokenize", body=json.dumps({"tokens": tokens})))
    assert json.loads(answer.body)["prompt"].endswith("the quick")
    for path in ("/docs", "//docs?x=1", "/openapi.json", "/%64ocs"):
        answer = ask(router, request("GET", path))
        assert (answer.status, "x-fd-replica" in answer.headers) == (200, True), path
    answer = ask(router, request("GET", "/docs", "Origin: http://localhost:3000"))
    assert answer.headers["access-control-allow-origin"] == "http://localhost:3000"


def test_the_router_itself_has_version_load_and_ping(router: RouterProcess) -> None:
    answers = [ask(router, request("GET", path)) for path in ("/version", "/load", "/ping")]
    version, load, ping = [json.loads(answer.body) for answer in answers]
    assert version == {"version": __version__}
    assert load["server_load"] == 0
    assert ping["status"] == "ok"
    assert not any("x-fd-replica" in answer.headers for answer in answers)


@pytest.mark.parametrize("target", ["/v1/embeddings", "/rerank", "/v1/sleep", "/generate"])
def test_an_endpoint_that_is_not_served_says_why(router: RouterProcess, target: str) -> None:
    answer = ask(router, request("POST", target, body="{}"))
    message = json.loads(answer.body)["error"]["message"]
    assert answer.status == 404
    assert message.startswith(f"POST {target} is not served: ")


@pytest.mark.parametrize("target", ["/v2//models", "/nowhere%0a%20x", "/static/x", "/v1/models/"])
def test_an_unknown_path_is_named_in_the_error(router: RouterProcess, target: str) -> None:
    answer = ask(router, request("POST", target, body="{}"))
    message = json.loads(answer.body)["error"]["message"]
    assert answer.status == 404
    assert target in message


def test_a_redirect_of_a_replica_leads_to_the_router(
    lent_router: RouterProcess, new_engine: Callable[..., FakeEngine]
) -> None:
    """FastAPI, which FastDeploy's own engines use, redirects a path with a trailing slash."""
    engine = new_engine()
    lent_router.add(engine)
    for sent, received in [
        (engine.url + "/v1/models?a=//b", "/v1/models?a=//b"),
        (engine.url, "/"),
        (engine.url + "//elsewhere.example/x", "/elsewhere.example/x"),
        ("http://elsewhere.example/x", "http://elsewhere.example/x"),
        ("/relative", "/relative"),
    ]:
        engine.behaviour = answers_status("307 Temporary Redirect", b"", f"Location: {sent}\r\n".encode())
        with RawClient(lent_router.port) as client:
            client.send(request("GET", "/v1/models/"))
            assert client.answer().headers["location"] == received


def test_errors_name_a_replica_by_its_number(
    lent_router: RouterProcess, new_engine: Callable[..., FakeEngine]
) -> None:
    engine = new_engine(replica=5)
    lent_router.add(engine)
    for behaviour in (closes, answers_status("503 Service Unavailable"), sends(b"no HTTP\r\n\r\n"), None):
        engine.behaviour = behaviour or engine.behaviour
        if behaviour is None:
            engine.stop()
        answer = lent_router.complete()
        assert answer.status_code in (500, 502, 503)
        assert "127.0.0.1" not in answer.text
        assert str(engine.port) not in answer.text


TOKEN = st.text("!#$%&'*+-.^`|~0aZ", min_size=1, max_size=20)
VALUE = st.text([*map(chr, range(0x20, 0x7F)), *map(chr, range(0x80, 0x100)), "\t"], max_size=60)
PATH = st.text("/vV1.~%2Fabc:;@!$&'()*+,=[]{}|^`\\\"<>-_?", max_size=40)


@settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    method=st.sampled_from(["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"]),
    path=st.one_of(
        PATH, st.sampled_from(["models", "/models", "chat/completions", "models/%ff", "models/%00"])
    ),
    headers=st.lists(st.tuples(TOKEN, VALUE), max_size=8),
    body=st.text('{}[]"a1:', max_size=20),
)
@example(method="GET", path="%", headers=[], body="")
@example(method="GET", path="//[", headers=[], body="")
@example(method="GET", path="models%", headers=[("a", "")], body="")
@example(method="PATCH", path="models", headers=[("a", "\x80\xff")], body="{")
def test_no_replica_refuses_a_form_that_the_router_accepts(
    router: RouterProcess, method: str, path: str, headers: list[tuple[str, str]], body: str
) -> None:
    lines = [f"{name}: {value}" for name, value in headers]
    assert_its_form_is_accepted(ask(router, request(method, f"/v1/{path}", *lines, body=body)))
