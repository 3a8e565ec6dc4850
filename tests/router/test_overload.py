"""With more requests than the replicas take, requests wait first come first served, or are rejected."""

from __future__ import annotations

import concurrent.futures
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest

from .conftest import RouterProcess
from .fake_engine import FakeEngine, Received, answers, answers_status, wait_until
from .raw_client import RawClient

BODY = b"Content-Length: 2\r\n\r\n{}"
POST = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n"


class Gated:
    """Answers requests in order of arrival, as many as `let` has permitted."""

    def __init__(self) -> None:
        self._may_answer = threading.Semaphore(0)

    def __call__(self, received: Received) -> bool:
        assert self._may_answer.acquire(timeout=30)
        return answers(received)

    def let(self, count: int) -> None:
        self._may_answer.release(count)


def names_of(engine: FakeEngine) -> list[str]:
    return [received.header("x-request-id") or "" for received in engine.received]


@pytest.fixture
def held() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def ask(held: ExitStack) -> Callable[[RouterProcess, str], RawClient]:
    """Sends a request with that ID, and returns once the router has read it."""

    def ask(router: RouterProcess, name: str) -> RawClient:
        client = held.enter_context(RawClient(router.port))
        # The router accepts connections in order, but may read the second one first.
        client.send(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        assert client.answer().status == 200
        client.send(POST + b"X-Request-Id: %b\r\n" % name.encode() + BODY)
        assert router.get("/health").status_code == 200
        return client

    return ask


def register(router: RouterProcess, engine: FakeEngine, max_concurrency: int) -> None:
    assert engine.register_with(router.url, max_concurrency=max_concurrency).status_code == 200


def waited(router: RouterProcess) -> float:
    lines = router.metric("fd_router_queue_seconds_count")
    return sum(float(line.split()[1]) for line in lines)


def was_logged(router: RouterProcess, *words: str) -> bool:
    return any(all(word in line for word in words) for line in router.log.read_text().splitlines())


def test_requests_beyond_capacity_wait_and_are_served_in_order(
    lent_router: RouterProcess,
    new_engine: Callable[..., FakeEngine],
    ask: Callable[[RouterProcess, str], RawClient],
) -> None:
    gated = Gated()
    engine = new_engine(behaviour=gated)
    register(lent_router, engine, max_concurrency=2)
    before = waited(lent_router)
    names = [str(number) for number in range(8)]
    clients = [ask(lent_router, name) for name in names]
    wait_until(lambda: len(engine.received) == 2, "as many as it takes have arrived")
    assert lent_router.in_flight() == {engine.url: 2}
    for number in range(6):
        gated.let(1)
        wait_until(lambda number=number: len(engine.received) == 3 + number, "the next one has its turn")
        assert lent_router.in_flight() == {engine.url: 2}
    gated.let(2)
    assert [client.answer().status for client in clients] == [200] * 8
    # Two requests are sent at once: the order in which they arrive is undefined.
    assert sorted(names_of(engine)[:2]) == names[:2]
    assert names_of(engine)[2:] == names[2:]
    wait_until(lambda: waited(lent_router) == before + 6, "their waiting is counted")


def test_new_request_does_not_overtake_a_waiting_one(
    start_router: Callable[..., RouterProcess],
    new_engine: Callable[..., FakeEngine],
    ask: Callable[[RouterProcess, str], RawClient],
) -> None:
    """A place that becomes free goes to the longest waiting request, not to the new one that reveals it."""
    router = start_router()
    gated = Gated()
    engine = new_engine(behaviour=gated)
    register(router, engine, max_concurrency=1)
    clients = [ask(router, name) for name in ("first", "second")]
    wait_until(lambda: len(engine.received) == 1, "the replica is full")
    register(router, engine, max_concurrency=2)
    clients.append(ask(router, "third"))
    wait_until(lambda: len(engine.received) == 2, "there was room for one more")
    assert names_of(engine) == ["first", "second"]
    gated.let(3)
    assert [client.answer().status for client in clients] == [200] * 3


def test_queue_advances_when_a_request_of_another_worker_ends(
    start_router: Callable[..., RouterProcess], new_engine: Callable[..., FakeEngine], held: ExitStack
) -> None:
    router = start_router("--workers", "2")
    gated = Gated()
    engine = new_engine(behaviour=gated)
    register(router, engine, max_concurrency=1)
    wait_until(lambda: len(router.workers()) == 2, "both workers run")
    clients: dict[psutil.Process, RawClient] = {}
    while len(clients) < 2:
        client = held.enter_context(RawClient(router.port))
        clients[router.worker_of(client)] = client
    first, second = clients.values()
    first.send(POST + b"X-Request-Id: first\r\n" + BODY)
    wait_until(lambda: engine.received, "the first is under way")
    second.send(POST + b"X-Request-Id: second\r\n" + BODY)
    # An answer to another request shows that the worker has put the earlier one in its wait queue.
    again = held.enter_context(RawClient(router.port))
    while router.worker_of(again) != router.worker_of(second):
        again = held.enter_context(RawClient(router.port))
    again.send(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
    assert again.answer().status == 200
    assert len(engine.received) == 1
    gated.let(2)
    assert [first.answer().status, second.answer().status] == [200, 200]
    assert names_of(engine) == ["first", "second"]


def test_requests_beyond_a_full_queue_get_429_with_retry_after(
    start_router: Callable[..., RouterProcess],
    new_engine: Callable[..., FakeEngine],
    ask: Callable[[RouterProcess, str], RawClient],
) -> None:
    router = start_router("--queue-size", "2", "--queue-timeout-secs", "7")
    gated = Gated()
    engine = new_engine(behaviour=gated)
    register(router, engine, max_concurrency=1)
    clients = [ask(router, str(number)) for number in range(4)]
    refused = clients[3].answer()
    assert refused.status == 429
    assert json.loads(refused.body)["error"]["type"] == "rate_limit_error"
    # No request has ended yet, so the only estimate is the longest time in the wait queue.
    assert refused.headers["retry-after"] == "7"
    gated.let(3)
    assert [client.answer().status for client in clients[:3]] == [200] * 3
    assert names_of(engine) == ["0", "1", "2"]


def test_queue_size_0_rejects_at_once(
    start_router: Callable[..., RouterProcess],
    new_engine: Callable[..., FakeEngine],
    ask: Callable[[RouterProcess, str], RawClient],
) -> None:
    router = start_router("--queue-size", "0")
    gated = Gated()
    register(router, new_engine(behaviour=gated), max_concurrency=1)
    first, second = (ask(router, name) for name in ("first", "second"))
    assert second.answer().status == 429
    gated.let(1)
    assert first.answer().status == 200


def test_request_that_waited_too_long_gets_429_with_retry_after(
    start_router: Callable[..., RouterProcess],
    new_engine: Callable[..., FakeEngine],
    ask: Callable[[RouterProcess, str], RawClient],
) -> None:
    router = start_router("--queue-timeout-secs", "0.5")
    gated = Gated()
    engine = new_engine(behaviour=gated)
    register(router, engine, max_concurrency=1)
    first, second = (ask(router, name) for name in ("first", "second"))
    late = second.answer()
    assert (late.status, late.headers["retry-after"]) == (429, "1")
    gated.let(2)
    assert first.answer().status == 200
    # Its place in the wait queue is free as well.
    assert ask(router, "third").answer().status == 200
    assert names_of(engine) == ["first", "third"]


def test_client_that_leaves_the_queue_is_forgotten(
    lent_router: RouterProcess,
    new_engine: Callable[..., FakeEngine],
    ask: Callable[[RouterProcess, str], RawClient],
) -> None:
    gated = Gated()
    engine = new_engine(behaviour=gated)
    register(lent_router, engine, max_concurrency=1)
    first, leaving, last = (ask(lent_router, name) for name in ("first", "leaving", "last"))
    leaving.close()
    wait_until(lambda: was_logged(lent_router, "request=leaving", "status=499"), "its leaving is noticed")
    gated.let(2)
    assert [first.answer().status, last.answer().status] == [200, 200]
    assert names_of(engine) == ["first", "last"]
    lent_router.wait_idle()


def test_waiting_requests_go_to_a_replica_that_joins(
    lent_router: RouterProcess,
    new_engine: Callable[..., FakeEngine],
    ask: Callable[[RouterProcess, str], RawClient],
) -> None:
    gated = Gated()
    full = new_engine(behaviour=gated)
    register(lent_router, full, max_concurrency=1)
    first, second = (ask(lent_router, name) for name in ("first", "second"))
    other = new_engine(replica=7)
    register(lent_router, other, max_concurrency=1)
    assert second.answer().headers["x-fd-replica"] == "7"
    gated.let(1)
    assert first.answer().status == 200


def test_replica_without_max_concurrency_gets_all_requests_at_once(
    lent_router: RouterProcess,
    new_engine: Callable[..., FakeEngine],
    ask: Callable[[RouterProcess, str], RawClient],
) -> None:
    gated = Gated()
    engine = new_engine(behaviour=gated)
    lent_router.add(engine)
    clients = [ask(lent_router, str(number)) for number in range(30)]
    wait_until(lambda: len(engine.received) == 30, "all have arrived")
    gated.let(30)
    assert [client.answer().status for client in clients] == [200] * 30


# ---- retries


@pytest.mark.parametrize("status", ["503 Service Unavailable", "429 Too Many Requests"])
def test_when_all_are_overloaded_retries_do_not_multiply_the_load(
    start_router: Callable[..., RouterProcess], new_engine: Callable[..., FakeEngine], status: str
) -> None:
    """Each request could try eight replicas; the retry budget permits about one retry per five requests."""
    router = start_router("--max-in-flight", "200")
    refuses = answers_status(status, b"{}", b"Retry-After: 9\r\n")
    engines = [new_engine(replica=number, behaviour=refuses) for number in range(8)]
    router.add(*engines)
    count = 400
    began = time.monotonic()
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        got = list(pool.map(lambda _: router.complete(), range(count)))
    seconds = time.monotonic() - began
    assert {(answer.status_code, answer.headers["Retry-After"]) for answer in got} == {(int(status[:3]), "9")}
    attempts = sum(len(engine.received) for engine in engines)
    # The bucket starts full, and each request and each second adds to it.
    assert attempts <= count + 100 + 0.2 * count + 10 * seconds + 1
    assert attempts > count
    assert router.urls("down") == set()


def test_a_replica_that_is_full_for_a_while_is_replaced_by_another(
    lent_router: RouterProcess, new_engine: Callable[..., FakeEngine]
) -> None:
    full = new_engine(
        replica=0, behaviour=answers_status("429 Too Many Requests", b"{}", b"Retry-After: 1\r\n")
    )
    lent_router.add(full, new_engine(replica=1))
    assert [lent_router.complete().headers["X-FD-Replica"] for _ in range(6)] == ["1"] * 6
    assert full.received


def test_refusal_without_retry_after_is_returned(
    lent_router: RouterProcess, new_engine: Callable[..., FakeEngine]
) -> None:
    """The limit may be a key's quota, which would be used up at every replica."""
    behaviour = answers_status("429 Too Many Requests", b"{}")
    engines = [new_engine(replica=number, behaviour=behaviour) for number in range(2)]
    lent_router.add(*engines)
    assert lent_router.complete().status_code == 429
    assert sum(len(engine.received) for engine in engines) == 1


def test_waiting_requests_count_as_in_flight(
    start_router: Callable[..., RouterProcess],
    new_engine: Callable[..., FakeEngine],
    ask: Callable[[RouterProcess, str], RawClient],
) -> None:
    router = start_router("--max-in-flight", "3")
    gated = Gated()
    engine = new_engine(behaviour=gated)
    register(router, engine, max_concurrency=1)
    clients = [ask(router, str(number)) for number in range(4)]
    refused = clients[3].answer()
    assert (refused.status, refused.headers["retry-after"]) == (429, "1")
    assert "current max concurrency is 3" in json.loads(refused.body)["error"]["message"]
    gated.let(3)
    assert [client.answer().status for client in clients[:3]] == [200] * 3


# ---- supervised replicas


def test_request_without_a_connection_waits_for_the_same_replica(
    start_router: Callable[..., RouterProcess], new_engine: Callable[..., FakeEngine], tmp_path: Path
) -> None:
    flags = ("--health-check-interval-secs", "0.2", "--queue-timeout-secs", "2")
    router = start_router("--admin-socket", str(tmp_path / "admin"), *flags)
    engine = new_engine()
    router.add(engine)
    engine.stop()
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        answer = pool.submit(router.complete)
        wait_until(lambda: router.get("/registered").json()["down"], "the replica is down")
        engine.restart()
        assert answer.result().status_code == 200


def test_a_refusal_is_not_kept_back_until_a_lost_replica_returns(
    start_router: Callable[..., RouterProcess], new_engine: Callable[..., FakeEngine], tmp_path: Path
) -> None:
    flags = ("--health-check-interval-secs", "0.2", "--queue-timeout-secs", "1")
    router = start_router("--admin-socket", str(tmp_path / "admin"), *flags)
    refuses = new_engine(behaviour=answers_status("429 Too Many Requests", extra=b"Retry-After: 7\r\n"))
    lost = new_engine()
    router.add(refuses, lost)
    lost.stop()
    wait_until(lambda: router.get("/registered").json()["down"], "the replica is down")
    answer = router.complete()
    assert (answer.status_code, answer.headers["retry-after"]) == (429, "7")
    assert router.metric("fd_router_queue_seconds_count") == ["fd_router_queue_seconds_count 0.0"]
