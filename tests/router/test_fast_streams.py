"""Streams on the fast path through a whole router: clients see no difference, and nothing is lost."""

from __future__ import annotations

import contextlib
import http.client
import os
import secrets
import socket
import ssl
import threading
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import requests

from ..certificates import certify
from ..file_limits import low_file_limit
from .asking import ask, generation
from .conftest import RouterProcess
from .fake_engine import EVENT_HEAD, Behaviour, FakeEngine, Received, answers, json_head, wait_until
from .raw_client import HEAD, POST, STREAM, RawClient
from .replicas import Fleet, running_fleet
from .test_tls import TlsRouter
from .test_transcript import DONE, SIGN, Said

ERROR = b'data: {"error":{"message":"the engine has failed"}}\n\n'
LAST_CHUNK = b"0\r\n\r\n"


def event(number: int, size: int = 5) -> Said:
    return Said(f"{number} {'x' * size}", tokens=(number,))


def clean(*events: Said) -> bytes:
    return b"".join(each.clean for each in events)


class Told:
    """Streams that begin with `event(0)`, and continue with the events that the test sends.

    The test has to see the first event before it sends more, or two threads would write at once.
    """

    def __init__(self) -> None:
        self.under_way: list[Received] = []
        self._is_over = threading.Event()

    def __call__(self, received: Received) -> bool:
        if b"stream" not in received.body:
            return answers(received)
        # Listed before the first event, by which the test knows that the stream has begun.
        self.under_way.append(received)
        received.send(EVENT_HEAD)
        received.send_chunk(event(0).raw)
        return self._is_over.wait(30)

    def say(self, *events: Said) -> None:
        for stream in self.under_way:
            for each in events:
                stream.send_chunk(each.raw)

    def end(self) -> None:
        for stream in self.under_way:
            stream.send_chunk(DONE)
            stream.send(LAST_CHUNK)
        self._is_over.set()


def add(router: RouterProcess, *engines: FakeEngine, verify: str | bool = True) -> None:
    """Register the engines as replicas whose events have marks."""
    for engine in engines:
        secret = {"token": secrets.token_hex(16), "instance": secrets.token_hex(16)}
        fields = engine.instance_info(features=["resume", "progress"], **secret)
        answer = requests.post(f"{router.url}/register", json=fields, timeout=10, verify=verify)
        assert answer.status_code == 200, answer.text


def rest(client: RawClient) -> bytes:
    """Return the remaining body of the current answer."""
    return b"".join(iter(client.chunk, b""))


def on_fast_path(router: RouterProcess) -> int:
    """Count the streams on the fast path, which has a duplicate of both connections of each."""
    return sum(_duplicates(worker.pid) for worker in router.workers()) // 2


def _duplicates(pid: int) -> int:
    found: Counter[str] = Counter()
    for file in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            found[os.readlink(file)] += 1
    return sum(count - 1 for name, count in found.items() if name.startswith("socket:"))


def access_log(router: RouterProcess, identity: str) -> str:
    def line() -> str | None:
        lines = router.log.read_text().splitlines()
        return next((line for line in lines if f"request={identity} " in line and "status=" in line), None)

    found: str = wait_until(line, "the line is logged")
    return found


@pytest.fixture
def told(lent_router: RouterProcess, new_engine: Callable[..., FakeEngine]) -> Told:
    """The behaviour of the only replica of `lent_router`."""
    told = Told()
    add(lent_router, new_engine(behaviour=told))
    return told


@pytest.fixture
def identity() -> str:
    return uuid.uuid4().hex


@pytest.fixture
def client(lent_router: RouterProcess, told: Told, identity: str) -> Iterator[RawClient]:
    """A client that has the first event of a stream on the fast path."""
    with RawClient(lent_router.port) as client:
        client.send(STREAM.replace(b"Host", b"X-Request-Id: %b\r\nHost" % identity.encode()))
        assert client.head()[0] == 200
        assert client.chunk() == event(0).clean
        wait_until(lambda: on_fast_path(lent_router) == 1, "the stream is on the fast path")
        yield client


