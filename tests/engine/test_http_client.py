"""The HTTP client against real servers, most of which misbehave."""

from __future__ import annotations

import contextlib
import json
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fastdeploy.common import http_client
from fastdeploy.common.http_client import (
    ConnectionRefused,
    HttpError,
    NotJson,
    Response,
    Server,
    TimedOut,
    request,
)

from ..certificates import certify
from ..ports import free_ports

#: Seconds that no request of these tests needs.
LONG = 60.0
OK = b"HTTP/1.1 200 OK\r\n"
CHUNKED = OK + b"Transfer-Encoding: chunked\r\n\r\n"
Answer = Callable[[socket.socket], None]


class Peer:
    """A server of one connection after the other that keeps what it received."""

    def __init__(self, listener: socket.socket, answer: Answer) -> None:
        self.received: list[bytes] = []
        self.leave = threading.Event()
        self._listener = listener
        self._answer = answer
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    @property
    def server(self) -> Server:
        name = self._listener.getsockname()
        return Path(name) if isinstance(name, str) else (name[0], name[1])

    def close(self) -> None:
        self.leave.set()
        self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join(20)
        self._listener.close()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            with connection, contextlib.suppress(OSError):
                self.received.append(read_request(connection))
                self._answer(connection)


def read_request(connection: socket.socket) -> bytes:
    received = b""
    while b"\r\n\r\n" not in received:
        if not (piece := connection.recv(65536)):
            return received
        received += piece
    head, _, body = received.partition(b"\r\n\r\n")
    lengths = [line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length: ")]
    while lengths and len(body) < int(lengths[0][16:]):
        body += connection.recv(65536)
    return head + b"\r\n\r\n" + body


def answers(data: bytes) -> Answer:
    return lambda connection: connection.sendall(data)


def whole(body: bytes, status: str = "200 OK") -> bytes:
    return f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


@pytest.fixture
def serve() -> Iterator[Callable[..., Peer]]:
    peers: list[Peer] = []

    def serve(answer: Answer | bytes, path: Path | None = None) -> Peer:
        listener = socket.socket(socket.AF_UNIX if path else socket.AF_INET)
        listener.bind(str(path) if path else ("127.0.0.1", 0))
        listener.listen()
        peers.append(Peer(listener, answers(answer) if isinstance(answer, bytes) else answer))
        return peers[-1]

    yield serve
    for peer in peers:
        peer.close()


@pytest.mark.parametrize("name", [None, "socket"], ids=["tcp", "unix"])
def test_fields_and_key_arrive_and_the_json_comes_back(
    serve: Callable[..., Peer], tmp_path: Path, name: str | None
) -> None:
    peer = serve(whole(b'{"a": 1}', "404 No"), tmp_path / name if name else None)
    response = request(
        peer.server, "POST", "/a?b=1", timeout=LONG, fields={"x": "\u00e9"}, headers={"X-Id": "i"}, key="k"
    )
    assert (response.status, response.json()) == (404, {"a": 1})
    head, _, body = peer.received[0].partition(b"\r\n\r\n")
    first, *lines = head.decode().split("\r\n")
    assert first == "POST /a?b=1 HTTP/1.1"
    expected = ["Authorization: Bearer k", "Connection: close", "Content-Type: application/json", "X-Id: i"]
    assert set(expected) <= set(lines)
    assert json.loads(body) == {"x": "\u00e9"}


def test_a_request_without_a_key_has_no_authorization(serve: Callable[..., Peer]) -> None:
    peer = serve(whole(b""))
    assert request(peer.server, "GET", "/", timeout=LONG) == Response(200, b"")
    assert b"authorization" not in peer.received[0].lower()


@pytest.mark.parametrize(
    "start", [b"", OK + b"X-Slow: ", OK + b"Content-Length: 600\r\n\r\n", CHUNKED + b"258\r\n"]
)
def test_a_server_that_drips_bytes_uses_up_the_time(serve: Callable[..., Peer], start: bytes) -> None:
    def drip(connection: socket.socket) -> None:
        connection.sendall(start)
        rest = OK + b"X: " + b"x" * 570 if not start else b"x" * 600
        # It would end after many times the limit, so that a limit of each read alone fails the test.
        for byte in rest + b"\r\n\r\n0\r\n\r\n":
            peer.leave.wait(0.01)
            connection.sendall(bytes([byte]))

    peer = serve(drip)
    with pytest.raises(TimedOut, match=r"^no complete response within 0\.5 s$"):
        request(peer.server, "GET", "/", timeout=0.5)


@pytest.mark.parametrize("name", [None, "socket"], ids=["tcp", "unix"])
def test_a_server_that_accepts_and_hangs_is_given_up(
    serve: Callable[..., Peer], tmp_path: Path, name: str | None
) -> None:
    peer: Peer = serve(lambda _: peer.leave.wait(LONG), tmp_path / name if name else None)
    with pytest.raises(TimedOut):
        request(peer.server, "GET", "/", timeout=0.1)


def test_a_unix_socket_whose_backlog_is_full_is_retried_and_given_up(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as first:
        listener.bind(str(path))
        listener.listen(0)
        first.connect(str(path))
        with pytest.raises(TimedOut):
            request(path, "GET", "/", timeout=0.1)


def test_a_server_that_does_not_read_the_request_is_given_up() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener, pytest.raises(TimedOut):
        request(listener.getsockname(), "POST", "/", timeout=0.2, body=bytes(64 << 20))


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        (b"", "connection closed without a response"),
        (b"SSH-2.0-OpenSSH_9.2\r\n", "no valid HTTP response: BadStatusLine SSH-2.0"),
        (b"HTTP/1.1 999999 what\r\n\r\n", "no valid HTTP response: BadStatusLine"),
        (b"\0" * 70_000, "no valid HTTP response: LineTooLong"),
        (OK + b"X: y\r\n" * 200 + b"\r\n", "no valid HTTP response: HTTPException got more than 100 headers"),
        (OK + b"Content-Length: 9\r\n\r\nshort", "connection closed before the end of the response"),
        (CHUNKED + b"5\r\nab", "connection closed before the end of the response"),
        (CHUNKED + b"zz\r\nab\r\n", "connection closed before the end of the response"),
    ],
)
def test_what_is_no_whole_response_is_one_line(
    serve: Callable[..., Peer], answer: bytes, problem: str
) -> None:
    with pytest.raises(HttpError) as caught:
        request(serve(answer).server, "GET", "/", timeout=LONG)
    assert str(caught.value).startswith(problem)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    "frame",
    [
        whole,
        lambda body: OK + b"\r\n" + body,
        lambda body: CHUNKED + b"".join(b"1\r\n%c\r\n" % byte for byte in body) + b"0\r\n\r\n",
    ],
    ids=["length", "close", "chunked"],
)
def test_a_body_of_the_limit_is_read_and_a_larger_one_refused(
    serve: Callable[..., Peer], frame: Callable[[bytes], bytes]
) -> None:
    assert (
        request(serve(frame(b"0123456789")).server, "GET", "/", timeout=LONG, limit=10).body == b"0123456789"
    )
    with pytest.raises(HttpError, match=r"^response of more than 10 bytes$"):
        request(serve(frame(b"0123456789a")).server, "GET", "/", timeout=LONG, limit=10)


