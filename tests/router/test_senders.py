"""Permitted senders of registrations: no client can point the router at an address that is not allowed."""

from __future__ import annotations

import concurrent.futures
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
from flask.testing import FlaskClient
from prometheus_client import values

from fastdeploy.daemon.router.addresses import AllowedAddresses
from fastdeploy.daemon.router.board.board import Board
from fastdeploy.daemon.router.config.flags import parser
from fastdeploy.daemon.router.config.loader import settings_of
from fastdeploy.daemon.router.control.app import ControlPlane
from fastdeploy.daemon.router.control.reload_status import ReloadStatus
from fastdeploy.daemon.router.metrics import counter_memory
from fastdeploy.daemon.router.metrics.counter_memory import CounterMemory

from .conftest import RouterProcess
from .fake_engine import FakeEngine, wait_until, waits_for


@pytest.mark.parametrize(
    "host",
    [
        "169.254.169.254",
        "http://169.254.169.254",
        "100.100.100.200",
        "192.0.2.1",
        "224.0.0.1",
        "255.255.255.255",
        "fd00:ec2::254",
        "::ffff:169.254.169.254",
        "64:ff9b::a9fe:a9fe",
        "2002:a9fe:a9fe::",
    ],
)
def test_registration_cannot_name_another_machine(lent_router: RouterProcess, host: str) -> None:
    info = {"role": "mixed", "host_ip": host, "port": 80}
    answer = requests.post(f"{lent_router.url}/register", json=info, timeout=20)
    assert answer.status_code == 403
    assert "start fd-router with --allow-host" in answer.json()["msg"]


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0", "127.0.0.9"])
def test_registration_cannot_name_the_router_itself(lent_router: RouterProcess, host: str) -> None:
    info = {"role": "mixed", "host_ip": host, "port": lent_router.port}
    answer = requests.post(f"{lent_router.url}/register", json=info, timeout=20)
    assert (answer.status_code, "is the router itself" in answer.json()["msg"]) == (400, True)


@pytest.mark.parametrize(
    "host",
    [
        "metadata.google.internal",
        "localhost",
        "127.0.0.1.nip.io",
        "2852039166",
        "0xa9fea9fe",
        "0251.0376.0251.0376",
        "169.254.43518",
        "127.1",
        "127.0.0.1:80@evil",
        "127.0.0.1/../..",
        "127.0.0.1#",
        "127.0.0.1\r\nX: y",
        "[::1]evil",
        "",
    ],
)
def test_a_host_is_an_address_in_the_usual_spelling(lent_router: RouterProcess, host: str) -> None:
    info = {"role": "mixed", "host_ip": host, "port": 80}
    answer = requests.post(f"{lent_router.url}/register", json=info, timeout=20)
    assert answer.status_code == 400


class InProcess:
    """Routers called without sockets, because a test cannot send from addresses of other machines."""

    def __init__(self, directory: Path, engine: FakeEngine) -> None:
        self.keys = directory / "keys"
        self.keys.write_text("alpha\nbeta\n")
        self._engine = engine
        self._boards: list[Board] = []

    def start(self, *flags: str) -> FlaskClient:
        self._boards.append(Board.create())
        settings = settings_of(parser().parse_args(flags))
        counters = CounterMemory(counter_memory.create())
        return ControlPlane(settings, self._boards[-1], counters, ReloadStatus())._control.test_client()

    def ask(self, client: FlaskClient, peer: str, key: str = "", path: str = "/register") -> tuple[int, str]:
        answer = client.post(
            path,
            json=self._engine.instance_info(),
            environ_base={"REMOTE_ADDR": peer},
            headers={"Authorization": f"Bearer {key}"} if key else {},
        )
        return answer.status_code, answer.get_json()["msg"]

    def close(self) -> None:
        for board in self._boards:
            board.close()


@pytest.fixture
def in_process(new_engine: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[InProcess]:
    # A worker sets it for its whole process; the test process outlives the test.
    monkeypatch.setattr(values, "ValueClass", values.ValueClass)
    in_process = InProcess(tmp_path, new_engine())
    yield in_process
    in_process.close()


@pytest.mark.parametrize("path", ["/register", "/deregister"])
def test_other_machines_are_refused_without_allow_host(in_process: InProcess, path: str) -> None:
    status, message = in_process.ask(in_process.start(), "192.0.2.7", path=path)
    assert status == 403
    assert message.startswith(
        "the sender 192.0.2.7 is not on this machine; start fd-router with --allow-host"
    )


@pytest.mark.parametrize("path", ["/register", "/deregister"])
def test_other_machines_must_present_a_key(in_process: InProcess, path: str) -> None:
    network = ["--allow-host", "192.0.2.0/24"]
    status, message = in_process.ask(in_process.start(*network), "192.0.2.7", path=path)
    assert status == 403
    assert "replicas on other machines need a key, and none is set" in message
    router = in_process.start(*network, "--register-keys-file", str(in_process.keys))
    for key in ("", "alph", "alpha2"):
        assert in_process.ask(router, "192.0.2.7", key, path)[0] == 401
    assert in_process.ask(router, "198.51.100.7", "alpha", path)[0] == 403
    if path == "/register":
        assert in_process.ask(router, "192.0.2.7", "beta") == (200, "Register success")


def test_this_machine_needs_no_key(in_process: InProcess) -> None:
    router = in_process.start("--register-keys-file", str(in_process.keys))
    for peer in ("127.0.0.1", "127.0.0.2", "::1", "::ffff:127.0.0.1", ""):
        assert in_process.ask(router, peer) == (200, "Register success")


def test_admin_commands_are_accepted_from_loopback_only(in_process: InProcess) -> None:
    router = in_process.start("--admin-keys-file", str(in_process.keys))
    path = "/admin/replicas/0/drain"
    assert in_process.ask(router, "192.0.2.7", "alpha", path)[0] == 403
    assert in_process.ask(router, "127.0.0.1", "alpha", path)[0] == 404
    assert in_process.ask(router, "", "", path)[0] == 404


def test_an_address_is_ones_own_if_the_machine_has_it() -> None:
    allowed = AllowedAddresses()
    assert allowed.is_own("127.0.0.2")
    assert not allowed.is_own("192.0.2.7")
    assert not allowed.is_own("")


def test_replicas_that_hang_while_registering_delay_no_other(
    lent_router: RouterProcess, new_engine: Callable[..., FakeEngine]
) -> None:
    gate = threading.Event()
    engines = [new_engine(replica=number) for number in range(24)]
    for engine in engines:
        engine.health = waits_for(gate)
    with concurrent.futures.ThreadPoolExecutor(24) as pool:
        registering = [pool.submit(engine.register_with, lent_router.url) for engine in engines]
        wait_until(lambda: sum(engine.health_checks for engine in engines) == 24, "all are being looked at")
        assert lent_router.get("/health").status_code == 200
        gate.set()
        assert {each.result().status_code for each in registering} == {200}
