"""The daemon's requests to a router, and the answers of other programs in the router's place."""

from __future__ import annotations

import http.server
import json
import signal
import socket
import socketserver
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest

from fastdeploy.daemon.router.config.flags_file import fingerprint
from fastdeploy.daemon.supervision import router_sync
from fastdeploy.daemon.supervision.router_client import (
    BackgroundCall,
    RegisteredReplica,
    RouterUnavailable,
    flags,
    registered,
    set_draining,
)
from fastdeploy.daemon.supervision.router_sync import RouterSync

from ..router.conftest import RouterProcess
from ..router.fake_engine import FakeEngine
from .conftest import wait_until


@contextmanager
def answering(path: Path, answer: str, status: int = 200) -> Iterator[None]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.end_headers()
            self.wfile.write(answer.encode())

        def address_string(self) -> str:
            return "client"

        def log_message(self, *_: object) -> None:
            pass

    with socketserver.UnixStreamServer(str(path), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield
        server.shutdown()


def entry(url: str, **changed: object) -> dict[str, object]:
    fields = {"url": url, "leaving": False, "draining": False, "in_flight": 0, "in_flight_elsewhere": 0}
    return {**fields, **changed}


def test_a_real_router_is_understood_and_obeys(tmp_path: Path) -> None:
    admin, file = tmp_path / "admin", tmp_path / "flags"
    file.write_text(json.dumps(["--admin-socket", str(admin)]))
    file.chmod(0o600)
    router = RouterProcess(tmp_path, "--flags-file", str(file))
    engine = FakeEngine(replica=3)
    try:
        router.add(engine)
        row = RegisteredReplica(f"127.0.0.1:{engine.port}", "127.0.0.1", engine.port, True, False, False, 0)
        assert registered(admin) == {engine.port: row}
        set_draining(admin, row, True)
        assert registered(admin)[engine.port].draining
        set_draining(admin, row, False)
        assert registered(admin) == {engine.port: row}
        # A replica may have left the router by the time of the order.
        set_draining(admin, RegisteredReplica("127.0.0.1:1", "127.0.0.1", 1, True, False, False, 0), True)
        found = flags(admin)
        assert (found.hash, found.number, found.outcome) == (fingerprint(file.read_bytes()), 0, "done")
        router.process.send_signal(signal.SIGHUP)
        wait_until(
            lambda: flags(admin).number == 1 and flags(admin).outcome == "done", "the router has reloaded"
        )
    finally:
        engine.stop()
        router.stop()


def test_replicas_of_other_machines_with_equal_ports_are_ignored(
    tmp_path: Path,
) -> None:
    up = [entry("http://127.0.0.1:1811", in_flight=1, in_flight_elsewhere=2), entry("http://192.0.2.1:1811")]
    down = [entry("http://[::1]:1822", draining=True), entry("http://192.0.2.1:1822")]
    with answering(tmp_path / "admin", json.dumps({"mixed": up, "down": down})):
        assert registered(tmp_path / "admin") == {
            1811: RegisteredReplica("127.0.0.1:1811", "127.0.0.1", 1811, True, False, False, 3),
            1822: RegisteredReplica("[::1]:1822", "::1", 1822, False, False, True, 0),
        }


@pytest.mark.parametrize(
    "answer", ["", "[]", "{", '{"mixed": 5, "down": []}', '{"mixed": [{}], "down": []}', '{"mixed": []}']
)
@pytest.mark.parametrize("ask", [registered, flags])
def test_invalid_answer_counts_as_no_answer(
    tmp_path: Path, answer: str, ask: Callable[[Path], object]
) -> None:
    with answering(tmp_path / "admin", answer), pytest.raises(RouterUnavailable):
        ask(tmp_path / "admin")


def test_answer_with_an_error_status_counts_as_no_answer(tmp_path: Path) -> None:
    with (
        answering(tmp_path / "admin", "{}", status=503),
        pytest.raises(RouterUnavailable, match="answered GET /registered with 503"),
    ):
        registered(tmp_path / "admin")


def test_without_a_listener_there_is_no_answer(tmp_path: Path) -> None:
    with pytest.raises(RouterUnavailable, match="admin"):
        registered(tmp_path / "admin")


def test_hung_router_times_out_without_blocking_the_daemon(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "admin"))
        listener.listen()
        call = BackgroundCall(lambda: registered(tmp_path / "admin"))
        assert not call.is_done
        wait_until(lambda: call.is_done, "the call is given up")
        with pytest.raises(RouterUnavailable, match="does not answer"):
            call.result()


def test_requests_to_a_router_that_has_ended_are_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = RegisteredReplica("127.0.0.1:1811", "127.0.0.1", 1811, True, False, False, 0)
    asked: list[Mapping[int, bool]] = []

    def poll(admin: Path, wanted: Mapping[int, bool]) -> Mapping[int, RegisteredReplica]:
        asked.append(wanted)
        return {1811: row}

    monkeypatch.setattr(router_sync, "_poll_and_correct", poll)
    link = RouterSync(tmp_path)
    link.poll({1811: False}, 10.0, 1.0)
    wait_until(lambda: asked, "the router is called")
    link.router_down(10.5)
    link.poll({1811: False}, 10.6, 1.0)
    assert link.snapshot.problem == "the router is down"
    link.poll({1811: False}, 11.0, 1.0)
    wait_until(lambda: len(asked) == 2, "the new one is asked")

    def answered() -> bool:
        link.poll({1811: False}, 11.1, 1.0)
        return link.snapshot.rows == {1811: row}

    wait_until(answered, "the router has answered")
