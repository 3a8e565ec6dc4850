"""Fixtures of real fd-router processes, and of engines without a model."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pytest
import requests

from fastdeploy.daemon.router.board.board import Board

from ..ports import free_ports
from .boards import Clock
from .fake_engine import FakeEngine, answers, wait_until
from .raw_client import RawClient

if TYPE_CHECKING:
    from .replicas import Fleet

FD_ROUTER = Path(sys.executable).with_name("fd-router")


class RouterProcess:
    def __init__(
        self,
        directory: Path,
        *flags: str,
        port: int | None = None,
        env: dict[str, str] | None = None,
        launcher: Sequence[str] = (),
    ) -> None:
        """`launcher` is a command that runs the command given as its arguments."""
        self.directory = directory
        self.port = port or free_ports(1)[0]
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = directory / "router.log"
        self.process = subprocess.Popen(
            [*launcher, str(FD_ROUTER), "--port", str(self.port), *flags],
            cwd=directory,
            env={**os.environ, "FD_LOG_DIR": str(directory), **(env or {})},
            stderr=subprocess.DEVNULL,
        )
        wait_until(self._answers, "the router answers")

    def get(self, path: str, **arguments: Any) -> requests.Response:
        return requests.get(self.url + path, timeout=20, **arguments)

    def complete(self, **arguments: Any) -> requests.Response:
        body = {"prompt": "hello", **arguments.pop("body", {})}
        return requests.post(f"{self.url}/v1/completions", json=body, timeout=30, **arguments)

    def add(self, *engines: FakeEngine) -> None:
        for engine in engines:
            answer = engine.register_with(self.url)
            assert answer.status_code == 200, answer.text

    def urls(self, group: str = "mixed") -> set[str]:
        return {entry["url"] for entry in self.get("/registered").json()[group]}

    def in_flight(self) -> dict[str, int]:
        answer = self.get("/registered").json()
        return {entry["url"]: entry["in_flight"] for entry in answer["mixed"] + answer["down"]}

    def wait_idle(self) -> None:
        wait_until(lambda: not any(self.in_flight().values()), "all counts are zero")

    def metric(self, name: str) -> list[str]:
        return [line for line in self.get("/metrics").text.splitlines() if line.startswith(name)]

    def workers(self) -> list[psutil.Process]:
        children = psutil.Process(self.process.pid).children()
        return [child for child in children if _is_alive(child)]

    def memory(self) -> int:
        return int(sum(worker.memory_info().rss for worker in self.workers()))

    def worker_of(self, client: RawClient) -> psutil.Process:
        """Return the worker that accepted the connection."""

        def find() -> psutil.Process | None:
            for worker in self.workers():
                for connection in worker.net_connections("tcp"):
                    if connection.raddr and connection.raddr.port == client.own_port:
                        return worker
            return None

        worker: psutil.Process = wait_until(find, "the connection is accepted")
        return worker

    def stop(self, sig: int = signal.SIGINT) -> int:
        """Send the signal and wait until the router and all its child processes have ended."""
        if self.process.poll() is None:
            family = psutil.Process(self.process.pid).children(recursive=True)
            self.process.send_signal(sig)
            self.process.wait(timeout=60)
            _, alive = psutil.wait_procs(family, timeout=20)
            assert not alive
        return self.process.returncode

    def _answers(self) -> bool:
        assert self.process.poll() is None, f"fd-router ended with {self.process.returncode}"
        try:
            return self.get("/health").status_code == 200
        except requests.ConnectionError:
            return False


def _is_alive(process: psutil.Process) -> bool:
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def board(clock: Clock) -> Iterator[Board]:
    board = Board.create(clock)
    board.open_counters()
    yield board
    board.close()


@pytest.fixture
def start_router(tmp_path: Path) -> Iterator[Callable[..., RouterProcess]]:
    routers: list[RouterProcess] = []

    def start(*flags: str, **options: Any) -> RouterProcess:
        routers.append(RouterProcess(tmp_path, *flags, **options))
        return routers[-1]

    yield start
    for router in routers:
        router.stop()


@pytest.fixture
def router(start_router: Callable[..., RouterProcess]) -> RouterProcess:
    return start_router()


@pytest.fixture(scope="module")
def shared_router(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RouterProcess]:
    """A router for tests that leave it unchanged."""
    router = RouterProcess(tmp_path_factory.mktemp("router"))
    yield router
    router.stop()


@pytest.fixture
def lent_router(shared_router: RouterProcess) -> Iterator[RouterProcess]:
    """The shared router without replicas; those that a test adds are removed at its end."""
    yield shared_router
    entries = shared_router.get("/registered").json()
    for entry in entries["mixed"] + entries["down"]:
        host, _, port = entry["url"].removeprefix("http://").rpartition(":")
        farewell = {"host_ip": host, "port": port, "instance": entry["instance"]}
        requests.post(f"{shared_router.url}/deregister", json=farewell, timeout=20)
    wait_until(lambda: not shared_router.urls() | shared_router.urls("down"), "all replicas have left")


@pytest.fixture(scope="module")
def _shared_engine(shared_router: RouterProcess) -> Iterator[FakeEngine]:
    engine = FakeEngine()
    shared_router.add(engine)
    yield engine
    engine.stop()


@pytest.fixture
def replica(shared_router: RouterProcess, _shared_engine: FakeEngine) -> Iterator[FakeEngine]:
    """The only replica of `shared_router`. After the test, two further requests must succeed."""
    engine = _shared_engine
    engine.received.clear()
    yield engine
    engine.behaviour = answers
    engine.received.clear()
    wait_until(lambda: engine.register_with(shared_router.url).status_code == 200, "the replica is known")
    wait_until(lambda: shared_router.urls() == {engine.url}, "the replica is in use again")
    for _ in range(2):
        with RawClient(shared_router.port) as client:
            client.send(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{}")
            answer = client.answer()
        assert (answer.status, json.loads(answer.body)["engine"]) == (200, engine.name)
        assert "x-evil" not in answer.headers
    assert [received.body for received in engine.received] == [b"{}"] * 2
    assert "Traceback" not in shared_router.log.read_text()


@pytest.fixture
def new_engine() -> Iterator[Callable[..., FakeEngine]]:
    engines: list[FakeEngine] = []

    def new(*arguments: Any, **options: Any) -> FakeEngine:
        engines.append(FakeEngine(*arguments, **options))
        return engines[-1]

    yield new
    for engine in engines:
        try:
            engine.stop()
        except OSError:
            continue  # stopped by the test


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """Three processes of resumable_engine.py behind their own router."""
    # Not imported at the top, because replicas.py imports this module.
    from .replicas import running_fleet

    with running_fleet(tmp_path_factory.mktemp("router"), 3) as fleet:
        yield fleet


@pytest.fixture
def fleet(running: Fleet) -> Fleet:
    """The running fleet, whose replicas appear restarted to the router before each test."""
    running.renew()
    return running