# ---- ordinary streams


def test_events_pass_one_by_one_and_the_stream_is_returned_for_its_end(
    lent_router: RouterProcess, told: Told, client: RawClient
) -> None:
    for number in range(1, 6):
        told.say(event(number))
        assert client.chunk() == event(number).clean
    assert on_fast_path(lent_router) == 1
    told.end()
    assert (client.chunk(), client.chunk()) == (DONE, b"")
    wait_until(lambda: on_fast_path(lent_router) == 0, "the stream is back in the event loop")


def test_its_size_is_logged(lent_router: RouterProcess, told: Told, client: RawClient, identity: str) -> None:
    events = [event(number) for number in range(1, 50)]
    told.say(*events)
    told.end()
    assert event(0).clean + rest(client) == clean(event(0), *events) + DONE
    assert f" bytes={len(clean(event(0), *events) + DONE)} " in access_log(lent_router, identity)


def test_both_connections_are_used_again(lent_router: RouterProcess, told: Told, client: RawClient) -> None:
    told.say(event(1))
    told.end()
    rest(client)
    [stream] = told.under_way
    for _ in range(2):
        client.send(POST)
        assert client.answer().status == 200
    assert [each.connection for each in stream.engine.received] == [stream.connection] * 3


def test_pipelined_request_is_answered_after_the_stream(
    lent_router: RouterProcess, told: Told, client: RawClient
) -> None:
    client.send(POST + POST)
    told.say(event(1))
    assert client.chunk() == event(1).clean
    [stream] = told.under_way
    assert len(stream.engine.received) == 1
    told.say(event(2))
    told.end()
    assert rest(client) == event(2).clean + DONE
    assert [client.answer().status for _ in range(2)] == [200, 200]


# ---- clients


@pytest.mark.parametrize("how", ["close", "reset", "half"])
def test_disconnect_on_the_fast_path_cancels_the_request(
    lent_router: RouterProcess, told: Told, client: RawClient, identity: str, how: str
) -> None:
    told.say(event(1))
    assert client.chunk() == event(1).clean
    if how == "reset":
        client.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    if how == "half":
        client.sock.shutdown(socket.SHUT_WR)
        assert client.is_at_its_end()
    else:
        client.close()
    assert told.under_way[0].wait_until_cancelled()
    lent_router.wait_idle()
    assert f" bytes={len(clean(event(0), event(1)))} " in access_log(lent_router, identity)
    assert on_fast_path(lent_router) == 0


def test_slow_reader_pauses_the_replica_and_gets_everything(
    lent_router: RouterProcess, new_engine: Callable[..., FakeEngine]
) -> None:
    whole = [event(number, 10_000) for number in range(4000)]
    sent = [0]

    def streams(received: Received) -> bool:
        received.send(EVENT_HEAD)
        for each in whole:
            received.send_chunk(each.raw)
            sent[0] += 1
        received.send_chunk(DONE)
        received.send(LAST_CHUNK)
        return True

    def has_stopped() -> bool:
        before = sent[0]
        return before > 0 and not threading.Event().wait(0.3) and sent[0] == before

    add(lent_router, new_engine(behaviour=streams))
    before = lent_router.memory()
    with RawClient(lent_router.port, receive_buffer=1 << 16) as client:
        client.send(STREAM)
        assert client.head()[0] == 200
        wait_until(has_stopped, "the replica cannot send any more")
        assert sent[0] < len(whole)
        assert lent_router.memory() - before < 8 << 20
        assert rest(client) == clean(*whole) + DONE
        assert lent_router.memory() - before < 8 << 20


def test_an_old_client_gets_its_stream_from_the_event_loop(lent_router: RouterProcess, told: Told) -> None:
    with RawClient(lent_router.port) as client:
        client.send(STREAM.replace(b"HTTP/1.1", b"HTTP/1.0"))
        assert "transfer-encoding" not in client.head()[1]
        assert client.read(len(clean(event(0)))) == clean(event(0))
        told.say(event(1))
        assert client.read(len(clean(event(1)))) == clean(event(1))
        assert on_fast_path(lent_router) == 0
        told.end()
        assert client.rest() == DONE


