"""SIGUSR2 starts a new program on the same sockets and board without disturbing clients."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from .conftest import FD_ROUTER, RouterProcess
from .fake_engine import FakeEngine, wait_until
from .raw_client import RawClient
from .steady_load import Load, requests_counted, streams_or_answers


def successor_of(router: RouterProcess) -> psutil.Process | None:
    """Return the program that SIGUSR2 has started, once it has workers."""
    children = psutil.Process(router.process.pid).children()
    return next((child for child in children if child.children()), None)


def test_an_upgrade_loses_nothing(
    start_router: Callable[..., RouterProcess], new_engine: Callable[..., FakeEngine], tmp_path: Path
) -> None:
    """The new program serves on the same sockets and board; the old one ends on SIGTERM."""
    admin = tmp_path / "admin"
    router = start_router("--workers", "2", "--admin-socket", str(admin))
    engines = [new_engine(replica=number, behaviour=streams_or_answers) for number in range(2)]
    router.add(*engines)
    with Load(router) as load:
        load.wait()
        with upgraded(router) as successor:
            wait_until(lambda: len(successor.children()) == 2, "the new router has its workers")
            load.wait()
            router.process.send_signal(signal.SIGTERM)
            assert router.process.wait(30) == 0
            load.wait()
            load.end()
            assert load.problems == []
            assert router.urls() == {engine.url for engine in engines}
            wait_until(lambda: requests_counted(router) == load.answered, "counts go on")
            router.wait_idle()
            with RawClient(admin) as client:
                client.send(b"POST /admin/replicas/0/drain HTTP/1.1\r\nHost: x\r\n\r\n")
                assert client.answer().status == 200
            # The new program can be reloaded, too.
            [old, *_] = successor.children()
            successor.send_signal(signal.SIGHUP)
            wait_until(lambda: not old.is_running(), "its workers are replaced")
            assert router.complete().headers["X-FD-Replica"] == "1"
    assert not admin.exists()


def test_the_old_program_may_be_ended_at_once(
    start_router: Callable[..., RouterProcess], new_engine: Callable[..., FakeEngine]
) -> None:
    router = start_router()
    router.add(new_engine())
    with upgraded(router):
        router.process.send_signal(signal.SIGQUIT)
        assert router.process.wait(30) == 0
        for _ in range(3):
            assert router.complete().status_code == 200


def test_an_upgrade_can_be_taken_back(
    start_router: Callable[..., RouterProcess], new_engine: Callable[..., FakeEngine]
) -> None:
    router = start_router()
    router.add(new_engine())
    with upgraded(router):
        assert router.complete().status_code == 200
    for _ in range(3):
        assert router.complete().status_code == 200
    assert requests_counted(router) >= 4


def test_version_with_another_board_layout_exits_with_a_message(tmp_path: Path) -> None:
    """The program is started as SIGUSR2 would, and finds the board of the old program."""
    board = os.memfd_create("board")
    os.ftruncate(board, 1 << 20)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        ended = subprocess.run(
            [str(FD_ROUTER), "--port", str(listener.getsockname()[1])],
            pass_fds=[board, listener.fileno()],
            env={
                **os.environ,
                "GUNICORN_PID": str(os.getpid()),
                "GUNICORN_FD": str(listener.fileno()),
                "FD_ROUTER_BOARD": str(board),
                "FD_LOG_DIR": str(tmp_path),
            },
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
    os.close(board)
    assert ended.returncode == 6
    assert ended.stderr.startswith("fd-router: the old program cannot be replaced and continues: ")
    assert ended.stderr.count("\n") == 1


@contextmanager
def upgraded(router: RouterProcess) -> Iterator[psutil.Process]:
    """Start the router's successor, and end it after the block."""
    router.process.send_signal(signal.SIGUSR2)
    successor: psutil.Process = wait_until(lambda: successor_of(router), "the new program runs")
    try:
        yield successor
    finally:
        family = [successor, *successor.children(recursive=True)]
        successor.send_signal(signal.SIGTERM)
        _, alive = psutil.wait_procs(family, timeout=20)
        assert not alive
