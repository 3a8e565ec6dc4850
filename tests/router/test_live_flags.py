"""SIGHUP reloads the flags file into new workers without disturbing requests in progress."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from fastdeploy.daemon.router.board.board import Board
from fastdeploy.daemon.router.board.memory import WORKERS
from fastdeploy.daemon.router.config.flags_file import fingerprint

from .conftest import FD_ROUTER, RouterProcess
from .fake_engine import (
    FakeEngine,
    Received,
    events,
    streams_for_ever,
    wait_until,
    waits_after_the_first_event,
)
from .raw_client import RawClient
from .steady_load import Load, streams_or_answers

HEALTH = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"


class LiveRouter:
    """A router with a flags file."""

    def __init__(
        self, start: Callable[..., RouterProcess], file: Path, words: Sequence[str], **options: Any
    ) -> None:
        self.file = file
        self.write(*words)
        self.router = start("--flags-file", str(file), **options)

    def write(self, *words: str) -> None:
        """Replace the flags file atomically, as its writers should."""
        draft = self.file.with_suffix(".new")
        draft.write_text(json.dumps(words))
        draft.chmod(0o600)
        draft.replace(self.file)

    def health(self) -> dict[str, Any]:
        return dict(self.router.get("/health").json())

    def begin_reload(self) -> int:
        number = int(self.health()["reload"]["number"]) + 1
        self.router.process.send_signal(signal.SIGHUP)
        return number

    def reload(self) -> str:
        """Reload the flags; return the outcome."""
        number = self.begin_reload()

        def outcome() -> str | None:
            reload = self.health()["reload"]
            return (
                None if reload["number"] < number or reload["outcome"] == "under way" else reload["outcome"]
            )

        return str(wait_until(outcome, "the reload is over"))

    def pids(self) -> set[int]:
        return {worker.pid for worker in self.router.workers()}

    def replicas_of(self, session: str) -> set[str]:
        """Return the replicas that answer six requests of the session in sequence."""
        headers = {"X-Session-Id": session}
        return {self.router.complete(headers=headers).headers["X-FD-Replica"] for _ in range(6)}


@pytest.fixture
def live(start_router: Callable[..., RouterProcess], tmp_path: Path) -> Callable[..., LiveRouter]:
    return lambda *words, **options: LiveRouter(start_router, tmp_path / "flags.json", words, **options)


class Gate:
    """An engine's behaviour: streams with "long" in their body wait at the gate after their first event."""

    def __init__(self) -> None:
        self._open = threading.Event()

    def __call__(self, received: Received) -> bool:
        if received.target == "/metrics":
            body = b"fastdeploy:num_requests_running 0.0\nfastdeploy:num_requests_waiting 0.0\n"
            received.send(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))
            return True
        if b"long" not in received.body:
            return streams_or_answers(received)
        return waits_after_the_first_event(self._open)(received)

    def open(self) -> None:
        self._open.set()

    @contextmanager
    def stream(self, router: RouterProcess) -> Iterator[Callable[[], None]]:
        """Start a stream. The yielded function opens the gate and checks that the stream is complete."""
        body = {"prompt": "hello", "stream": True, "long": True}
        headers = {"Connection": "close"}
        with router.complete(body=body, headers=headers, stream=True) as stream:
            lines = (line for line in stream.iter_lines(chunk_size=1) if line)
            seen = [next(lines)]

            def finish() -> None:
                self.open()
                seen.extend(lines)
                sent = stream.request.body
                assert isinstance(sent, bytes)
                assert seen == [event.strip() for event in events(sent)]

            yield finish


@pytest.fixture
def gate() -> Iterator[Gate]:
    gate = Gate()
    yield gate
    gate.open()


class Callers:
    """Threads that open a new connection for each request, as fast as possible."""

    def __init__(self, router: RouterProcess) -> None:
        self.answered = 0
        self.problems: list[str] = []
        self._port = router.port
        self._over = threading.Event()
        self._threads = [threading.Thread(target=self._call) for _ in range(2)]

    def _call(self) -> None:
        while not self._over.is_set():
            try:
                with RawClient(self._port) as client:
                    client.send(HEALTH)
                    answer = client.answer()
                if answer.status != 200:
                    self.problems.append(str(answer))
                self.answered += 1
            except (OSError, AssertionError) as error:
                self.problems.append(repr(error))

    def __enter__(self) -> Callers:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join(30)


