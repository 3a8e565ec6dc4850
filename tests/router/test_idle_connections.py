"""Hundreds of idle connections do not displace the active ones."""

import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from .conftest import RouterProcess
from .fake_engine import FakeEngine

#: Limits the router to 48 connections.
FEW = ("--max-connections", "48")
DEADLINE = 20


@pytest.fixture
def held() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def connect(router: RouterProcess, held: ExitStack) -> socket.socket:
    return held.enter_context(socket.create_connection(("127.0.0.1", router.port), timeout=DEADLINE))


def ask(client: socket.socket) -> bytes:
    client.sendall(b"GET /v1/models HTTP/1.1\r\nHost: x\r\n\r\n")
    return client.recv(15)


def test_silent_connections_delay_no_request(
    start_router: Callable[..., RouterProcess], new_engine: Callable[..., FakeEngine], held: ExitStack
) -> None:
    router = start_router(*FEW)
    router.add(new_engine())
    for _ in range(400):
        connect(router, held)
    assert router.get("/health").status_code == 200
    assert router.complete().status_code == 200
    assert ask(connect(router, held)) == b"HTTP/1.1 200 OK"


def test_longest_idle_connection_is_closed_at_the_limit(
    start_router: Callable[..., RouterProcess], new_engine: Callable[..., FakeEngine], held: ExitStack
) -> None:
    router = start_router(*FEW)
    router.add(new_engine())
    kept = connect(router, held)
    assert ask(kept) == b"HTTP/1.1 200 OK"
    first, *others = [connect(router, held) for _ in range(60)]
    assert router.get("/health").status_code == 200
    for gone in (kept, first):
        while gone.recv(4096):
            pass
    assert ask(others[-1]) == b"HTTP/1.1 200 OK"


def test_silent_connections_do_not_delay_a_stop(
    start_router: Callable[..., RouterProcess], held: ExitStack
) -> None:
    router = start_router(*FEW, "--graceful-timeout-secs", "600")
    for _ in range(30):
        connect(router, held)
    assert router.get("/health").status_code == 200
    assert router.stop(signal.SIGTERM) == 0
