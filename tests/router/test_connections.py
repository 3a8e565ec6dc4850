"""The use of one connection: many requests, one at a time, in any dialect of HTTP/1."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from .conftest import RouterProcess
from .fake_engine import (
    EVENT_HEAD,
    FakeEngine,
    Received,
    answers,
    answers_status,
    events,
    json_head,
    keeps,
    wait_until,
    waits_for,
)
from .raw_client import GET, HEAD, POST, RawClient


@pytest.fixture
def client(shared_router: RouterProcess, replica: FakeEngine) -> Iterator[RawClient]:
    with RawClient(shared_router.port) as client:
        yield client


def test_incomplete_requests_on_all_connections_do_not_block_new_ones(
    start_router: Callable[..., RouterProcess], new_engine: Callable[..., FakeEngine]
) -> None:
    """A new connection with a request replaces the one whose request has been incomplete longest."""
    router = start_router("--max-connections", "40")
    gate = threading.Event()
    router.add(new_engine(behaviour=waits_for(gate)))
    with ExitStack() as stack:
        busy = stack.enter_context(RawClient(router.port))
        busy.send(POST)
        wait_until(lambda: any(router.in_flight().values()), "a request is under way")
        for _ in range(100):
            slow = stack.enter_context(RawClient(router.port))
            slow.send_what_is_taken(HEAD)
        for _ in range(3):
            assert router.get("/health").status_code == 200
        gate.set()
        assert busy.answer().status == 200


def test_a_thousand_requests_at_once_are_answered_in_their_order(
    shared_router: RouterProcess, replica: FakeEngine, client: RawClient
) -> None:
    before = shared_router.memory()
    count = 1000

    def sends_all() -> None:
        for number in range(count):
            client.send(
                b"GET /v1/models?%d HTTP/1.1\r\nHost: x\r\nX-Request-Id: %d\r\n\r\n" % (number, number)
            )

    sending = threading.Thread(target=sends_all)
    sending.start()
    assert [client.answer().headers["x-request-id"] for _ in range(count)] == [str(n) for n in range(count)]
    sending.join()
    assert [received.target for received in replica.received] == [f"/v1/models?{n}" for n in range(count)]
    assert shared_router.memory() - before < 16 << 20


def test_requests_of_one_connection_are_served_one_at_a_time(
    shared_router: RouterProcess, replica: FakeEngine, client: RawClient
) -> None:
    gate = threading.Event()
    replica.behaviour = waits_for(gate)
    client.send(POST + POST)
    wait_until(lambda: replica.received, "the first has arrived")
    assert shared_router.get("/health").status_code == 200
    assert len(replica.received) == 1
    gate.set()
    assert [client.answer().status for _ in range(2)] == [200, 200]


def test_half_closed_client_counts_as_disconnected(
    shared_router: RouterProcess, replica: FakeEngine, client: RawClient
) -> None:
    """nginx does the same by default; a reset tells the client that nothing more will come."""
    gone = []

    def waits(received: Received) -> bool:
        gone.append(received.wait_until_cancelled())
        return False

    replica.behaviour = waits
    client.send(POST)
    wait_until(lambda: replica.received, "the request has arrived")
    client.sock.shutdown(socket.SHUT_WR)
    assert client.is_at_its_end()
    wait_until(lambda: gone == [True], "the replica knows")
    shared_router.wait_idle()


def test_a_connection_is_used_again(replica: FakeEngine, client: RawClient) -> None:
    ports = set()
    for _ in range(5):
        client.send(POST)
        answer = client.answer()
        assert answer.status == 200
        assert "connection" not in answer.headers
        ports.add(client.own_port)
    assert len(ports) == 1


def test_an_old_client_keeps_its_connection_if_it_says_so(replica: FakeEngine, client: RawClient) -> None:
    request = b"GET /v1/models HTTP/1.0\r\nConnection: keep-alive\r\n\r\n"
    for _ in range(2):
        client.send(request)
        answer = client.answer()
        assert (answer.status, answer.headers["connection"]) == (200, "keep-alive")
    client.send(request.replace(b"keep-alive", b"x"))
    answer = client.answer()
    assert (answer.status, answer.headers["connection"]) == (200, "close")
    assert client.is_at_its_end()


def test_stream_to_an_http_1_0_keep_alive_client_ends_by_closing(
    replica: FakeEngine, client: RawClient
) -> None:
    body = b'{"stream": true}'
    head = b"POST /v1/completions HTTP/1.0\r\nConnection: keep-alive\r\nContent-Length: %d\r\n\r\n"
    client.send(head % len(body) + body)
    answer = client.answer()
    assert "transfer-encoding" not in answer.headers
    assert answer.body == b"".join(events(body))


def test_upgrade_offer_is_answered_in_http_1(replica: FakeEngine, client: RawClient) -> None:
    """Java's HttpClient offers HTTP/2 with its first request on each connection, body included."""
    offer = (
        b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAEAAEAAAAIAAAABAAMAAABk\r\n"
    )
    for body in (b"{}", b"x" * 50_000):
        client.send(HEAD + offer + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        assert client.answer().status == 200
        assert replica.received[-1].body == body
        assert replica.received[-1].header("upgrade") is None
        assert replica.received[-1].header("http2-settings") is None


@pytest.mark.parametrize("whole", [True, False])
def test_the_answer_to_head_is_a_head(replica: FakeEngine, client: RawClient, whole: bool) -> None:
    replica.behaviour = keeps(json_head(77) if whole else EVENT_HEAD)
    for _ in range(2):
        client.send(b"HEAD /v1/models HTTP/1.1\r\nHost: x\r\n\r\n")
        status, headers, _ = client.answer(to_head=True)
        assert (status, headers.get("content-length")) == (200, "77" if whole else None)
    client.send(b"HEAD /health HTTP/1.1\r\nHost: x\r\n\r\n")
    assert client.answer(to_head=True).status == 200
    replica.behaviour = answers
    client.send(GET)
    assert client.answer().status == 200


def test_options_that_are_no_preflight_are_answered_by_a_replica(
    replica: FakeEngine, client: RawClient
) -> None:
    replica.behaviour = answers_status("204 No Content", b"", b"Allow: POST\r\n")
    client.send(b"OPTIONS /v1/completions HTTP/1.1\r\nHost: x\r\nOrigin: http://a\r\n\r\n")
    status, headers, body = client.answer()
    assert (status, headers["allow"], body) == (204, "POST", b"")
    assert len(replica.received) == 1
    # About the router itself, not a replica (RFC 9110, section 9.3.7).
    client.send(b"OPTIONS * HTTP/1.1\r\nHost: x\r\n\r\n")
    assert client.answer().status == 200
    assert len(replica.received) == 1