# ---- flags that change


def test_workers_run_with_the_flags_of_the_file_as_it_was_read_last(
    live: Callable[..., LiveRouter], new_engine: Callable[..., FakeEngine]
) -> None:
    one = live("--policy", "round_robin")
    one.router.add(new_engine(replica=0), new_engine(replica=1))
    before = one.health()
    assert before["flags"] == fingerprint(one.file.read_bytes())
    assert before["reload"] == {"number": 0, "outcome": "done"}
    assert one.replicas_of("a") == {"0", "1"}
    one.write("--policy", "session", "--log-level", "debug")
    assert one.health()["flags"] == before["flags"]
    assert one.reload() == "done"
    assert one.health()["flags"] == fingerprint(one.file.read_bytes()) != before["flags"]
    assert one.replicas_of("a") in ({"0"}, {"1"})
    assert " DEBUG " in one.router.log.read_text()


def test_there_are_as_many_workers_as_the_file_says(
    live: Callable[..., LiveRouter], new_engine: Callable[..., FakeEngine]
) -> None:
    one = live("--workers", "1")
    engine = new_engine()
    one.router.add(engine)
    for workers in ("3", "2"):
        old = one.pids()
        one.write("--workers", workers)
        assert one.reload() == "done"
        wait_until(lambda old=old: not old & one.pids(), "the old workers have ended")
        assert len(one.pids()) == int(workers)
        assert one.router.urls() == {engine.url}
        assert one.router.complete().status_code == 200


def test_a_router_without_a_flags_file_says_so(router: RouterProcess) -> None:
    assert router.get("/health").json()["flags"] is None


# ---- flags that stay


def test_a_reload_that_cannot_be_changes_nothing(
    live: Callable[..., LiveRouter], new_engine: Callable[..., FakeEngine], tmp_path: Path
) -> None:
    one = live("--policy", "round_robin", "--workers", "2")
    one.router.add(new_engine(replica=0), new_engine(replica=1))
    flags, pids = one.health()["flags"], one.pids()
    fixed = "cannot change while the router runs; restart it; keeping the old configuration"
    for words, reason in {
        ("--port", "1"): f"--port {fixed}",
        ("--host", "0.0.0.0", "--admin-socket", "x"): f"--admin-socket and --host {fixed}",
        ("--registry-file", str(tmp_path / "registry")): f"--registry-file {fixed}",
        ("--policy", "fastest"): "--policy is 'fastest'; it must be one of",
        ("--workers", "17"): "--workers is 17; it must be 1..16",
        ("--help",): "unrecognized arguments: --help",
        ("--api-keys-file", "/nonexistent"): "--api-keys-file /nonexistent: cannot be read",
    }.items():
        one.write(*words)
        assert one.reload() == "refused"
        assert f"reload: {reason}" in one.router.log.read_text().replace(f"--flags-file {one.file}: ", "")
    one.write("--policy", "session")
    one.file.chmod(0o666)
    assert one.reload() == "refused"
    reason = "others may write to it (mode 0666); chmod 600 it; keeping the old configuration"
    assert reason in one.router.log.read_text()
    assert (one.health()["flags"], one.pids()) == (flags, pids)
    assert one.replicas_of("a") == {"0", "1"}
    one.file.chmod(0o600)
    assert one.reload() == "done"
    assert "Traceback" not in one.router.log.read_text()


