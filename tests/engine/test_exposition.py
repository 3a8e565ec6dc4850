"""Every scrape is answered, whatever other clients do or fail to do."""

from __future__ import annotations

import contextlib
import http.client
import socket
import time
from collections.abc import Iterator

import pytest

from fastdeploy.common.metrics_server import CONTENT_TYPE, MetricsServer

from ..waiting import wait_until

#: More than the kernel buffers for a client that does not read.
TEXT = b"# a comment\n" + b"x" * (16 << 20) + b"\n"


@pytest.fixture
def server() -> Iterator[MetricsServer]:
    exposition = MetricsServer(["127.0.0.1"], 0, lambda: TEXT)
    yield exposition
    exposition.close()


def ask(port: int, method: str = "GET", path: str = "/metrics") -> tuple[int, str | None, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request(method, path)
        response = connection.getresponse()
        return response.status, response.getheader("Content-Type"), response.read()
    finally:
        connection.close()


def connect(port: int, sent: bytes = b"") -> socket.socket:
    client = socket.create_connection(("127.0.0.1", port), timeout=10)
    client.sendall(sent)
    return client


def trickle(client: socket.socket) -> None:
    """Send bytes slowly, and far fewer than a request may have."""
    for _ in range(2000):
        client.sendall(b"x")
        time.sleep(0.01)


def test_a_scrape_gets_the_text_of_its_moment() -> None:
    texts = [b"a 2\n", b"a 1\n"]
    server = MetricsServer(["127.0.0.1"], 0, texts.pop)
    try:
        assert ask(server.port) == (200, CONTENT_TYPE, b"a 1\n")
        assert ask(server.port, path="/metrics?name[]=a") == (200, CONTENT_TYPE, b"a 2\n")
    finally:
        server.close()


def test_requests_other_than_a_scrape_get_a_hint(server: MetricsServer) -> None:
    assert ask(server.port, path="/")[::2] == (404, b"GET /metrics\n")
    assert ask(server.port, "DELETE")[::2] == (405, b"GET /metrics\n")
    assert ask(server.port, "HEAD")[::2] == (200, b"")
    with connect(server.port, b"hello\r\n\r\n") as client:
        assert client.recv(100).startswith(b"HTTP/1.1 400 Bad Request\r\n")
    with connect(server.port, b"GET /metrics HTTP/1.1\r\nx: " + b"y" * 9000) as client:
        assert client.recv(100).startswith(b"HTTP/1.1 200 OK\r\n"), "a long request is not read to its end"


def test_silent_and_unread_clients_do_not_block_others(server: MetricsServer) -> None:
    silent = [connect(server.port, b"GET /met") for _ in range(8)]
    full = [connect(server.port, b"GET /metrics HTTP/1.1\r\n\r\n") for _ in range(8)]
    assert ask(server.port)[2] == TEXT
    for client in (*silent, *full):
        client.close()


def test_oldest_client_is_dropped_at_the_limit(server: MetricsServer) -> None:
    crowd = [connect(server.port) for _ in range(40)]
    assert ask(server.port)[2] == TEXT
    assert crowd[0].recv(1) == b""
    for client in crowd:
        client.close()


def test_a_client_that_takes_too_long_is_dropped(
    server: MetricsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastdeploy.common.metrics_server._CLIENT_TIMEOUT", 0.2)
    with connect(server.port, b"GET /metrics HTTP/1.1\r\n") as client:
        assert client.recv(1) == b""


def test_a_client_that_does_not_read_is_dropped_after_the_time_for_it(
    server: MetricsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastdeploy.common.metrics_server._CLIENT_TIMEOUT", 0.2)
    with connect(server.port, b"GET /metrics HTTP/1.1\r\n\r\n") as client:
        wait_until(lambda: server._clients, deadline=10)
        wait_until(lambda: not server._clients, deadline=10)
        received = 0
        with contextlib.suppress(ConnectionResetError):
            while data := client.recv(1 << 20):
                received += len(data)
    assert 0 < received < len(TEXT)


def test_a_client_that_sends_byte_by_byte_gets_no_more_time(
    server: MetricsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastdeploy.common.metrics_server._CLIENT_TIMEOUT", 0.2)
    with connect(server.port, b"GET /metrics HTTP/1.1\r\n") as client, pytest.raises(ConnectionError):
        trickle(client)


def test_failing_collector_costs_one_scrape(caplog: pytest.LogCaptureFixture) -> None:
    texts = [b"a 1\n"]
    server = MetricsServer(["127.0.0.1"], 0, texts.pop)
    try:
        assert ask(server.port)[0] == 200
        assert ask(server.port)[0] == 500
        assert "/metrics: ERROR (IndexError: pop from empty list)" in caplog.text
        texts.append(b"a 2\n")
        assert ask(server.port)[2] == b"a 2\n"
    finally:
        server.close()


def test_a_taken_port_is_an_error_at_once_and_a_closed_one_is_free() -> None:
    server = MetricsServer(["127.0.0.1"], 0, lambda: b"a 1\n")
    try:
        with pytest.raises(OSError, match="in use"):
            MetricsServer(["127.0.0.1"], server.port, lambda: b"")
    finally:
        server.close()
    again = MetricsServer(["127.0.0.1"], server.port, lambda: b"a 2\n")
    try:
        assert ask(server.port)[2] == b"a 2\n"
    finally:
        again.close()


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="this machine has no IPv6")
def test_open_to_the_network_means_both_families() -> None:
    server = MetricsServer(["::"], 0, lambda: b"a 1\n")
    try:
        assert ask(server.port)[2] == b"a 1\n"
    finally:
        server.close()
