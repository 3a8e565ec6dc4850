"""Bytes that two parsers could read differently: no replica receives a request too many.

A refused request reaches no replica. An accepted one is rewritten in the plainest form, in which a second,
strict parser finds exactly one request.
"""

from __future__ import annotations

import json

import pytest
from gunicorn.config import Config
from gunicorn.http.parser import RequestParser

from .conftest import RouterProcess
from .fake_engine import FakeEngine, Received
from .raw_client import RawClient

HOST = b"Host: x\r\n"
POST = b"POST /v1/completions HTTP/1.1\r\n" + HOST
GET = b"GET /v1/models HTTP/1.1\r\n" + HOST
CHUNKED = POST + b"Transfer-Encoding: chunked\r\n\r\n"
#: The request that an attacker would smuggle, on a connection that another client uses next.
HIDDEN = b"GET /v1/hidden HTTP/1.1\r\nHost: x\r\n\r\n"
BODY = b"Content-Length: 2\r\n\r\n{}"
UPGRADE = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAA\r\n"

REFUSED = {
    # The length of the body
    "length and chunks": (
        POST + b"Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + HIDDEN,
        400,
    ),
    "chunks and length": (
        POST + b"Transfer-Encoding: chunked\r\nContent-Length: 4\r\n\r\n0\r\n\r\n" + HIDDEN,
        400,
    ),
    "two lengths": (POST + b"Content-Length: 2\r\nContent-Length: 40\r\n\r\n{}" + HIDDEN, 400),
    "one length twice": (POST + b"Content-Length: 2\r\n" + BODY, 400),
    "list of lengths": (POST + b"Content-Length: 2, 2\r\n\r\n{}", 400),
    "length with sign": (POST + b"Content-Length: +2\r\n\r\n{}", 400),
    "negative length": (POST + b"Content-Length: -2\r\n\r\n{}", 400),
    "length in hex": (POST + b"Content-Length: 0x2\r\n\r\n{}", 400),
    "length with a blank inside": (POST + b"Content-Length: 2 2\r\n\r\n{}", 400),
    "length with underscore": (POST + b"Content-Length: 1_0\r\n\r\n{}", 400),
    "length in other digits": (POST + "Content-Length: ٢\r\n\r\n{}".encode(), 400),
    "empty length": (POST + b"Content-Length: \r\n\r\n{}", 400),
    "length over 64 bits": (POST + b"Content-Length: 18446744073709551618\r\n\r\n{}", 400),
    "blank before the colon of a length": (POST + b"Content-Length : 2\r\n\r\n{}", 400),
    # The transfer encoding
    "xchunked": (POST + b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n", 501),
    "chunked, identity": (POST + b"Transfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n", 501),
    "identity, chunked": (POST + b"Transfer-Encoding: identity, chunked\r\n\r\n0\r\n\r\n", 501),
    "gzip, chunked": (POST + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n", 501),
    "identity": (POST + b"Transfer-Encoding: identity\r\nX: y\r\n\r\n", 501),
    "chunked twice": (
        POST + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        501,
    ),
    "chunked in quotes": (POST + b'Transfer-Encoding: "chunked"\r\n\r\n0\r\n\r\n', 501),
    "chunked with a comma": (POST + b"Transfer-Encoding: chunked,\r\n\r\n0\r\n\r\n", 501),
    "chunked with a parameter": (POST + b"Transfer-Encoding: chunked;q=1\r\n\r\n0\r\n\r\n", 501),
    "chunked behind a vertical tab": (POST + b"Transfer-Encoding: \x0bchunked\r\n\r\n0\r\n\r\n", 400),
    "blank before the colon": (POST + b"Transfer-Encoding : chunked\r\n\r\n0\r\n\r\n", 400),
    "tab before the colon": (POST + b"Transfer-Encoding\t: chunked\r\n\r\n0\r\n\r\n", 400),
    "no coding": (POST + b"Transfer-Encoding:\r\n\r\n0\r\n\r\n", 400),
    "chunked on the next line": (POST + b"Transfer-Encoding:\r\n chunked\r\n\r\n0\r\n\r\n", 400),
    "chunks of HTTP/1.0": (CHUNKED.replace(b"1.1", b"1.0") + b"2\r\n{}\r\n0\r\n\r\n", 400),
    # The end of a line
    "folded header": (POST + b"X: a\r\n b\r\n" + BODY, 400),
    "header that begins with a blank": (POST + b" Transfer-Encoding: chunked\r\n" + BODY, 400),
    "blank line before the headers": (b"POST /v1/completions HTTP/1.1\r\n Host: y\r\n" + HOST + BODY, 400),
    "bare line feeds": ((POST + BODY).replace(b"\r\n", b"\n"), 400),
    "bare line feed at the end": (POST + b"Content-Length: 2\r\n\n{}", 400),
    "bare line feed in a value": (POST + b"X: y\nTransfer-Encoding: chunked\r\n" + BODY, 400),
    "bare carriage return in a value": (POST + b"X: y\rTransfer-Encoding: chunked\r\n" + BODY, 400),
    "NUL in a value": (POST + b"X: a\0b\r\n" + BODY, 400),
    "NUL in a name": (POST + b"X\0: a\r\n" + BODY, 400),
    "header without colon": (POST + b"X\r\n" + BODY, 400),
    "header without name": (POST + b": x\r\n" + BODY, 400),
    "blank in a name": (POST + b"X Y: x\r\n" + BODY, 400),
    # The end of a chunk
    "chunk size with sign": (CHUNKED + b"+2\r\n{}\r\n0\r\n\r\n", 400),
    "chunk size with 0x": (CHUNKED + b"0x2\r\n{}\r\n0\r\n\r\n", 400),
    "chunk size behind a blank": (CHUNKED + b" 2\r\n{}\r\n0\r\n\r\n", 400),
    "chunk size before a blank": (CHUNKED + b"2 \r\n{}\r\n0\r\n\r\n", 400),
    "chunk size over 64 bits": (CHUNKED + b"10000000000000002\r\n{}\r\n0\r\n\r\n", 400),
    "no chunk size": (CHUNKED + b"\r\n{}\r\n0\r\n\r\n", 400),
    "chunk size with a bare line feed": (CHUNKED + b"2\n{}\r\n0\r\n\r\n", 400),
    "chunk extension with a bare line feed": (CHUNKED + b"2;a=b\n{}\r\n0\r\n\r\n", 400),
    "chunk extension with a bare carriage return": (CHUNKED + b"2;a\rb\r\n{}\r\n0\r\n\r\n", 400),
    "chunk extension with a line break in quotes": (CHUNKED + b'2;a="\r\n"\r\n{}\r\n0\r\n\r\n', 400),
    "chunk longer than its size": (CHUNKED + b"2\r\n{}xx0\r\n\r\n", 400),
    "chunk that ends with a bare line feed": (CHUNKED + b"2\r\n{}\n0\r\n\r\n", 400),
    "trailer that is a length": (CHUNKED + b"2\r\n{}\r\n0\r\nContent-Length: 40\r\n\r\n" + HIDDEN, 400),
    # The host
    "two hosts": (GET + b"Host: y\r\n\r\n", 400),
    "one host twice": (GET + HOST + b"\r\n", 400),
    "no host": (b"GET /v1/models HTTP/1.1\r\n\r\n", 400),
    "host with a user": (b"GET /v1/models HTTP/1.1\r\nHost: a@b\r\n\r\n", 400),
    "host with a path": (b"GET /v1/models HTTP/1.1\r\nHost: a/b\r\n\r\n", 400),
    "list of hosts": (b"GET /v1/models HTTP/1.1\r\nHost: a, b\r\n\r\n", 400),
    # The version
    "no version": (b"GET /v1/models\r\n\r\n", 505),
    "HTTP/0.9": (b"GET /v1/models HTTP/0.9\r\n" + HOST + b"\r\n", 505),
    "HTTP/2.0": (b"GET /v1/models HTTP/2.0\r\n" + HOST + b"\r\n", 505),
    "HTTP/1.2": (b"GET /v1/models HTTP/1.2\r\n" + HOST + b"\r\n", 400),
    "HTTP/1.10": (b"GET /v1/models HTTP/1.10\r\n" + HOST + b"\r\n", 400),
    "preface of HTTP/2": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\4\0\0\0\0\0", 400),
    "RTSP": (b"DESCRIBE /v1/models RTSP/1.0\r\n" + HOST + b"\r\n", 501),
    "method in small letters": (b"get /v1/models HTTP/1.1\r\n" + HOST + b"\r\n", 400),
    "CONNECT": (b"CONNECT /v1/models HTTP/1.1\r\n" + HOST + b"\r\n" + HIDDEN, 501),
    "TRACE": (b"TRACE /v1/models HTTP/1.1\r\n" + HOST + b"\r\n", 501),
    "PURGE": (b"PURGE /v1/models HTTP/1.1\r\n" + HOST + b"\r\n", 501),
    "blank in the target": (b"GET /v1/models /v1/hidden HTTP/1.1\r\n" + HOST + b"\r\n", 400),
    "tab in the target": (b"GET /v1/\tmodels HTTP/1.1\r\n" + HOST + b"\r\n", 400),
    "control character in the target": (b"GET /v1/\x01models HTTP/1.1\r\n" + HOST + b"\r\n", 400),
    # Expectations and other protocols
    "another expectation": (POST + b"Expect: 200-ok\r\n" + BODY, 417),
    "expectation with something before it": (POST + b"Expect: y 100-continue\r\n" + BODY, 417),
    "upgrade with chunks": (
        POST + UPGRADE + b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n" + HIDDEN,
        400,
    ),
    "upgrade with two lengths": (POST + UPGRADE + b"Content-Length: 2\r\n" + BODY + HIDDEN, 400),
}

#: The requests that the replica receives: method, target and body of each.
COMPLETION = ("POST", "/v1/completions", b"{}")
MODELS = ("GET", "/v1/models", b"")
SERVED = {
    "length behind blanks": (POST + b"Content-Length:  \t 2 \r\n\r\n{}", [COMPLETION]),
    "length with zeros": (POST + b"Content-Length: 0002\r\n\r\n{}", [COMPLETION]),
    "chunked in any case": (POST + b"Transfer-Encoding:\tcHuNkEd\r\n\r\n2\r\n{}\r\n0\r\n\r\n", [COMPLETION]),
    "chunk size with zeros": (CHUNKED + b"000000000000000000002\r\n{}\r\n0\r\n\r\n", [COMPLETION]),
    "chunk extension": (CHUNKED + b'2;a=b;c="d e"\r\n{}\r\n0\r\n\r\n', [COMPLETION]),
    "trailers": (CHUNKED + b"2\r\n{}\r\n0\r\nHost: y\r\nX-FD-Token: t\r\n\r\n", [COMPLETION]),
    "second request in a body": (
        POST + b"Content-Length: %d\r\n\r\n" % len(HIDDEN) + HIDDEN,
        [("POST", "/v1/completions", HIDDEN)],
    ),
    "second request in the body of a GET": (
        GET + b"Content-Length: %d\r\n\r\n" % len(HIDDEN) + HIDDEN,
        [("GET", "/v1/models", HIDDEN)],
    ),
    "second request in the chunk of a GET": (
        GET + b"Transfer-Encoding: chunked\r\n\r\n%x\r\n" % len(HIDDEN) + HIDDEN + b"\r\n0\r\n\r\n",
        [("GET", "/v1/models", HIDDEN)],
    ),
    "two requests": (GET + b"Content-Length: 0\r\n\r\n" + POST + BODY, [MODELS, COMPLETION]),
    "line breaks before a request": (b"\r\n\r\n" + GET + b"\r\n", [MODELS]),
    "absolute target": (b"GET http://a:b@evil:1/v1/models HTTP/1.1\r\n" + HOST + b"\r\n", [MODELS]),
    "absolute target of an old client": (b"GET http://evil/v1/models HTTP/1.0\r\n\r\n", [MODELS]),
    "empty host": (b"GET /v1/models HTTP/1.1\r\nHost:\r\n\r\n", [MODELS]),
    "fragment": (b"GET /v1/models#/../x HTTP/1.1\r\n" + HOST + b"\r\n", [MODELS]),
    "expectation twice": (POST + b"Expect: 100-continue\r\nExpect: 100-Continue\r\n" + BODY, [COMPLETION]),
    "expectation without a body": (GET + b"Expect: 100-continue\r\n\r\n", [MODELS]),
    "upgrade with a body": (POST + UPGRADE + BODY + GET + b"\r\n", [COMPLETION, MODELS]),
    "upgrade without a body": (GET + UPGRADE + b"\r\n" + POST + BODY, [MODELS, COMPLETION]),
    "upgrade and close": (POST + b"Upgrade: a\r\nConnection: upgrade, close\r\n" + BODY + GET, [COMPLETION]),
    "upgrade of an old client": (
        b"POST /v1/completions HTTP/1.0\r\nUpgrade: h2c\r\nConnection: upgrade\r\n" + BODY + HIDDEN,
        [COMPLETION],
    ),
    "headers named as of the connection": (
        POST + b"Connection: Content-Length, Host, X-Request-Id, X-FD-Seed\r\n" + BODY,
        [COMPLETION],
    ),
}  # fmt: skip

CLIMBING = [
    "/v1/../internal/resume",
    "/v1/..%2finternal/resume",
    "/v1/..%2Finternal/resume",
    "/v1/%2e%2e/internal/resume",
    "/v1/%2e%2e%2finternal%2fresume",
    "/v1/%252e%252e/internal/resume",
    "/v1/%25252e%25252e%25252finternal/resume",
    "/v1/./../internal/resume",
    "/v1//../../internal/resume",
    "/v1/x/../../internal/resume",
    "/v1/..\\internal\\resume",
    "/v1/..%5cinternal%5cresume",
    "/v1/..",
    "/internal/resume",
    "//internal/resume",
    "///internal/resume",
    "/./internal/resume",
    "/v1",
    "/V1/models",
    "/internal/../v1/models",
    "http://x/internal/resume",
    "http://x/v1/../internal/resume",
    "http://x?/../internal/resume",
]


def shape_of(received: Received) -> tuple[str, str, bytes]:
    return received.method, received.target, received.body


def requests_in(raw: bytes) -> list[tuple[str, str, bytes, list[tuple[str, str]]]]:
    """Parse the bytes with gunicorn, which rejects ambiguous ones."""
    parser = RequestParser(Config(), iter([raw]), ("127.0.0.1", 1))
    return [(each.method, each.uri, each.body.read(), each.headers) for each in parser]


@pytest.mark.parametrize("trick", REFUSED)
def test_ambiguous_request_reaches_no_replica(
    shared_router: RouterProcess, replica: FakeEngine, trick: str
) -> None:
    sent, expected = REFUSED[trick]
    with RawClient(shared_router.port) as client:
        client.send(sent)
        answer = client.answer()
        assert (answer.status, answer.headers["connection"]) == (expected, "close")
        assert json.loads(answer.body)["error"]["type"] == "invalid_request_error"
        assert client.is_at_its_end()
    assert replica.received == []


@pytest.mark.parametrize("trick", SERVED)
def test_unambiguous_request_is_rewritten(
    shared_router: RouterProcess, replica: FakeEngine, trick: str
) -> None:
    sent, expected = SERVED[trick]
    with RawClient(shared_router.port) as client:
        client.send(sent)
        assert [client.answer().status for _ in expected] == [200] * len(expected)
        if b"close" in sent or b"HTTP/1.0" in sent:
            assert client.is_at_its_end()
    assert [shape_of(received) for received in replica.received] == expected
    for received in replica.received:
        [(method, target, body, headers)] = requests_in(received.raw)
        assert (method, target, body) == shape_of(received)
        names = [name for name, _ in headers]
        assert sorted(names) == sorted(set(names))
        assert set(names) <= {"HOST", "CONTENT-LENGTH", "X-REQUEST-ID", "X-FD-SEED"}
        assert received.header("host") == f"127.0.0.1:{replica.port}"


@pytest.mark.parametrize("path", CLIMBING)
@pytest.mark.parametrize("method", [b"POST", b"GET"])
def test_only_paths_below_v1_reach_a_replica(
    shared_router: RouterProcess, replica: FakeEngine, path: str, method: bytes
) -> None:
    with RawClient(shared_router.port) as client:
        client.send(method + b" " + path.encode() + b" HTTP/1.1\r\n" + HOST + BODY)
        status, headers, _ = client.answer()
        assert (status, "location" in headers) == (404, False)
    assert replica.received == []


@pytest.mark.parametrize(
    "name",
    [b"X-FD-Token", b"x-fd-marks", b"X-FD-PROGRESS", b"X_FD_Token", b"X_FD-Marks", b"X-FD_Progress"],
)
def test_clients_cannot_send_internal_headers(
    shared_router: RouterProcess, replica: FakeEngine, name: bytes
) -> None:
    with RawClient(shared_router.port) as client:
        client.send(POST + name + b": 1\r\n" + BODY)
        assert client.answer().status == 200
    [received] = replica.received
    assert b"token" not in received.raw.lower()
    assert b"marks" not in received.raw.lower()
    assert b"progress" not in received.raw.lower()


@pytest.mark.parametrize(
    "name", [b"Content_Length", b"Transfer_Encoding", b"X_Request_Id", b"X-FD_Seed", b"HOST_"]
)
def test_an_underscore_does_not_pose_as_a_hyphen(
    shared_router: RouterProcess, replica: FakeEngine, name: bytes
) -> None:
    with RawClient(shared_router.port) as client:
        client.send(POST + name + b": chunked\r\n" + BODY)
        assert client.answer().status == 200
    [received] = replica.received
    assert b"_" not in received.raw
    assert received.header("x-request-id") != "chunked"


def test_http_1_0_client_gets_no_100_continue(shared_router: RouterProcess, replica: FakeEngine) -> None:
    with RawClient(shared_router.port) as client:
        client.send(b"POST /v1/completions HTTP/1.0\r\nExpect: 100-continue\r\nContent-Length: 2\r\n\r\n")
        wait_for_the_head(shared_router)
        client.send(b"{}")
        assert client.answer().status == 200


def wait_for_the_head(router: RouterProcess) -> None:
    """Wait until the router has read the head: it answers a later request only after that."""
    assert router.get("/health").status_code == 200