def test_workers_that_do_not_come_up_change_nothing(
    live: Callable[..., LiveRouter], new_engine: Callable[..., FakeEngine], tmp_path: Path
) -> None:
    """The workers end right after the fork."""
    is_broken = tmp_path / "broken"
    (tmp_path / "sitecustomize.py").write_text(
        "import os\n"
        f"end = lambda: os.path.exists({str(is_broken)!r}) and os._exit(3)\n"
        "os.register_at_fork(after_in_child=end)\n"
    )
    one = live(env={"PYTHONPATH": str(tmp_path)})
    one.router.add(new_engine())
    flags, pids = one.health()["flags"], one.pids()
    is_broken.touch()
    one.write("--policy", "session")
    assert one.reload() == "failed"
    assert (
        "a new worker ended before it was ready; keeping the old configuration" in one.router.log.read_text()
    )
    assert one.router.complete().status_code == 200
    assert one.health()["flags"] == flags
    wait_until(lambda: one.pids() == pids, "the workers that did not start are gone")
    is_broken.unlink()
    assert one.reload() == "done"
    assert one.health()["flags"] == fingerprint(one.file.read_bytes())


def test_new_program_with_another_port_does_not_replace_the_running_one(tmp_path: Path) -> None:
    """The program is started as SIGUSR2 would, after the flags file has changed."""
    board = Board.create()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        ended = subprocess.run(
            [str(FD_ROUTER), "--port", "2"],
            pass_fds=[board.descriptor, listener.fileno()],
            env={
                **os.environ,
                "GUNICORN_PID": str(os.getpid()),
                "GUNICORN_FD": str(listener.fileno()),
                "FD_ROUTER_BOARD": str(board.descriptor),
                "FD_ROUTER_FIXED": '{"--port": "1"}',
                "FD_LOG_DIR": str(tmp_path),
            },
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
    board.close()
    assert ended.returncode == 6
    assert ended.stderr == (
        "fd-router: the old program cannot be replaced and continues: "
        "--port cannot change while the router runs; restart it\n"
    )


# ---- requests in progress


def test_stream_outlives_three_reloads_while_every_request_is_served(
    live: Callable[..., LiveRouter], new_engine: Callable[..., FakeEngine], gate: Gate
) -> None:
    one = live("--graceful-timeout-secs", "1")
    one.router.add(*(new_engine(replica=number, behaviour=gate) for number in range(2)))
    with gate.stream(one.router) as finish, Load(one.router) as load, Callers(one.router) as callers:
        [first] = one.pids()
        for workers in ("3", "1", "2"):
            load.wait()
            one.write("--workers", workers)
            assert one.reload() == "done"
            load.wait()
        assert callers.answered > 0
        load.end()
        # The old worker counts it until it ends, but takes no new requests.
        wait_until(lambda: sum(one.router.in_flight().values()) == 1, "only the stream is left")
        assert first in one.pids()
        finish()
    assert load.problems == callers.problems == []
    wait_until(lambda: len(one.pids()) == 2, "the old workers have ended")
    one.router.wait_idle()


def test_reloads_in_quick_succession_end_with_the_last_one(
    live: Callable[..., LiveRouter], new_engine: Callable[..., FakeEngine]
) -> None:
    one = live()
    one.router.add(new_engine(behaviour=streams_or_answers))
    with Load(one.router) as load:
        load.wait()
        for limit in range(100, 104):
            one.write("--max-in-flight", str(limit))
            one.router.process.send_signal(signal.SIGHUP)
            time.sleep(0.02)
        assert one.reload() == "done"
        load.wait()
    assert load.problems == []
    assert one.health()["flags"] == fingerprint(one.file.read_bytes())
    wait_until(lambda: len(one.pids()) == 1, "one worker is left")


def test_idle_connection_gets_one_more_answer_from_its_old_worker(live: Callable[..., LiveRouter]) -> None:
    """The client may be sending a request; closing the connection at that moment would lose it."""
    one = live()
    with RawClient(one.router.port) as client:
        client.send(HEALTH)
        before = client.answer()
        time.sleep(1.5)
        one.write("--policy", "session")
        assert one.reload() == "done"
        client.send(HEALTH)
        after = client.answer()
        assert json.loads(after.body)["flags"] == json.loads(before.body)["flags"] != one.health()["flags"]
        assert (before.headers.get("connection"), after.headers["connection"]) == (None, "close")
        assert client.is_at_its_end()
    wait_until(lambda: len(one.pids()) == 1, "the old worker has ended")


def test_idle_connection_keeps_its_old_worker_for_keep_alive_time_only(
    live: Callable[..., LiveRouter],
) -> None:
    one = live("--keep-alive-secs", "0.5")
    with RawClient(one.router.port) as client:
        client.send(HEALTH)
        client.answer()
        old = one.pids()
        assert one.reload() == "done"
        assert client.is_at_its_end()
        wait_until(lambda: not old & one.pids(), "the old worker has ended")


def test_a_worker_that_dies_is_replaced_while_an_old_one_ends_its_streams(
    live: Callable[..., LiveRouter], new_engine: Callable[..., FakeEngine], gate: Gate
) -> None:
    one = live()
    one.router.add(new_engine(behaviour=gate))
    with gate.stream(one.router) as finish:
        old = one.pids()
        assert one.reload() == "done"
        [new] = one.pids() - old
        psutil.Process(new).kill()
        wait_until(lambda: one.pids() - old - {new}, "another has taken its place")
        assert one.router.complete().status_code == 200
        finish()


def test_an_old_worker_no_longer_watches_over_the_replicas(
    live: Callable[..., LiveRouter], new_engine: Callable[..., FakeEngine], gate: Gate
) -> None:
    """With its old flags it would not collect the data that the new workers' policy needs."""
    one = live("--policy", "request_num", "--health-check-interval-secs", "0.1")
    engine = new_engine(behaviour=gate)
    one.router.add(engine)
    with gate.stream(one.router) as finish:
        assert not any(received.target == "/metrics" for received in engine.received)
        one.write("--policy", "fd_metrics_score", "--health-check-interval-secs", "0.1")
        assert one.reload() == "done"
        wait_until(
            lambda: any(received.target == "/metrics" for received in engine.received),
            "the replica is asked for its load",
        )
        finish()


def test_new_workers_wait_for_places_instead_of_cutting_off_streams(
    live: Callable[..., LiveRouter], new_engine: Callable[..., FakeEngine], gate: Gate
) -> None:
    """The board has 32 places; other workers hold all but one."""
    one = live()
    one.router.add(new_engine(behaviour=gate))
    with others_on_the_board(one.router, WORKERS - 2), gate.stream(one.router) as finish:
        assert one.reload() == "done"
        served_by = one.health()["flags"]
        one.write("--policy", "session")
        one.begin_reload()
        wait_until(lambda: "1 new workers have to wait" in one.router.log.read_text(), "the log says so")
        assert one.health()["flags"] == served_by
        assert one.health()["reload"]["outcome"] == "under way"
        finish()
        wait_until(lambda: one.health()["reload"]["outcome"] == "done", "there is a place")
        assert one.health()["flags"] == fingerprint(one.file.read_bytes())


def test_sigterm_ends_streams_of_old_workers_in_time_as_well(
    live: Callable[..., LiveRouter], new_engine: Callable[..., FakeEngine]
) -> None:
    one = live("--graceful-timeout-secs", "1")
    one.router.add(new_engine(behaviour=streams_for_ever))
    with one.router.complete(body={"stream": True}, stream=True) as stream:
        # The iterator is kept, because closing it would close the connection.
        lines = stream.iter_lines(chunk_size=1)
        assert next(lines)
        assert one.reload() == "done"
        assert len(one.pids()) == 2
        assert one.router.stop(signal.SIGTERM) == 0


@contextmanager
def others_on_the_board(router: RouterProcess, count: int) -> Iterator[None]:
    """Occupy places on the board as workers of another program would."""
    files = Path(f"/proc/{router.process.pid}/fd")
    path = next(file for file in files.iterdir() if "fd-board" in os.readlink(file))
    board = Board.attach(os.open(path, os.O_RDWR))
    free = [
        index
        for index in range(WORKERS)
        if not board._lock.is_held_elsewhere(index) and board._lock.take_liveness(index)
    ]
    for index in free[count:]:
        board._lock.release_liveness(index)
    for index in free[:count]:
        board._memory.counters[index].pid[0] = 1_000_000_000 + index
    yield
    board.close()
