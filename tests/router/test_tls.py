"""TLS towards clients, with a certificate that the test signs itself."""

from __future__ import annotations

import contextlib
import http.client
import signal
import socket
import ssl
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests

from ..certificates import certify
from ..ports import free_ports
from .conftest import FD_ROUTER, RouterProcess
from .fake_engine import (
    FakeEngine,
    events,
    streams_for_ever,
    wait_until,
    waits_after_each_event,
)


class TlsRouter(RouterProcess):
    """A router whose control plane uses TLS as well."""

    def __init__(self, directory: Path, certificate: Path, key: Path) -> None:
        self.certificate, self.key = certificate, key
        super().__init__(
            directory, "--certfile", str(certificate), "--keyfile", str(key), port=free_ports(1)[0]
        )

    def get(self, path: str, **arguments: object) -> requests.Response:
        url = f"https://127.0.0.1:{self.port}{path}"
        return requests.get(url, timeout=20, verify=str(self.certificate), **arguments)  # type: ignore[arg-type]

    def add(self, *engines: FakeEngine) -> None:
        for engine in engines:
            answer = requests.post(
                f"https://127.0.0.1:{self.port}/register",
                json=engine.instance_info(),
                timeout=20,
                verify=str(self.certificate),
            )
            assert answer.status_code == 200, answer.text


@pytest.fixture(scope="module")
def shared_router(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TlsRouter]:
    directory = tmp_path_factory.mktemp("tls")
    certificate, key = directory / "certificate.pem", directory / "key.pem"
    certify(certificate, key)
    router = TlsRouter(directory, certificate, key)
    yield router
    router.stop()


@pytest.fixture
def engine(shared_router: TlsRouter, new_engine: type[FakeEngine]) -> FakeEngine:
    engine = new_engine()
    shared_router.add(engine)
    return engine


@pytest.fixture
def connection(shared_router: TlsRouter) -> Iterator[http.client.HTTPSConnection]:
    context = ssl.create_default_context(cafile=str(shared_router.certificate))
    connection = http.client.HTTPSConnection("127.0.0.1", shared_router.port, timeout=20, context=context)
    yield connection
    connection.close()


def test_requests_are_served_and_the_connection_is_kept(
    engine: FakeEngine, connection: http.client.HTTPSConnection
) -> None:
    connection.connect()
    own = connection.sock.getsockname()
    for body in (b"{}", b"x" * 2_000_000):
        connection.request("POST", "/v1/completions", body)
        answer = connection.getresponse()
        assert (answer.status, answer.version) == (200, 11)
        answer.read()
        assert engine.received[-1].body == body
    assert connection.sock.getsockname() == own


def test_each_event_arrives_before_the_next_is_sent(
    engine: FakeEngine, connection: http.client.HTTPSConnection
) -> None:
    seen = threading.Semaphore(0)

    engine.behaviour = waits_after_each_event(seen)
    connection.request("POST", "/v1/completions", b'{"stream": true}')
    answer = connection.getresponse()
    for event in events(b'{"stream": true}'):
        assert answer.readline() + answer.readline() == event
        seen.release()
    assert answer.read() == b""


def test_a_client_that_goes_away_ends_the_request(
    shared_router: TlsRouter, engine: FakeEngine, connection: http.client.HTTPSConnection
) -> None:
    engine.behaviour = streams_for_ever
    connection.request("POST", "/v1/completions", b'{"stream": true}')
    answer = connection.getresponse()
    assert answer.readline() == b"data: first\n"
    answer.close()
    connection.close()
    wait_until(lambda: engine.cancelled == [True], "the replica knows")
    wait_until(lambda: not any(shared_router.in_flight().values()), "the count is zero")


def test_only_the_client_without_tls_is_disconnected(shared_router: TlsRouter, engine: FakeEngine) -> None:
    with socket.create_connection(("127.0.0.1", shared_router.port), timeout=20) as plain:
        plain.sendall(b"GET /v1/models HTTP/1.1\r\nHost: x\r\n\r\n")
        with contextlib.suppress(ConnectionResetError):
            assert b"HTTP/" not in plain.recv(1000)
    assert shared_router.get("/v1/models").status_code == 200
    assert engine.received[-1].target == "/v1/models"
    assert "Traceback" not in shared_router.log.read_text()


def test_invalid_certificate_is_one_line_and_exit_code_2(tmp_path: Path, shared_router: TlsRouter) -> None:
    file = tmp_path / "certificate"
    for text in (None, "none", shared_router.certificate.read_text()):
        if text is not None:
            file.write_text(text)
        flags = ["--port", str(free_ports(1)[0]), "--certfile", str(file), "--keyfile", str(file)]
        ended = subprocess.run(
            [str(FD_ROUTER), *flags], capture_output=True, text=True, timeout=30, check=False
        )
        assert ended.returncode == 2
        assert ended.stderr.startswith(f"fd-router: --certfile {file}, --keyfile {file}: cannot be used (")
        assert ended.stderr.count("\n") == 1


def test_reload_takes_a_new_certificate_and_ignores_a_broken_one(
    shared_router: TlsRouter, engine: FakeEngine
) -> None:
    def sign() -> str:
        certify(shared_router.certificate, shared_router.key)
        return ssl.PEM_cert_to_DER_cert(shared_router.certificate.read_text()).hex()

    def shown() -> str:
        return ssl.PEM_cert_to_DER_cert(ssl.get_server_certificate(("127.0.0.1", shared_router.port))).hex()

    new = sign()
    assert shown() != new
    shared_router.process.send_signal(signal.SIGHUP)
    wait_until(lambda: shown() == new, "the new certificate is shown")
    whole = shared_router.certificate.read_text()
    shared_router.certificate.write_text("broken")
    shared_router.process.send_signal(signal.SIGHUP)
    wait_until(lambda: "keeping the old configuration" in shared_router.log.read_text(), "the fault is named")
    assert shown() == new
    shared_router.certificate.write_text(whole)
    assert shared_router.get("/v1/models").status_code == 200
