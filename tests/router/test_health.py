"""Health checks over real sockets, by the leading process."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from fastdeploy.daemon.router.board.board import Board, ReplicaState
from fastdeploy.daemon.router.control.health import Monitor, check, read_load
from fastdeploy.daemon.router.control.registry import RegistryFile
from fastdeploy.daemon.router.instance import Instance
from fastdeploy.daemon.router.policy.policies import policy_named

from .. import waiting
from .forked import Forked

METRICS = b"""# HELP fastdeploy:num_requests_running Requests that run.
# TYPE fastdeploy:num_requests_running gauge
fastdeploy:num_requests_running{model="m",rank="0"} 3.0
fastdeploy:num_requests_running{model="m",rank="1"} 4.0
fastdeploy:num_requests_waiting 1.2e1
fastdeploy:num_requests_waiting_since{model="m"} 99
"""


class Replica:
    """Answers /health with `status` and /metrics with METRICS, and counts its connections."""

    def __init__(self) -> None:
        self.status = 200
        self.metrics = METRICS
        self.connections = 0
        replica = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def setup(self) -> None:
                super().setup()
                replica.connections += 1

            def do_GET(self) -> None:
                body = replica.metrics if self.path == "/metrics" else b"{}"
                self.send_response(replica.status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        self.instance = Instance("127.0.0.1", self._server.server_address[1])

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def new_replica() -> Iterator[Callable[[], Replica]]:
    replicas: list[Replica] = []

    def new() -> Replica:
        replicas.append(Replica())
        return replicas[-1]

    yield new
    for replica in replicas:
        replica.stop()


@pytest.fixture
def board() -> Iterator[Board]:
    board = Board.create()
    yield board
    board.close()


@pytest.fixture
def start_monitor(board: Board) -> Iterator[Callable[..., Forked]]:
    """Starts the monitor in its own process, so that its threads end with it."""
    children: list[Forked] = []

    def start(policy: str = "request_num", registry: Path | None = None) -> Forked:
        def work(child: Forked) -> None:
            Monitor(board, RegistryFile(registry), policy_named(policy), 0.05).start()
            child.receive()

        children.append(Forked(work))
        return children[-1]

    yield start
    for child in children:
        child.kill()


def wait_until(condition: Callable[[], bool], what: str) -> None:
    waiting.wait_until(condition, what, deadline=30.0)


def state(board: Board) -> ReplicaState:
    return board.status()[0].state


def test_a_replica_that_answers_with_200_is_well(new_replica: Callable[[], Replica]) -> None:
    replica = new_replica()
    assert check(replica.instance) is None
    replica.status = 304
    assert str(check(replica.instance)) == f"{replica.instance.authority} answered /health with 304"


def test_each_check_uses_a_new_connection(new_replica: Callable[[], Replica]) -> None:
    replica = new_replica()
    for _ in range(3):
        check(replica.instance)
    assert replica.connections == 3


def test_a_proxy_for_the_outside_world_is_not_asked(
    new_replica: Callable[[], Replica], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    assert check(new_replica().instance) is None


def test_refused_connections_are_distinguished_from_broken_ones() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        instance = Instance("127.0.0.1", listener.getsockname()[1])

        def hang_up() -> None:
            listener.accept()[0].close()

        threading.Thread(target=hang_up).start()
        broken = check(instance)
    refused = check(instance)
    assert broken is not None
    assert not broken.refused
    assert refused is not None
    assert refused.refused


def test_a_silent_replica_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastdeploy.daemon.router.control.health._TIMEOUT", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        instance = Instance("127.0.0.1", listener.getsockname()[1])
        problem = check(instance)
    assert problem is not None
    assert "no complete response within" in problem.text


@pytest.mark.parametrize("answer", [b"", b"garbage\r\n\r\n", b"HTTP/1.1 999999 what\r\n\r\n", b"\0" * 70000])
def test_nonsense_is_a_problem_and_not_an_exception(answer: bytes) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        instance = Instance("127.0.0.1", listener.getsockname()[1])

        def answer_once() -> None:
            with listener.accept()[0] as connection:
                connection.recv(1000)
                connection.sendall(answer)

        threading.Thread(target=answer_once).start()
        assert check(instance) is not None


def test_load_is_read_from_the_metrics_of_all_ranks(new_replica: Callable[[], Replica]) -> None:
    replica = new_replica()
    assert read_load(replica.instance) == (7, 12)
    replica.metrics = b"fastdeploy:num_requests_running 1\n"
    assert read_load(replica.instance) is None
    replica.metrics = METRICS.replace(b"3.0", b"1e999")
    assert read_load(replica.instance) is None


def test_failing_replica_is_down_at_once_and_probed_once_healthy_again(
    board: Board, new_replica: Callable[[], Replica], start_monitor: Callable[..., Forked]
) -> None:
    start_monitor()  # started first, so that it does not inherit the replica's listener
    replica = new_replica()
    board.admit(replica.instance, up=False)
    wait_until(lambda: state(board) == ReplicaState.UP, "the replica is up")
    replica.status = 503
    wait_until(lambda: state(board) == ReplicaState.DOWN, "the replica is down")
    replica.status = 200
    wait_until(lambda: state(board) == ReplicaState.PROBING, "the replica is probed")
    replica.stop()
    wait_until(lambda: state(board) == ReplicaState.DOWN, "the replica is down again")


def test_hung_replica_delays_no_other(
    board: Board, new_replica: Callable[[], Replica], start_monitor: Callable[..., Forked]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        board.admit(Instance("127.0.0.1", listener.getsockname()[1], replica=1), up=False)
        replicas = [new_replica() for _ in range(2)]
        for replica in replicas:
            board.admit(replica.instance, up=False)
        start_monitor()
        wait_until(lambda: sum(row.up for row in board.status()) == 2, "the others are up")


def test_load_is_scraped_where_the_policy_asks_for_it(
    board: Board, new_replica: Callable[[], Replica], start_monitor: Callable[..., Forked]
) -> None:
    board.admit(new_replica().instance)
    start_monitor("fd_metrics_score")
    wait_until(lambda: (board.status()[0].running, board.status()[0].waiting) == (7, 12), "its load is known")


def test_only_the_leader_checks_and_a_dead_one_is_succeeded(
    board: Board, new_replica: Callable[[], Replica], start_monitor: Callable[..., Forked]
) -> None:
    replica = new_replica()
    board.admit(replica.instance, up=False)
    first = start_monitor()
    wait_until(lambda: state(board) == ReplicaState.UP, "the replica is up")
    start_monitor()
    first.kill()
    seen = replica.connections
    wait_until(lambda: replica.connections > seen + 2, "the second looks")