def test_a_body_without_an_end_is_refused_at_the_limit(serve: Callable[..., Peer]) -> None:
    def flood(connection: socket.socket) -> None:
        connection.sendall(OK + b"\r\n")
        while not peer.leave.is_set():
            connection.sendall(bytes(65536))

    peer = serve(flood)
    with pytest.raises(HttpError, match=r"^response of more than 1048576 bytes$"):
        request(peer.server, "GET", "/", timeout=LONG)


def test_a_body_that_is_not_wanted_is_not_waited_for(serve: Callable[..., Peer]) -> None:
    def answer(connection: socket.socket) -> None:
        connection.sendall(OK + b"Content-Length: 1000\r\n\r\n")
        peer.leave.wait(LONG)

    peer = serve(answer)
    assert request(peer.server, "GET", "/", timeout=LONG, limit=0) == Response(200, b"")


@pytest.mark.parametrize("body", [b"", b"{", b"\xff", b"[" * 100_000], ids=["empty", "cut", "bytes", "deep"])
def test_a_body_that_is_not_json_is_one_line(serve: Callable[..., Peer], body: bytes) -> None:
    response = request(serve(whole(body)).server, "GET", "/", timeout=LONG)
    with pytest.raises(NotJson, match=r"^response is not JSON: ") as caught:
        response.json()
    assert str(caught.value).isprintable()


def test_a_refused_connection_is_told_from_other_failures(tmp_path: Path) -> None:
    left = tmp_path / "left"
    with socket.socket(socket.AF_UNIX) as ended:
        ended.bind(str(left))
    for server in (("127.0.0.1", free_ports(1)[0]), left):
        with pytest.raises(ConnectionRefused, match=r"^connection refused$"):
            request(server, "GET", "/", timeout=LONG)
    with pytest.raises(HttpError, match=r"^No such file or directory$") as caught:
        request(tmp_path / "missing", "GET", "/", timeout=LONG)
    assert not isinstance(caught.value, ConnectionRefused)


def test_a_name_that_is_none_is_one_line() -> None:
    with pytest.raises(HttpError, match=r"is not a host name$"):
        request(("a" * 70 + ".example", 80), "GET", "/", timeout=LONG)


def test_the_next_address_of_a_name_is_tried(
    serve: Callable[..., Peer], monkeypatch: pytest.MonkeyPatch
) -> None:
    peer = serve(whole(b""))
    found = [
        (socket.AF_INET, socket.SOCK_STREAM, 6, "", address)
        for address in (("127.0.0.1", free_ports(1)[0]), peer.server)
    ]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
    assert request(("two.example", 80), "GET", "/", timeout=LONG).status == 200


def test_redirects_and_proxies_are_not_followed(
    serve: Callable[..., Peer], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{free_ports(1)[0]}")
    peer = serve(b"HTTP/1.1 307 Elsewhere\r\nLocation: /b\r\nContent-Length: 0\r\n\r\n")
    assert request(peer.server, "POST", "/a", timeout=LONG, fields={}).status == 307
    assert len(peer.received) == 1


def test_a_certificate_has_to_be_trusted(
    serve: Callable[..., Peer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    certificate, key = tmp_path / "certificate.pem", tmp_path / "key.pem"
    certify(certificate, key)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    listener = context.wrap_socket(socket.create_server(("127.0.0.1", 0)), server_side=True)
    # The server's thread must not end with the handshake that the first client breaks off.
    accept = listener.accept

    def accepted() -> Any:
        while True:
            try:
                return accept()
            except ssl.SSLError:
                continue

    monkeypatch.setattr(listener, "accept", accepted)
    peer = Peer(listener, answers(whole(b"secret")))
    try:
        http_client._tls_context.cache_clear()
        with pytest.raises(HttpError, match="certificate verify failed"):
            request(peer.server, "GET", "/", timeout=LONG, tls=True)
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        http_client._tls_context.cache_clear()
        assert request(peer.server, "GET", "/", timeout=LONG, tls=True).body == b"secret"
    finally:
        http_client._tls_context.cache_clear()
        peer.close()
