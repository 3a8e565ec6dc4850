"""nginx and HAProxy with the shipped configurations in front of a router: they delay no data."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from ..ports import accepts, free_ports
from .conftest import RouterProcess
from .fake_engine import (
    FakeEngine,
    answers_status,
    events,
    streams_for_ever,
    wait_until,
    waits_after_each_event,
)
from .raw_client import RawClient

ETC = Path(__file__).parents[2] / "etc"
STREAM = b'POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 16\r\n\r\n{"stream": true}'
POST = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n%bContent-Length: 2\r\n\r\n{}"


def nginx(directory: Path, port: int, router: int) -> list[str]:
    """Adapt the configuration as its comments describe, with the router as replica; return the command."""
    text = (ETC / "nginx.conf").read_text()
    text = text.replace("listen 127.0.0.1:8080", f"listen 127.0.0.1:{port}")
    first, *others = re.findall(r"^ +server 127\.0\.0\.1:\d+.*\n", text, re.MULTILINE)
    for line in others:
        text = text.replace(line, "")
    text = text.replace(first, f"server 127.0.0.1:{router};\n")
    (directory / "nginx.conf").write_text(text)
    command = ["nginx", "-p", str(directory), "-e", "stderr", "-c", str(directory / "nginx.conf")]
    return [*command, "-g", "daemon off;"]


def haproxy(directory: Path, port: int, router: int) -> list[str]:
    text = (ETC / "haproxy.cfg").read_text()
    text = text.replace("bind 127.0.0.1:8081", f"bind 127.0.0.1:{port}")
    text = text.replace("127.0.0.1:30000", f"127.0.0.1:{router}")
    (directory / "haproxy.cfg").write_text(text)
    return ["haproxy", "-db", "-f", str(directory / "haproxy.cfg")]


@pytest.fixture(scope="module", params=[nginx, haproxy], ids=lambda proxy: proxy.__name__)
def front(
    request: pytest.FixtureRequest, shared_router: RouterProcess, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[int]:
    """The port of the proxy."""
    name = request.param.__name__
    if shutil.which(name) is None:
        pytest.skip(f"{name} is not installed (apt-get install {name})")
    port = free_ports(1)[0]
    command = request.param(tmp_path_factory.mktemp(name), port, shared_router.port)
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            wait_until(lambda: accepts(port), f"{name} listens")
            yield port
        finally:
            process.terminate()


@pytest.fixture
def engine(lent_router: RouterProcess, front: int, new_engine: type[FakeEngine]) -> FakeEngine:
    engine = new_engine()
    lent_router.add(engine)

    def answers_through_the_proxy() -> bool:
        # HAProxy checks for the router every two seconds.
        with RawClient(front) as client:
            client.send(b"GET /v1/models HTTP/1.1\r\nHost: x\r\n\r\n")
            return client.answer().status == 200

    wait_until(answers_through_the_proxy, "the proxy knows the router")
    engine.received.clear()
    return engine


@pytest.fixture
def client(front: int, engine: FakeEngine) -> Iterator[RawClient]:
    with RawClient(front) as client:
        yield client


def test_each_event_arrives_before_the_next_is_sent(engine: FakeEngine, client: RawClient) -> None:
    """The replica sends an event only after the client has seen the previous one: a buffer would deadlock."""
    seen = threading.Semaphore(0)

    engine.behaviour = waits_after_each_event(seen)
    client.send(STREAM)
    assert client.head()[0] == 200
    for event in events(b'{"stream": true}'):
        assert client.chunk() == event
        seen.release()
    assert client.chunk() == b""


def test_a_client_that_goes_away_ends_the_request(
    lent_router: RouterProcess, engine: FakeEngine, client: RawClient
) -> None:
    engine.behaviour = streams_for_ever
    client.send(STREAM)
    assert client.head()[0] == 200
    assert client.chunk() == b"data: first\n\n"
    client.close()
    wait_until(lambda: engine.cancelled == [True], "the replica knows")
    lent_router.wait_idle()


def test_a_request_has_one_id_from_end_to_end(engine: FakeEngine, client: RawClient) -> None:
    client.send(POST % b"X-Request-Id: mine\r\n")
    assert client.answer().headers["x-request-id"] == "mine"
    client.send(POST % b"")
    made = client.answer().headers["x-request-id"]
    assert [received.header("x-request-id") for received in engine.received] == ["mine", made]
    assert len(made) >= 32


def test_a_replicas_error_arrives_as_it_is(engine: FakeEngine, client: RawClient) -> None:
    for status in ("400 Bad Request", "429 Too Many Requests", "500 Oops"):
        engine.behaviour = answers_status(status, b'{"error":"why"}')
        client.send(POST % b"")
        answer = client.answer()
        assert (answer.status, answer.body) == (int(status[:3]), b'{"error":"why"}')


@pytest.mark.parametrize(
    "path", ["/register", "/metrics", "/registered", "/admin/replicas/0/drain", "/internal/resume"]
)
def test_internal_paths_are_not_reachable_through_the_proxy(
    engine: FakeEngine, client: RawClient, path: str
) -> None:
    """To the router, every client of the proxy seems to be on this machine."""
    client.send(b"POST %b HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{}" % path.encode())
    answer = client.answer()
    assert (answer.status, json.loads(answer.body)["error"]["code"]) == (404, "not_found")
    client.send(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
    assert client.answer().status == 200


def test_a_reload_of_the_router_is_not_noticed_behind_a_proxy(
    lent_router: RouterProcess, front: int, engine: FakeEngine
) -> None:
    """The proxy keeps connections to the router, and may be sending on one at that moment."""
    over = threading.Event()
    got: list[int] = []

    def ask() -> None:
        while not over.is_set():
            with RawClient(front) as client:
                # nginx closes a connection after a thousand requests.
                for _ in range(100):
                    client.send(POST % b"")
                    got.append(client.answer().status)

    clients = [threading.Thread(target=ask) for _ in range(4)]
    for thread in clients:
        thread.start()
    try:
        for _ in range(2):
            workers = started(lent_router)
            lent_router.process.send_signal(signal.SIGHUP)
            wait_until(lambda count=workers + 1: started(lent_router) == count, "there is a new worker")
            goal = len(got) + 200
            wait_until(lambda goal=goal: len(got) >= goal, "requests go on")
    finally:
        over.set()
        for thread in clients:
            thread.join()
    assert set(got) == {200}


def started(router: RouterProcess) -> int:
    """Return the number of workers started since the router did."""
    return router.log.read_text().count("listening on")
