"""The client receives the replica's answer byte for byte, or an error that says what is wrong."""

import collections
import concurrent.futures
import hashlib
import http.client
import json
import socket
import threading
from collections.abc import Callable

import pytest
import requests

from .conftest import RouterProcess
from .fake_engine import (
    EVENT_HEAD,
    Behaviour,
    FakeEngine,
    Received,
    answers,
    answers_status,
    closes,
    events,
    json_head,
    never_answers,
    sends,
    sends_the_head_of_a_stream,
    wait_until,
    waits_for,
)
from .raw_client import RawClient


def raw_exchange(port: int, request: bytes) -> bytes:
    """Return everything that the router sends until it closes the connection."""
    with socket.create_connection(("127.0.0.1", port), timeout=20) as sock:
        sock.sendall(request)
        return b"".join(iter(lambda: sock.recv(65536), b""))


# ---- transparency


def test_body_path_query_and_headers_arrive_as_they_were_sent(
    router: RouterProcess, new_engine: Callable[..., FakeEngine]
) -> None:
    engine = new_engine()
    router.add(engine)
    body = b'{ "prompt":\t"\xc3\xa4",\n "odd":  1.0e0 }' + bytes(range(256)) * 2000
    headers = {
        "Authorization": "Bearer secret",
        "Content-Type": "application/json; charset=utf-8",
        "X-Custom": "a, b",
        "X-Private": "hop",
        "Connection": "keep-alive, X-Private",
        "TE": "trailers",
        "X-Request-Id": "mine",
        "X-FD-Seed": "42",
    }
    url = f"{router.url}/v1/chat/completions?a=1&b=%2F%20x"
    assert requests.post(url, data=body, headers=headers, timeout=20).status_code == 200
    [received] = engine.received
    assert received.body == body
    assert received.target == "/v1/chat/completions?a=1&b=%2F%20x"
    assert received.header("authorization") == "Bearer secret"
    assert received.header("content-type") == "application/json; charset=utf-8"
    assert received.header("x-custom") == "a, b"
    assert received.header("x-request-id") == "mine"
    assert received.header("x-fd-seed") == "42"
    assert received.header("host") == f"127.0.0.1:{engine.port}"
    for name in ("x-private", "te", "connection", "transfer-encoding"):
        assert received.header(name) is None


def test_d3_each_path_goes_to_the_same_path(
    router: RouterProcess, new_engine: Callable[..., FakeEngine]
) -> None:
    """Upstream once sent /v1/completions to /v1/chat/completions."""
    engine = new_engine()
    router.add(engine)
    for path in ("/v1/completions", "/v1/chat/completions", "/v1/embeddings"):
        requests.post(router.url + path, json={}, timeout=20)
    assert [received.target for received in engine.received] == [
        "/v1/completions",
        "/v1/chat/completions",
        "/v1/embeddings",
    ]


def test_a_request_without_id_and_seed_gets_both(
    router: RouterProcess, new_engine: Callable[..., FakeEngine]
) -> None:
    engine = new_engine()
    router.add(engine)
    answer = router.complete()
    [received] = engine.received
    assert received.header("x-request-id") == answer.headers["X-Request-Id"]
    assert 0 <= int(received.header("x-fd-seed") or "") < 2**53


