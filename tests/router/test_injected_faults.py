"""An exception in a request's callback ends only that request: clock, wait queue and others are unharmed."""

from __future__ import annotations

import asyncio
import concurrent.futures
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import uvloop

from fastdeploy.daemon.router.board.board import PickFailure
from fastdeploy.daemon.router.http.write_batcher import WriteBatcher
from fastdeploy.daemon.router.relay.wait_queue import WaitQueue

from .conftest import RouterProcess
from .fake_engine import (
    EVENT_HEAD,
    Behaviour,
    FakeEngine,
    Received,
    answers,
    closes,
    events,
    never_answers,
    wait_until,
)
from .faulty_router import CLIENT_WATCH, DELIVERY, ENTRIES
from .raw_client import RawClient

_ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def faulty(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RouterProcess]:
    """A router with injected faults, and with short timeouts so that waiting requests end soon."""
    directory = tmp_path_factory.mktemp("router")
    lines = f"import sys; sys.path.insert(0, {str(_ROOT)!r})\nfrom tests.router import faulty_router\n"
    (directory / "sitecustomize.py").write_text(lines + "faulty_router.install()\n")
    router = RouterProcess(
        directory,
        *("--queue-timeout-secs", "0.6", "--request-timeout-secs", "2"),
        env={"PYTHONPATH": str(directory)},
    )
    yield router
    router.stop()


@pytest.fixture(scope="module")
def _engine(faulty: RouterProcess) -> Iterator[FakeEngine]:
    engine = FakeEngine()
    faulty.add(engine)
    yield engine
    engine.stop()


@pytest.fixture
def engine(faulty: RouterProcess, _engine: FakeEngine) -> FakeEngine:
    _engine.behaviour = answers
    wait_until(lambda: _engine.register_with(faulty.url).status_code == 200, "the engine is known")
    wait_until(lambda: faulty.urls() == {_engine.url}, "the engine is in use")
    return _engine


def request(fault: str = "", body: bytes = b'{"stream": true}') -> bytes:
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nX-Fault: {fault}\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


def behaving(gate: threading.Event, fault: str) -> Behaviour:
    """Hold ordinary streams at the gate in their middle; for a faulty request, trigger the faulty method."""

    def behave(received: Received) -> bool:
        if not received.header("X-Fault"):
            sent = events(received.body)
            received.send(EVENT_HEAD)
            received.send_chunk(sent[0])
            assert gate.wait(30)
            for event in sent[1:]:
                received.send_chunk(event)
            received.send(b"0\r\n\r\n")
            return True
        if fault in ("failed", "resumption"):
            return closes(received)
        if fault in ("watch", CLIENT_WATCH, "client_gone"):
            return never_answers(received)
        if fault == "informed":
            received.send(b"HTTP/1.1 102 Processing\r\n\r\n")
        if fault == "break_off":
            received.send(EVENT_HEAD)
            received.send_chunk(events(received.body)[0])
            return False
        return answers(received)

    return behave


REACHED = [
    *(name for name in ENTRIES if name not in ("try_again", "give_up", "unreachable")),
    *(name for name in DELIVERY if name != "respond"),
    CLIENT_WATCH,
]


@pytest.mark.parametrize("fault", REACHED)
def test_fault_in_one_request_affects_no_other(faulty: RouterProcess, engine: FakeEngine, fault: str) -> None:
    [worker] = faulty.workers()
    gate = threading.Event()
    engine.behaviour = behaving(gate, fault)
    body = b'{"prompt": "x"}' if fault in ("respond", "finish") else b'{"stream": true}'
    with RawClient(faulty.port) as innocent, RawClient(faulty.port) as culprit:
        innocent.send(request())
        assert innocent.head()[0] == 200
        assert innocent.chunk() == events(b'{"stream": true}')[0]
        culprit.send(request(fault, body))
        if fault == "client_gone":
            wait_until(lambda: faulty.in_flight()[engine.url] == 2, "the request is in flight")
            culprit.sock.shutdown(socket.SHUT_RDWR)
        else:
            # An error or a closed connection: neither silence nor an answer that looks complete.
            said = first_answer(culprit)
            assert not said or b"internal error of the router" in said or b"was lost in the middle" in said
        wait_until(lambda: faulty.in_flight()[engine.url] == 1, "its place is free again")
        gate.set()
        assert b"".join(iter(innocent.chunk, b"")) == b"".join(events(b'{"stream": true}')[1:])
    faulty.wait_idle()
    assert faulty.workers() == [worker]
    assert faulty.urls() == {engine.url}