def test_tls_client_gets_its_stream_from_the_event_loop(
    tmp_path: Path, new_engine: Callable[..., FakeEngine]
) -> None:
    certificate, key = tmp_path / "certificate.pem", tmp_path / "key.pem"
    certify(certificate, key)
    context = ssl.create_default_context(cafile=str(certificate))
    router, told = TlsRouter(tmp_path, certificate, key), Told()
    client = http.client.HTTPSConnection("127.0.0.1", router.port, timeout=20, context=context)
    try:
        router.url = router.url.replace("http:", "https:")
        add(router, new_engine(behaviour=told), verify=str(certificate))
        client.request("POST", "/v1/completions", b'{"stream": true}')
        answer = client.getresponse()
        assert answer.readline() + answer.readline() == event(0).clean
        told.say(event(1))
        assert answer.readline() + answer.readline() == event(1).clean
        assert on_fast_path(router) == 0
        told.end()
        assert answer.read() == DONE
    finally:
        client.close()
        router.stop()


# ---- replicas


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    with running_fleet(tmp_path_factory.mktemp("fleet"), 3) as fleet:
        yield fleet


@pytest.mark.parametrize(
    ("at", "how"),
    [
        *((at, "close") for at in ("half", "mark", "line", "frame", "event")),
        *(("event", how) for how in ("reset", "ends", "garbage", "reborn", "failed", "kill")),
    ],
)
def test_stream_cut_anywhere_on_the_fast_path_is_resumed(fleet: Fleet, at: str, how: str) -> None:
    """Each event is sent separately, so that the stream is on the fast path by the third."""
    fleet.renew()
    fault = {"at": at, "event": 5, "how": how}
    answer = ask(fleet.router.port, generation(n=2, max_tokens=8, interval=0.01, faults=[fault]))
    answer.check()
    assert len(answer.resumed_by) == 1
    fleet.wait_until_up()


def test_resumed_stream_is_on_the_fast_path_too(
    lent_router: RouterProcess, new_engine: Callable[..., FakeEngine]
) -> None:
    """A resumed stream takes the fast path even on a connection that has carried another stream."""
    told = Told()

    def fails(received: Received) -> bool:
        received.send(EVENT_HEAD + b"".join(b"%x\r\n%b\r\n" % (len(x), x) for x in (event(0).raw, ERROR)))
        return False

    def streams(received: Received) -> bool:
        return fails(received) if received.target == "/v1/completions" else told(received)

    def answers_in_chunks(received: Received) -> bool:
        received.send(EVENT_HEAD.replace(b"event-stream", b"plain"))
        received.send_chunk(b"hi")
        received.send(LAST_CHUNK)
        return True

    engines = [new_engine(replica=number, behaviour=answers_in_chunks) for number in range(2)]
    add(lent_router, *engines)
    with RawClient(lent_router.port) as client:
        for _ in range(4):
            client.send(POST)
            assert client.answer().body == b"hi"
        assert [engine.connections - engine.health_checks for engine in engines] == [1, 1]
        for engine in engines:
            engine.behaviour = streams
        client.send(STREAM)
        assert client.head()[0] == 200
        assert [client.chunk(), client.chunk()] == [event(0).clean] * 2
        wait_until(lambda: on_fast_path(lent_router) == 1, "the stream is on the fast path")
        told.end()
        assert client.chunk() == DONE


