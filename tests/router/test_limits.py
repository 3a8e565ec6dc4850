"""Limits on one client's memory, time and connections; other clients are served meanwhile."""

from __future__ import annotations

import json
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
    keeps,
    wait_until,
    waits_for,
)
from .raw_client import CHUNKED, GET, HEAD, POST, STREAM, RawClient

MOST_BODY = 100_000
#: Bytes; more than the router reads before it refuses a request.
ENDLESS = 2 << 20


@pytest.fixture(scope="module")
def shared_router(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RouterProcess]:
    flags = ["--max-body-bytes", str(MOST_BODY), "--client-timeout-secs", "1", "--keep-alive-secs", "2"]
    router = RouterProcess(tmp_path_factory.mktemp("router"), *flags)
    yield router
    router.stop()


@pytest.fixture
def client(shared_router: RouterProcess, replica: FakeEngine) -> Iterator[RawClient]:
    with RawClient(shared_router.port) as client:
        yield client


# ---- size


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"GET /" + b"a" * 9000 + b" HTTP/1.1\r\nHost: x\r\n\r\n", 414),
        (b"GET /v1/models?" + b"a" * ENDLESS, 414),
        (b"GET / HTTP/1.1\r\nHost: x\r\n" + b"X: y\r\n" * 200 + b"\r\n", 431),
        (b"GET / HTTP/1.1\r\nHost: x\r\n" + b"X: y\r\n" * (ENDLESS // 6), 431),
        (b"GET / HTTP/1.1\r\nHost: x\r\nX: " + b"y" * 70_000 + b"\r\n\r\n", 431),
        (b"GET / HTTP/1.1\r\nHost: x\r\nX: " + b"y" * ENDLESS, 431),
        (b"GET / HTTP/1.1\r\nHost: x\r\n" + b"y" * ENDLESS, 431),
        (HEAD + b"Content-Length: %d\r\n\r\n" % (MOST_BODY + 1), 413),
        (HEAD + b"Content-Length: %d\r\nExpect: 100-continue\r\n\r\n" % (MOST_BODY + 1), 413),
        (CHUNKED + b"%x\r\n" % (MOST_BODY + 1) + b"x" * (MOST_BODY + 1), 413),
        (CHUNKED + b"100\r\n" + b"x" * 256 + b"\r\n100;" + b"x" * ENDLESS, 400),
        (CHUNKED + b"2\r\n{}\r\n0\r\n" + b"X: y\r\n" * (ENDLESS // 6) + b"\r\n", (400, 431)),
        (CHUNKED + b"2\r\n{}\r\n0\r\nX: " + b"y" * ENDLESS, 400),
        (CHUNKED + b"0" * ENDLESS, 400),
    ],
    ids=lambda value: str(value[:20] + b"..." + value[-20:]) if isinstance(value, bytes) else str(value),
)
def test_oversized_requests_are_refused_in_any_form(
    shared_router: RouterProcess,
    replica: FakeEngine,
    client: RawClient,
    sent: bytes,
    status: int | tuple[int, int],
) -> None:
    client.send_what_is_taken(sent)
    answer = client.answer()
    assert answer.status in ((status,) if isinstance(status, int) else status)
    assert json.loads(answer.body)["error"]["type"] == "invalid_request_error"
    assert replica.received == []
    assert shared_router.memory() < 150 << 20


@pytest.mark.parametrize("cut", [1, 7, 1000])
def test_request_just_within_the_limits_is_served_for_any_chunking(
    replica: FakeEngine, client: RawClient, cut: int
) -> None:
    lines = b"".join(b"X-%d: %b\r\n" % (number, b"y" * 400) for number in range(100))
    target = b"/v1/completions?" + b"a" * 7900
    body = b"x" * 20_000
    chunks = b"".join(b"%x\r\n%b\r\n" % (cut, body[at : at + cut]) for at in range(0, 20_000 - cut, cut))
    sent = b"POST %b HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n%b\r\n" % (target, lines)
    client.send(sent)
    client.send(chunks + b"0\r\n\r\n")
    assert client.answer().status == 200
    assert len(replica.received[0].headers) >= 100
    assert len(replica.received[0].body) == chunks.count(b"x")


def test_a_head_and_a_body_may_come_byte_by_byte(replica: FakeEngine, client: RawClient) -> None:
    client.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for byte in POST:
        client.send(bytes([byte]))
    assert client.answer().status == 200


# ---- time

STOPPED = [
    (b"P", "head"),
    (HEAD, "head"),
    (HEAD + b"Content-Length: 10\r\n\r\n{", "body"),
    (CHUNKED, "body"),
    (CHUNKED + b"1", "body"),
    (POST + b"GET", "head"),
]
#: The start of a request, and the piece that follows it now and then.
SLOWLORIS = [(b"POST /", b"x"), (HEAD, b"X: y\r\n"), (HEAD + b"Content-Length: 9999\r\n\r\n", b"x")]


def is_told_that_it_is_late(client: RawClient, part: str) -> bool:
    answer = client.answer()
    message = json.loads(answer.body)["error"]["message"]
    return (answer.status, message) == (408, f"the request {part} did not arrive in time")


def test_incomplete_request_gets_408(shared_router: RouterProcess, replica: FakeEngine) -> None:
    with ExitStack() as stack:
        clients = [stack.enter_context(RawClient(shared_router.port)) for _ in STOPPED]
        for client, (sent, _) in zip(clients, STOPPED, strict=True):
            client.send(sent)
        for client, (sent, part) in zip(clients, STOPPED, strict=True):
            if sent.startswith(POST):
                assert client.answer().status == 200
            assert is_told_that_it_is_late(client, part)
            assert client.is_at_its_end()


def test_trickled_request_gets_408_too(shared_router: RouterProcess, replica: FakeEngine) -> None:
    """Slowloris: each piece arrives in time, but the request is never complete."""
    all_refused = threading.Event()

    def drips() -> None:
        while not all_refused.wait(0.2):
            for client, (_, drop) in zip(clients, SLOWLORIS, strict=True):
                client.send_what_is_taken(drop)

    with ExitStack() as stack:
        clients = [stack.enter_context(RawClient(shared_router.port)) for _ in SLOWLORIS]
        for client, (start, _) in zip(clients, SLOWLORIS, strict=True):
            client.send(start)
        dripping = threading.Thread(target=drips)
        dripping.start()
        try:
            for client, part in zip(clients, ("head", "head", "body"), strict=True):
                assert is_told_that_it_is_late(client, part)
        finally:
            all_refused.set()
            dripping.join()


def test_a_connection_without_requests_is_closed_after_a_while(
    shared_router: RouterProcess, replica: FakeEngine
) -> None:
    with RawClient(shared_router.port) as client, RawClient(shared_router.port) as silent:
        client.send(GET)
        assert client.answer().status == 200
        assert client.is_at_its_end()
        assert silent.is_at_its_end()


def test_late_answer_keeps_the_connection_open(replica: FakeEngine, client: RawClient) -> None:
    """A request may take as long as it needs; the client's time limit starts after the answer."""
    gate = threading.Event()
    replica.behaviour = waits_for(gate)
    client.send(POST)
    threading.Timer(2.2, gate.set).start()
    assert client.answer().status == 200
    client.send(GET)
    assert client.answer().status == 200


# ---- slow readers


class EndlessStream:
    """Sends events until writing fails."""

    def __init__(self) -> None:
        self.sent = 0
        self.is_cut = threading.Event()

    def __call__(self, received: Received) -> bool:
        received.send(EVENT_HEAD)
        event = b"data: " + b"x" * 10_000 + b"\n\n"
        try:
            while True:
                received.send_chunk(event)
                self.sent += len(event)
        except OSError:
            self.is_cut.set()
            raise


def test_client_that_stops_reading_pauses_the_replica_and_is_dropped(
    start_router: Callable[..., RouterProcess], new_engine: Callable[..., FakeEngine]
) -> None:
    router = start_router("--client-timeout-secs", "2")
    stream = EndlessStream()
    engine = new_engine(behaviour=stream)
    router.add(engine)
    before = router.memory()
    with RawClient(router.port, receive_buffer=4096) as client:
        client.send(STREAM)
        assert client.head()[0] == 200
        seen = [-1]

        def has_stopped() -> bool:
            seen.append(stream.sent)
            return seen[-1] == seen[-2] > 0 and not threading.Event().wait(0.3) and stream.sent == seen[-1]

        wait_until(has_stopped, "the replica cannot send any more")
        assert not stream.is_cut.is_set()
        assert router.memory() - before < 8 << 20
        other = new_engine(replica=1)
        router.add(other)
        assert router.complete().status_code == 200
        assert stream.is_cut.wait(20)
        assert "its client does not read its response" in router.log.read_text()
        with pytest.raises(ConnectionResetError):
            client.rest()
    router.wait_idle()


def test_slow_reader_gets_everything(shared_router: RouterProcess, replica: FakeEngine) -> None:
    """The answer exceeds all buffers, so that the replica is paused and resumed many times."""
    whole = b"".join(b"data: %d %b\n\n" % (number, b"x" * 1000) for number in range(20_000))

    def streams(received: Received) -> bool:
        received.send(EVENT_HEAD)
        for at in range(0, len(whole), 100_000):
            received.send_chunk(whole[at : at + 100_000])
        received.send(b"0\r\n\r\n")
        return True

    replica.behaviour = streams
    with RawClient(shared_router.port, receive_buffer=4096) as client:
        client.send(STREAM)
        status, headers = client.head()
        assert (status, headers["transfer-encoding"]) == (200, "chunked")
        pieces = []
        while piece := client.chunk():
            pieces.append(piece)
            threading.Event().wait(0.002)
        assert b"".join(pieces) == whole


def test_a_connection_to_a_replica_does_not_stay_stopped_for_the_next(
    shared_router: RouterProcess, replica: FakeEngine
) -> None:
    """The sizes of kernel buffers vary; for one of these counts the last piece is what fills them."""
    piece = b"data: " + b"x" * 1000 + b"\n\n"
    for count in range(2500, 5000, 100):
        replica.behaviour = keeps(EVENT_HEAD + (b"%x\r\n%b\r\n" % (len(piece), piece)) * count + b"0\r\n\r\n")
        with RawClient(shared_router.port, receive_buffer=4096) as client:
            client.send(STREAM)
            wait_until(lambda: replica.received and replica.received[-1].done.is_set(), "all is sent")
            assert len(client.answer().body) == count * len(piece)
        replica.behaviour = answers
        assert shared_router.complete().status_code == 200
        replica.received.clear()