def first_answer(client: RawClient) -> bytes:
    try:
        return client.answer().body
    except (AssertionError, ConnectionError, ValueError):
        return b""


@pytest.mark.parametrize("fault", ["try_again", "give_up"])
def test_fault_in_the_wait_queue_delays_no_other(
    faulty: RouterProcess, engine: FakeEngine, fault: str
) -> None:
    faulty_place = FakeEngine()
    engine.stop()
    wait_until(lambda: not faulty.urls(), "the engine is down")
    gate = threading.Event()

    def behave(received: Received) -> bool:
        assert gate.wait(30)
        return answers(received)

    faulty_place.behaviour = behave
    assert faulty_place.register_with(faulty.url, max_concurrency=1, instance="one").status_code == 200
    try:
        with concurrent.futures.ThreadPoolExecutor(5) as pool:
            first = pool.submit(faulty.complete)
            wait_until(lambda: faulty.in_flight()[faulty_place.url] == 1, "the replica is full")
            culprit = pool.submit(faulty.complete, headers={"X-Fault": fault})
            assert culprit.result().status_code == 500
            assert "internal error of the router" in culprit.result().json()["error"]["message"]
            # Requests queued after the fault get a timely answer: a rejection, or their turn.
            waiting = [pool.submit(faulty.complete) for _ in range(2)]
            assert pool.submit(faulty.complete).result().status_code == 429
            gate.set()
            assert first.result().status_code == 200
            assert {answer.result().status_code for answer in waiting} <= {200, 429}
    finally:
        faulty_place.stop()
        engine.restart()
    wait_until(lambda: not any(faulty.in_flight().values()), "nothing is in flight")


def test_a_fault_while_a_replica_is_unreachable_ends_with_an_error(
    faulty: RouterProcess, engine: FakeEngine
) -> None:
    engine.stop()
    try:
        answer = faulty.complete(headers={"X-Fault": "unreachable"})
        assert answer.status_code in (500, 503)
    finally:
        engine.restart()
    faulty.wait_idle()


def test_the_time_limits_hold_after_faults_in_the_clock(faulty: RouterProcess, engine: FakeEngine) -> None:
    """Requests after the one whose `watch` raises are watched all the same."""
    engine.behaviour = never_answers
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        faults = [pool.submit(faulty.complete, headers={"X-Fault": "watch"}) for _ in range(4)]
        others = [pool.submit(faulty.complete) for _ in range(4)]
        assert {answer.result().status_code for answer in faults} == {500}
        # Ended by their own deadline, or in the wait queue once the replica is taken for dead.
        assert {answer.result().status_code for answer in others} <= {504, 503, 429}


# ---- single components


class Waiter:
    has_exclusions = False
    deadline = 100.0

    def __init__(self, name: str) -> None:
        self.name = name

    def try_again(self, now: float) -> PickFailure | None:
        if self.name == "broken":
            raise RuntimeError(self.name)
        return PickFailure.DOWN

    def give_up(self) -> None: ...


def test_waiter_that_raises_does_not_affect_the_others() -> None:
    line = WaitQueue(10)
    waiters = [Waiter(name) for name in ("stays 1", "broken", "stays 2")]
    for waiter in waiters:
        assert line.join(waiter)
    with pytest.raises(RuntimeError, match="broken"):
        line.advance(0.0)
    assert [*line._others] == [waiters[0], waiters[2]]


def test_write_that_raises_does_not_affect_the_others() -> None:
    class Broken(asyncio.WriteTransport):
        aborted = False

        def is_closing(self) -> bool:
            return False

        def write(self, data: object) -> None:
            raise RuntimeError("no")

        def abort(self) -> None:
            self.aborted = True

    async def scene() -> None:
        outbox, broken = WriteBatcher(), Broken()
        ours, other = socket.socketpair()
        transport, _ = await asyncio.get_running_loop().create_connection(asyncio.Protocol, sock=ours)
        outbox.write(broken, b"nobody reads this")
        outbox.write(transport, b"but this")
        outbox.flush()
        assert other.recv(100) == b"but this"
        assert broken.aborted
        transport.close()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(scene())
