"""A client's departure cancels its request at any moment, and every count returns to zero."""

import random
import socket
import struct
import threading
from collections.abc import Callable

import pytest

from .conftest import RouterProcess
from .fake_engine import (
    EVENT_HEAD,
    Behaviour,
    FakeEngine,
    Received,
    answers,
    events,
    never_answers,
    sends_the_head_of_a_stream,
    streams_for_ever,
    wait_until,
)

BODY = b'{"stream": true, "prompt": "x"}'
REQUEST = (
    b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    b"Content-Length: %d\r\n\r\n%s" % (len(BODY), BODY)
)


def connect(router: RouterProcess) -> socket.socket:
    return socket.create_connection(("127.0.0.1", router.port), timeout=20)


def leave(client: socket.socket, how: str) -> None:
    if how == "reset":
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()


@pytest.mark.parametrize("behaviour", [never_answers, sends_the_head_of_a_stream])
@pytest.mark.parametrize("how", ["close", "reset"])
def test_disconnect_before_the_first_token_cancels_the_request(
    router: RouterProcess, new_engine: Callable[..., FakeEngine], behaviour: Behaviour, how: str
) -> None:
    """gevent, gthread and sync workers would hold the replica until it writes something."""
    engine = new_engine(behaviour=behaviour)
    other = new_engine(behaviour=behaviour)
    router.add(engine, other)
    client = connect(router)
    client.sendall(REQUEST)
    wait_until(lambda: engine.received or other.received, "a replica has the request")
    leave(client, how)
    wait_until(lambda: engine.cancelled + other.cancelled == [True], "its request is cancelled")
    router.wait_idle()
    # The client failed, not the replica: there is no retry, and no replica is suspected.
    assert len(engine.received) + len(other.received) == 1
    assert len(router.urls()) == 2
    assert (
        "status=499"
        in wait_until(
            lambda: [line for line in router.log.read_text().splitlines() if "status=499" in line],
            "it is logged",
        )[0]
    )


@pytest.mark.parametrize("how", ["close", "reset"])
def test_disconnect_in_a_silent_stream_cancels_the_request(
    router: RouterProcess, new_engine: Callable[..., FakeEngine], how: str
) -> None:
    engine = new_engine(behaviour=streams_for_ever)
    router.add(engine)
    client = connect(router)
    client.sendall(REQUEST)
    seen = b""
    while b"data: first" not in seen:
        seen += client.recv(65536)
    leave(client, how)
    wait_until(lambda: engine.cancelled == [True], "the stream is cancelled")
    router.wait_idle()


def test_half_closing_client_gets_a_reset_instead_of_a_cut_off_answer(
    router: RouterProcess, new_engine: Callable[..., FakeEngine]
) -> None:
    engine = new_engine(behaviour=streams_for_ever)
    router.add(engine)
    with connect(router) as client:
        client.sendall(REQUEST)
        seen = b""
        while b"data: first" not in seen:
            seen += client.recv(65536)
        client.shutdown(socket.SHUT_WR)
        with pytest.raises(ConnectionResetError):
            b"".join(iter(lambda: client.recv(65536), b""))
    wait_until(lambda: engine.cancelled == [True], "the stream is cancelled")


def test_kept_connection_serves_the_next_request_after_a_disconnect(
    router: RouterProcess, new_engine: Callable[..., FakeEngine]
) -> None:
    """The cancelled connection must not be reused, and the other connections must not be cancelled."""
    engine = new_engine()
    router.add(engine)
    for _ in range(20):
        assert router.complete().status_code == 200
        with connect(router) as client:
            client.sendall(REQUEST)
    router.wait_idle()
    for _ in range(20):
        assert router.complete(body={"stream": True}).text.endswith("data: [DONE]\n\n")
    assert router.urls() == {engine.url}


def test_counts_are_zero_after_clients_that_leave_at_random_moments(
    router: RouterProcess, new_engine: Callable[..., FakeEngine]
) -> None:
    """The other half of D4: each request is counted down exactly once, however it ends."""
    chance = random.Random(7)

    def moody(received: Received) -> bool:
        """Draw one of: slow, silent until cancelled, dead before head, first or second event, healthy."""
        mood = received.body[-3] % 7
        if mood == 0:
            return received.wait_until_cancelled(0.2)
        if mood == 1:
            return False
        if mood == 2:
            received.send(EVENT_HEAD)
            received.send_chunk(events(BODY)[0])
            received.reset()
            return False
        if mood == 3:
            received.wait_until_cancelled(0.02)
        if mood == 4:
            received.send(EVENT_HEAD)
            return received.wait_until_cancelled(0.02)
        return answers(received)

    engines = [new_engine(replica=number, behaviour=moody) for number in range(4)]
    router.add(*engines)
    ended = threading.Semaphore(0)

    def client() -> None:
        try:
            for _ in range(15):
                body = b'{"stream": true, "prompt": "%c"}' % chance.randrange(97, 123)
                head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body)
                request = head + body
                patience = chance.choice([0.0, 0.005, 0.05, 0.3])
                with connect(router) as sock:
                    # Some clients leave in the middle of sending their request.
                    sock.sendall(request[: chance.choice([10, len(head) + 3, len(request), len(request)])])
                    sock.settimeout(patience or 0.001)
                    try:
                        while sock.recv(4096):
                            pass
                    except OSError:
                        continue
        finally:
            ended.release()

    clients = [threading.Thread(target=client) for _ in range(12)]
    for each in clients:
        each.start()
    for _ in clients:
        assert ended.acquire(timeout=120)
    router.wait_idle()
    assert [line.rsplit(" ", 1)[1] for line in router.metric("fd_router_in_flight")] == ["0.0"] * 4
    for engine in engines:
        engine.behaviour = answers
    wait_until(lambda: len(router.urls()) == 4, "all replicas are back")
    assert router.complete().status_code == 200
    assert "Traceback" not in router.log.read_text()