@pytest.mark.parametrize(
    ("lines", "seed"),
    [
        (b"Connection: x-fd-seed, x-request-id\r\nX-FD-Seed: 7\r\nX-Request-Id: a\r\n", None),
        (b"X-FD-Seed: 7\r\nX-FD-Seed: 8\r\nX-Request-Id: a\r\nX-Request-Id: b\r\n", 7),
    ],
    ids=["named in Connection", "twice"],
)
def test_a_replica_gets_one_seed_and_one_id(
    router: RouterProcess, new_engine: Callable[..., FakeEngine], lines: bytes, seed: int | None
) -> None:
    engine = new_engine()
    router.add(engine)
    with RawClient(router.port) as client:
        client.send(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n" + lines + b"Content-Length: 2\r\n\r\n{}")
        assert client.answer().status == 200
    [received] = engine.received
    names = [name.lower() for name, _ in received.headers]
    assert (names.count("x-fd-seed"), names.count("x-request-id")) == (1, 1)
    assert received.header("x-request-id") == "a"
    assert 0 <= int(received.header("x-fd-seed") or "") < 2**53
    assert seed is None or received.header("x-fd-seed") == str(seed)


def test_the_answers_headers_come_back_without_those_of_the_connection(
    router: RouterProcess, new_engine: Callable[..., FakeEngine]
) -> None:
    extra = b"X-Kept: yes\r\nSet-Cookie: a=1\r\nSet-Cookie: b=2\r\nX-Hop: no\r\nConnection: X-Hop, close\r\n"
    router.add(new_engine(replica=4, behaviour=answers_status("200 Fine", b"{}", extra)))
    connection = http.client.HTTPConnection("127.0.0.1", router.port, timeout=20)
    connection.request("POST", "/v1/completions", b"{}")
    answer = connection.getresponse()
    assert (answer.status, answer.reason) == (200, "Fine")
    assert answer.headers["X-Kept"] == "yes"
    assert answer.headers.get_all("Set-Cookie") == ["a=1", "b=2"]
    assert answer.headers["X-Hop"] is None
    assert answer.headers["X-FD-Replica"] == "4"
    assert answer.headers["Content-Length"] == "2"
    connection.close()


@pytest.mark.parametrize(
    "status", ["400 Bad Request", "401 Unauthorized", "404 Not Found", "422 X", "429 Slow", "500 Oops"]
)
def test_d1_the_replicas_status_is_the_clients_status(
    router: RouterProcess, new_engine: Callable[..., FakeEngine], status: str
) -> None:
    """Upstream set the status for 200 only: a 429 arrived as 200 with an error body."""
    body = json.dumps({"error": {"message": status}}).encode()
    engine = new_engine(behaviour=answers_status(status, body, b"Retry-After: 7\r\n"))
    router.add(engine, new_engine(behaviour=answers_status(status, body, b"Retry-After: 7\r\n")))
    answer = router.complete()
    assert answer.status_code == int(status[:3])
    assert answer.content == body
    assert answer.headers["Retry-After"] == "7"
    assert len(engine.received) <= 1


def test_a_stream_that_is_refused_has_the_true_status(
    router: RouterProcess, new_engine: Callable[..., FakeEngine]
) -> None:
    router.add(new_engine(behaviour=answers_status("400 Bad Request")))
    assert router.complete(body={"stream": True}).status_code == 400


def test_models_come_from_a_replica(router: RouterProcess, new_engine: Callable[..., FakeEngine]) -> None:
    router.add(new_engine("ernie"))
    assert router.get("/v1/models").json()["data"] == [{"id": "ernie"}]


def test_a_long_answer_and_one_without_length_arrive_whole(
    router: RouterProcess, new_engine: Callable[..., FakeEngine]
) -> None:
    blob = bytes(range(256)) * 20_000
    engine = new_engine(behaviour=answers_status("200 OK", blob))
    router.add(engine)
    assert hashlib.sha256(router.complete().content).digest() == hashlib.sha256(blob).digest()
    engine.behaviour = sends(b"HTTP/1.0 200 OK\r\nContent-Type: text/plain\r\n\r\n" + blob)
    assert router.complete().content == blob


def test_the_answer_to_head_keeps_its_length_and_has_no_body(
    router: RouterProcess, new_engine: Callable[..., FakeEngine]
) -> None:
    router.add(new_engine(behaviour=sends(json_head(77))))
    answer = requests.head(f"{router.url}/v1/models", timeout=20)
    assert (answer.status_code, answer.headers["Content-Length"], answer.content) == (200, "77", b"")


# ---- streams


def test_each_event_arrives_before_the_next_is_sent(
    router: RouterProcess, new_engine: Callable[..., FakeEngine]
) -> None:
    """The engine sends an event only after the client has seen the previous one: a buffer would deadlock."""
    seen = [threading.Event() for _ in range(5)]

    def steps(received: Received) -> bool:
        received.send(EVENT_HEAD)
        for number, event in enumerate(seen):
            received.send_chunk(b"data: %d\n\n" % number)
            assert event.wait(20)
        received.send(b"0\r\n\r\n")
        return True

    router.add(new_engine(behaviour=steps))
    with router.complete(body={"stream": True}, stream=True) as answer:
        for number, line in enumerate(line for line in answer.iter_lines(chunk_size=1) if line):
            assert line == b"data: %d" % number
            seen[number].set()
    assert number == 4


def test_stream_arrives_byte_for_byte_for_any_split(
    router: RouterProcess, new_engine: Callable[..., FakeEngine]
) -> None:
    expected = (
        b': hi\r\n\r\nevent: x\ndata: {"a": 1}\ndata: more\n\n'
        + b"data: \xc3\xa4\n\ndata: [DONE]\n\nno newline"
    )

    def drips(received: Received) -> bool:
        received.send(EVENT_HEAD)
        for byte in expected:
            received.send_chunk(bytes([byte]))
        received.send(b"0\r\n\r\n")
        return True

    router.add(new_engine(behaviour=drips))
    answer = router.complete(body={"stream": True})
    assert answer.content == expected
    assert answer.headers["Content-Type"] == "text/event-stream"


def test_a_client_of_http_1_0_gets_a_stream_that_ends_with_the_connection(
    router: RouterProcess, new_engine: Callable[..., FakeEngine]
) -> None:
    router.add(new_engine())
    body = b'{"stream": true}'
    answer = raw_exchange(
        router.port,
        b"POST /v1/completions HTTP/1.0\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body),
    )
    head, _, rest = answer.partition(b"\r\n\r\n")
    assert b"chunked" not in head
    assert rest == b"".join(events(body))


# ---- replicas that fail before their answer


def test_d2_unreachable_replica_is_replaced_by_another(
    router: RouterProcess, new_engine: Callable[..., FakeEngine]
) -> None:
    """Upstream tried three times, always the same replica."""
    dead, alive = new_engine(replica=0), new_engine(replica=1)
    router.add(dead, alive)
    dead.stop()
    for _ in range(4):
        answer = router.complete()
        assert (answer.status_code, answer.headers["X-FD-Replica"]) == (200, "1")
    assert router.urls("down") == {dead.url}


def test_a_replica_that_dies_before_its_answer_is_replaced_by_another(
    router: RouterProcess, new_engine: Callable[..., FakeEngine]
) -> None:
    dying, alive = new_engine(replica=0, behaviour=closes), new_engine(replica=1)
    router.add(dying, alive)
    for _ in range(4):
        assert router.complete().headers["X-FD-Replica"] == "1"
    assert [received.body for received in alive.received] == [b'{"prompt": "hello"}'] * 4


@pytest.mark.parametrize(
    "start",
    [
        EVENT_HEAD,
        EVENT_HEAD + b'10\r\ndata: {"half of ',
        b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nContent-Length: 99\r\n\r\n",
        json_head(1000),
    ],
)
@pytest.mark.parametrize("how", ["close", "reset"])
def test_replica_lost_between_head_and_first_event_is_replaced(
    router: RouterProcess, new_engine: Callable[..., FakeEngine], start: bytes, how: str
) -> None:
    """FastDeploy's replicas send the head of a stream at once, long before the first token."""

    def dies(received: Received) -> bool:
        received.send(start)
        if how == "reset":
            received.reset()
        return False

    dying, alive = new_engine(replica=0, behaviour=dies), new_engine(replica=1)
    router.add(dying, alive)
    for _ in range(4):
        answer = router.complete(body={"stream": True})
        assert (answer.status_code, answer.headers["X-FD-Replica"]) == (200, "1")
        assert answer.content == b"".join(events(alive.received[-1].body))
    assert dying.received
    router.wait_idle()


def test_a_stream_that_no_replica_begins_is_refused(
    router: RouterProcess, new_engine: Callable[..., FakeEngine]
) -> None:
    engines = [new_engine(replica=number, behaviour=sends(EVENT_HEAD)) for number in range(3)]
    router.add(*engines)
    answer = router.complete(body={"stream": True})
    assert (answer.status_code, answer.json()["error"]["code"]) == (500, "replicas_lost")
    assert [len(engine.received) for engine in engines] == [1, 1, 1]


def test_a_retried_request_is_the_same_request(
    router: RouterProcess, new_engine: Callable[..., FakeEngine]
) -> None:
    engines = [new_engine(replica=0, behaviour=closes), new_engine(replica=1)]
    router.add(*engines)
    while not engines[0].received:
        router.complete()
    lost = engines[0].received[0]
    [again] = [
        each for each in engines[1].received if each.header("x-request-id") == lost.header("x-request-id")
    ]
    assert again.header("x-fd-seed") == lost.header("x-fd-seed")
    assert (again.body, again.target) == (lost.body, lost.target)


def test_each_replica_is_tried_once(router: RouterProcess, new_engine: Callable[..., FakeEngine]) -> None:
    engines = [new_engine(replica=number, behaviour=closes) for number in range(3)]
    router.add(*engines)
    answer = router.complete()
    assert (answer.status_code, answer.headers["X-Should-Retry"]) == (500, "false")
    assert "Retry-After" not in answer.headers
    assert [len(engine.received) for engine in engines] == [1, 1, 1]
    message = answer.json()["error"]["message"]
    assert all(f"replica {number}: " in message for number in range(3))


def test_a_busy_replica_is_replaced_by_another(
    router: RouterProcess, new_engine: Callable[..., FakeEngine]
) -> None:
    busy = new_engine(replica=0, behaviour=answers_status("503 Service Unavailable"))
    router.add(busy, new_engine(replica=1))
    for _ in range(3):
        assert router.complete().headers["X-FD-Replica"] == "1"
    assert router.urls("down") == set()


def test_when_all_are_busy_the_client_gets_their_answer(
    router: RouterProcess, new_engine: Callable[..., FakeEngine]
) -> None:
    body = b'{"error":{"message":"loading","type":"server_error","param":null,"code":"loading"}}'
    behaviour = answers_status("503 Service Unavailable", body, b"Retry-After: 30\r\n")
    router.add(*[new_engine(replica=number, behaviour=behaviour) for number in range(2)])
    answer = router.complete()
    assert (answer.status_code, answer.content, answer.headers["Retry-After"]) == (503, body, "30")


def test_a_replica_that_answers_garbage_is_a_bad_gateway(
    router: RouterProcess, new_engine: Callable[..., FakeEngine]
) -> None:
    router.add(new_engine(replica=0, behaviour=sends(b"SSH-2.0-OpenSSH\r\n")))
    answer = router.complete()
    assert (answer.status_code, answer.json()["error"]["code"]) == (502, "bad_gateway")


@pytest.mark.parametrize("behaviour", [never_answers, sends_the_head_of_a_stream])
def test_a_silent_replica_is_given_up_after_the_timeout(
    start_router: Callable[..., RouterProcess], new_engine: Callable[..., FakeEngine], behaviour: Behaviour
) -> None:
    router = start_router("--request-timeout-secs", "0.3")
    engines = [new_engine(replica=number, behaviour=behaviour) for number in range(2)]
    router.add(*engines)
    answer = router.complete(body={"stream": True})
    assert (answer.status_code, answer.json()["error"]["code"]) == (504, "replica_timeout")
    wait_until(
        lambda: [each for engine in engines for each in engine.cancelled] == [True],
        "the one replica that was asked learns that nobody waits any more",
    )


def test_an_early_refusal_of_a_large_body_reaches_the_client(
    router: RouterProcess, new_engine: Callable[..., FakeEngine]
) -> None:
    """The engine answers and closes while the router is still sending."""

    def refuses_early(connection: socket.socket) -> None:
        connection.recv(1000)
        connection.sendall(json_head(2, "413 Too Large", b"Connection: close\r\n") + b"{}")
        connection.shutdown(socket.SHUT_WR)
        while connection.recv(65536):
            pass
        connection.close()

    engine = new_engine()
    router.add(engine)
    engine.takes_connection = refuses_early
    answer = requests.post(f"{router.url}/v1/completions", data=b"x" * 5_000_000, timeout=20)
    assert (answer.status_code, answer.content) == (413, b"{}")


# ---- replicas that fail during their answer


@pytest.mark.parametrize("tail", [b"", b'data: {"half of an eve'])
def test_a_stream_whose_replica_dies_ends_with_an_error_event(
    router: RouterProcess, new_engine: Callable[..., FakeEngine], tail: bytes
) -> None:
    whole = b'data: {"choices": []}\n\n'

    def dies(received: Received) -> bool:
        received.send(EVENT_HEAD)
        received.send_chunk(whole + tail)
        received.reset()
        return False

    engines = [new_engine(replica=number, behaviour=dies) for number in (6, 7)]
    router.add(*engines)
    answer = router.complete(body={"stream": True})
    assert answer.status_code == 200
    assert sum(len(engine.received) for engine in engines) == 1
    lines = [line for line in answer.text.splitlines() if line]
    assert lines[0] == whole.decode().strip()
    assert json.loads(lines[1].removeprefix("data: "))["error"]["code"] == "replica_lost"
    assert lines[2:] == ["data: [DONE]"]
    router.wait_idle()


@pytest.mark.parametrize(
    "start",
    [
        json_head(1000) + b"half",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nhalf\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nContent-Length: 99\r\n\r\ndata: 1\n\n",
    ],
)
@pytest.mark.parametrize("version", [b"1.0", b"1.1"])
def test_incomplete_answer_reaches_no_client(
    router: RouterProcess, new_engine: Callable[..., FakeEngine], start: bytes, version: bytes
) -> None:
    """An answer that is not streamed is held back until it is complete."""
    router.add(new_engine(replica=0, behaviour=sends(start)))
    head = b"POST /v1/completions HTTP/%s\r\nHost: x\r\nConnection: close\r\n" % version
    request = head + b"Content-Length: 2\r\n\r\n{}"
    assert raw_exchange(router.port, request).startswith(b"HTTP/1.1 500 ")
    alive = new_engine(replica=1)
    router.add(alive)
    answer = router.complete()
    assert (answer.status_code, answer.headers["X-FD-Replica"]) == (200, "1")
    router.wait_idle()


@pytest.mark.parametrize("version", [b"1.0", b"1.1"])
def test_truncated_large_answer_never_looks_complete(
    router: RouterProcess, new_engine: Callable[..., FakeEngine], version: bytes
) -> None:
    router.add(new_engine(behaviour=sends(json_head(9_000_000) + b"x" * 8_000_000)))
    request = b"POST /v1/completions HTTP/%s\r\nHost: x\r\nContent-Length: 2\r\n\r\n{}" % version
    with pytest.raises(ConnectionResetError):
        raw_exchange(router.port, request)
    router.wait_idle()


# ---- kept connections


def test_connections_to_replicas_are_used_again(
    router: RouterProcess, new_engine: Callable[..., FakeEngine]
) -> None:
    engine = new_engine()
    router.add(engine)
    before = engine.connections
    checks = engine.health_checks
    for _ in range(10):
        router.complete()
    opened_by_checks = engine.health_checks - checks
    assert engine.connections - before - opened_by_checks <= 2


def test_kept_connection_closed_by_the_replica_fails_no_request(
    router: RouterProcess, new_engine: Callable[..., FakeEngine]
) -> None:
    engine = new_engine(replica=0)
    router.add(engine)

    def answers_and_closes(received: Received) -> bool:
        answers(received)
        return False

    engine.behaviour = answers_and_closes
    for _ in range(20):
        assert router.complete().status_code == 200
    assert router.urls() == {engine.url}


def test_request_on_an_expired_kept_connection_is_sent_on_a_new_one(
    router: RouterProcess, new_engine: Callable[..., FakeEngine]
) -> None:
    """The connection's keep-alive time ended at the moment of the request."""
    engine = new_engine(replica=0)
    router.add(engine)
    used: set[socket.socket] = set()

    def once_per_connection(received: Received) -> bool:
        if received.connection in used:
            return False
        used.add(received.connection)
        return answers(received)

    engine.behaviour = once_per_connection
    for _ in range(6):
        assert router.complete().status_code == 200
    assert "trying another" not in router.log.read_text()


# ---- load


def test_d5_a_burst_over_eight_idle_replicas_lands_eight_on_each(
    router: RouterProcess, new_engine: Callable[..., FakeEngine]
) -> None:
    """Upstream picked and counted in two steps, so that a burst piled up on one worker."""
    gate = threading.Event()
    engines = [new_engine(replica=number, behaviour=waits_for(gate)) for number in range(8)]
    router.add(*engines)
    with concurrent.futures.ThreadPoolExecutor(64) as pool:
        answers_ = [pool.submit(router.complete) for _ in range(64)]
        wait_until(lambda: sum(len(engine.received) for engine in engines) == 64, "all have arrived")
        assert [len(engine.received) for engine in engines] == [8] * 8
        assert set(router.in_flight().values()) == {8}
        gate.set()
        counts = collections.Counter(answer.result().headers["X-FD-Replica"] for answer in answers_)
    assert counts == {str(number): 8 for number in range(8)}
    router.wait_idle()


def test_requests_beyond_max_in_flight_get_429_with_retry_after(
    start_router: Callable[..., RouterProcess], new_engine: Callable[..., FakeEngine]
) -> None:
    router = start_router("--max-in-flight", "4")
    gate = threading.Event()
    engine = new_engine(behaviour=waits_for(gate))
    router.add(engine)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        running = [pool.submit(router.complete) for _ in range(4)]
        wait_until(lambda: len(engine.received) == 4, "the router is full")
        refused = router.complete()
        assert (refused.status_code, refused.headers["Retry-After"]) == (429, "1")
        assert refused.json()["error"]["type"] == "rate_limit_error"
        assert router.get("/health").status_code == 200
        assert engine.register_with(router.url).status_code == 200
        gate.set()
        assert [answer.result().status_code for answer in running] == [200] * 4
    assert router.complete().status_code == 200


def test_requested_policy_is_used(
    start_router: Callable[..., RouterProcess], new_engine: Callable[..., FakeEngine]
) -> None:
    gate = threading.Event()
    router = start_router("--policy", "round_robin")
    engines = [new_engine(replica=number) for number in range(2)]
    router.add(*engines)
    engines[0].behaviour = waits_for(gate)
    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        running = [pool.submit(router.complete) for _ in range(6)]
        wait_until(lambda: sum(len(engine.received) for engine in engines) == 6, "all have arrived")
        assert [len(engine.received) for engine in engines] == [3, 3]
        gate.set()
        assert all(answer.result().status_code == 200 for answer in running)