def test_replica_lost_before_it_read_the_whole_request_is_replaced(
    lent_router: RouterProcess, new_engine: Callable[..., FakeEngine]
) -> None:
    """Until then its stream stays with the event loop, because the fast path misses failed writes."""
    told = Told()
    may_go = threading.Event()

    def answers_early(connection: socket.socket) -> None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        if not connection.recv(1000).startswith(b"POST /v1/"):
            connection.sendall(json_head(2) + b"{}")
        else:
            connection.sendall(EVENT_HEAD + b"%x\r\n%b\r\n" % (len(event(0).raw), event(0).raw))
            assert may_go.wait(20)
        connection.close()

    hasty, other = new_engine(replica=0), new_engine(replica=1, behaviour=told)
    hasty.takes_connection = answers_early
    add(lent_router, hasty)
    body = b'{"stream": true, "prompt": "%b"}' % (b"x" * (9 << 20))
    with ExitStack() as stack:
        clients = [stack.enter_context(RawClient(lent_router.port)) for _ in range(4)]
        for client in clients:
            client.send(HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body)
            assert client.head()[0] == 200
            assert client.chunk() == event(0).clean
        assert on_fast_path(lent_router) == 0
        add(lent_router, other)
        may_go.set()
        for client in clients:
            assert client.chunk() == event(0).clean, "it goes on at the other"
        told.say(event(1))
        told.end()
        for client in clients:
            assert [client.chunk() for _ in range(2)] == [event(1).clean, DONE]
    lent_router.wait_idle()
    assert "Traceback" not in lent_router.log.read_text()


def test_keep_alives_on_the_fast_path_are_noticed(
    start_router: Callable[..., RouterProcess], new_engine: Callable[..., FakeEngine]
) -> None:
    router, told = start_router("--progress-timeout-secs", "0.5"), Told()
    add(router, new_engine(behaviour=told))
    with RawClient(router.port) as client:
        client.send(STREAM)
        assert client.head()[0] == 200
        assert client.chunk() == event(0).clean
        wait_until(lambda: on_fast_path(router) == 1, "the stream is on the fast path")
        [stream] = told.under_way
        for _ in range(10):
            assert not stream.wait_until_cancelled(0.1)
            stream.send_chunk(SIGN)
        assert on_fast_path(router) == 1
        told.end()
        assert rest(client) == DONE


def test_speed_of_replicas_is_measured_on_the_fast_path(
    lent_router: RouterProcess, new_engine: Callable[..., FakeEngine]
) -> None:
    stop = threading.Event()

    def at(seconds: float) -> Behaviour:
        def streams(received: Received) -> bool:
            received.send(EVENT_HEAD)
            while not stop.wait(seconds):
                received.send_chunk(event(0).raw)
            received.send_chunk(DONE)
            received.send(LAST_CHUNK)
            return True

        return streams

    add(lent_router, new_engine(replica=0, behaviour=at(0.02)), new_engine(replica=1, behaviour=at(0.2)))
    with ExitStack() as stack:
        for _ in range(16):
            client = stack.enter_context(RawClient(lent_router.port))
            client.send(STREAM)
        wait_until(lambda: on_fast_path(lent_router) == 16, "all are on the fast path")
        wait_until(lambda: weight(lent_router, 1) < 0.5, "the second one is known to be slow")
        assert weight(lent_router, 0) == 1.0
        stop.set()


def weight(router: RouterProcess, replica: int) -> float:
    [line] = router.metric(f'fd_router_replica_weight{{replica="{replica}"')
    return float(line.rpartition(" ")[2])


# ---- limits


def test_file_limit_is_raised_for_the_maximum_number_of_connections(
    start_router: Callable[..., RouterProcess], new_engine: Callable[..., FakeEngine]
) -> None:
    """The router raises a low soft limit to what it needs."""
    few = 300
    with low_file_limit():
        router = start_router("--max-connections", str(few))
    told = Told()
    add(router, new_engine(behaviour=told))
    with ExitStack() as stack:
        for _ in range(few - 10):
            client = stack.enter_context(RawClient(router.port))
            client.send(STREAM)
            assert client.head()[0] == 200
        wait_until(lambda: on_fast_path(router) == few - 10, "all are on the fast path")
        assert router.get("/health").status_code == 200
        told.end()


def test_large_connection_limit_costs_nothing(
    start_router: Callable[..., RouterProcess], new_engine: Callable[..., FakeEngine]
) -> None:
    router = start_router("--max-in-flight", str(10**10))
    add(router, new_engine(behaviour=answers))
    assert router.complete(body={"stream": True}).text.endswith("data: [DONE]\n\n")
    assert router.memory() < 150 << 20
