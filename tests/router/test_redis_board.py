"""Routers that share a board through a real Redis: two processes, each with its own local board."""

from __future__ import annotations

import ipaddress
import logging
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis

from fastdeploy.common.errors import ConfigError
from fastdeploy.daemon.router.addresses import AllowedAddresses
from fastdeploy.daemon.router.board.board import Board, Lease
from fastdeploy.daemon.router.config.redis_address import RedisAddress
from fastdeploy.daemon.router.control.redis_board import RedisBoard
from fastdeploy.daemon.router.control.registry import RegistryFile
from fastdeploy.daemon.router.instance import Instance
from fastdeploy.daemon.router.policy.policies import policy_named
from fastdeploy.daemon.router.policy.policy import RequestFacts

from .. import waiting
from ..system_packages import needs
from .forked import Forked

SERVER = shutil.which("redis-server")
needs_redis = needs("redis-server")
PASSWORD = "open-sesame"
pytestmark = pytest.mark.timeout(120)


def wait_until(condition: Callable[..., Any], what: str) -> None:
    waiting.wait_until(condition, what, deadline=30.0)


class Redis:
    """A private server on a unix socket, with a password and without persistence."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.socket = directory / "redis.sock"
        self.url = f"unix://:{PASSWORD}@{self.socket}?db=3"
        self.start()

    def start(self) -> None:
        assert SERVER is not None
        options = {"port": "0", "unixsocket": str(self.socket), "save": "", "appendonly": "no"}
        options |= {"dir": str(self._directory), "requirepass": PASSWORD}
        flags = [text for name, value in options.items() for text in (f"--{name}", value)]
        self.process = subprocess.Popen([SERVER, *flags], stdout=subprocess.DEVNULL)
        self.client = redis.Redis.from_url(self.url, decode_responses=True)
        wait_until(self._answers, "Redis answers")

    def stop(self) -> None:
        self.client.close()
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(timeout=30)

    def pause(self) -> None:
        self.process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    def _answers(self) -> bool:
        try:
            return bool(self.client.ping())
        except redis.ConnectionError:
            return False


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Redis]:
    server = Redis(tmp_path)
    yield server
    server.go_on()
    server.stop()


class Router:
    """A worker with its own board in another process, which executes orders."""

    def __init__(self, url: str, directory: Path, board: Board | None = None) -> None:
        board = board or Board.create()
        self.log = directory / f"{os.urandom(4).hex()}.log"
        self.log.touch()

        def work(child: Forked) -> None:
            logging.basicConfig(filename=self.log, level="DEBUG", force=True)
            board.open_counters()
            allowed = AllowedAddresses([ipaddress.ip_network("10.0.0.0/8")])
            RedisBoard(board, RegistryFile(None), allowed, RedisAddress.parse(url)).start()
            leases: list[Lease] = []
            while True:
                child.send(act(board, leases, *child.receive()))

        self._child = Forked(work)
        self.pid = self._child.pid

    def __call__(self, *order: Any) -> Any:
        self._child.send(order)
        return self._child.receive()

    def remote(self) -> list[int]:
        return [row["elsewhere"] for row in self("status")]

    def kill(self) -> None:
        self._child.kill()


def act(board: Board, leases: list[Lease], order: str, number: int = 0) -> Any:
    handle = board.handle_of(instance(number).url)
    match order:
        case "admit":
            return board.admit(instance(number))
        case "pick":
            lease = board.pick(policy_named("request_num"), RequestFacts(0, prompt_tokens=100))
            assert isinstance(lease, Lease)
            leases.append(lease)
            return lease.instance.replica
        case "release":
            leases.pop().release()
        case "leave":
            return board.deregister(instance(number).url, instance(number).instance)
        case "drain":
            assert handle is not None
            return board.drain(handle)
        case "healthy":
            assert handle is not None
            board.healthy(handle, float("inf"))
        case "status":
            return [
                {
                    "name": row.instance.name,
                    "own": row.in_flight,
                    "elsewhere": row.in_flight_elsewhere,
                    "token": row.instance.token,
                    "draining": row.draining,
                }
                for row in board.status()
            ]
    return None


def instance(number: int) -> Instance:
    port = 8000 + number
    return Instance("10.0.0.1", port, number, metrics_port=str(port), instance="a", token="secret")


@pytest.fixture
def start_router(server: Redis, tmp_path: Path) -> Iterator[Callable[..., Router]]:
    routers: list[Router] = []

    def start(board: Board | None = None) -> Router:
        routers.append(Router(server.url, tmp_path, board))
        return routers[-1]

    yield start
    for router in routers:
        router.kill()


def test_the_password_is_never_shown() -> None:
    address = RedisAddress.parse("redis://:open-sesame@10.0.0.5:6380/2")
    assert str(address) == "redis at 10.0.0.5:6380, database 2"
    assert "open-sesame" not in repr(address)
    for url in ("http://:open-sesame@x", "redis://x:open-sesame", "open-sesame"):
        with pytest.raises(ConfigError, match="--board must be redis://HOST:PORT/DB") as raised:
            RedisAddress.parse(url)
        assert "open-sesame" not in str(raised.value)


def test_a_missing_redis_package_is_named_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "redis.connection", None)
    with pytest.raises(ConfigError, match=r"not installed: pip install 'fd-dp\[redis\]'"):
        RedisAddress.parse("redis://:open-sesame@10.0.0.5:6380/2")


@needs_redis
def test_routers_see_each_others_requests_in_flight(start_router: Callable[..., Router]) -> None:
    one, other = start_router(), start_router()
    for number in range(2):
        one("admit", number)
    wait_until(lambda: len(other("status")) == 2, "the other knows the replicas")
    assert [row["token"] for row in other("status")] == ["secret", "secret"]
    for number in range(2):
        other("healthy", number)
    assert [one("pick") for _ in range(4)] == [0, 1, 0, 1]
    wait_until(lambda: other.remote() == [2, 2], "the other counts them")
    assert one.remote() == [0, 0]
    other("pick")
    wait_until(lambda: sum(one.remote()) == 1, "one counts it")
    for _ in range(4):
        one("release")
    wait_until(lambda: other.remote() == [0, 0], "the requests have ended")


@needs_redis
def test_the_counts_of_a_dead_router_expire(start_router: Callable[..., Router]) -> None:
    one, other = start_router(), start_router()
    one("admit")
    wait_until(lambda: other("status"), "the other knows the replica")
    one("pick")
    one("pick")
    wait_until(lambda: other.remote() == [2], "the other counts them")
    one.kill()
    wait_until(lambda: other.remote() == [0], "the requests are gone")
    assert len(other("status")) == 1


@needs_redis
def test_new_leader_of_a_router_does_not_count_requests_twice(start_router: Callable[..., Router]) -> None:
    board = Board.create()
    first, second, other = start_router(board), start_router(board), start_router()
    first("admit")
    second("pick")
    wait_until(lambda: other.remote() == [1], "the other counts it")
    first.kill()
    board.drop_dead_workers()
    second("pick")
    wait_until(lambda: other.remote() == [2], "the other counts that as well")
    assert second.remote() == [0]


@needs_redis
def test_a_deregistration_and_a_drain_reach_the_other(start_router: Callable[..., Router]) -> None:
    one, other = start_router(), start_router()
    for number in range(2):
        one("admit", number)
    wait_until(lambda: len(other("status")) == 2, "the other knows the replicas")
    other("drain", 1)
    wait_until(lambda: [row["draining"] for row in one("status")] == [False, True], "replica 1 drains")
    one("leave", 0)
    wait_until(lambda: [row["name"] for row in other("status")] == ["1"], "replica 0 has left")


@needs_redis
@pytest.mark.parametrize("kind", ["stopped", "hanging"])
def test_without_redis_each_router_continues_and_logs_it_once(
    start_router: Callable[..., Router], server: Redis, kind: str
) -> None:
    one, other = start_router(), start_router()
    one("admit", 0)
    wait_until(lambda: other("status"), "the other knows the replica")
    one("pick")
    wait_until(lambda: other.remote() == [1], "the other counts it")
    server.stop() if kind == "stopped" else server.pause()
    one("admit", 1)
    assert {one("pick"), one("pick")} == {0, 1}
    wait_until(lambda: other.remote() == [0], "what is old is dropped")
    server.start() if kind == "stopped" else server.go_on()
    wait_until(lambda: len(other("status")) == 2, "the other knows the second replica")
    wait_until(lambda: sum(other.remote()) == 3, "the other counts them again")
    for router in (one, other):
        log = router.log.read_text()
        assert log.count("cannot be reached") == 1
        assert log.count("can be reached again after") == 1
        assert PASSWORD not in log
        assert "secret" not in log


@needs_redis
def test_invalid_data_in_redis_is_ignored(start_router: Callable[..., Router], server: Redis) -> None:
    one, other = start_router(), start_router()
    server.client.sadd("fd-router:routers", "stranger")
    server.client.hset("fd-router:entries", "http://10.0.0.9:1", "[")
    server.client.hset("fd-router:heard", "http://10.0.0.9:1", "x")
    for text in ("[]", "{", '{"http://10.0.0.1:8000": 7}', '{"http://10.0.0.1:8000": ["a", 1]}'):
        server.client.set("fd-router:counts:stranger", text)
        server.client.set("fd-router:changes", text)
        number = len(one("status"))
        one("admit", number)
        wait_until(lambda number=number: len(other("status")) == number + 1, "the routers work on")


@needs_redis
def test_a_wrong_password_is_a_line_in_the_log_and_not_shown(server: Redis, tmp_path: Path) -> None:
    router = Router(server.url.replace(PASSWORD, "wrong-guess"), tmp_path)
    wait_until(lambda: "cannot be reached" in router.log.read_text(), "the message is logged")
    assert "wrong-guess" not in router.log.read_text()
    router.kill()
