"""Requests that are too large, malformed or forbidden: the router refuses them in OpenAI's form."""

import json
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import requests

from fastdeploy.common.api_keys import ApiKeys
from fastdeploy.common.errors import ConfigError
from fastdeploy.daemon.router.http.request import without_hop_by_hop

from .conftest import RouterProcess
from .fake_engine import FakeEngine, wait_until


def exchange(port: int, *pieces: bytes, half_close: bool = False) -> tuple[int, dict[str, str], bytes]:
    """Return status, headers and body of the answer to these bytes."""
    with socket.create_connection(("127.0.0.1", port), timeout=20) as sock:
        for piece in pieces:
            sock.sendall(piece)
        if half_close:
            sock.shutdown(socket.SHUT_WR)
        file = sock.makefile("rb")
        status = int(file.readline().split()[1])
        lines = iter(lambda: file.readline().decode().strip(), "")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        return status, headers, file.read(int(headers.get("content-length", 0)))


def error_code(body: bytes) -> str:
    code: str = json.loads(body)["error"]["code"]
    return code


def test_a_chunked_request_body_is_accepted(
    router: RouterProcess, new_engine: Callable[..., FakeEngine]
) -> None:
    engine = new_engine()
    router.add(engine)

    def pieces() -> Iterator[bytes]:
        yield b'{"prompt":'
        yield b'"x"}'

    assert requests.post(f"{router.url}/v1/completions", data=pieces(), timeout=20).status_code == 200
    [received] = engine.received
    assert received.body == b'{"prompt":"x"}'
    assert received.header("transfer-encoding") is None
    assert received.header("content-length") == "14"


def test_body_over_the_limit_is_refused_for_any_framing(
    start_router: Callable[..., RouterProcess], new_engine: Callable[..., FakeEngine]
) -> None:
    router = start_router("--max-body-bytes", "1000")
    engine = new_engine()
    router.add(engine)
    url = f"{router.url}/v1/completions"
    assert requests.post(url, data=b"x" * 1000, timeout=20).status_code == 200
    refused = requests.post(url, data=b"x" * 1001, timeout=20)
    assert (refused.status_code, refused.json()["error"]["code"]) == (413, "body_too_large")
    refused = requests.post(url, data=iter([b"x" * 600, b"x" * 600]), timeout=20)
    assert (refused.status_code, refused.json()["error"]["type"]) == (413, "invalid_request_error")
    assert len(engine.received) == 1


def test_refusal_of_a_huge_body_reaches_a_client_still_sending(
    start_router: Callable[..., RouterProcess], new_engine: Callable[..., FakeEngine]
) -> None:
    router = start_router("--max-body-bytes", "1000000")
    router.add(new_engine())
    answer = requests.post(f"{router.url}/v1/completions", data=b"x" * 5_000_000, timeout=20)
    assert answer.status_code == 413


@pytest.mark.parametrize(
    "framing",
    [
        b"Content-Length: x\r\n\r\n",
        b"Content-Length: -5\r\n\r\n",
        b"Content-Length: 5\r\nContent-Length: 6\r\n\r\n",
        b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n",
    ],
)
def test_ambiguous_framing_is_a_bad_request(
    router: RouterProcess, new_engine: Callable[..., FakeEngine], framing: bytes
) -> None:
    engine = new_engine()
    router.add(engine)
    assert exchange(router.port, b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n" + framing)[0] == 400
    assert engine.received == []


@pytest.mark.parametrize(
    "chunks", [b"zz\r\n", b"-1\r\n", b"2\r\n{}}}\r\n0\r\n\r\n", b"1;x=\xff\x00\r\na\r\n0\r\n\r\n"]
)
def test_bad_chunks_are_the_clients_fault_and_leave_their_traces(
    router: RouterProcess, new_engine: Callable[..., FakeEngine], chunks: bytes
) -> None:
    engine = new_engine()
    router.add(engine)
    head = b"POST %s HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    status, _, body = exchange(router.port, head % b"/v1/completions" + chunks, half_close=True)
    assert (status, error_code(body)) == (400, "bad_body")
    assert exchange(router.port, head % b"/register" + chunks, half_close=True)[0] == 400
    assert engine.received == []
    log = router.log.read_text()
    assert "POST /v1/completions status=400" in log
    assert "POST /register status=400" in log
    assert "Traceback" not in log
    for endpoint in ("/register", "/v1/completions"):
        [line] = router.metric(
            f'http_requests_total{{endpoint="{endpoint}",method="POST",status_code="400"}}'
        )
        assert line.endswith(" 1.0")


def test_truncated_body_reaches_no_replica(
    router: RouterProcess, new_engine: Callable[..., FakeEngine]
) -> None:
    engine = new_engine()
    router.add(engine)
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n"
    status, _, body = exchange(router.port, head + b'{"prompt', half_close=True)
    assert (status, error_code(body)) == (400, "bad_body")
    assert engine.received == []


def test_a_request_without_length_has_no_body(
    router: RouterProcess, new_engine: Callable[..., FakeEngine]
) -> None:
    engine = new_engine()
    router.add(engine)
    assert exchange(router.port, b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n\r\n")[0] == 200
    assert engine.received[0].header("content-length") == "0"


def test_the_absolute_form_of_a_target_is_understood(
    router: RouterProcess, new_engine: Callable[..., FakeEngine]
) -> None:
    engine = new_engine()
    router.add(engine)
    assert (
        exchange(router.port, b"GET http://some.where/v1/models?x=1 HTTP/1.1\r\nHost: some.where\r\n\r\n")[0]
        == 200
    )
    assert engine.received[0].target == "/v1/models?x=1"


@pytest.mark.parametrize("path", ["/v1/../controller/x", "/v1/%2e%2e/controller/x", "/v1/a/..", "/v1/.%2e"])
def test_a_path_does_not_climb_out_of_v1(
    router: RouterProcess, new_engine: Callable[..., FakeEngine], path: str
) -> None:
    engine = new_engine()
    router.add(engine)
    assert exchange(router.port, b"POST %s HTTP/1.1\r\nHost: x\r\n\r\n" % path.encode())[0] == 404
    assert engine.received == []


def test_a_line_break_in_a_path_makes_no_line_in_the_log(
    router: RouterProcess, new_engine: Callable[..., FakeEngine]
) -> None:
    router.add(new_engine())
    assert exchange(router.port, b"GET /v1/x%0Aforged HTTP/1.1\r\nHost: x\r\n\r\n")[0] == 200
    wait_until(lambda: "GET /v1/x%0Aforged" in router.log.read_text(), "the request is in the log")
    assert "\nforged" not in router.log.read_text()


def test_expect_100_continue_is_answered_by_the_router(
    router: RouterProcess, new_engine: Callable[..., FakeEngine]
) -> None:
    engine = new_engine()
    router.add(engine)
    with socket.create_connection(("127.0.0.1", router.port), timeout=20) as sock:
        sock.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\nExpect: 100-continue\r\n\r\n"
        )
        assert sock.recv(1000).startswith(b"HTTP/1.1 100 ")
        sock.sendall(b"{}")
        assert sock.recv(1000).startswith(b"HTTP/1.1 200 ")
    assert engine.received[0].header("expect") is None


def test_clients_must_present_a_key_when_keys_are_set(
    start_router: Callable[..., RouterProcess], new_engine: Callable[..., FakeEngine], tmp_path: Path
) -> None:
    keys = tmp_path / "keys"
    keys.write_text("# team a\nalpha\n\n  beta  \n")
    router = start_router("--api-keys-file", str(keys), env={"FD_API_KEY": "gamma, delta"})
    engine = new_engine()
    router.add(engine)  # replicas need no key
    refused = router.complete()
    assert (refused.status_code, refused.json()["error"]["code"]) == (401, "invalid_api_key")
    assert refused.headers["WWW-Authenticate"] == "Bearer"
    assert router.get("/v1/models", headers={"Authorization": "Bearer wrong"}).status_code == 401
    for key in ("alpha", "beta", "gamma", "delta"):
        assert router.complete(headers={"Authorization": f"Bearer {key}"}).status_code == 200
    assert router.get("/health").status_code == 200
    for path in ("/tokenize", "/detokenize"):
        assert requests.post(f"{router.url}{path}", data="{}", timeout=10).status_code == 401
    assert router.get("/openapi.json").status_code == router.get("/docs").status_code == 200
    assert [each.target for each in engine.received[4:]] == ["/openapi.json", "/docs"]
    assert not any(key in router.log.read_text() for key in ("alpha", "gamma", "wrong"))


@pytest.mark.parametrize(
    "header", ["", "alpha", "Basic alpha", "Bearer", "Bearer alph", "Bearer alphaa", "Bearer \xff"]
)
def test_only_a_valid_bearer_token_is_accepted(header: str) -> None:
    assert not ApiKeys(["alpha"]).allow(header)


def test_without_keys_every_client_is_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FD_API_KEY", raising=False)
    assert ApiKeys.read("--api-keys-file", None, "FD_API_KEY").allow("")
    monkeypatch.setenv("FD_API_KEY", " a ,")
    keys = ApiKeys.read("--api-keys-file", None, "FD_API_KEY")
    assert (keys.allow("bearer a"), keys.allow("")) == (True, False)


def test_empty_key_file_does_not_disable_the_keys(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# nothing yet\n")
    with pytest.raises(ConfigError, match="has no key in it"):
        ApiKeys.read("--api-keys-file", file, "FD_API_KEY")
    with pytest.raises(ConfigError, match="cannot be read"):
        ApiKeys.read("--api-keys-file", tmp_path / "none", "FD_API_KEY")


def test_headers_named_in_connection_are_not_forwarded() -> None:
    headers = [
        (b"connection", b"close, X-A"),
        (b"x-a", b"1"),
        (b"x-b", b"2"),
        (b"upgrade", b"h2c"),
        (b"keep-alive", b"5"),
    ]
    assert without_hop_by_hop(headers) == [(b"x-b", b"2")]


def test_clients_that_do_not_close_do_not_delay_others(
    router: RouterProcess, new_engine: Callable[..., FakeEngine]
) -> None:
    """gunicorn waits two seconds for each such client in turn, in the loop that accepts connections."""
    router.add(new_engine())
    lingering = [socket.create_connection(("127.0.0.1", router.port)) for _ in range(30)]
    for sock in lingering:
        sock.sendall(b"GET /v1/models HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    for sock in lingering:
        assert sock.recv(15) == b"HTTP/1.1 200 OK"
    assert router.complete().status_code == 200  # within its timeout of 30 s
    for sock in lingering:
        sock.close()


def test_a_client_that_never_finishes_its_head_does_not_stop_the_others(
    router: RouterProcess, new_engine: Callable[..., FakeEngine]
) -> None:
    router.add(new_engine())
    slow = [socket.create_connection(("127.0.0.1", router.port)) for _ in range(50)]
    for sock in slow:
        sock.sendall(b"POST /v1/completions HTTP/1.1\r\nHost:")
    assert router.complete().status_code == 200
    for sock in slow:
        sock.close()
    wait_until(lambda: router.get("/health").status_code == 200, "the router is alive")
